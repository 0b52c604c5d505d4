"use strict";
// The page of one or more runs: asks for what is new, or reads what a report holds, and shows it.

const POLL_MS = 5000;
const MOST_LINES = 2000; // of the log, on the page at once
const $ = (id) => document.getElementById(id);
const view = {axis: "step", log: false, smooth: 0, hidden: new Set()};
const plots = new Map();

// ---- runs: the same shape from a server and from a report

class Run {
  constructor(name, index) {
    this.name = name;
    this.index = index;
    this.facts = {};
    this.curves = new Curves();
    this.machines = new Map(); // host -> rows
    this.log = [];
    this.version = 0;
  }
}

// What stands in the page itself.
function reportedRuns(data) {
  return data.runs.map((given, index) => {
    const run = new Run(given.name, index);
    run.facts = given.facts;
    run.curves = Curves.of(given.curves);
    run.leftOut = given.curves.left_out;
    run.log = given.log;
    for (const [host, rows] of Object.entries(given.machines)) run.machines.set(host, rows);
    run.version = 1;
    return run;
  });
}

// A file of a run on the server, read on from where it was.
class Followed {
  constructor(run, name, take, forget) {
    Object.assign(this, {run, name, take, forget, offset: 0, identity: null, lines: new Lines()});
  }

  async read(file) {
    if (this.identity !== null && (file.identity !== this.identity || file.size < this.offset)) {
      // It was cut back, by a job that went on from an older checkpoint.
      this.offset = 0;
      this.lines = new Lines();
      this.forget();
    }
    this.identity = file.identity;
    let changed = false;
    while (this.offset < file.size) {
      const answer = await ask(`file?run=${this.run.index}&name=${encodeURIComponent(this.name)}&from=${this.offset}`);
      const piece = new Uint8Array(await answer.arrayBuffer());
      if (!piece.length) break;
      this.offset += piece.length;
      this.take(this.lines.feed(piece));
      changed = true;
    }
    return changed;
  }
}

async function ask(path) {
  const answer = await fetch(path, {cache: "no-store", credentials: "same-origin"});
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer;
}

class Served {
  constructor() { this.runs = []; this.followed = []; }

