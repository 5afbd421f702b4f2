"use strict";
// Shared helpers, and the page's curves, tables and bars. User text is only ever inserted as a text node.

const runs = JSON.parse(document.getElementById("data").textContent).runs;
const several = runs.length > 1;
const COLOURS = 8, DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const byId = (id) => document.getElementById(id);
const colour = (index) => `var(--c${index % COLOURS})`;
const isMain = (name) => name === "reward" || name.startsWith("rewards/") || name.startsWith("judges/");

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "text") made.textContent = value;
    else if (name === "class") made.className = value;
    else if (name.startsWith("aria-") || name === "role" || name === "scope" || name === "dir" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawn(tag, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

function shown(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return size >= 1000 ? String(Math.round(value)) : value.toFixed(digits);
}
const signed = (value) => value === null ? "–" : (value > 0 ? "+" : value < 0 ? "−" : "±") + shown(Math.abs(value));
const difference = (a, b) => a === null || a === undefined || b === null || b === undefined ? null : b - a;
const direction = (value) => value > 0 ? "better" : value < 0 ? "worse" : "";

// Labels of runs, numbered if several folders have the same name.
runs.forEach((run, i) => {
  run.label = runs.filter((other) => other.name === run.name).length > 1 ? `${run.name} (${i + 1})` : run.name;
});

function swatch(index) {
  const made = element("span", {class: "swatch"});
  made.style.background = colour(index);
  return made;
}

function table(head, rows, caption = null) {
  const cells = (row, tag) => row.map((cell) => {
    const content = cell !== null && typeof cell === "object" ? cell : {text: cell};
    return element(content.tag || tag, {...(content.tag === "th" ? {scope: "row"} : tag === "th" ? {scope: "col"} : {}),
      class: content.class || "", text: content.text ?? "–", title: content.title || ""});
  });
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr", {class: row.class || ""}, ...cells(row, "td"));
    body.append(line);
  }
  const made = element("table", {}, caption === null ? null : element("caption", {text: caption}),
    element("thead", {}, element("tr", {}, ...cells(head, "th"))), body);
  return element("div", {class: "scroll", tabIndex: 0, role: "region", "aria-label": caption || "table"}, made);
}

function later(title, fill) {  // a section that is filled when it is first opened
  const made = element("details", {}, element("summary", {text: title}));
  made.addEventListener("toggle", () => { if (made.open && made.children.length === 1) made.append(...fill()); });
  return made;
}

// --- scores ---------------------------------------------------------------------------------------------------------

function showScores(place, beforeOf, afterOf) {
  const sets = [...new Set(runs.flatMap((run, index) => [beforeOf(index), afterOf(index)].flatMap((one) => Object.keys(one ? one.sets : {}))))];
  const line = (run, before, after, set, score) => {
    const first = before && before !== after ? before.sets[set]?.means[score] ?? null : null, last = after?.sets[set]?.means[score] ?? null;
    if (first === null && last === null) return null;
    const report = run.comparison, same = report && before && after && report.from_step === before.step && report.to_step === after.step;
    const paired = same ? report.comparison?.[set]?.[score] ?? null : null;
    const change = paired ? paired.difference : difference(first, last), known = paired && Number.isFinite(paired.low) && Number.isFinite(paired.high);
    const sure = known && paired.n > 1 && (paired.low > 0 || paired.high < 0);
    return [{text: score, tag: "th", class: "text"}, ...(several ? [{text: run.label, class: "text"}] : []),
      {text: shown(paired ? paired.before : first), class: "n"}, {text: shown(paired ? paired.after : last), class: "n"},
      {text: change === null ? "–" : signed(change) + (known ? ` [${signed(paired.low)}, ${signed(paired.high)}]` : ""), class: `change ${sure ? direction(change) : ""}`}];
  };
  const head = ["score", ...(several ? ["run"] : []), {text: "before", class: "n"}, {text: "after", class: "n"}, {text: "change [95 %]", class: "change"}];
  const tables = (main) => sets.map((set) => {
    const names = [...new Set(runs.flatMap((run, index) => [beforeOf(index), afterOf(index)].flatMap((one) => Object.keys(one?.sets[set]?.means || {}))))].filter((name) => isMain(name) === main);
    const lines = names.flatMap((score) => runs.map((run, index) => line(run, beforeOf(index), afterOf(index), set, score)).filter((row) => row));
    return lines.length ? element("div", {}, table(head, lines, set)) : null;
  }).filter((one) => one);
  const main = tables(true), rest = tables(false);
  place.replaceChildren();
  if (!main.length && !rest.length) {
    place.append(element("p", {class: "empty", text: "No evaluations yet."}));
    return;
  }
  place.append(element("p", {class: "hint", text: "Means over the prompts of each set. Intervals are from report.json, if it compares these two steps; colored if they exclude 0."}),
    element("div", {class: "tables"}, ...main));
  if (rest.length) place.append(later("Other scores", () => [element("div", {class: "tables"}, ...tables(false))]));
}

// --- curves ---------------------------------------------------------------------------------------------------------

const WIDTH = 340, HEIGHT = 190, LEFT = 52, RIGHT = 8, TOP = 10, BOTTOM = 24;

function smoothed(points, weight) {
  let mean = 0, norm = 0;
  return points.map(([step, value]) => {
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return [step, mean / norm];
  });
}

function ticks(low, high) {
  const raw = (high - low) / 3, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).filter((size) => size <= raw * 1.0001).at(-1);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  return found;
}

