// The second half of the page's script: the trajectories. report.js before it has the tools and the data.

// ---------------------------------------------------------------- the viewer: filters and the list

const WHAT = { collected: "collected", evaluated: "evaluated", test: "test", teacher: "the teacher itself" };
const FILTERS = [
  // name, what it is called, the values with their texts, whether a trajectory has the value
  ["run", "Run", () => data.runs.map((run, place) => [String(place), run.name]), (t, value) => t.run === Number(value)],
  ["what", "Kind", () => present("what").map((name) => [name, WHAT[name]]), (t, value) => t.what === value],
  ["iteration", "Iteration", () => present("iteration").map((number) => [String(number), String(number)]),
    (t, value) => t.what !== "teacher" && t.iteration === Number(value)],
  ["actor", "Who acted", () => [["student", "has student turns"], ["teacher", "has teacher turns"],
    ["both", "has both"]],
    (t, value) => (value === "teacher" || t.student_turns > 0) && (value === "student" || t.teacher_turns > 0)],
  ["labels", "Labels", () => [["differ", "a label differs"], ["agree", "all agree"]],
    (t, value) => t.judged > 0 && (value === "differ") === t.differ > 0],
  ["result", "Result", () => [["resolved", "resolved"], ["unresolved", "not resolved"], ["ungraded", "not graded"]],
    (t, value) => t.resolved === { resolved: true, unresolved: false, ungraded: null }[value]],
  ["mode", "Failure mode", () => present("failure_mode").map((name) => [name, name.replaceAll("_", " ")]),
    (t, value) => t.failure_mode === value],
  ["exit", "Ended by", () => present("exit_status").map((name) => [name, name.replaceAll("_", " ")]),
    (t, value) => t.exit_status === value],
];
const chosen = {}; // filter -> value
let wanted = []; // words of the search
let shown = []; // places in `trajectories`
let opened = null; // place in `trajectories`
let current = -1; // turn
let record = null; // what is opened
const ROW = 60; // pixels, as .row in the style

function present(field) {
  const values = [...new Set(trajectories.map((t) => t[field]))].filter(known);
  return field === "what" ? Object.keys(WHAT).filter((name) => values.includes(name))
    : values.sort((a, b) => (a < b ? -1 : 1));
}

function makeFilters() {
  const place = $("#filters > div");
  for (const [name, title, options] of FILTERS) {
    const values = options();
    if (values.length < (name === "mode" ? 1 : 2)) continue;
    const select = make("select", { name }, make("option", { value: "", textContent: "any" }),
      values.map(([value, text]) => make("option", { value, textContent: visible(text) })));
    select.addEventListener("change", () => { setFilters({ ...chosen, [name]: select.value }, $("#text").value);
      sayFilters(); });
    place.append(make("label", title, select));
  }
  place.append(make("button", { type: "button", textContent: "Clear all",
    onclick: () => { setFilters({}, ""); sayFilters(); } }));
  $("#text").addEventListener("input", () => { setFilters(chosen, $("#text").value); sayFilters(); });
  $("#filters").open = matchMedia("(min-width: 56.01rem) and (min-height: 50rem)").matches;
}

function setFilters(values, text) {
  for (const [name] of FILTERS) { if (values[name]) chosen[name] = values[name]; else delete chosen[name]; }
  for (const select of document.querySelectorAll("#filters select")) select.value = chosen[select.name] || "";
  if ($("#text").value !== text) $("#text").value = text;
  wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
  applyFilters();
}

function applyFilters() {
  const tests = FILTERS.filter(([name]) => chosen[name]).map(([name, , , test]) => (t) => test(t, chosen[name]));
  shown = [];
  trajectories.forEach((t, place) => {
    if (tests.every((test) => test(t)) && wanted.every((word) => t.text.includes(word))) shown.push(place);
  });
  $("#filters summary").textContent = tests.length ? `Filters (${tests.length} set)` : "Filters";
  $("#count").textContent = shown.length === trajectories.length ? plural(shown.length, "trajectory", "trajectories")
    : `${whole(shown.length)} of ${plural(trajectories.length, "trajectory", "trajectories")}`;
  $("#list").scrollTop = 0;
  fillList(true);
}

