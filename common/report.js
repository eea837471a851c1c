"use strict";
// The first half of the page's script: small tools, the data, charts, the report. report_viewer.js follows it.
// Whatever a model or a program wrote reaches the page as text alone (append of strings, textContent).

// ---------------------------------------------------------------- tools

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector) => document.querySelector(selector);

/** An element: make("p.quiet", {properties; attributes, if with a dash}, ...children). Texts among these stay text. */
function make(name, ...rest) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  element.classList.add(...classes);
  const plain = rest[0] && Object.getPrototypeOf(rest[0]) === Object.prototype;
  for (const [key, value] of Object.entries(plain ? rest.shift() : {})) {
    if (!known(value)) continue;
    if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...rest.flat(Infinity).filter((child) => known(child) && child !== ""));
  return element;
}

const NOTHING_TO_SEE = new RegExp("[\\0-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5" +
  "\\u180b-\\u180f\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufe00-\\ufe0f\\ufeff\\uffa0\\ufff9-\\ufffb" +
  "\\u{e0000}-\\u{e0fff}]", "gu");

/** The text with what cannot be seen made visible: control characters, marks of direction, characters of no width. */
function visible(text) {
  return text.replace(/\r\n/g, "\n").replace(NOTHING_TO_SEE, (char) => {
    const code = char.codePointAt(0);
    if (code < 32) return String.fromCharCode(0x2400 + code);
    return code === 127 ? "\u2421" : `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
}

const percent = (share, digits = 0) => (share === null || share === undefined ? "\u2013"
  : `${(100 * share).toFixed(digits)} %`);
const whole = (number) => Math.round(number).toLocaleString("en");
const plural = (number, one, many = `${one}s`) => `${whole(number)} ${number === 1 ? one : many}`;
const known = (value) => value !== null && value !== undefined;

function short(number) {
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(number) >= size) return `${Number((number / size).toPrecision(3))}${letter}`;
  return `${Number(number.toPrecision(3))}`;
}

function bytes(number) {
  return number < 1e6 ? `${(number / 1e3).toFixed(0)} kB` : `${(number / 1e6).toFixed(number < 1e7 ? 1 : 0)} MB`;
}

// ---------------------------------------------------------------- the data: one row a trajectory, the rest in chunks

const trajectories = data.rows.map((row) => Object.fromEntries(data.fields.map((name, place) => [name, row[place]])));
trajectories.forEach((t) => { t.text = `${t.instance_id}\n${data.issues[t.issue]}`.toLowerCase(); });
const byPlace = new Map(trajectories.map((t, index) =>
  [JSON.stringify([data.runs[t.run].name, t.place, t.trajectory_id]), index]));

const unpacked = new Map(); // number -> promise of a list; the latest few are kept
const KEPT = 4;

/** The content of one chunk: JSON, gzipped, in base64, in a script element that is no script. */
function chunk(name) {
  const found = unpacked.get(name) || unpack(name);
  unpacked.delete(name);
  unpacked.set(name, found);
  if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
  return found;
}

async function unpack(name) {
  await parsed;
  const binary = atob(document.getElementById(`chunk-${name}`).textContent.trim());
  const packed = Uint8Array.from(binary, (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const parsed = new Promise((done) => {
  if (document.readyState !== "loading") done();
  else document.addEventListener("DOMContentLoaded", done);
});

// ---------------------------------------------------------------- charts

function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) if (known(value)) element.setAttribute(name, value);
  element.append(...children.flat().filter(known));
  return element;
}

const SHAPES = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0 ${-1.3 * r}L${1.2 * r} ${r}H${-1.2 * r}z`,
  (r) => `M0 ${-1.4 * r}L${1.4 * r} 0L0 ${1.4 * r}L${-1.4 * r} 0z`,
  (r) => `M0 ${1.3 * r}L${1.2 * r} ${-r}H${-1.2 * r}z`,
  (r) => `M${-r} ${-r}L${r} ${r}M${-r} ${r}L${r} ${-r}M${-1.2 * r} 0H${1.2 * r}M0 ${-1.2 * r}V${1.2 * r}z`,
];

function mark(shape, x, y, size, style) {
  return draw("path", { d: SHAPES[shape % SHAPES.length](size), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
    class: style });
}

/** Round numbers from 0 to at least `top`. */
function ticks(top, about = 5) {
  if (!(top > 0)) return [0, 1];
  const rough = top / about;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * size).find((n) => n >= rough * 0.999);
  return Array.from({ length: Math.ceil(top / step - 1e-9) + 1 }, (_, place) => place * step);
}

/**
 * A line chart as SVG, drawn for `width` pixels.
 *   x: {ticks: [[value, text]], from, to, title}   y: {ticks: [value], text: value -> string, title}
 *   series: [{label, colour: "c0", shape, style: "bold"|"thin"|"", dashed, hollow,
 *             points: [{x, y, low, high, ring, tag, text, gap}]}]
 *   references: [{y, text}]   name: what a screen reader says
 */
function chart({ x, y, series, references = [], name, height = 250 }, width) {
  const labels = series.filter((one) => one.label && one.points.length);
  const longest = Math.max(0, ...labels.map((one) => one.label.length));
  const room = { left: 46, top: 22, bottom: x.title ? 42 : 26,
    right: Math.max(14, Math.min(longest * 6.9 + 16, width * 0.4)) };
  const right = width - room.right, bottom = height - room.bottom;
  const top = y.ticks[y.ticks.length - 1];
  const atX = (value) => room.left + 10 + ((value - x.from) / (x.to - x.from || 1)) * (right - room.left - 20);
  const atY = (value) => bottom - (value / top) * (bottom - room.top);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  for (const value of y.ticks) {
    picture.append(draw("line", { class: value ? "grid" : "axis", x1: room.left, x2: right, y1: atY(value),
      y2: atY(value) }));
    picture.append(draw("text", { x: room.left - 8, y: atY(value) + 4, "text-anchor": "end" }, y.text(value)));
  }
  picture.append(draw("text", { x: 0, y: 10 }, y.title));
  let before = -Infinity;
  for (const [value, text] of x.ticks) {
    if (atX(value) - before < text.length * 6.5 + 8) continue; // no room for this one
    before = atX(value);
    picture.append(draw("text", { x: before, y: bottom + 17, "text-anchor": "middle" }, text));
  }
  if (x.title) picture.append(draw("text", { x: (room.left + right) / 2, y: height - 6, "text-anchor": "middle" },
    x.title));
  for (const one of references) {
    picture.append(draw("line", { class: "reference", x1: room.left, x2: right, y1: atY(one.y), y2: atY(one.y) }));
    picture.append(draw("text", { x: room.left + 6, y: atY(one.y) + (atY(one.y) < room.top + 14 ? 14 : -5) },
      one.text));
  }
  for (const one of series) picture.append(line(one, atX, atY));
  placeLabels(labels, atX, atY, room.top, bottom).forEach(({ one, x: left, y: down }) =>
    picture.append(draw("g", { class: one.colour }, mark(one.shape || 0, right + 6, down - 4, 3,
      one.hollow ? "hollow" : "mark"),
      draw("text", { class: "label", x: right + 13, y: down }, shorten(one.label, room.right - 14)))));
  return picture;
}

const shorten = (text, room) => (text.length * 6.9 <= room + 6 ? text
  : `${text.slice(0, Math.max(3, Math.floor(room / 6.9) - 1))}\u2026`);

function line(one, atX, atY) {
  const group = draw("g", { class: [one.colour, one.style, one.dashed ? "dashed" : ""].filter(Boolean).join(" ") });
  let path = "";
  one.points.forEach((point,
    place) => { path += `${place && !point.gap ? "L" : "M"}${atX(point.x).toFixed(1)} ${atY(point.y).toFixed(1)}`; });
  group.append(draw("path", { class: "line", d: path || "M0 0" }));
  for (const point of one.points) {
    const px = atX(point.x), py = atY(point.y);
    const spot = draw("g", {}, draw("title", {}, point.text || ""));
    if (known(point.low)) spot.append(draw("line", { class: "whisker", x1: px, x2: px, y1: atY(point.low),
      y2: atY(point.high) }));
    if (point.ring) spot.append(draw("circle", { class: "ring", cx: px, cy: py, r: one.style === "thin" ? 5.5 : 8 }));
    spot.append(mark(one.shape || 0, px, py, one.style === "thin" ? 2.5 : 4, one.hollow ? "hollow" : "mark"));
    if (point.tag) spot.append(draw("text", { x: px + (point.tagAt === "left" ? -9 : 0), y: py - 10,
      "text-anchor": point.tagAt === "left" ? "end" : "middle" }, point.tag));
    group.append(spot);
  }
  return group;
}

/** Labels at the ends of their lines, pushed apart so that none covers another. */
function placeLabels(labels, atX, atY, top, bottom) {
  const placed = labels.map((one) => ({ one, y: atY(one.points[one.points.length - 1].y) + 4 }))
    .sort((a, b) => a.y - b.y);
  placed.forEach((label, place) => { if (place) label.y = Math.max(label.y, placed[place - 1].y + 15); });
  let limit = bottom + 8;
  for (const label of placed.slice().reverse()) { label.y = Math.min(label.y, limit); limit = label.y - 15; }
  return placed;
}

/** A figure that draws itself again when its width changes. */
function figure(title, options, caption) {
  const place = make("div");
  const whole = make("figure", title ? make("h4", title) : null, place, caption ? make("figcaption", caption) : null);
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(place.clientWidth);
    if (width > 0 && width !== drawn) { drawn = width; place.replaceChildren(chart(options, width)); }
  }).observe(place);
  return whole;
}

