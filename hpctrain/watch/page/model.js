"use strict";
// What the files of runs say, without a page: records to curves, steps to other axes, text to show.

// Control characters become visible: a terminal would obey them, and a page would hide them.
const printable = (text) => String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
  (c) => "\\x" + c.charCodeAt(0).toString(16).padStart(2, "0"));

// Nested keys as one: {"seconds": {"data": 1}} is {"seconds.data": 1}.
function flatten(value, path, into) {
  if (value !== null && typeof value === "object") {
    for (const [key, item] of Object.entries(value)) flatten(item, path ? path + "." + key : key, into);
  } else into[path] = value;
  return into;
}

// The place of x among ascending xs, between their indices; clamped to them.
function placeOf(x, xs) {
  let low = 0, high = xs.length - 1;
  if (high < 0 || x <= xs[0]) return 0;
  if (x >= xs[high]) return high;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  return low + (x - xs[low]) / (xs[high] - xs[low]);
}

function at(place, ys) {
  const low = Math.floor(place), high = Math.min(low + 1, ys.length - 1);
  return ys[low] + (ys[high] - ys[low]) * (place - low);
}

const OF_THE_LINE = new Set(["kind", "split", "step", "epoch", "samples_seen", "wall_time"]);

// All curves of a run: a series for each number of each split, and what a step is in other units.
class Curves {
  constructor() {
    this.series = new Map(); // "split\u0000key" -> {split, key, step: [], value: []}
    this.axis = {step: [], samples: [], epoch: [], time: []};
  }

  get isEmpty() { return this.series.size === 0; }

  static of(columns) {
    const curves = new Curves();
    curves.axis = columns.axis;
    for (const each of columns.series) curves.series.set(each.split + "\u0000" + each.key, each);
    return curves;
  }

  add(record) {
    const split = record.split ?? "train";
    const {axis} = this, last = axis.step.length - 1;
    if (last < 0 || record.step > axis.step[last]) {
      axis.step.push(record.step);
      axis.samples.push(record.samples_seen ?? null);
      axis.epoch.push(record.epoch ?? null);
      axis.time.push(record.wall_time ?? null);
    } else if (record.step === axis.step[last] && axis.samples[last] === null) {
      axis.samples[last] = record.samples_seen ?? null;
    }
    for (const [key, value] of Object.entries(flatten(record, "", {}))) {
      if (OF_THE_LINE.has(key) || key.startsWith("nonfinite.")) continue;
      if (typeof value !== "number" && value !== null) continue;
      this.point(split, key.replace(/^logged\./, ""), record.step, value);
    }
  }

  point(split, key, step, value) {
    const name = split + "\u0000" + key;
    let series = this.series.get(name);
    if (!series) this.series.set(name, series = {split, key, step: [], value: []});
    const last = series.step.length - 1;
    if (series.step[last] === step) series.value[last] = value;
    else { series.step.push(step); series.value.push(value); }
  }

  // Steps in the unit of an axis; null where the run does not say it.
  along(unit, steps) {
    if (unit === "step") return steps;
    const known = this._known(unit);
    if (known === null) return null;
    return steps.map((step) => at(placeOf(step, known.step), known.unit));
  }

  _known(unit) {
    const found = {step: [], unit: []}, values = unit === "epoch" ? this._epochs() : this.axis[unit];
    this.axis.step.forEach((step, i) => {
      if (values[i] !== null && values[i] !== undefined) { found.step.push(step); found.unit.push(values[i]); }
    });
    return found.step.length ? found : null;
  }

  // Epochs with their fractions: records know whole ones. A line between the steps where they begin.
  _epochs() {
    const {step, epoch} = this.axis, begins = [], steps = [];
    epoch.forEach((each, i) => {
      if (each !== null && (!begins.length || each > begins[begins.length - 1])) {
        begins.push(each);
        steps.push(begins.length === 1 ? 0 : step[i - 1]);
      }
    });
    if (!begins.length) return epoch;
    const length = begins.length > 1 ? (steps[begins.length - 1] - steps[0]) / (begins[begins.length - 1] - begins[0]) : Infinity;
    const lastBegin = begins[begins.length - 1], lastStep = steps[begins.length - 1];
    return step.map((each) => {
      if (each < lastStep) return at(placeOf(each, steps), begins);
      return lastBegin + Math.min(1, (each - lastStep) / Math.max(length, 1e-9));
    });
  }
}

// Sums of series over equal stretches of steps: [ends of the stretches that hold something, sums of each series].
function summed(all, stretches) {
  const last = Math.max(0, ...all.map((series) => series.step[series.step.length - 1] ?? 0));
  const width = Math.max(1, Math.ceil(last / stretches)), found = new Map();
  all.forEach((series, k) => series.step.forEach((step, i) => {
    const stretch = Math.max(0, Math.ceil(step / width) - 1);
    if (!found.has(stretch)) found.set(stretch, all.map(() => 0));
    found.get(stretch)[k] += series.value[i] ?? 0;
  }));
  const order = [...found.keys()].sort((a, b) => a - b);
  return [order.map((stretch) => Math.min(last, (stretch + 1) * width)), all.map((_, k) => order.map((stretch) => found.get(stretch)[k]))];
}

// Lines of a file that grows, fed piece by piece; the last one may come in two.
class Lines {
  constructor() { this.rest = ""; this.decoder = new TextDecoder(); }

  feed(bytes) {
    const lines = (this.rest + this.decoder.decode(bytes, {stream: true})).split("\n");
    this.rest = lines.pop();
    return lines;
  }
}

function parsed(line) {
  try {
    const record = JSON.parse(line);
    return record && typeof record === "object" && Number.isInteger(record.step) ? record : null;
  } catch { return null; }
}

// An average that forgets, as TensorBoard's: without a pull towards zero at the start.
function smoothed(values, weight) {
  if (!weight) return values;
  let last = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    last = last * weight + (1 - weight) * value;
    norm = norm * weight + (1 - weight);
    return last / norm;
  });
}

const UNITS = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e12)) return value.toExponential(2);
  for (const [unit, letter] of UNITS) if (size >= unit * (letter === "k" ? 10 : 1)) return Number((value / unit).toPrecision(4)) + letter;
  return String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${seconds < 10 ? Number(seconds.toPrecision(2)) : whole} s`;
}

function bytes(count) {
  for (const [unit, name] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (count >= unit) return `${Number((count / unit).toPrecision(3))} ${name}`;
  }
  return `${count} B`;
}