function chart(title, lines, weight) {  // lines: {label, points, colour, dash}
  const steps = lines.flatMap((line) => line.points.map((point) => point[0]));
  const values = lines.flatMap((line) => line.points.map((point) => point[1]));
  let [x0, x1] = [steps, steps].map((all, i) => all.reduce((a, b) => i ? Math.max(a, b) : Math.min(a, b)));
  let [y0, y1] = [values, values].map((all, i) => all.reduce((a, b) => i ? Math.max(a, b) : Math.min(a, b)));
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  const pad = y0 === y1 ? Math.abs(y0) * 0.1 || 1 : (y1 - y0) * 0.06;
  y0 -= pad; y1 += pad;
  const x = (step) => LEFT + (step - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
  const summary = lines.map((line) => `${line.label}: ${shown(line.points[0][1])} at step ${line.points[0][0]}, ${shown(line.points.at(-1)[1])} at step ${line.points.at(-1)[0]}`).join("; ");
  const svg = drawn("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", "aria-label": `${title}. ${summary}`});
  for (const value of ticks(y0, y1)) {
    svg.append(drawn("line", {class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value)}));
    const text = Math.abs(value) >= 1e5 || value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
    svg.append(drawn("text", {x: LEFT - 5, y: y(value) + 4, "text-anchor": "end"}, text));
  }
  const marks = ticks(x0, x1).filter((step) => Number.isInteger(step));
  for (const step of marks) svg.append(drawn("text", {x: x(step), y: HEIGHT - 7, "text-anchor": x(step) > WIDTH - 25 ? "end" : "middle"}, String(step)));
  for (const line of lines) {
    const path = (points) => "M" + points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("L");
    const style = {stroke: line.colour, "stroke-dasharray": line.dash};
    const add = (kind, points) => { const made = drawn("path", {class: kind, d: path(points), "stroke-dasharray": line.dash}); made.style.stroke = style.stroke; svg.append(made); };
    if (weight > 0) add("raw", line.points);
    add("curve", weight > 0 ? smoothed(line.points, weight) : line.points);
    if (line.points.length < 12) for (const [a, b] of line.points) { const dot = drawn("circle", {cx: x(a), cy: y(b), r: 2.6}); dot.style.fill = line.colour; svg.append(dot); }
  }
  const cursor = drawn("line", {class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden"});
  svg.append(cursor);
  const read = element("div", {class: "read", "aria-live": "polite"});
  const all = [...new Set(steps)].sort((a, b) => a - b);
  let at = all.length - 1;
  const show = (index) => {
    at = Math.max(0, Math.min(all.length - 1, index));
    const place = x(all[at]);
    cursor.setAttribute("x1", place); cursor.setAttribute("x2", place); cursor.setAttribute("visibility", "visible");
    const found = lines.map((line) => [line, line.points.find((point) => point[0] === all[at])]).filter(([, point]) => point);
    read.textContent = `step ${all[at]}: ` + found.map(([line, point]) => (lines.length > 1 ? `${line.label} ` : "") + shown(point[1], 4)).join(", ");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * WIDTH;
    show(all.reduce((best, step, index) => Math.abs(x(step) - place) < Math.abs(x(all[best]) - place) ? index : best, 0));
  });
  svg.addEventListener("focus", () => show(at));
  svg.addEventListener("keydown", (event) => {
    const moves = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1};
    if (event.key in moves) { event.preventDefault(); event.stopPropagation(); show(moves[event.key]); }
  });
  return element("figure", {class: "chart"}, element("h4", {text: title}), svg, read);
}

function legend(lines) {
  return element("div", {class: "legend"}, ...lines.map((line) => {
    const mark = drawn("svg", {viewBox: "0 0 28 10", width: 28, height: 10, "aria-hidden": "true"});
    const stroke = drawn("line", {x1: 1, x2: 27, y1: 5, y2: 5, "stroke-width": line.dash === undefined ? 10 : 2.5, "stroke-dasharray": line.dash || ""});
    stroke.style.stroke = line.colour;
    mark.append(stroke);
    return element("span", {}, mark, line.label);
  }));
}