/** A table: heads, rows of texts or elements; a row may be {cells, className}. */
function table(heads, rows, { caption, className, textColumns = 1 } = {}) {
  const cell = (tag, content, place) => make(tag, { className: place < textColumns ? "text" : "",
    scope: tag === "th" ? (place || heads === null ? "col" : "row") : undefined }, content);
  const body = rows.map((row) => {
    const { cells, className: name } = Array.isArray(row) ? { cells: row } : row;
    return make("tr", { className: name || "" }, cells.map((content, place) =>
      (content instanceof HTMLTableCellElement ? content : cell(place ? "td" : "th", content, place))));
  });
  return make("div.scroll", { tabIndex: 0, role: "region", "aria-label": caption || "table" },
    make("table", { className: className || "" }, caption ? make("caption", caption) : null,
      make("thead", make("tr", heads.map((head, place) =>
        make("th", { className: place < textColumns ? "text" : "", scope: "col", textContent: head })))),
      make("tbody", body)));
}

const paragraph = (text, className) => make("p", { textContent: text, className: className || "" });

// ---------------------------------------------------------------- the report

const RANGE = (score) => `${percent(score.rate_low)} to ${percent(score.rate_high)}`;
const colourOf = (arm) => `c${arm % 7}`;
const numbersOf = () => [...new Set(data.runs.flatMap((run) => run.iterations.map((one) => one.number)))].sort((a, b) =>
  a - b);
