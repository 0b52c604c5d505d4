"use strict";
// Plots by uPlot, in the page's colours, which colour-blind people tell apart; and with the keyboard.

// Okabe and Ito's, without black and yellow, which need a background of their own.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#9a6a00", "#5a5a5a"];
const DARK = ["#56b4e9", "#e69f00", "#2fbf8f", "#e59cc4", "#8fc7ff", "#f0e442", "#bdbdbd"];
// What the seconds of a run went into, each in a colour of its own; waiting is hatched.
const PARTS = {trained: 0, read: 1, evaluated: 2, saved: 3, recomputed: 4, started: 5, ended: 6};
function ofPart(name, i) {
  if (name === "waited") return "repeating-linear-gradient(135deg, var(--line) 0 4px, var(--quiet) 4px 5px)";
  if (name === "unattributed") return "var(--line)";
  if (name === "hung") return "repeating-linear-gradient(135deg, var(--bad) 0 4px, var(--card) 4px 6px)";
  return colour(PARTS[name] ?? i);
}
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [4, 2]];

const isDark = () => document.documentElement.dataset.theme === "dark";
const colour = (i) => (isDark() ? DARK : LIGHT)[i % LIGHT.length];
const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list") made[name] = value; else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}


// A plot in a card: told once what it is, then data as often as they change.
class Plot {
  constructor(parent, title, {unit = null, height = 220} = {}) {
    this.title = title;
    this.unit = unit;
    this.height = height;
    this.frame = element("div", {className: "plot", tabIndex: 0, role: "img"});
    this.card = element("figure", {className: "card"}, element("figcaption", {}, printable(title), unit ? element("span", {className: "unit"}, ` in${unit}`) : ""), this.frame);
    parent.append(this.card);
    this.frame.addEventListener("keydown", (event) => this._key(event));
    this.plot = null;
    this.shape = "";
    new ResizeObserver(() => this._fit()).observe(this.frame);
  }

  // lines: {label, colour, dash, fill, band, hidden}; data as uPlot has them, x first.
  show(data, lines, {x = "step", log = false, marks = [], range = null} = {}) {
    const shape = JSON.stringify([lines, x, log, isDark(), range]);
    this.marks = marks;
    if (shape === this.shape && this.plot) {
      const zoomed = this._isZoomed(), {min, max} = this.plot.scales.x;
      this.plot.setData(data, !zoomed);
      if (zoomed) this.plot.setScale("x", {min, max});
    } else {
      this.plot?.destroy();
      this.plot = new uPlot(this._options(lines, x, log, range), data, this.frame);
      this.shape = shape;
    }
    const last = lines.map((line, i) => line.hidden ? null : `${line.label} ${short(lastOf(data[i + 1]))}`);
    this.frame.setAttribute("aria-label", printable(`${this.title}: ${last.filter(Boolean).join(", ")}`));
  }

  whole() { this.plot?.setData(this.plot.data, true); }

  _options(lines, x, log, range) {
    const axis = {
      stroke: styleOf("--quiet"), grid: {stroke: styleOf("--line"), width: 1},
      ticks: {stroke: styleOf("--line"), width: 1}, font: "11px system-ui, sans-serif",
    };
    return {
      width: this._width(), height: this.height, padding: [8, 18, 0, 0],
      cursor: {sync: {key: "hpctrain-" + x}, focus: {prox: 24}, points: {size: 6}},
      scales: {x: {time: x === "time"}, y: {distr: log ? 3 : 1, range: log ? undefined : range ?? paddedRange}},
      axes: [
        {...axis, size: 32, values: x === "time" ? undefined : (_, ticks) => shortAll(ticks)},
        {...axis, size: 56, values: (_, ticks) => shortAll(ticks)},
      ],
      bands: lines.flatMap((line, i) => line.band === undefined ? [] : [{series: [i + 1, line.band + 1], fill: faded(line.colour, 0.18)}]),
      series: [
        // Where nobody points, the legend tells the last.
        {label: x, value: (plot, value) => (x === "time" ? moment : x === "step" || x === "samples" ? (each) => whole(Math.round(each)) : short)(value ?? lastOf(plot.data[0]))},
        ...lines.map((line) => ({
          label: printable(line.label), stroke: line.colour, dash: line.dash, fill: line.fill,
          width: line.hidden ? 0 : 1.6, points: {show: line.points ?? false, size: 5, fill: line.colour},
          spanGaps: line.spanGaps ?? true, value: (plot, _, i, at) => short(this._value(plot, line, i, at)) + (this.unit ?? ""),
        })),
      ],
      legend: {live: true, isolate: true, markers: {width: 2, stroke: (_, i) => lines[i - 1]?.colour,
        dash: (_, i) => lines[i - 1]?.dash?.length ? (lines[i - 1].dash[0] > 3 ? "dashed" : "dotted") : "solid", fill: () => "transparent"}},
      hooks: {draw: [(plot) => this._drawMarks(plot)]},
    };
  }

  // Jobs that begin, and checkpoints: lines across, and triangles at the foot.
  _drawMarks(plot) {
    const {ctx, bbox} = plot, ratio = devicePixelRatio;
    ctx.save();
    for (const {x, kind} of this.marks) {
      const place = plot.valToPos(x, "x", true);
      if (place < bbox.left || place > bbox.left + bbox.width) continue;
      ctx.strokeStyle = ctx.fillStyle = styleOf("--quiet");
      ctx.beginPath();
      if (kind === "job") {
        ctx.setLineDash([3 * ratio, 3 * ratio]);
        ctx.moveTo(place, bbox.top);
        ctx.lineTo(place, bbox.top + bbox.height);
        ctx.stroke();
      } else {
        const foot = bbox.top + bbox.height;
        ctx.moveTo(place - 3 * ratio, foot);
        ctx.lineTo(place + 3 * ratio, foot);
        ctx.lineTo(place, foot - 5 * ratio);
        ctx.fill();
      }
    }
    ctx.restore();
  }

