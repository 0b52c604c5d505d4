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

// One number of many hosts in stretches of an axis: its mean, lowest and highest of each.
function spread(hosts, pick, along, stretches) {
  const points = [];
  for (const rows of hosts) {
    for (const row of rows) {
      const value = pick(row), x = along(row);
      if (Number.isFinite(value) && Number.isFinite(x)) points.push([x, value]);
    }
  }
  if (!points.length) return null;
  const first = points.reduce((low, [x]) => Math.min(low, x), Infinity), last = points.reduce((high, [x]) => Math.max(high, x), -Infinity);
  const width = (last - first) / stretches || 1, found = new Map();
  for (const [x, value] of points) {
    const stretch = Math.floor((x - first) / width), known = found.get(stretch);
    if (known) {
      known.sum += value; known.count += 1;
      known.low = Math.min(known.low, value); known.high = Math.max(known.high, value);
    } else found.set(stretch, {sum: value, count: 1, low: value, high: value});
  }
  const order = [...found.keys()].sort((a, b) => a - b), each = order.map((stretch) => found.get(stretch));
  return [order.map((stretch) => first + stretch * width), each.map((e) => e.sum / e.count), each.map((e) => e.low), each.map((e) => e.high)];
}

const total = (values) => values.reduce((sum, value) => sum + value, 0);
const known = (values) => (values ?? []).filter((value) => Number.isFinite(value));
const mean = (values) => values.length ? total(values) / values.length : NaN;

// What the lines of machine/HOST.jsonl say of a node: title, unit, and the number.
const FIGURES = [
  ["device busy", " %", (row) => 100 * mean(known(row.devices?.busy))],
  ["device memory", " GB", (row) => row.devices?.memory ? total(known(row.devices.memory)) / 1e3 : NaN],
  ["device power", " W", (row) => row.devices?.watts ? total(known(row.devices.watts)) : NaN],
  ["device temperature", " °C", (row) => row.devices?.celsius ? Math.max(...known(row.devices.celsius)) : NaN],
  ["CPU busy", " %", (row) => 100 * row.cpu?.busy],
  ["memory of the node", " GB", (row) => row.memory?.used / 1e3],
  ["memory of the job", " GB", (row) => row.memory?.job / 1e3],
  ["network", " MB/s", (row) => row.network ? total(Object.values(row.network).flat().filter(Number.isFinite)) : NaN],
  ["disk", " MB/s", (row) => row.disk ? total(known(Object.values(row.disk))) : NaN],
  ["own time of a step", " s", (row) => mean(ownSeconds(row).map(([, value]) => value))],
];

// Of each rank of a line, the seconds of a step that are its own: [rank, seconds].
function ownSeconds(row) {
  const {rank, step, others} = row.ranks ?? {};
  if (!Array.isArray(rank) || !Array.isArray(step)) return [];
  return rank.map((each, i) => [each, step[i] - (others?.[i] ?? 0)]).filter(([, value]) => Number.isFinite(value));
}

// Seconds between two lines of a host, usually; a report has fewer than the files.
function spacing(machines) {
  const gaps = [...machines.values()].flatMap((lines) => lines.slice(1).map((line, i) => line.wall_time - lines[i].wall_time)).filter((gap) => gap > 0);
  return Math.max(60, gaps.sort((a, b) => a - b)[gaps.length >> 1] ?? 60);
}

// Ranks over time as rows of a map: labels, moments, values.
function rankMap(machines, columns) {
  const rows = [...machines].flatMap(([host, lines]) => lines.map((line) => ({host, line}))).filter(({line}) => line.wall_time && line.ranks);
  if (!rows.length) return null;
  const times = rows.map(({line}) => line.wall_time);
  const first = times.reduce((a, b) => Math.min(a, b)), last = times.reduce((a, b) => Math.max(a, b));
  const count = Math.max(1, Math.min(columns, Math.round((last - first) / spacing(machines)) + 1)), width = (last - first) / count || 1;
  const found = new Map();
  for (const {host, line} of rows) {
    const column = Math.min(count - 1, Math.floor((line.wall_time - first) / width));
    for (const [rank, value] of ownSeconds(line)) {
      if (!found.has(rank)) found.set(rank, {host, values: new Array(count).fill(null)});
      const {values} = found.get(rank);
      values[column] = Math.max(values[column] ?? 0, value);
    }
  }
  const ranks = [...found.keys()].sort((a, b) => a - b);
  return {
    labels: ranks.map((rank) => `rank ${rank} on ${found.get(rank).host}`),
    columns: Array.from({length: count}, (_, i) => moment(first + (i + 0.5) * width)),
    rows: ranks.map((rank) => found.get(rank).values),
  };
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

// Numbers of an axis, all in the same unit: 8k, 10k.
function shortAll(values) {
  const most = values.reduce((high, value) => Math.max(high, Math.abs(value ?? 0)), 0);
  const unit = UNITS.find(([size, letter]) => most >= size * (letter === "k" ? 10 : 1) && most < 1e12);
  if (!unit) return values.map((value) => value === null ? "" : short(value));
  return values.map((value) => value === null ? "" : value === 0 ? "0" : Number((value / unit[0]).toPrecision(6)) + unit[1]);
}

// Counts in full, as 12,000.
const whole = (value) => Number.isFinite(value) ? value.toLocaleString("en-US") : String(value ?? "–");

// A time in the reader's zone, the same in every country.
function moment(seconds) {
  const date = new Date(seconds * 1000), two = (value) => String(value).padStart(2, "0");
  if (Number.isNaN(date.getTime())) return "–";
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}`;
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${seconds < 10 ? Number(seconds.toPrecision(2)) : whole} s`;
}