const scored = (run) => run.iterations.filter((one) => one.eval && known(one.eval.rate));

function showReport() {
  document.title = data.title;
  showOverview();
  showShift();
  showFailures();
  showCost();
  showMade();
}

function fill(section, ...content) {
  $(`#${section} .contents`).append(...content.flat(Infinity).filter(known));
}

// ---- resolved

function showOverview() {
  $("#overview h1").textContent = visible(data.title);
  $("#overview .lead").textContent = data.lead;
  fill("overview", waitingNotes());
  const any = data.runs.some((run) => scored(run).length);
  if (!any) return fill("overview", paragraph("No iteration is evaluated yet."));
  fill("overview", resolvedCharts());
  fill("overview", data.runs.length === 1 ? iterationTable(data.runs[0]) : comparisonTable());
  fill("overview", testTable(), groupTable(), pairedTables(), settingsTable());
}

/** What is missing, in words. */
function waitingNotes() {
  return data.runs.flatMap((run) => run.missing.map((text) =>
    paragraph(`${data.runs.length > 1 ? `${visible(run.name)}: ` : ""}${text}`, "note")));
}

function resolvedCharts() {
  const caption = "Bars: 95 % Wilson intervals of one evaluation. A ring marks the iteration that was chosen on " +
    "these tasks; the best of several rates is a little too high, the test score is not.";
  if (data.arms.length === 1) return figure("", resolvedOptions(data.arms.map((_, arm) => arm), true), caption);
  const arms = data.arms.map((_, arm) => arm);
  if (data.runs.length === data.arms.length) return figure("", resolvedOptions(arms, true), caption);
  const all = figure("Mean of the seeds", resolvedOptions(arms, false));
  const each = make("div.panels", data.arms.map((name, arm) =>
    figure(visible(name), { ...resolvedOptions([arm], true, true), height: 220 })));
  return [all, make("h3", "Each arm, its seeds thin"), each, paragraph(caption, "small")];
}

const BESIDE = 0.24; // so far apart (in iterations) stand the points of one, or their intervals would cover each other

function resolvedOptions(arms, seeds, small) {
  const numbers = numbersOf(), last = numbers[numbers.length - 1];
  const mine = data.runs.filter((run) => arms.includes(run.arm)),
    tested = mine.some((run) => run.tests.some((one) => one.chosen));
  const gone = (number) => mine.every((run) => !run.iterations.some((one) => one.number === number && !one.missing));
  const series = arms.flatMap((arm) => armSeries(arm, seeds, small, last + 1));
  const top = Math.max(...data.runs.flatMap((run) => [...scored(run).map((one) => one.eval),
    ...run.tests.map((one) => one.score)]).map((score) => score.rate_high), 0.1);
  const teachers = mine.filter((run) => run.teacher && known(run.teacher.rate)
    && (run.tasks || "").startsWith(`${run.teacher.on} (`));
  const reference = teachers.length ? Math.max(...teachers.map((run) => run.teacher.rate)) : null;
  const ceiling = known(reference) ? Math.max(top, reference) : top;
  return {
    name: "Resolved tasks by iteration; the table below has the same numbers",
    x: { from: numbers[0] - BESIDE / 2, to: (tested ? last + 1 : last) + BESIDE / 2,
      ticks: [...numbers.map((number) => [number, gone(number) ? `${number} missing` : String(number)]),
      ...(tested ? [[last + 1, "test"]] : [])], title: small ? "" : "iteration" },
    y: { ticks: ticks(ceiling).filter((value) => value <= 1.001), text: (value) => percent(value), title: "resolved" },
    series,
    references: known(reference) ? [{ y: reference, text: `the teacher, ${percent(reference)}` }] : [],
    height: small ? 220 : 330,
  };
}