  // What the legend tells of a line: of layers that are stacked the layer's own part.
  _value(plot, line, i, at) {
    const of = (k) => at === null || at === undefined ? lastOf(plot.data[k]) : plot.data[k][at];
    const value = of(i);
    return line.stacked && i > 1 && Number.isFinite(value) ? value - of(i - 1) : value;
  }

  _width() { return Math.max(200, this.frame.clientWidth || 320); }

  _fit() {
    if (this.plot && this.plot.width !== this._width()) this.plot.setSize({width: this._width(), height: this.height});
  }

  _extent() {
    const xs = this.plot.data[0];
    return [xs[0], xs[xs.length - 1]];
  }

  _isZoomed() {
    const [first, last] = this._extent(), {min, max} = this.plot.scales.x;
    return min > first || max < last;
  }

  _key(event) {
    if (!this.plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const {min, max} = this.plot.scales.x, [first, last] = this._extent(), width = max - min;
    const move = {ArrowLeft: [-0.2, 1], ArrowRight: [0.2, 1], "+": [0, 0.5], "-": [0, 2], 0: null}[event.key];
    if (move === undefined) return;
    event.preventDefault();
    if (move === null) return this.whole();
    const middle = min + width / 2 + move[0] * width, half = width * move[1] / 2;
    const low = Math.max(first, middle - half), high = Math.min(last, middle + half);
    if (high > low) this.plot.setScale("x", {min: low, max: high});
  }
}

function lastOf(values) {
  for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null && values[i] !== undefined) return values[i];
  return null;
}

function paddedRange(_, low, high) {
  if (low === null || high === null) return [0, 1];
  if (low === high) return [low - Math.abs(low) * 0.1 - 1e-9, high + Math.abs(high) * 0.1 + 1e-9];
  const pad = (high - low) * 0.06;
  return [low - pad, high + pad];
}

// Rows of cells, such as ranks over time: dark is little, bright is much.
const HEAT = ["#0b1d51", "#23468f", "#2f7fb8", "#48b3a5", "#a8d68a", "#f7f06d"];
function heatMap(parent, title, labels, columns, rows, name) {
  const cell = Math.max(2, Math.min(16, Math.floor(400 / Math.max(rows.length, 1))));
  const canvas = element("canvas", {width: Math.max(columns.length, 1), height: Math.max(rows.length, 1), className: "heat", tabIndex: 0});
  canvas.style.height = `${Math.max(rows.length, 1) * cell}px`;
  canvas.setAttribute("role", "img");
  const values = rows.flat().filter((value) => value !== null && Number.isFinite(value));
  const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const ctx = canvas.getContext("2d");
  rows.forEach((row, y) => row.forEach((value, x) => {
    if (value === null || !Number.isFinite(value)) return;
    const part = high > low ? (value - low) / (high - low) : 0;
    ctx.fillStyle = HEAT[Math.min(HEAT.length - 1, Math.floor(part * HEAT.length))];
    ctx.fillRect(x, y, 1, 1);
  }));
  canvas.setAttribute("aria-label", `${title}: ${rows.length} rows, from ${short(low)} to ${short(high)}; arrow keys read a cell`);
  const scale = element("span", {className: "scale"});
  scale.style.background = `linear-gradient(to right, ${HEAT.flatMap((each, i) => [`${each} ${100 * i / HEAT.length}%`, `${each} ${100 * (i + 1) / HEAT.length}%`]).join(", ")})`;
  const told = element("span", {role: "status"}, "");
  const place = {x: columns.length - 1, y: 0};
  const tell = (x, y) => {
    place.x = Math.max(0, Math.min(columns.length - 1, x));
    place.y = Math.max(0, Math.min(rows.length - 1, y));
    const value = rows[place.y]?.[place.x] ?? null;
    told.textContent = printable(`${labels[place.y]}, ${columns[place.x]}: ${value === null ? "no figures" : name(value)}`);
  };
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    tell(Math.floor((event.clientX - box.left) / box.width * columns.length), Math.floor((event.clientY - box.top) / box.height * rows.length));
  });
  canvas.addEventListener("keydown", (event) => {
    const [right, down] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key] ?? [0, 0];
    if (!right && !down) return;
    event.preventDefault();
    tell(place.x + right, place.y + down);
  });
  const ends = (first, last) => [element("span", {}, printable(first)), element("span", {}, printable(last))];
  parent.replaceChildren(element("figure", {className: "card wide"}, element("figcaption", {}, title),
    element("p", {className: "hint"}, name(low), " ", scale, " ", name(high), "  ", told),
    element("div", {className: "ends"}, element("span", {}, printable(labels[0] ?? ""))), canvas,
    element("div", {className: "ends"}, element("span", {}, printable(labels[labels.length - 1] ?? ""))),
    element("div", {className: "ends"}, ...ends(columns[0] ?? "", columns[columns.length - 1] ?? ""))));
}

// Parts of a line in time, as shares of its width: {from, to, className, text, said}.
function timeline(parts, said) {
  const line = element("div", {className: "timeline", role: "img", ariaLabel: printable(said)});
  for (const {from, to, className, text = "", said: title} of parts) {
    const piece = element("span", {className, title: printable(title)}, printable(text));
    piece.style.left = `${100 * from}%`;
    piece.style.width = `${Math.max(0, 100 * (to - from))}%`;
    line.append(piece);
  }
  return line;
}