/** The address of the list with its filters; only where the list alone is shown, an opened trajectory keeps its own. */
function sayFilters() {
  if (opened !== null) return;
  const words = new URLSearchParams(chosen);
  if ($("#text").value) words.set("text", $("#text").value);
  replaceHash(`#trajectories${String(words) ? `?${words}` : ""}`);
}

/** Only the rows that can be seen are elements. */
function fillList(anew) {
  const list = $("#list"), inner = list.firstElementChild;
  inner.style.height = `${shown.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6),
    last = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW) + 12);
  if (!anew && fillList.first === first && fillList.last === last) return;
  [fillList.first, fillList.last] = [first, last];
  list.setAttribute("aria-activedescendant", opened === null ? "" : `row-${opened}`);
  inner.replaceChildren(...shown.slice(first, last).map((place, offset) => listRow(place, first + offset)));
  if (!shown.length) inner.replaceChildren(make("p.empty",
    trajectories.length ? "No trajectory is like that. " : "There are no trajectories yet.",
    trajectories.length ? make("button", { type: "button", textContent: "Clear the filters",
      onclick: () => { setFilters({}, ""); sayFilters(); } }) : null));
}

function listRow(place, position) {
  const t = trajectories[place];
  const where = [data.runs.length > 1 ? data.runs[t.run].name : "",
    t.what === "teacher" ? "teacher" : `iteration ${t.iteration}, ${WHAT[t.what]}`].filter(Boolean).join(" \u00b7 ");
  const turns = t.differ ? `${t.differ} of ${t.judged} differ` : plural(t.turns, "turn");
  const row = make("div.row", { role: "option", id: `row-${place}`, title: visible(t.trajectory_id),
    "aria-selected": String(place === opened),
    "aria-setsize": shown.length, "aria-posinset": position + 1, onclick: () => openTrajectory(place, 0, true) },
  make("span.id", idParts(visible(t.instance_id))), make("span.right", resultOf(t)),
  make("span.about", where), make("span.about.right", turns));
  row.style.top = `${position * ROW}px`;
  return row;
}

/** Where an id is too long, its middle goes: the end tells it from its neighbours. */
function idParts(id) {
  return [make("span", id.slice(0, -8)), make("span", id.slice(-8))];
}

function resultOf(t) {
  if (t.resolved === true) return make("span.good", "\u2713 resolved");
  if (t.resolved === false) return make("span.bad",
    `\u2717 ${(t.failure_mode || "not resolved").replaceAll("_", " ")}`);
  return make("span.quiet", t.exit_status.replaceAll("_", " "));
}

function showInList(place) {
  const position = shown.indexOf(place), list = $("#list");
  if (position < 0) return fillList(true);
  const top = position * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  fillList(true);
}

// ---------------------------------------------------------------- the viewer: one trajectory

function addressOf(t, turn) {
  return `#trajectory/${[data.runs[t.run].name, t.place, t.trajectory_id, turn].map(encodeURIComponent).join("/")}`;
}

async function openTrajectory(place, turn, byClick) {
  const t = trajectories[place], address = addressOf(t, turn);
  opened = place;
  $("#viewer").classList.add("open");
  showInList(place);
  if (byClick === true) location.hash = address; // a step that the back button undoes
  else replaceHash(address);
  let found;
  try {
    found = (await chunk(t.chunk))[t.position];
  } catch (error) {
    const old = "This browser cannot unpack trajectories: it has no DecompressionStream (Chrome 80, Firefox 113 and " +
      "Safari 16.4 have).";
    const reason = `This trajectory cannot be unpacked: ${error.message}`;
    $("#opened").replaceChildren(make("p.empty", typeof DecompressionStream === "undefined" ? old : reason));
    return;
  }
  if (opened !== place) return; // another one was opened meanwhile
  record = found;
  record.labelled = found.turns.some((turn) => turn.label);
  $("#opened").replaceChildren(...trajectoryParts(t, record));
  document.title = `${visible(t.instance_id)} \u00b7 ${data.title}`;
  current = Math.max(0, Math.min(turn, record.turns.length - 1));
  markTurn();
  if (turn > 0) goToTurn(turn); else scrollTo(0, 0);
}