/** An arm's line: its mean in bold, and each seed's thin with intervals; a lone seed is its arm's line. */
function armSeries(arm, seeds, small, testAt) {
  const runs = data.runs.filter((run) => run.arm === arm && scored(run).length), lone = runs.length === 1;
  const colour = colourOf(arm), series = [];
  const beside = (place, count) => ((place + 0.5) / count - 0.5) * BESIDE;
  const spread = (place) => (!seeds ? 0 : lone && !small ? beside(arm, data.arms.length) : beside(place, runs.length));
  if (seeds || lone)
    runs.forEach((run, place) => series.push({ colour, shape: arm, style: lone ? "bold" : "thin",
      label: lone && !small && data.arms.length > 1 ? visible(data.arms[arm]) : "",
      points: [...scored(run).map((one, at, all) => scorePoint(one.number + spread(place), one.eval,
        `${run.name}, iteration ${one.number}`, one.number === run.chosen,
        at > 0 && one.number !== all[at - 1].number + 1)),
        ...run.tests.filter((one) => one.chosen).map((one) =>
          scorePoint(testAt + spread(place), one.score, `${run.name}, test`, false, true))] }));
  if (!lone && runs.length) {
    const mean = data.means[arm];
    series.push({ colour, shape: arm, style: "bold", label: small || data.arms.length === 1 ? ""
      : visible(data.arms[arm]),
      points: [...mean.iterations.map((one, at, all) =>
        ({ x: one.number, y: one.rate, gap: at > 0 && one.number !== all[at - 1].number + 1,
        text: `${data.arms[arm]}, iteration ${one.number}: ${meanWords(one)}` })),
        ...(mean.test
          ? [{ x: testAt, y: mean.test.rate, gap: true, text: `${data.arms[arm]}, test: ${meanWords(mean.test)}` }]
          : [])] });
  }
  return series;
}

const meanWords = (mean) => `mean ${percent(mean.rate, 1)} of ${plural(mean.seeds, "seed")}`;

function scorePoint(x, score, name, ring, gap) {
  return { x, y: score.rate, low: score.rate_low, high: score.rate_high, ring, gap,
    text: `${name}: ${scoreWords(score)} (${RANGE(score)})` };
}

/** Tasks that the machine failed are in no rate: they are named apart. */
const scoreWords = (score) => (known(score.rate)
  ? `${score.resolved}/${score.tasks - (score.infra_errors || 0)} = ${percent(score.rate)}` +
    (score.infra_errors ? ` (${score.infra_errors} not run${known(score.rate_of_all)
      ? `; of all ${percent(score.rate_of_all)}` : ""})` : "") : "not scored");

function missingCell(text = "missing") {
  return make("td.missing", text);
}

/** One run: a line an iteration. */
function iterationTable(run) {
  const columns = [
    ["beta", (one) => one.collect && (known(one.collect.beta) ? one.collect.beta.toFixed(2) : one.collect.mix)],
    ["teacher's turns", (one) => one.collect && percent(one.collect.teacher_turn_share)],
    ["its tokens", (one) => one.collect && percent(one.collect.teacher_token_share)],
    ["labels", (one) => one.train && whole(one.train.labels)],
    ["agree", (one) => one.labels && known(one.labels.agree) && percent(one.labels.agree)],
    ["loss", (one) => one.train && known(one.train.loss) && one.train.loss.toFixed(3)],
    ["resolved", (one) => one.eval && scoreWords(one.eval)],
    ["95 %", (one) => one.eval && known(one.eval.rate) && RANGE(one.eval)],
    ["minutes", (one) => one.cost && known(one.cost.minutes) && one.cost.minutes.toFixed(1)],
  ];
  const rows = run.iterations.map((one) => ({
    className: one.number === run.chosen ? "chosen" : "",
    cells: [one.number === run.chosen ? `${one.number} (chosen)` : String(one.number),
      ...(one.missing ? [make("td.missing", { colSpan: columns.length, textContent: "missing" })]
        : columns.map(([, value]) => value(one) || missingCell("\u2013")))],
  }));
  return table(["iteration", ...columns.map(([head]) => head)], rows,
    { caption: `Resolved on ${run.tasks || "the evaluation tasks"}. agree: share of the student's turns with the ` +
      "teacher's command; minutes: collect, relabel and train." });
}

/** Several runs: a line a run, grouped by arm, and each arm's mean. */
function comparisonTable() {
  const numbers = numbersOf(), rows = [];
  data.arms.forEach((name, arm) => {
    const runs = data.runs.filter((run) => run.arm === arm);
    runs.forEach((run, place) => rows.push({ className: place === 0 && rows.length ? "group" : "",
      cells: [place === 0 ? visible(name) : "", make("td.text", visible(run.name)),
        String(known(run.seed) ? run.seed : "\u2013"),
        ...numbers.map((number) => scoreCell(run.iterations.find((one) => one.number === number),
          run.chosen === number)), testCell(run)] }));
    const mean = data.means[arm];
    if (runs.length > 1) rows.push({ className: "chosen", cells: ["", make("td.text", "mean"), "",
      ...numbers.map((number) => { const one = mean.iterations.find((item) => item.number === number);
        return one ? meanCell(one, runs.length) : missingCell("\u2013"); }),
        mean.test ? meanCell(mean.test, runs.length) : missingCell("\u2013")] });
  });
  return table(["arm", "run", "seed", ...numbers.map((number) => `iteration ${number}`), "test (chosen)"], rows,
    { caption: `Resolved on ${data.runs[0].tasks || "the evaluation tasks"}, with 95 % intervals. The chosen ` +
      "iteration is bold.", textColumns: 2 });
}