  follower(run, name) {
    const mine = this.followed[run.index], known = mine.get(name);
    if (known) return known;
    let made;
    if (name === "metrics.jsonl") {
      made = new Followed(run, name,
        (lines) => { for (const line of lines) { const record = parsed(line); if (record) run.curves.add(record); } },
        () => { run.curves = new Curves(); });
    } else if (name === "log.txt") {
      made = new Followed(run, name, (lines) => { for (const line of lines) run.log.push(line); }, () => { run.log.length = 0; });
    } else {
      const host = name.replace(/^machine\//, "").replace(/\.jsonl$/, "");
      const rows = [];
      run.machines.set(host, rows);
      made = new Followed(run, name,
        (lines) => { for (const line of lines) { try { rows.push(JSON.parse(line)); } catch { /* torn */ } } },
        () => { rows.length = 0; });
    }
    mine.set(name, made);
    return made;
  }

  async poll() {
    const told = await (await ask("runs")).json();
    told.runs.forEach((given, i) => {
      if (!this.runs[i]) { this.runs[i] = new Run(given.name, i); this.followed[i] = new Map(); }
    });
    for (const run of this.runs) {
      const given = told.runs[run.index];
      let changed = JSON.stringify(given.facts) !== JSON.stringify(run.facts);
      run.facts = given.facts;
      for (const file of given.files) changed = (await this.follower(run, file.name).read(file)) || changed;
      if (changed) run.version += 1;
    }
    return this.runs;
  }
}

// ---- views

const shown = (runs) => runs.filter((run) => !view.hidden.has(run.index));
const GOOD = {complete: "good", running: "busy", failed: "bad", "not reached": "bad", "no progress": "bad", "too many tries": "bad"};

function showRuns(runs) {
  if (runs.length < 2) return $("runs").replaceChildren();
  $("runs").replaceChildren(...runs.map((run) => {
    const box = element("input", {type: "checkbox", checked: !view.hidden.has(run.index)});
    box.addEventListener("change", () => {
      if (box.checked) view.hidden.delete(run.index); else view.hidden.add(run.index);
      show(runs);
    });
    return element("label", {}, box, swatch(colour(run.index)), printable(run.name));
  }));
}

function swatch(background) {
  const made = element("span", {className: "swatch"});
  made.style.background = background;
  return made;
}

function fact(label, ...value) { return element("div", {className: "fact"}, element("span", {}, label), element("b", {}, ...value)); }

function lastValue(run, split, key) {
  const series = run.curves.series.get(split + "\u0000" + key);
  return series ? lastOf(series.value) : null;
}

function progressOf(run) {
  const {axis} = run.curves, {max_steps: steps, max_epochs: epochs} = run.facts;
  const step = axis.step[axis.step.length - 1] ?? run.facts.step ?? 0;
  if (run.facts.state === "complete") return 1;
  if (steps) return Math.min(1, step / steps);
  const epoch = run.curves.along("epoch", [step]);
  return epochs && epoch ? Math.min(1, epoch[0] / epochs) : null;
}

function showStates(runs) {
  $("states").replaceChildren(...runs.map((run) => {
    const {facts} = run, steps = run.curves.axis.step, done = progressOf(run);
    const parts = [
      element("h3", {}, runs.length > 1 ? swatch(colour(run.index)) : "", " ", printable(run.name)),
      fact("state", element("span", {className: "badge " + (GOOD[facts.state] ?? "wait")}, printable(facts.state ?? "–"))),
      fact("step", whole(steps[steps.length - 1] ?? facts.step ?? 0) + (facts.max_steps ? ` of ${whole(facts.max_steps)}` : "")),
      fact("saved", facts.checkpoint ? `step ${whole(facts.step)}` : "nothing yet"),
    ];
    if (facts.best) parts.push(fact("best", printable(`${facts.best.metric} ${short(facts.best.value)} at step ${whole(facts.best.step)}`)));
    for (const [label, split, key] of [["loss", "train", "loss"], ["speed", "train", "samples_per_second"]]) {
      const value = lastValue(run, split, key);
      if (value !== null) parts.push(fact(label, key === "loss" ? short(value) : `${whole(Number(value.toPrecision(4)))} samples/s`));
    }
    const newest = facts.jobs?.[facts.jobs.length - 1];
    if (newest) parts.push(fact("ranks", `${newest.ranks ?? "–"} on ${newest.nodes ?? "–"} node${newest.nodes === 1 ? "" : "s"}`));
    parts.push(fact("jobs", String(facts.jobs?.length ?? 0)));
    if (facts.node_hours !== undefined && facts.node_hours !== null) parts.push(fact("node-hours", short(facts.node_hours)));
    if (run.leftOut) parts.push(fact("not in this report", `${whole(run.leftOut)} more curves: watch has them`));
    if (facts.energy) parts.push(fact("energy", printable(facts.energy)));
    if (facts.explanation && facts.explanation !== facts.state) parts.push(fact("that is", printable(facts.explanation)));
    if (facts.reason && ![facts.state, "running"].includes(facts.reason)) parts.push(fact("reason", printable(facts.reason)));
    if (done !== null) parts.push(element("progress", {max: 1, value: done, ariaLabel: `${Math.round(100 * done)} % done`}));
    return element("article", {className: "card state"}, ...parts);
  }));
}

const FIRST = ["loss", "accuracy", "perplexity", "lr", "grad_norm", "samples_per_second"];
const isPhase = (key) => key.startsWith("seconds.");

// One plot for a number, with a line for each run and split: their steps joined.
function showCharts(runs) {
  const groups = new Map();
  for (const run of runs) {
    for (const series of run.curves.series.values()) {
      if (isPhase(series.key) || (series.key === "skipped_steps" && !series.value.some((value) => value > 0))) continue;
      if (!groups.has(series.key)) groups.set(series.key, []);
      groups.get(series.key).push({run, series});
    }
  }
  const order = (key) => { const i = FIRST.indexOf(key); return i < 0 ? FIRST.length : i; };
  const keys = [...groups.keys()].sort((a, b) => order(a) - order(b) || a.localeCompare(b));
  const present = new Set();
  // A split has its colour or its dashes in every plot, training the first.
  const splits = [...new Set([...groups.values()].flat().map(({series}) => series.split))]
    .sort((a, b) => (a === "train" ? 0 : 1) - (b === "train" ? 0 : 1) || a.localeCompare(b));
  for (const key of keys) {
    const lines = [], tables = [];
    for (const {run, series} of groups.get(key)) {
      const xs = run.curves.along(view.axis, series.step);
      if (xs === null) continue;
      tables.push(ascending(xs, smoothed(series.value, view.smooth)));
      const several = shown(runs).length > 1, of = splits.indexOf(series.split);
      lines.push({
        label: several ? `${run.name} ${series.split}` : series.split,
        colour: colour(several ? run.index : of), dash: DASHES[of % DASHES.length],
        points: series.step.length < 40,
      });
    }
    if (!tables.length) continue;
    present.add("metric " + key);
    const log = view.log && tables.every((table) => table[1].every((value) => value === null || value > 0));
    plotOf("metric " + key, $("charts"), key).show(uPlot.join(tables), lines, {x: view.axis, log, marks: marksOf(runs)});
  }
  drop("metric ", present);
}

function plotOf(name, parent, title, options) {
  if (!plots.has(name)) plots.set(name, new Plot(parent, title, options));
  return plots.get(name);
}

function drop(prefix, present) {
  for (const [name, plot] of plots) {
    if (name.startsWith(prefix) && !present.has(name)) { plot.plot?.destroy(); plot.card.remove(); plots.delete(name); }
  }
}

// uPlot wants xs that ascend: another unit may stand still, where no sample was counted.
function ascending(xs, ys) {
  const kept = [[], []];
  xs.forEach((x, i) => {
    const last = kept[0].length - 1;
    if (last >= 0 && x <= kept[0][last]) kept[1][last] = ys[i];
    else { kept[0].push(x); kept[1].push(ys[i]); }
  });
  return kept;
}

function marksOf(runs) {
  const marks = [];
  for (const run of runs) {
    const add = (steps, kind) => {
      const xs = run.curves.along(view.axis, steps);
      if (xs) xs.forEach((x) => marks.push({x, kind}));
    };
    add((run.facts.jobs ?? []).slice(1).map((job) => job.first_step).filter((step) => step !== null && step !== undefined), "job");
    add((run.facts.checkpoints ?? []).map((each) => each.step), "checkpoint");
  }
  return marks;
}

const PHASE_STRETCHES = 120;
const PHASES = ["compute", "communication", "data", "evaluation", "checkpoint"];

// Phases of the steps, stacked: parts of the time that each line of metrics tells of.
function showPhases(runs) {
  const present = new Set();
  for (const run of runs) {
    const all = [...run.curves.series.values()].filter((series) => isPhase(series.key) && series.split === "train");
    if (!all.length) continue;
    const rank = (key) => { const i = PHASES.indexOf(key); return i < 0 ? PHASES.length : i; };
    all.sort((a, b) => rank(a.key.slice(8)) - rank(b.key.slice(8)));
    const [steps, sums] = summed(all, PHASE_STRETCHES);
    const xs = run.curves.along(view.axis, steps);
    if (xs === null) continue;
    const totals = steps.map((_, i) => sums.reduce((total, each) => total + each[i], 0)), below = steps.map(() => 0);
    const stacked = sums.map((each) => each.map((value, i) => totals[i] ? 100 * (below[i] += value) / totals[i] : null));
    const lines = all.map((series, k) => ({label: series.key.slice(8), colour: colour(k), dash: [], stacked: true, band: k ? k - 1 : undefined,
      fill: k ? undefined : faded(colour(0), 0.18)}));
    const tables = stacked.map((ys) => ascending(xs, ys));
    const name = "phases " + run.index;
    present.add(name);
    const title = runs.length > 1 ? `${run.name}: phases of the steps` : "phases of the steps";
    plotOf(name, $("phases"), title, {unit: " %"}).show([tables[0][0], ...tables.map((each) => each[1])], lines, {x: view.axis, range: [0, 100]});
  }
  drop("phases ", present);
}

const endOf = (job) => job.reason === "complete" ? "good" : job.reason === "running" ? "busy" : /stop/.test(job.reason ?? "") ? "wait" : "bad";

// Jobs in time, one line a run: what lies between them was spent waiting.
function showJobsBar(runs) {
  const all = runs.flatMap((run) => (run.facts.jobs ?? []).filter((job) => job.start));
  if (!all.length) return $("jobs-bar").replaceChildren();
  const ends = all.map((job) => job.end ?? job.seen ?? job.start);
  const begin = Math.min(...all.map((job) => job.start)), end = Math.max(...ends, begin + 1);
  const place = (time) => (time - begin) / (end - begin), said = {good: "complete", busy: "running", wait: "stopped", bad: "failed"};
  const rows = runs.flatMap((run) => {
    const jobs = (run.facts.jobs ?? []).filter((job) => job.start).map((job) => {
      const until = job.end ?? job.seen ?? job.start, how = endOf(job);
      return {from: place(job.start), to: place(until), className: `job ${how}`, text: `${job.number} ${said[how]}`,
        said: `job ${job.number}: ${job.reason ?? "no end is known"}, ${duration(until - job.start)}`};
    });
    const saved = (run.facts.checkpoints ?? []).filter(({time}) => time >= begin && time <= end)
      .map(({step, time}) => ({from: place(time), to: place(time), className: "tick", said: `checkpoint of step ${whole(step)}`}));
    const line = timeline([...jobs, ...saved], `${run.name}: ${jobs.map((job) => job.said).join("; ")}`);
    return runs.length > 1 ? [element("span", {className: "hint"}, printable(run.name)), line] : [line];
  });
  $("jobs-bar").replaceChildren(element("figure", {className: "card"},
    element("figcaption", {}, "Jobs"),
    ...rows,
    element("p", {className: "hint"}, `${moment(begin)} to ${moment(end)}: ${duration(end - begin)}; ticks below are checkpoints, the gaps are waiting`)));
}

// Of all seconds since the first job, what they went into.
function showGoodput(runs) {
  $("goodput").replaceChildren(...runs.filter((run) => run.facts.goodput).map((run) => {
    const parts = Object.entries(run.facts.goodput.seconds).filter(([, seconds]) => seconds > 0);
    const total = parts.reduce((sum, [, seconds]) => sum + seconds, 0) || 1;
    const bar = element("div", {className: "bar", role: "img", ariaLabel: parts.map(([name, s]) => `${name} ${(100 * s / total).toFixed(1)} %`).join(", ")});
    const keys = element("ul", {className: "keys"});
    parts.forEach(([name, seconds], i) => {
      const piece = element("span", {title: `${name}: ${duration(seconds)}`});
      piece.style.background = ofPart(name, i);
      piece.style.width = `${100 * seconds / total}%`;
      bar.append(piece);
      keys.append(element("li", {}, swatch(ofPart(name, i)), printable(name.replaceAll("_", " ")), element("b", {}, `${(100 * seconds / total).toFixed(1)} %`), duration(seconds)));
    });
    const title = runs.length > 1 ? `${run.name}: goodput` : "Goodput";
    return element("figure", {className: "card wide"},
      element("figcaption", {}, printable(`${title}: ${(100 * (run.facts.goodput.seconds.trained ?? 0) / total).toFixed(1)} % of ${duration(total)} trained`)), bar, keys);
  }));
}

function cells(row, tag = "td") { return element("tr", {}, ...row.map((cell) => element(tag, {}, typeof cell === "string" ? printable(cell) : cell))); }

function table(head, rows) { return element("div", {className: "scroll"}, element("table", {}, element("thead", {}, cells(head, "th")), element("tbody", {}, ...rows.map((row) => cells(row))))); }

function showJobs(runs) {
  const rows = runs.flatMap((run) => (run.facts.jobs ?? []).map((job) => [
    ...(runs.length > 1 ? [run.name] : []), String(job.number), job.job ?? "–",
    job.start ? moment(job.start) : "–",
    job.start ? duration((job.end ?? job.seen ?? job.start) - job.start) : "–",
    `${job.ranks ?? "–"} / ${job.nodes ?? "–"}`, `${whole(job.first_step)} to ${whole(job.step)}`,
    element("span", {className: endOf(job)}, printable(job.reason ?? "no end is known")),
    element("details", {}, element("summary", {}, "command"), element("pre", {}, printable(job.command ?? "")), ...(job.changes?.length ? [element("pre", {className: "changed"}, printable(job.changes.join("\n")))] : [])),
  ]));
  $("jobs").replaceChildren(element("div", {className: "card"}, table([...(runs.length > 1 ? ["run"] : []), "job", "id", "began", "took", "ranks / nodes", "steps", "end", ""], rows)));
}

// The config; of two runs what differs is marked.
function showConfig(runs) {
  const texts = runs.map((run) => (run.facts.config ?? "").split("\n"));
  const everywhere = (line) => texts.every((text) => text.includes(line));
  $("config").replaceChildren(...runs.map((run, i) => {
    const pre = element("pre");
    for (const line of texts[i]) {
      const differs = runs.length > 1 && line.trim() && !everywhere(line);
      pre.append(differs ? element("span", {className: "changed"}, printable(line)) : printable(line), "\n");
    }
    const differing = texts[i].filter((line) => line.trim() && !everywhere(line)).length;
    const summary = runs.length > 1 ? `${run.name}: ${differing} lines differ` : "config.toml, with every default";
    return element("details", {className: "card"}, element("summary", {}, printable(summary)), pre);
  }));
}

function showLog(runs) {
  const wanted = $("find").value.toLowerCase(), box = $("lines");
  const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 30;
  const lines = runs.flatMap((run) => run.log.map((line) => runs.length > 1 ? `${run.name}  ${line}` : line));
  const found = wanted ? lines.filter((line) => line.toLowerCase().includes(wanted)) : lines;
  $("found").textContent = wanted ? `${found.length} of ${lines.length} lines` : `${lines.length} lines`;
  box.replaceChildren(...found.slice(-MOST_LINES).flatMap((line) => {
    const text = printable(line), place = wanted ? text.toLowerCase().indexOf(wanted) : -1;
    if (place < 0) return [text + "\n"];
    return [text.slice(0, place), element("mark", {}, text.slice(place, place + wanted.length)), text.slice(place + wanted.length) + "\n"];
  }));
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function show(runs) {
  const some = shown(runs);
  showRuns(runs);
  showStates(some);
  showCharts(some);
  showJobsBar(some);
  showGoodput(some);
  showPhases(some);
  showMachines(some);
  showJobs(some);
  showConfig(some);
  showLog(some);
  document.title = `${some.map((run) => printable(run.name)).join(", ")} · hpctrain`;
}

// ---- machines: bands over the nodes, and a map of the ranks

const MACHINE_STRETCHES = 300, MAP_COLUMNS = 240;

function showMachines(runs) {
  const present = new Set();
  const some = runs.filter((run) => run.machines.size);
  $("machines-section").hidden = !some.length;
  for (const [title, unit, pick] of FIGURES) {
    const lines = [], tables = [];
    some.forEach((run) => {
      const table = spread([...run.machines.values()].map((rows) => rows.filter((row) => row.kind === "machine")), pick, alongOf(run), MACHINE_STRETCHES);
      if (table === null) return;
      const own = colour(runs.length > 1 ? run.index : 0), label = runs.length > 1 ? run.name : "mean", at = lines.length;
      const points = table[0].length < 40;
      if (run.machines.size > 1) {
        tables.push(table);
        lines.push({label, colour: own, points}, {label: "lowest", colour: own, hidden: true, dash: [2, 2]}, {label: "highest", colour: own, hidden: true, band: at + 1, dash: [2, 2]});
      } else {
        tables.push(table.slice(0, 2));
        lines.push({label: runs.length > 1 ? label : "node", colour: own, points});
      }
    });
    if (!tables.length) continue;
    present.add("machine " + title);
    const nodes = some.length === 1 && some[0].machines.size > 1 ? `, ${some[0].machines.size} nodes` : "";
    plotOf("machine " + title, $("machines"), title + nodes, {unit, height: 180})
      .show(uPlot.join(tables), lines, {x: view.axis, range: unit === " %" ? [0, 100] : null});
  }
  drop("machine ", present);
  showRanks(some);
}

// Where a line of machine figures lies along the chosen axis.
function alongOf(run) {
  if (view.axis === "time") return (row) => row.wall_time;
  return (row) => run.curves.along(view.axis, [row.step])?.[0];
}

function showRanks(runs) {
  const maps = runs.map((run) => [run, rankMap(run.machines, MAP_COLUMNS)]).filter(([, map]) => map !== null && map.rows.length > 1);
  const boxes = maps.map(([run, map]) => {
    const box = element("div"), title = "seconds of a step that are each rank's own, without waiting for others";
    heatMap(box, runs.length > 1 ? `${run.name}: ${title}` : title, map.labels, map.columns, map.rows, (value) => short(value) + " s");
    return box;
  });
  const slow = runs.flatMap((run) => [...run.machines.values()].flat().filter((row) => row.kind === "straggler"));
  const told = slow.map((row) => element("p", {className: "bad"}, printable(
    `rank ${row.rank} on ${row.host}${row.device >= 0 ? `, device ${row.device}` : ""}: ${short(row.seconds)} s of a step, ` +
    `the others ${short(row.usual_seconds)} s, since ${moment(row.since)}${row.why ? `: ${row.why}` : ""}`)));
  $("ranks").replaceChildren(...boxes, ...told);
}

// ---- start

function listen(runs) {
  const again = () => show(runs());
  $("axis").addEventListener("change", () => { view.axis = $("axis").value; again(); });
  $("log").addEventListener("change", () => { view.log = $("log").checked; again(); });
  $("smooth").addEventListener("input", () => { view.smooth = Number($("smooth").value); again(); });
  $("whole").addEventListener("click", () => { for (const plot of plots.values()) plot.whole(); });
  $("find").addEventListener("input", () => showLog(shown(runs())));
  $("theme").addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; again(); });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const follow = () => { document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; again(); };
  dark.addEventListener("change", follow);
  follow();
}

async function serve() {
  const served = new Served();
  listen(() => served.runs);
  let last = "";
  for (;;) {
    try {
      const runs = await served.poll();
      const now = runs.map((run) => run.version).join();
      if (now !== last) show(runs);
      last = now;
      $("gone").hidden = true;
      $("footer").textContent = `Asked every ${POLL_MS / 1000} s; last at ${new Date().toLocaleTimeString()}.`;
    } catch (error) {
      $("gone").hidden = false;
      $("gone").textContent = "The server of this page does not answer: start `python -m hpctrain watch RUN --serve` again. What is shown is the last that it told.";
    }
    await new Promise((done) => setTimeout(done, document.hidden ? 6 * POLL_MS : POLL_MS));
  }
}

{
  const data = $("data");
  if (data) {
    const given = JSON.parse(data.textContent), runs = reportedRuns(given);
    $("footer").textContent = `Written by hpctrain ${given.version} at ${moment(given.time)}.`;
    listen(() => runs);
  } else serve();
}