function closeTrajectory() {
  opened = record = null;
  current = -1;
  $("#viewer").classList.remove("open");
  $("#opened").replaceChildren(make("p.empty",
    "Choose a trajectory in the list, or press j for the first. ? shows all keys."));
  document.title = data.title;
  fillList(true);
}

function trajectoryParts(t, record) {
  const position = shown.indexOf(opened);
  const step = (text, by, off) => make("button", { type: "button", textContent: text, disabled: off,
    onclick: () => move(by) });
  const differs = record.turns.filter((turn) => turn.label && turn.label.agrees === false).length;
  return [
    make("div.moves", make("a.back", { href: "#trajectories", textContent: "\u2190 list" }),
      step("previous", -1, position <= 0), step("next", 1, position === shown.length - 1),
      differs ? make("button", { type: "button", textContent: "next difference", onclick: nextDifference }) : null,
      position >= 0 ? make("span.quiet", `${whole(position + 1)} of ${whole(shown.length)}`) : null),
    make("h1", visible(t.trajectory_id)),
    facts(t, record),
    ...issueParts(visible(record.issue)),
    ...folds(record),
    strip(record),
    ...record.turns.map((turn, place) => turnParts(turn, place)),
    record.turns.length ? null : make("p.empty", "No turn was taken."),
  ].filter(known);
}

function issueParts(text) {
  const issue = make("div.issue", text);
  if (text.length <= 900 && text.split("\n").length <= 12) return [issue];
  issue.classList.add("clamped");
  const button = make("button.small", { type: "button", textContent: "the whole issue",
    onclick: () => { issue.classList.remove("clamped"); button.remove(); } });
  return [issue, make("p", button)];
}

function facts(t, record) {
  const parts = [make("b", { className: t.resolved === null ? "" : t.resolved ? "good" : "bad" }, resultWords(t))];
  parts.push(` \u00b7 ended by ${t.exit_status.replaceAll("_", " ")}`, ` \u00b7 ${plural(t.turns, "turn")}`);
  if (t.teacher_turns && t.student_turns) parts.push(`, ${t.student_turns} by the student`);
  const verb = t.differ === 1 ? "differs" : "differ";
  if (t.differ) parts.push(` \u00b7 ${plural(t.differ, "label")} of ${t.judged} ${verb}`);
  parts.push(` \u00b7 ${data.runs[t.run].name} ${t.place}`);
  if (record.seconds) parts.push(` \u00b7 ${whole(record.seconds)} s`);
  const mix = { turn: "turns mixed", prefix: "student first, then teacher", teacher: "the teacher alone",
    student: "the student alone" }[record.mix] || record.mix;
  const knob = known(record.kappa) ? `, kappa ${record.kappa}` : known(record.beta) && record.mix === "turn"
    ? `, beta ${record.beta}` : "";
  parts.push(make("br"), `${mix}${knob}`, record.student ? ` \u00b7 student ${visible(record.student)}` : "",
    record.teacher ? ` \u00b7 teacher ${visible(record.teacher)}` : "");
  return make("p.facts", parts);
}

function resultWords(t) {
  if (t.resolved === null) return "not graded";
  return t.resolved ? "resolved" : `not resolved${t.failure_mode ? `: ${t.failure_mode.replaceAll("_", " ")}` : ""}`;
}

function folds(record) {
  const all = [];
  if (record.patch || record.gold) {
    const both = make("div.patches",
      make("div", make("h3", "Patch of this trajectory"),
        record.patch ? diffText(record.patch) : make("p.quiet", "Nothing was changed.")),
      record.gold ? make("div", make("h3", "Gold patch"), diffText(record.gold)) : null);
    all.push(make("details.fold", make("summary", record.gold ? "Patch and gold patch" : "Patch"), both));
  }
  if (record.tests) {
    const back = record.tampered ? "; files that steer the tests were put back" : "";
    const failed = record.tests.failed.map((name) => make("li", make("code", visible(name))));
    all.push(make("details.fold",
      make("summary", `Tests: ${record.tests.passed} passed, ${record.tests.failures} failed${back}`),
      failed.length ? make("ul", failed) : null, record.tests.failures > failed.length
        ? paragraph(`and ${record.tests.failures - failed.length} more`, "quiet") : null));
  }
  if (record.system) all.push(make("details.fold", make("summary", "System prompt"),
    make("div.issue", visible(record.system))));
  return all;
}