/** A mean of fewer seeds than its arm has says so. */
const meanCell = (mean, seeds) => percent(mean.rate, 1) + (mean.seeds < seeds ? ` (${mean.seeds} of ${seeds})` : "");

function scoreCell(one, chosenOne) {
  if (!one || one.missing) return missingCell();
  if (!one.eval || !known(one.eval.rate)) return missingCell("not yet");
  return make("td", { title: RANGE(one.eval) }, make(chosenOne ? "b" : "span", { textContent: scoreWords(one.eval) }),
    make("br"), make("span.small", RANGE(one.eval)));
}

function testCell(run) {
  const one = run.tests.find((item) => item.chosen) || run.tests[0];
  return one ? make("td", scoreWords(one.score), make("br"),
    make("span.small", `iteration ${one.iteration}, ${RANGE(one.score)}`)) : missingCell("not yet");
}

function testTable() {
  if (data.runs.length > 1) return null;
  const run = data.runs[0], rows = [];
  for (const one of run.tests) {
    const name = `test, iteration ${one.iteration}${one.chosen ? " (chosen)" : " (not the chosen one)"}`;
    rows.push([name, make("td.text", one.tasks), scoreWords(one.score), RANGE(one.score)]);
  }
  if (run.teacher && known(run.teacher.rate)) rows.push(["the teacher itself", make("td.text", run.teacher.on),
    scoreWords(run.teacher), RANGE(run.teacher)]);
  if (!run.tests.length) rows.push(["test", missingCell("not yet"), missingCell("not yet"), missingCell("not yet")]);
  return [make("h3", "The test score, and the teacher's"),
    table(["", "tasks", "resolved", "95 %"], rows, { textColumns: 2 })];
}

/** By kind of task, where the tasks say their kind. */
function groupTable() {
  const rows = data.runs.flatMap((run) => {
    const best = run.tests.find((one) => one.chosen) || run.tests[0];
    return best ? Object.entries(best.score.groups || {})
      .map(([name, score]) => [visible(name), ...(data.runs.length > 1 ? [make("td.text", visible(run.name))] : []),
      scoreWords(score), RANGE(score)]) : [];
  });
  if (!rows.length) return null;
  return make("details.fold", make("summary", "The test score by kind of task"),
    table(["tasks", ...(data.runs.length > 1 ? ["run"] : []), "resolved", "95 %"], rows,
    { textColumns: data.runs.length > 1 ? 2 : 1 }));
}

function pairedTables() {
  if (!data.pairs.length) return data.pair_notes.map((text) => paragraph(text, "note"));
  const points = (value) => `${value > 0 ? "+" : value < 0 ? "\u2212" : ""}${Math.abs(100 * value).toFixed(1)}`;
  const rows = data.pairs.map((pair) => [visible(pair.name), make("td.text", pair.tasks), whole(pair.n),
    known(pair.only_b) ? `${pair.only_b} / ${pair.only_a}` : "", points(pair.difference),
    `${points(pair.low)} to ${points(pair.high)}`, known(pair.p) ? String(Number(pair.p.toPrecision(2))) : ""]);
  return [make("h3", "Paired comparisons"), table(["compared", "on", "pairs",
    "only the first / only the second resolved", "points", "95 %", "p"], rows, { textColumns: 2 }),
    data.pair_notes.map((text) => paragraph(text, "small"))];
}

function settingsTable() {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.settings)))];
  if (!names.length) return null;
  const rows = names.map((name) => [name, ...data.runs.map((run) =>
    make("td.text", visible(String(run.settings[name] ?? "\u2013"))))]);
  return make("details.fold", make("summary", "Settings"),
    table(["", ...data.runs.map((run) => visible(run.name))], rows, { textColumns: 1 + data.runs.length }));
}

/** Content for one run at a time, with a choice where there are several. */
function byRun(draw) {
  const place = make("div"), show = (index) => place.replaceChildren(...[draw(data.runs[index])].flat().filter(known));
  show(0);
  if (data.runs.length === 1) return [place];
  const select = make("select", data.runs.map((run, index) =>
    make("option", { value: index, textContent: `${data.arms[run.arm]}: ${run.name}` })));
  select.addEventListener("change", () => show(Number(select.value)));
  return [make("label.picker", "Run", select), place];
}

// ---- covariate shift

const HISTORIES = { teacher: "teacher alone", student: "with student" };

function showShift() {
  fill("shift", paragraph("A student imitates the teacher's demonstrations, and then acts in states that its own " +
    "turns brought about. How well does it predict the teacher there? The lower the negative log-likelihood of the " +
    "teacher's label (nats per token), the better; where the two histories lie apart, that is the shift."));
  const first = paragraph("Measured in a sample of the newest trajectories of each iteration: before, under the " +
    "student that collected them; after, under the one that was trained on them.", "small");
  fill("shift", first, byRun(shiftOf));
}

const measuredIn = (run) => run.iterations.filter((one) => one.shift
  && one.shift.some((row) => known(row.before) || known(row.after)));