function logged(name) {
  return runs.map((run, i) => ({label: run.label, points: run.curves[name] || [], colour: colour(i), dash: ""})).filter((line) => line.points.length);
}

function evaluated(score) {  // one line per set; with several runs, color shows the run and dashes show the set
  const sets = [...new Set(runs.flatMap((run) => run.evaluations.flatMap((one) => Object.keys(one.sets))))];
  return runs.flatMap((run, i) => sets.map((set, j) => ({
    label: several ? `${run.label}, ${set}` : set, colour: colour(several ? i : j), dash: several ? DASHES[j % DASHES.length] : "",
    points: run.evaluations.map((one) => [one.step, one.sets[set]?.means[score] ?? null]).filter((point) => point[1] !== null),
  }))).filter((line) => line.points.length);
}

function showCurves(place, weight) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))];
  const scores = [...new Set(runs.flatMap((run) => run.evaluations.flatMap((one) => Object.values(one.sets).flatMap((part) => Object.keys(part.means)))))];
  const left = new Set(names.filter((name) => !(name.startsWith("eval_") && scores.length)));
  const take = (pattern) => names.filter((name) => left.has(name) && pattern.test(name) && left.delete(name));
  const grid = (charts) => element("div", {class: "chart-grid"}, ...charts);
  const open = [...place.querySelectorAll("details[open]")].map((one) => one.dataset.group);
  place.replaceChildren();
  const group = (title, charts, extra = null) => { if (charts.length) place.append(element("h3", {text: title}), ...(extra ? [extra] : []), grid(charts)); };
  const plain = (found) => found.map((name) => chart(name, logged(name), weight));
  const mainScores = scores.filter(isMain), keys = mainScores.length ? evaluated(mainScores[0]) : [];
  group("Evaluation: rewards and judges", mainScores.map((score) => chart(score, evaluated(score), 0)), keys.length > 1 ? legend(keys) : null);
  group("Training: rewards", plain(take(/^(reward|reward_std|frac_reward_zero_std|rewards\/.*\/mean|judges\/.*\/mean)$/)));
  group("Reward correlations in training", plain(take(/^reward_correlation\//)));
  group("KL divergence", plain(take(/^(kl|.*_kl)(\/|$)/)));
  group("Gradient norm", plain(take(/^grad_norm(\/|$)/)));
  group("Loss", plain(take(/^loss$|(?<!train)_loss$/)));
  const timed = take(/^seconds\/|^step_time$/);
  const folded = (title, charts, count) => {
    if (!count) return;
    const made = later(`${title} (${count})`, () => [grid(charts())]);
    made.dataset.group = title;
    place.append(made);
    if (open.includes(title)) made.open = true;
  };
  const rest = scores.filter((score) => !isMain(score));
  folded("Evaluation: other scores", () => rest.map((score) => chart(score, evaluated(score), 0)), rest.length);
  folded("Training: other logged values", () => plain([...left]), left.size);
  folded("Seconds", () => plain(timed), timed.length);
  if (!place.children.length) place.append(element("p", {class: "empty", text: "Nothing was logged yet."}));
}

// --- time line, correlations, settings, files -----------------------------------------------------------------------

function showTime(place) {
  const order = ["text", "rollout", "sampling", "decode", "rewards", "update"];
  const known = runs.flatMap((run) => run.time ? Object.keys(run.time.parts).filter((name) => !name.includes("/")) : []);
  const apart = ["evaluation", "saving"];
  const inner = [...new Set([...order, ...known])].filter((name) => known.includes(name) && !apart.includes(name) && name !== "idle");
  const parts = [...inner, ...(known.includes("idle") ? ["idle"] : [])];
  for (const run of runs) {
    if (several) place.append(element("h3", {text: run.label}));
    if (!run.time) { place.append(element("p", {class: "empty", text: "No times were logged."})); continue; }
    const {steps, parts: seconds} = run.time;
    const total = parts.reduce((sum, name) => sum + (seconds[name] || 0), 0);
    const share = (name) => (seconds[name] || 0) / total;
    const bar = element("div", {class: "bar", role: "img", "aria-label": parts.map((name) => `${name} ${(100 * share(name)).toFixed(0)} %`).join(", ")});
    parts.forEach((name, i) => {
      const made = element("div", {title: `${name} ${(100 * share(name)).toFixed(1)} %`});
      made.style.width = `${100 * share(name)}%`;
      made.style.background = name === "idle" ? "transparent" : colour(i);
      bar.append(made);
    });
    const rows = parts.flatMap((name, i) => [[name, name], ...Object.keys(seconds).filter((key) => key.startsWith(`${name}/`)).map((key) => [key, key.slice(name.length + 1)])]
      .filter(([key]) => seconds[key] !== undefined)
      .map(([key, label]) => [{text: label, tag: "th", class: key === label ? "text" : "text inner"}, {text: shown(seconds[key] / steps), class: "n"}, {text: `${(100 * seconds[key] / total).toFixed(1)} %`, class: "n"}]));
    rows.push([{text: "step", tag: "th"}, {text: shown(total / steps), class: "n"}, {text: "100 %", class: "n"}]);
    for (const name of apart.filter((name) => seconds[name] !== undefined)) rows.push([{text: `apart: ${name}`, tag: "th"}, {text: `${shown(seconds[name], 1)} in total`, class: "n"}, ""]);
    place.append(bar, legend(parts.map((name, i) => ({label: name, colour: name === "idle" ? "var(--track)" : colour(i)}))),
      table(["part", {text: "seconds per step", class: "n"}, {text: "share", class: "n"}], rows, `mean of ${steps} steps`));
  }
}

function showCorrelations(place) {
  let any = false;
  for (const run of runs) for (const [set, found] of Object.entries(run.correlations ? run.correlations.sets : {})) {
    any = true;
    const made = table(["", ...found.scores.map((score, i) => ({text: String(i + 1), class: "n", title: score}))], found.scores.map((score, i) => [{text: `${i + 1}. ${score}`, tag: "th", class: "text"}, ...found.values[i].map((r) => ({text: r === null ? "–" : r.toFixed(2), class: "n"}))]),
      `${several ? run.label + ", " : ""}${set}: Pearson's r over ${found.n} prompts at step ${run.correlations.step}`);
    [...made.querySelectorAll("tbody tr")].forEach((row, i) => [...row.querySelectorAll("td")].forEach((cell, j) => {
      const r = found.values[i][j];
      if (r !== null) cell.style.background = `rgba(var(--${r < 0 ? "negative" : "positive"}), ${(0.45 * Math.abs(r)).toFixed(3)})`;
    }));
    place.append(made);
  }
  if (!any) place.append(element("p", {class: "empty", text: "Correlations need an evaluation with at least two rewards or judges."}));
  else place.append(element("p", {class: "hint", text: "“–”: fewer than three prompts have both scores, or one is constant."}));
}

function showSettings(place, text, onlyDifferent, all) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].sort();
  const given = new Set(runs.flatMap((run) => run.given || Object.keys(run.settings)));
  const rows = names.filter((name) => (all || given.has(name)) && name.toLowerCase().includes(text.toLowerCase())).map((name) => {
    const values = runs.map((run) => run.settings[name] ?? null), differs = values.some((value) => value !== values[0]);
    const row = [{text: name, tag: "th"}, ...values.map((value) => ({text: value, class: "text"}))];
    row.class = differs ? "differs" : "";
    return onlyDifferent && !differs ? null : row;
  }).filter((row) => row);
  place.replaceChildren(rows.length ? table(["setting", ...(several ? runs.map((run) => run.label) : ["value"])], rows, "Settings")
    : element("p", {class: "empty", text: "None."}));
}