function diffText(patch) {
  const style = (line) => (line.startsWith("@@") || /^(diff|index|---|\+\+\+) ?/.test(line) ? "hunk"
    : line.startsWith("+") ? "plus" : line.startsWith("-") ? "minus" : "");
  const lines = visible(patch.replace(/\n$/, "")).split("\n");
  const parts = lines.slice(0, 400).map((text, place) =>
    make("span", { className: style(text), textContent: place ? `\n${text}` : text }));
  if (lines.length > 400) parts.push(`\n\u2026 ${lines.length - 400} more lines`);
  return make("pre.box", parts);
}

/** The whole episode at a glance: a letter a turn, a bar under it where the label differs. */
function strip(record) {
  const buttons = record.turns.map((turn, place) => {
    const differs = turn.label && turn.label.agrees === false;
    const name = `turn ${place}, ${turn.actor}${differs ? ", the label differs" : ""}`;
    return make("button", { type: "button", className: `${turn.actor}${differs ? " differs" : ""}`,
      textContent: turn.actor === "teacher" ? "T" : "S", title: name, "aria-label": name,
      onclick: () => goToTurn(place) });
  });
  const actors = new Set(record.turns.map((turn) => turn.actor));
  const key = [actors.has("student") ? "S student" : "",
    actors.has("teacher") ? `T teacher${record.labelled ? " (its own label)" : ""}` : "",
    record.turns.some((turn) => turn.label && turn.label.agrees === false) ? "underlined: the label differs" : ""];
  return make("div.strip", { role: "group", "aria-label": "Turns" }, buttons,
    make("span", key.filter(Boolean).join(", ")));
}

function turnParts(turn, place) {
  const label = turn.label, differs = label && label.agrees === false;
  const costs = [known(turn.tokens) ? plural(turn.tokens, "token") : "",
    known(turn.logprob) ? `log p ${turn.logprob.toFixed(3)}` : "",
    turn.seconds >= 0.05 ? `${turn.seconds.toFixed(1)} s` : "",
    turn.finish_reason !== "stop" ? turn.finish_reason : ""];
  const executed = splitAction(turn.text, turn.command),
    labelled = label && known(label.text) ? splitAction(label.text) : null;
  const apart = labelled && label.text !== turn.text;
  const marks = apart ? { thought: diffWords(executed.thought, labelled.thought),
    command: diffWords(executed.command, labelled.command) } : null;
  const left = actionPart(executed, turn.actor, apart ? `executed by the ${turn.actor}` : null,
    marks && { thought: marks.thought[0], command: marks.command[0] }, turn.reasoning);
  const right = apart ? actionPart(labelled, "teacher",
    `the teacher's label${label.valid ? "" : `, not valid: ${label.reason}`}`,
    { thought: marks.thought[1], command: marks.command[1] }) : null;
  return make("section.turn", { id: `turn-${place}`, "aria-label": `Turn ${place}` },
    make("header", make("span.number", place), make("span",
      { className: `actor ${turn.actor}`, textContent: turn.actor }),
      make("span.cost", costs.filter(Boolean).map((text) => make("span", text)))),
    make("div", differs ? make("p.verdict.differs", "The teacher would have done something else.") : null,
      make("div.actions", left, right), verdict(turn, label, apart), observationPart(turn)));
}

/** In words, where there is something to say: a turn of the teacher is its own label and needs none. */
function verdict(turn, label, apart) {
  let text = "";
  if (!label) text = record.labelled ? "No label here." : "";
  else if (turn.actor === "teacher") text = apart ? "The teacher was asked again." : "";
  else if (label.agrees) text = apart ? "The label has the same command." : "The label is the same.";
  return text ? make("p.verdict", text) : null;
}