function shiftOf(run) {
  const measured = measuredIn(run), parts = [];
  if (measured.length) {
    // An untrained student knows nothing of all this: its values would press all others to the floor.
    const untrained = (one) => one.number === 1 && measured.length > 1;
    const overall = (one, history, when) => (when === "before" && untrained(one) ? null
      : one.shift.find((row) => row.history === history && row.turn === null));
    // One scale for all runs, so that they can be told apart by height.
    const all = data.runs.flatMap(measuredIn);
    const tops = all.flatMap((one) => one.shift.filter((row) => row.turn === null)
      .flatMap((row) => [untrained(one) ? null : row.before, row.after]));
    parts.push(make("div.panels", figure("All turns, by iteration",
      shiftOptions(measured.map((one) => one.number), "iteration",
      (history, number, when) => value(overall(measured.find((one) => one.number === number), history, when), when),
      tops)),
      ...measured.map((one) => figure(`Iteration ${one.number}, by turn`,
        shiftOptions([...new Set(one.shift.map((row) => row.turn).filter(known))].sort((a, b) => a - b), "turn",
        (history, turn, when) => value(one.shift.find((row) => row.history === history && row.turn === turn), when),
        all.filter((other) => untrained(other) === untrained(one)).flatMap((other) => other.shift)
          .filter((row) => known(row.turn)).flatMap((row) => [row.before, row.after]))))));
    parts.push(paragraph("Dashed and hollow: before training. Solid: after it. Squares: histories that the teacher " +
      "alone made; circles: histories with student turns." + (measured.some(untrained) ? " Iteration 1 was " +
      "collected before any training: it has a scale of its own, and on the left only what came after." : ""), "small"));
  } else {
    parts.push(paragraph("The likelihood of labels was not measured in this run (03_train.py --measure).", "note"));
  }
  if (run.iterations.some((one) => one.shift) && !run.iterations.some((one) => one.shift
    && one.shift.some((row) => row.history === "student")))
    parts.push(paragraph("The teacher alone acted while these tasks were collected: there is no state with a turn of " +
      "the student in its history. To measure those, label an evaluation of the student (README, \u201cCovariate " +
      "shift of any student\u201d).", "note"));
  if (!["all", undefined].includes(run.settings.label_states))
    parts.push(paragraph(`Only a choice of states has labels here (--label-states ${run.settings.label_states}): these ` +
      "numbers cannot be set against those of a run that labelled all.", "note"));
  return [...parts, ...agreement(run), shiftTable(run)];
}

const value = (row, when) => (row && known(row[when]) ? { y: row[when],
  text: `${plural(row.labels, "label")}, ${plural(row.tokens, "token")}` } : null);

/** tops: the values that the scale has to reach. */
function shiftOptions(xs, title, valueOf, tops) {
  const series = [];
  for (const [history, colour, shape] of [["student", "cs", 0], ["teacher", "ct", 1]])
    for (const when of ["before", "after"]) {
      const points = xs.map((x) => [x, valueOf(history, x, when)]).filter(([, found]) => found)
        .map(([x, found], place) =>
        ({ x, y: found.y,
          text: `${title} ${x}, ${HISTORIES[history]}, ${when}: ${found.y.toFixed(3)} (${found.text})` }));
      if (points.length) series.push({ colour, shape, dashed: when === "before", hollow: when === "before",
        label: "", points });
    }
  for (const colour of ["cs", "ct"]) { // one name for the two lines of a history
    const lines = series.filter((one) => one.colour === colour);
    if (lines.length) lines[lines.length - 1].label = HISTORIES[colour === "cs" ? "student" : "teacher"];
  }
  return { name: `Negative log-likelihood of labels by ${title}`, x: span(xs, title),
    y: { ticks: ticks(Math.max(...tops.filter(known), 0.01), 4), text: short, title: "nats per token" }, series,
    height: 240 };
}

/** How often the student's command was the teacher's: by iteration, and by turn in each, for both histories. */
function agreement(run) {
  const rows = (one, history) => (one.shift || []).filter((row) => row.history === history && known(row.agree));
  const found = run.iterations.filter((one) => rows(one, "teacher").length || rows(one, "student").length);
  const note = "No label stands beside a student's turn yet, so there is no agreement to show.";
  if (!found.length) return [paragraph(note, "note")];
  const turnsOf = (one) => [...new Set(["teacher", "student"].flatMap((history) => rows(one, history))
    .map((row) => row.turn).filter(known))].sort((a, b) => a - b);
  const overall = agreementPanel("All turns, by iteration", found.map((one) => one.number), "iteration",
    (history, number) => rows(found.find((one) => one.number === number), history).find((row) => row.turn === null));
  const each = found.map((one) => agreementPanel(`Iteration ${one.number}, by turn`, turnsOf(one), "turn",
    (history, turn) => rows(one, history).find((row) => row.turn === turn)));
  return [make("h3", "How often the student's command was the teacher's"), make("div.panels", overall, each)];
}