function address(run, path) {
  if (run.base === null || run.embedded[path]) return run.embedded[path] || null;
  try {
    return run.base + path.split("/").map(encodeURIComponent).join("/");
  } catch { return null; }  // not valid Unicode
}

function showFiles(place) {
  for (const run of runs) {
    if (several) place.append(element("h3", {text: run.label}));
    const groups = new Map();
    for (const [path, size] of run.files) {
      const group = path.includes("/") ? path.slice(0, path.lastIndexOf("/")) : size === null ? "checkpoints" : "";
      groups.set(group, [...(groups.get(group) || []), [path, size]]);
    }
    const list = (files) => element("ul", {class: "file-list"}, ...files.map(([path, size]) => {
      const text = size === null ? `${path}/` : path, bytes = size === null ? "" : ` ${size < 1e4 ? size + " B" : size < 1e6 ? (size / 1e3).toFixed(0) + " kB" : (size / 1e6).toFixed(1) + " MB"}`;
      const target = address({...run, embedded: {}}, path), link = target === null ? text : element("a", {href: target, text});
      return element("li", {}, link, element("span", {class: "faint", text: bytes}));
    }));
    if (run.base === null) place.append(element("p", {class: "hint", text: "This page was made for sharing as one file, so it has no links to the run's files."}));
    for (const [group, files] of [...groups].sort(([a], [b]) => a < b ? -1 : 1)) {
      if (group === "") place.append(list(files)); else place.append(later(`${group} (${files.length})`, () => [list(files)]));
    }
    if (!run.files.length) place.append(element("p", {class: "empty", text: "None."}));
  }
}