/** Thought and command of an assistant turn. An executed turn's command is on record, null if it held not just one. */
function splitAction(text, command) {
  const blocks = [...text.matchAll(/^```bash[ \t]*\n([\s\S]*?)^```[ \t]*$/gm)];
  // others are in the reasoning
  const block = blocks.find((one) => one[1].trim() === command) || blocks[blocks.length - 1];
  if (!block || command === null) return { thought: text.trim(), command: "", none: true };
  const before = text.slice(0, block.index).trimEnd(), after = text.slice(block.index + block[0].length).trim();
  return { thought: `${before}\n${after}`.trim(), command: block[1].replace(/\n$/, "") };
}

function actionPart(action, actor, title, marks, reasoning) {
  return make("div", { className: `action ${actor}` }, title ? make("h3", title) : null,
    reasoning ? make("details", make("summary", "reasoning"), make("pre", visible(reasoning))) : null,
    action.thought ? make("p.thought", marks ? marks.thought : visible(action.thought)) : null,
    action.none ? make("p.verdict", action.thought ? "No single command in it." : "Nothing was said.")
      : make("pre.command", marks ? marks.command : visible(action.command)));
}

function observationPart(turn) {
  if (!known(turn.observation)) return null;
  const text = visible(turn.observation), lines = text.split("\n");
  const notes = [turn.truncated ? "cut in the middle" : "",
    turn.observation_seconds >= 1 ? `${turn.observation_seconds.toFixed(1)} s` : ""].filter(Boolean).join(", ");
  const part = make("div.observation", make("h3", `observation${notes ? ` (${notes})` : ""}`));
  if (lines.length <= 16 && text.length <= 2400) {
    part.append(make("pre", text));
    return part;
  }
  const head = make("pre"), tail = make("pre"), button = make("button", { type: "button", className: "unfold" });
  const start = lines.slice(0, 8).join("\n").slice(0, 1000), end = lines.slice(-4).join("\n").slice(-500);
  const fold = (folded) => {
    head.textContent = folded ? start : text;
    tail.textContent = folded ? end : "";
    button.textContent = folded ? (lines.length > 12 ? `show all ${whole(lines.length)} lines`
      : `show all ${whole(text.length)} characters`) : "fold";
    button.setAttribute("aria-expanded", String(!folded));
  };
  button.onclick = () => fold(button.getAttribute("aria-expanded") === "true");
  fold(true);
  part.append(head, button, tail);
  return part;
}

// ---------------------------------------------------------------- what differs between two texts

/** Both texts as lists of strings and <mark> elements: the words that only this side has are marked. */
function diffWords(one, other) {
  const a = visible(one).match(/\s+|\w+|[^\w\s]/g) || [], b = visible(other).match(/\s+|\w+|[^\w\s]/g) || [];
  const common = commonWords(a, b);
  return [withMarks(a, common[0]), withMarks(b, common[1])];
}