function agreementPanel(title, xs, xTitle, rowOf) {
  const series = [];
  for (const [history, colour, shape] of [["student", "cs", 0], ["teacher", "ct", 1]]) {
    const points = xs.map((x) => [x, rowOf(history, x)]).filter(([, row]) => row).map(([x, row]) => ({ x, y: row.agree,
      text: `${xTitle} ${x}, ${HISTORIES[history]}: ${percent(row.agree, 1)} of ${plural(row.compared, "turn")}` }));
    if (points.length) series.push({ colour, shape, label: HISTORIES[history], points });
  }
  return figure(title, { name: `Agreement by ${xTitle}`, x: span(xs, xTitle), series, height: 230,
    y: { ticks: [0, 0.25, 0.5, 0.75, 1], text: (share) => percent(share), title: "the same command" } });
}

function span(xs, title) {
  const from = Math.min(...xs), to = Math.max(...xs), alone = from === to ? 1 : 0;
  return { from: from - alone, to: to + alone, ticks: xs.map((x) => [x, String(x)]), title };
}

function shiftTable(run) {
  const dash = (number, text) => (known(number) ? text(number) : missingCell("\u2013"));
  const three = (number) => number.toFixed(3);
  const columns = [["labels", (row) => dash(row.labels, whole), true],
    ["tokens", (row) => dash(row.tokens, whole), true], ["before", (row) => dash(row.before, three), true],
    ["after", (row) => dash(row.after, three), true],
    ["the student's turns", (row) => dash(row.compared, whole)],
      ["the same command", (row) => dash(row.agree, percent)]];
  const measured = run.iterations.some((one) => (one.shift || []).some((row) => row.labels));
  const used = columns.filter(([, , ofLikelihood]) => measured || !ofLikelihood);
  const rows = run.iterations.flatMap((one) => (one.shift || [])
    .filter((row) => row.turn === null && (row.labels || row.compared)).map((row) =>
    [String(one.number), make("td.text", HISTORIES[row.history]), ...used.map(([, cell]) => cell(row))]));
  const caption = (measured ? "Labels measured and their mean negative log-likelihood (nats per token); the" : "The") +
    " student's turns with a label, and the share with the same command";
  return rows.length ? table(["iteration", "history", ...used.map(([head]) => head)], rows, { caption, textColumns: 2 })
    : null;
}

// ---- failure modes

function showFailures() {
  const words = "The tasks of each evaluation by what became of them. Each number leads to its trajectories.";
  fill("failures", endingsTable(), paragraph(words), byRun(failuresOf), definitions());
}

/** All arms side by side, each at its chosen iteration. */
function endingsTable() {
  if (!data.endings) return null;
  const { on, arms } = data.endings, ends = arms.filter(known);
  const modes = data.modes.map(([name]) => name).filter((name) => ends.some((arm) => name in arm.failure_modes));
  const mean = (arm, count) => (arm ? make(count ? "td" : "td.quiet", String(Math.round(10 * count) / 10)) : missingCell());
  const rows = [["resolved", (arm) => arm.resolved], ...modes.map((name) =>
    [name.replaceAll("_", " "), (arm) => arm.failure_modes[name] || 0])]
    .map(([name, of]) => [name, ...arms.map((arm) => mean(arm, arm && of(arm)))]);
  return table(["", ...data.arms.map(visible)], rows, { textColumns: 1,
    caption: `Chosen students on ${on}: tasks, in the mean of ${[...new Set(ends.map((arm) => arm.runs))].join(" or ")} runs` });
}

function failuresOf(run) {
  const columns = [...run.iterations.filter((one) => one.eval || one.missing)
    .map((one) => ({ head: `iteration ${one.number}`, score: one.eval, iteration: one.number, what: "evaluated" })),
    ...run.tests.map((one) => ({ head: `test (iteration ${one.iteration})`, score: one.score, iteration: one.iteration,
      what: "test" }))];
  const found = new Set(columns.flatMap((column) => Object.keys((column.score && column.score.failure_modes) || {})));
  if (!columns.length) return paragraph("No iteration is evaluated yet.", "note");
  const modes = [...data.modes.map(([name]) => name).filter((name) => found.has(name)),
    ...[...found].filter((name) => !data.modes.some(([mode]) => mode === name)).sort()];
  const index = data.runs.indexOf(run), meaning = Object.fromEntries(data.modes);
  const rows = [["resolved", "resolved"], ...modes.map((mode) => [mode, mode])].map(([name, mode]) =>
    ({ className: name === "resolved" ? "resolved" : "", cells: [
    make("th", { scope: "row", className: "text", title: meaning[mode] || "", textContent: name.replaceAll("_", " ") }),
      ...columns.map((column) => barCell(column, mode, index))] }));
  return table(["", ...columns.map((column) => column.head)], rows,
    { className: "bars", caption: "Tasks; the bar is their share" });
}

function barCell({ score, iteration, what }, mode, index) {
  if (!score) return missingCell();
  const count = mode === "resolved" ? score.resolved : (score.failure_modes || {})[mode] || 0;
  if (!count) return make("td.quiet", "0");
  const words = new URLSearchParams({ ...(data.runs.length > 1 ? { run: index } : {}), what, iteration,
    ...(mode === "resolved" ? { result: "resolved" } : { mode }) });
  const bar = make("span.bar-of");
  bar.style.width = `max(2px, ${(5.5 * count) / score.tasks}rem)`; // the same scale in every column
  return make("td", make("a", { href: `#trajectories?${words}`,
    title: `${count} of ${score.tasks} = ${percent(count / score.tasks)}` }, make("span", count), bar));
}