/** The longest common subsequence: for each word of either side, whether it is in it. */
function commonWords(a, b) {
  const inA = new Array(a.length).fill(false), inB = new Array(b.length).fill(false);
  let start = 0, endA = a.length, endB = b.length;
  while (start < endA && start < endB && a[start] === b[start]) { inA[start] = inB[start] = true; start++; }
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) inA[--endA] = inB[--endB] = true;
  const rows = endA - start, columns = endB - start;
  if (!rows || !columns || rows * columns > 4e6) return [inA, inB]; // what is too long is marked whole
  const length = Array.from({ length: rows + 1 }, () => new Uint16Array(columns + 1));
  for (let i = rows - 1; i >= 0; i--)
    for (let j = columns - 1; j >= 0; j--)
      length[i][j] = a[start + i] === b[start + j] ? length[i + 1][j + 1] + 1
        : Math.max(length[i + 1][j], length[i][j + 1]);
  for (let i = 0, j = 0; i < rows && j < columns; ) {
    if (a[start + i] === b[start + j]) { inA[start + i++] = inB[start + j++] = true; }
    else if (length[i + 1][j] >= length[i][j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

function withMarks(words, same) {
  const parts = [];
  let marked = null, text = "";
  const flush = () => { if (text) parts.push(marked ? make("mark", text) : text); text = ""; };
  words.forEach((word, place) => {
    const blank = /^\s+$/.test(word) && place > 0 && place < words.length - 1;
    // blanks between marked words are marked too
    const mine = blank ? !same[place - 1] && !same[place + 1] : !same[place];
    if (mine !== marked) { flush(); marked = mine; }
    text += word;
  });
  flush();
  return parts;
}

// ---------------------------------------------------------------- moving about

function move(by) {
  if (!shown.length) return;
  const at = opened === null ? -1 : shown.indexOf(opened);
  const next = at < 0 ? 0 : at + by;
  if (next >= 0 && next < shown.length) openTrajectory(shown[next], 0);
}

function goToTurn(turn) {
  if (!record || turn < 0 || turn >= record.turns.length) return;
  current = turn;
  markTurn();
  const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches && Math.abs(turn - goToTurn.last) < 3;
  goToTurn.last = turn;
  $(`#turn-${turn}`).scrollIntoView({ block: "start", behavior: smooth ? "smooth" : "instant" });
  replaceHash(addressOf(trajectories[opened], turn));
}

function markTurn() {
  document.querySelectorAll("#opened .turn").forEach((part, place) =>
    part.classList.toggle("current", place === current));
  document.querySelectorAll(".strip button").forEach((button, place) => {
    if (place === current) button.setAttribute("aria-current", "step"); else button.removeAttribute("aria-current");
  });
  const strip = $(".strip"), button = strip && strip.children[current];
  // of many turns only some are seen
  if (button) strip.scrollTo(button.offsetLeft - strip.clientWidth / 2, button.offsetTop - strip.clientHeight / 2);
}

/** The next turn whose label differs; behind the last one, the first such in the trajectories that follow. */
function nextDifference() {
  const differs = (turn) => turn.label && turn.label.agrees === false;
  if (record) {
    const next = record.turns.findIndex((turn, place) =>
      (place > current || (place === 0 && current === 0 && scrollY === 0)) && differs(turn));
    if (next >= 0) return goToTurn(next);
  }
  const from = opened === null ? -1 : shown.indexOf(opened);
  const place = shown.find((candidate, position) => position > from && trajectories[candidate].differ > 0);
  if (place !== undefined) openTrajectory(place, 0)
    .then(() => { if (opened === place) goToTurn(record.turns.findIndex(differs)); });
}

function toggleObservation() {
  const button = document.querySelector(`#turn-${current} .unfold`);
  if (button) button.click();
}

const KEYS = [
  ["j", "k", "next, previous trajectory (also \u2192 \u2190, and \u2193 \u2191 in the list)"],
  ["n", "p", "next, previous turn"],
  ["d", "", "next turn whose label differs"],
  ["o", "", "show all of a long observation, or fold it"],
  ["/", "", "search"],
  ["Esc", "", "leave the search, close this, back to the list"],
  ["?", "", "this help"],
];

function makeHelp() {
  const dialog = $("#help");
  const keys = KEYS.flatMap(([one, two, text]) => [make("dt", make("kbd", one), two ? [" ", make("kbd", two)] : null),
    make("dd", text)]);
  dialog.append(make("h2", { id: "help-title", textContent: "Keys" }), make("dl", keys),
    make("button", { type: "button", textContent: "Close", onclick: () => dialog.close() }));
  const line = [["j", "k", "trajectory"], ["n", "p", "turn"], ["d", "", "next difference"], ["o", "", "unfold"],
    ["/", "", "search"], ["?", "", "help"]];
  $("#keys").append(...line.map(([one, two, text]) => make("span", make("kbd", one), " ",
    two ? [make("kbd", two), " "] : null, text)));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("#help").open) return;
  if ($("#viewer").hidden) { if (event.key === "?") $("#help").showModal(); return; }
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape") {
    if (typing) { event.preventDefault(); event.target.blur(); } // it would also empty the search
    else if (opened !== null) { closeTrajectory(); sayFilters(); }
    return;
  }
  if (typing) { if (event.key === "Enter" && event.target.id === "text") { event.target.blur(); move(1); } return; }
  const inList = event.target.id === "list";
  const actions = {
    j: () => move(1), k: () => move(-1), ArrowRight: () => move(1), ArrowLeft: () => move(-1),
    n: () => goToTurn(current + 1), p: () => goToTurn(current - 1), d: nextDifference, o: toggleObservation,
    "/": () => { if (getComputedStyle($("#choice")).display === "none") { closeTrajectory(); sayFilters();
      } $("#text").focus(); $("#text").select(); },
    "?": () => $("#help").showModal(),
    ...(inList ? { ArrowDown: () => move(1), ArrowUp: () => move(-1) } : {}),
  };
  const action = actions[event.key];
  if (action) { event.preventDefault(); action(); }
}

// ---------------------------------------------------------------- addresses, light and dark, start

function replaceHash(hash) {
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

/** Show what the address names: #section, #trajectories?filters, #trajectory/run/place/id/turn. */
function route() {
  const hash = location.hash;
  const viewer = hash.startsWith("#trajector");
  $("#viewer").hidden = !viewer;
  $("#report").hidden = viewer;
  for (const link of document.querySelectorAll(".bar nav a")) {
    if ((link.dataset.view === "viewer") === viewer) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
  }
  if (!viewer) {
    document.title = data.title;
    const section = document.getElementById(hash.slice(1));
    return section ? section.scrollIntoView() : undefined;
  }
  if (hash.startsWith("#trajectory/")) return routeTrajectory(hash);
  const words = new URLSearchParams(hash.split("?")[1] || "");
  closeTrajectory();
  if (hash.includes("?")) setFilters(Object.fromEntries(words), words.get("text") || "");
  else fillList(true);
}

function routeTrajectory(hash) {
  let parts;
  try { parts = hash.split("/").slice(1).map(decodeURIComponent); } catch { parts = []; }
  const place = byPlace.get(JSON.stringify(parts.slice(0, 3))), turn = Number.parseInt(parts[3], 10) || 0;
  if (place === undefined) {
    closeTrajectory();
    $("#viewer").classList.add("open");
    $("#opened").replaceChildren(make("p.empty", "This page has no trajectory of that address. ",
      make("a", { href: "#trajectories", textContent: "All trajectories" })));
    return;
  }
  if (place !== opened || !record) openTrajectory(place, turn);
  else if (turn !== current) goToTurn(turn);
}

function remembered(value) {
  try {
    if (value) localStorage.setItem("swe-dagger-theme", value);
    return localStorage.getItem("swe-dagger-theme");
  } catch { return null; } // no storage: the choice lasts as long as the page
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("#theme").textContent = theme === "dark" ? "Light" : "Dark";
  $("#theme").title = `Show this page ${theme === "dark" ? "light" : "dark"}`;
}

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let own = remembered();
  const follow = () => setTheme(own || (system.matches ? "dark" : "light"));
  system.addEventListener("change", follow);
  $("#theme").onclick = () => { own = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    remembered(own); follow(); };
  follow();
}

function start() {
  startTheme();
  $("#whose").textContent = visible(data.runs.map((run) => run.name).join(", "));
  showReport();
  makeFilters();
  makeHelp();
  applyFilters();
  $("#list").addEventListener("scroll", () => fillList(false), { passive: true });
  addEventListener("resize", () => fillList(false));
  addEventListener("keydown", onKey);
  addEventListener("hashchange", route);
  route();
  document.documentElement.dataset.ready = "yes";
  if (data.more_issues !== null) chunk(data.more_issues).then(searchWholeIssues);
}

/** The list holds the beginning of every issue; the search covers all of it as soon as the page is there. */
function searchWholeIssues(issues) {
  trajectories.forEach((t) => { t.text = `${t.instance_id}\n${issues[t.issue]}`.toLowerCase(); });
  if (wanted.length) applyFilters();
}

start();