function definitions() {
  const found = new Set(data.runs.flatMap((run) => [...run.iterations.map((one) => one.eval),
    ...run.tests.map((one) => one.score)]).filter(Boolean).flatMap((score) => Object.keys(score.failure_modes || {})));
  const names = new Map(); // definition -> the names that share it
  for (const [name, text] of data.modes.filter(([mode]) => found.has(mode)))
    names.set(text, [...(names.get(text) || []), name.replaceAll("_", " ")]);
  return names.size ? [make("h3", "What they mean"), make("dl.definitions",
    [...names].flatMap(([text, list]) => [make("dt", list.join(", ")), make("dd", text)]))] : null;
}

// ---- cost

const COSTS = [["tokens", "Tokens", short], ["minutes", "Minutes", (value) => short(value)],
  ["dollars", "Dollars", (value) => `$${short(value)}`]];

function showCost() {
  const panels = COSTS.map(costPanel).filter(known);
  fill("cost", paragraph("What it took to make the student of each iteration, all before it included: collecting, " +
    "relabelling and training, but not evaluating. Tokens are those of both policies, prompts and answers. A point " +
    "is an iteration; of several seeds it is their mean."),
    panels.length ? make("div.panels", panels) : paragraph("Nothing is spent and evaluated yet.", "note"),
      panels.length ? costTable() : null);
}

function costPanel([name, title, text]) {
  const series = data.arms.flatMap((_, arm) => costSeries(arm, name, text))
    .filter((one) => one.points.some((point) => point.x > 0));
  if (!series.length) return null;
  const xs = ticks(Math.max(...series.flatMap((one) => one.points.map((point) => point.x))), 4),
    top = Math.max(...series.flatMap((one) => one.points.map((point) => point.y)), 0.1);
  return figure(title, { name: `Resolved against ${title}`,
    x: { from: 0, to: xs[xs.length - 1], ticks: xs.map((value) => [value, text(value)]), title: "" },
    y: { ticks: ticks(top * 1.1).filter((value) => value <= 1.001), text: (share) => percent(share),
      title: "resolved" }, series, height: 240 });
}

/** An arm's iterations: the mean of its seeds in bold; a lone seed is its arm's line. */
function costSeries(arm, name, text) {
  const runs = data.runs.filter((run) => run.arm === arm), colour = colourOf(arm),
    label = data.arms.length > 1 ? visible(data.arms[arm]) : "";
  const points = (who, all, rateOf, spentOf) => all.map((one, place) =>
    ({ x: spentOf(one), y: rateOf(one), tag: label ? "" : String(one.number),
    gap: place > 0 && one.number !== all[place - 1].number + 1,
    text: `${who}, iteration ${one.number}: ${text(spentOf(one))} ${name}, ${percent(rateOf(one), 1)}` }));
  const ofRuns = runs.map((run) => ({ colour, shape: arm, style: runs.length > 1 ? "thin" : "bold",
    label: runs.length > 1 ? "" : label,
    points: points(run.name, scored(run).filter((one) => known(one.spent[name])), (one) => one.eval.rate,
      (one) => one.spent[name]) }));
  if (runs.length === 1) return ofRuns;
  for (const one of ofRuns) for (const point of one.points) point.tag = "";
  const mean = points(data.arms[arm], data.means[arm].iterations.filter((one) => known(one.spent[name])),
    (one) => one.rate, (one) => one.spent[name]);
  // the seeds of several arms would hide each other
  return [...(label ? [] : ofRuns), { colour, shape: arm, style: "bold", label, points: mean }];
}

function costTable() {
  const priced = data.runs.some((run) => run.iterations.some((one) => one.spent && known(one.spent.dollars)));
  const columns = COSTS.filter(([name]) => name !== "dollars" || priced);
  const rows = data.runs.flatMap((run) => run.iterations.filter((one) => one.cost)
    .map((one) => [...(data.runs.length > 1 ? [visible(run.name)] : []), String(one.number),
    ...columns.flatMap(([name, , text]) => [one.cost[name],
      one.spent && one.spent[name]].map((value) => (known(value) ? text(value) : missingCell("\u2013"))))]));
  const heads = columns.flatMap(([name]) => [name, "up to here"]);
  return make("details.fold", make("summary", "The same as a table"),
    table([...(data.runs.length > 1 ? ["run"] : []), "iteration", ...heads], rows, { textColumns: 1 }));
}

// ---- this page

function showMade() {
  const counts = plural(data.rows.length, "trajectory", "trajectories"),
    turns = trajectories.reduce((sum, t) => sum + t.turns, 0);
  const words = `${data.command} wrote it on ${data.made}. It holds ${counts} with ${plural(turns, "turn")}: ` +
    `${bytes(data.raw)} of text in a file of ${bytes(data.bytes)}. It loads nothing; its security policy forbids it.`;
  fill("made", paragraph(words, "small"),
    data.rows.length ? make("p", make("a", { href: "#trajectories", textContent: "Read the trajectories" })) : null);
}
