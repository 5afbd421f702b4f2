
// --- choice of the evaluations before and after ---------------------------------------------------------------------

const PAGE_SIZE = several ? 8 : 12;
const PLAYED = "▶ Play all", PAUSED = "❚❚ Pause";
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const scored = runs.map((run) => run.evaluations.filter((one) => Object.values(one.sets).every((part) => part.scores)));

function chosen(index, which) {
  const value = byId(which).value, all = scored[index];
  if (value !== "auto") return all.find((one) => one.step === Number(value)) || null;
  if (which === "before") return all[0] || null;
  const saved = runs[index].comparison?.to_step;
  return all.find((one) => one.step === saved) || all.at(-1) || null;
}

function options(select, entries) {
  const value = select.value;
  select.replaceChildren(...entries.map(([key, text]) => element("option", {value: key, text})));
  if (entries.some(([key]) => key === value)) select.value = value;
}

// --- rows: a prompt with the results of each run --------------------------------------------------------------------

function rowsOf() {
  const rows = new Map();
  runs.forEach((run, index) => {
    for (const which of ["before", "after"]) {
      const evaluation = chosen(index, which);
      for (const [set, part] of Object.entries(evaluation ? evaluation.sets : {})) {
        const seen = new Map();
        run.prompts[part.prompts].forEach((prompt, row) => {
          const count = seen.get(prompt) || 0;  // a set may repeat a prompt
          seen.set(prompt, count + 1);
          const key = JSON.stringify([set, prompt, count]);
          if (!rows.has(key)) rows.set(key, {set, prompt, row, order: rows.size, runs: runs.map(() => ({}))});
          rows.get(key).runs[index][which] = {step: evaluation.step, video: part.videos[row] || null,
            scores: Object.fromEntries(Object.entries(part.scores).map(([name, values]) => [name, values[row] ?? null]))};
        });
      }
    }
  });
  for (const row of rows.values()) for (const one of row.runs) if (one.before && one.after && one.before.step === one.after.step) delete one.before;
  return [...rows.values()];
}

let rows = [], limit = PAGE_SIZE;
const hasVideo = (row) => row.runs.some((one) => one.before?.video || one.after?.video);
const scoreOf = (row, which, name = byId("score").value) => row.runs[Number(byId("run").value)]?.[which]?.scores[name] ?? null;
const changeOf = (row) => difference(scoreOf(row, "before"), scoreOf(row, "after"));
const lastOf = (row) => scoreOf(row, "after") ?? scoreOf(row, "before");

const SORTS = {
  order: ["as evaluated", (row) => row.order, 1], best: ["change: best first", changeOf, -1], worst: ["change: worst first", changeOf, 1],
  high: ["score after: highest first", lastOf, -1], low: ["score after: lowest first", lastOf, 1],
  "before-high": ["score before: highest first", (row) => scoreOf(row, "before"), -1],
  "before-low": ["score before: lowest first", (row) => scoreOf(row, "before"), 1],
  prompt: ["prompt: A to Z", (row) => row.prompt.toLowerCase(), 1], set: ["set", (row) => row.set, 1],
};

function filtered() {
  const set = byId("set").value, text = byId("prompt").value.trim().toLowerCase(), change = byId("change").value;
  const bound = (id) => byId(id).value === "" ? null : Number(byId(id).value), low = bound("from"), high = bound("to");
  const [, key, sign] = SORTS[byId("sort").value];
  return rows.filter((row) => {
    const value = lastOf(row), moved = changeOf(row);
    return (set === "all" || row.set === JSON.parse(set)) && row.prompt.toLowerCase().includes(text)
      && (!byId("with-video").checked || hasVideo(row)) && (low === null || value !== null && value >= low)
      && (high === null || value !== null && value <= high)
      && (change === "any" || moved !== null && (change === "same" ? moved === 0 : change === "better" ? moved > 0 : moved < 0));
  }).sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order;  // rows without a score go last
    return x < y ? -sign : x > y ? sign : a.order - b.order;
  });
}

// --- cards ----------------------------------------------------------------------------------------------------------

function figure(run, row, one, name) {
  const score = byId("score").value, caption = element("figcaption", {}, `${name}, step ${one.step}`, element("b", {text: shown(one.scores[score])}));
  const source = one.video && address(run, one.video);
  if (!source) return element("figure", {}, element("div", {class: "no-video", text: one.video ? "video not in this file" : "no video"}), caption);
  const video = element("video", {muted: true, playsInline: true, preload: "auto", title: "click: play or pause all"});
  video.setAttribute("aria-label", `${several ? run.label + ", " : ""}${name}, step ${one.step}: ${row.prompt.slice(0, 200)}`);
  video.dataset.source = source;
  video.addEventListener("error", () => video.replaceWith(element("div", {class: "no-video", text: "the video could not be loaded"})));
  video.addEventListener("click", () => player.toggle());
  player.add(video);
  return element("figure", {}, video, caption);
}

function card(row) {
  const made = element("article", {class: "card"}), title = element("h3", {text: row.prompt || "(empty prompt)", dir: "auto"});
  made.append(title);
  if (row.prompt.length > 160 || row.prompt.split("\n").length > 3) {
    const all = element("button", {type: "button", class: "text-button", text: "full prompt", "aria-expanded": "false"});
    title.classList.add("short");
    all.addEventListener("click", () => {
      const short = title.classList.toggle("short");
      all.textContent = short ? "full prompt" : "less";
      all.setAttribute("aria-expanded", String(!short));
    });
    made.append(all);
  }
  made.append(element("p", {class: "meta", dir: "auto", text: `${row.set}, row ${row.row + 1}`}));
  const both = byId("show-before").checked, place = element("div", {class: "runs"});
  row.runs.forEach((one, index) => {
    if (!one.before && !one.after) return;
    const block = element("div"), pair = element("div", {class: "pair"}), run = runs[index];
    if (several) block.append(element("p", {class: "run-name"}, swatch(index), run.label));
    if (one.before && (both || !one.after)) pair.append(figure(run, row, one.before, "before"));
    if (one.after) pair.append(figure(run, row, one.after, one.before ? "after" : "evaluated"));
    const score = byId("score").value, moved = difference(one.before?.scores[score], one.after?.scores[score]);
    block.append(pair);
    if (moved !== null) block.append(element("p", {class: "delta"}, `${score} `, element("span", {class: direction(moved), text: `${signed(moved)}${moved > 0 ? " ▲" : moved < 0 ? " ▼" : ""}`})));
    place.append(block);
  });
  const names = [...new Set(row.runs.flatMap((one) => [...Object.keys(one.before?.scores || {}), ...Object.keys(one.after?.scores || {})]))];
  made.append(place, later("all scores", () => [table([...(several ? ["run"] : []), "score", {text: "before", class: "n"}, {text: "after", class: "n"}, {text: "change", class: "n"}],
    row.runs.flatMap((one, index) => names.map((name) => {
      const a = one.before?.scores[name] ?? null, b = one.after?.scores[name] ?? null;
      if (a === null && b === null) return null;
      return [...(several ? [runs[index].label] : []), {text: name, tag: "th"}, {text: shown(a), class: "n"}, {text: shown(b), class: "n"}, {text: signed(difference(a, b)), class: "n"}];
    }).filter((line) => line)), "Scores of this prompt")]));
  return made;
}

function showCards() {
  const found = filtered(), some = found.slice(0, limit);
  player.clear();
  byId("cards").replaceChildren(...some.map(card));
  byId("count").textContent = !rows.length ? "No evaluations or samples yet." :
    `${found.length} of ${rows.length} prompts` + (some.length < found.length ? `, showing the first ${some.length}` : "")
    + (rows.some(hasVideo) ? `; ${found.filter(hasVideo).length} with video.` : "; none has a video.");
  byId("more").hidden = some.length === found.length;
}

// --- players: all follow one clock ----------------------------------------------------------------------------------

const player = {
  time: 0, duration: 0, playing: false, last: 0, checked: 0, near: new Set(),
  observer: new IntersectionObserver((entries) => entries.forEach(({target, isIntersecting}) => isIntersecting ? player.enter(target) : player.leave(target)), {rootMargin: "300px"}),
  speed: () => Number(byId("speed").value),
  frame: 1 / (Math.max(...runs.map((run) => run.fps || 0)) || 8),

  add(video) {
    video.addEventListener("loadedmetadata", () => {
      video.style.setProperty("--ratio", `${video.videoWidth} / ${video.videoHeight}`);
      if (Number.isFinite(video.duration) && video.duration > this.duration) {
        this.duration = video.duration;
        byId("scrub").max = Math.max(0, this.duration - this.frame);
        this.show();
      }
      this.follow(video);
    });
    this.observer.observe(video);
  },
  clear() { this.observer.disconnect(); for (const video of this.near) video.pause(); this.near.clear(); },
  enter(video) { if (!video.getAttribute("src")) video.src = video.dataset.source; this.near.add(video); this.follow(video); },
  leave(video) { video.pause(); this.near.delete(video); },

  follow(video) {  // set a video to the clock's time; play it while the clock runs
    if (video.readyState < 1) return;
    const end = Math.max(0, video.duration - 0.001), time = Math.min(this.time, end);
    const runs = this.playing && this.time < end;
    if (!runs) video.pause();  // pause before setting the time: a playing video would move past it
    if (Math.abs(video.currentTime - time) > (runs ? 0.12 : 1e-5)) video.currentTime = time;
    video.playbackRate = this.speed();
    if (runs && video.paused) video.play().catch(() => {});
  },
  tick(now) {
    if (!this.playing) return;
    this.time += Math.min(0.25, (now - this.last) / 1000) * this.speed();
    this.last = now;
    if (this.duration && this.time >= this.duration) {
      if (calm.matches) { this.time = this.duration - this.frame; this.set(false); return; }  // play once, do not loop
      this.time = 0;
      this.near.forEach((video) => this.follow(video));
    } else if (now - this.checked > 200) {
      this.checked = now;
      this.near.forEach((video) => this.follow(video));
    }
    this.show();
    requestAnimationFrame((next) => this.tick(next));
  },
  set(playing) {
    if (playing && this.duration && this.time >= this.duration - this.frame * 1.01) this.time = 0;
    if (!playing && this.playing) this.time = Math.max(0, Math.min(this.duration - this.frame, Math.round(this.time / this.frame) * this.frame));
    const start = playing && !this.playing;
    this.playing = playing;
    byId("play").textContent = playing ? PAUSED : PLAYED;
    byId("play").setAttribute("aria-pressed", String(playing));
    this.near.forEach((video) => this.follow(video));
    this.show();
    if (start) { this.last = performance.now(); requestAnimationFrame((now) => this.tick(now)); }
  },
  toggle() { this.set(!this.playing); },
  seek(time) {
    this.time = Math.max(0, Math.min(Math.max(0, this.duration - this.frame), time));
    this.near.forEach((video) => this.follow(video));
    this.show();
  },
  show() {
    byId("scrub").value = this.time;
    byId("scrub").setAttribute("aria-valuetext", `${this.time.toFixed(2)} seconds`);
    byId("clock").textContent = `${this.time.toFixed(2)} / ${this.duration.toFixed(2)} s`;
  },
};

document.addEventListener("keydown", (event) => {
  const at = event.target, tag = at.tagName;
  if (event.ctrlKey || event.metaKey || event.altKey || tag === "SELECT" || tag === "TEXTAREA" || (tag === "INPUT" && at.type !== "range" && at.type !== "checkbox")) return;
  if (tag === "INPUT" && at.type === "range" && at.id !== "scrub") return;
  if (event.key === " " && !["BUTTON", "SUMMARY", "A"].includes(tag) && at.type !== "checkbox") player.toggle();
  else if (!player.duration || at.closest?.(".scroll")) return;
  else if (event.key === "ArrowLeft" || event.key === "ArrowRight") { player.set(false); player.seek(player.time + (event.key === "ArrowLeft" ? -1 : 1) * player.frame); }
  else if ((event.key === "Home" || event.key === "End") && at.id === "scrub") { player.set(false); player.seek(event.key === "Home" ? 0 : player.duration); }
  else return;
  event.preventDefault();
});

// --- fill the page ----------------------------------------------------------------------------------------------------

function showEvaluations() {
  rows = rowsOf();
  showCards();
  showScores(byId("score-tables"), (index) => chosen(index, "before"), (index) => chosen(index, "after"));
}

function begin() {
  const title = runs.map((run) => run.label).join(" · ");
  document.title = byId("title").textContent = title;
  runs.forEach((run) => {
    const facts = [several ? run.label : null, run.trainer, run.model,
      run.step === null ? "no step yet" : run.max_steps ? `step ${run.step} of ${run.max_steps}${run.step < run.max_steps ? " (not finished)" : ""}` : `step ${run.step}`,
      `${run.evaluations.length} evaluation${run.evaluations.length === 1 ? "" : "s"}`];
    byId("about").append(element("ul", {class: "facts"}, ...facts.filter((text) => text !== null).map((text) => element("li", {text, dir: "auto"}))));
    byId("notes").append(...run.notes.map((text) => element("li", {text: several ? `${run.label}: ${text}` : text})));
  });
  byId("notes").hidden = !byId("notes").children.length;
  const parts = runs.flatMap((run) => run.evaluations.flatMap((one) => Object.entries(one.sets)));
  const steps = [...new Set(scored.flatMap((all) => all.map((one) => one.step)))].sort((a, b) => a - b).map((step) => [String(step), `step ${step}`]);
  options(byId("set"), [["all", "all sets"], ...[...new Set(parts.map(([name]) => name))].map((name) => [JSON.stringify(name), name])]);
  options(byId("score"), [...new Set(parts.flatMap(([, part]) => Object.keys(part.means)))].map((name) => [name, name]));
  options(byId("sort"), Object.entries(SORTS).map(([key, [text]]) => [key, text]));
  options(byId("run"), runs.map((run, index) => [String(index), run.label]));
  options(byId("before"), [["auto", "first"], ...steps]);
  options(byId("after"), [["auto", "last, or saved"], ...steps]);
  byId("run-label").hidden = byId("differences-label").hidden = true;
  if (several) byId("run-label").hidden = byId("differences-label").hidden = false;
  byId("cards").classList.toggle("wide", several);
  byId("filters").open = innerWidth > 640;
  byId("scrub").step = player.frame;
  rows = rowsOf();
  const start = () => { byId("with-video").checked = rows.some(hasVideo); byId("show-before").checked = true; };
  start();
  showEvaluations();
  showCurves(byId("charts"), 0);
  if (several) byId("legend").append(legend(runs.map((run, index) => ({label: run.label, colour: colour(index)}))));
  showTime(byId("time-lines"));
  showCorrelations(byId("correlation-tables"));
  showFiles(byId("file-lists"));
  const settings = () => showSettings(byId("setting-table"), byId("setting").value, byId("differences").checked, byId("defaults").checked);
  settings();

  const again = () => { limit = PAGE_SIZE; showCards(); };
  for (const id of ["set", "score", "sort", "change", "from", "to", "run", "with-video", "show-before"]) byId(id).addEventListener("change", again);
  for (const id of ["prompt", "from", "to"]) byId(id).addEventListener("input", again);
  for (const id of ["before", "after"]) byId(id).addEventListener("change", showEvaluations);
  byId("reset").addEventListener("click", () => {
    for (const select of byId("filters").querySelectorAll("select")) select.selectedIndex = 0;
    for (const input of byId("filters").querySelectorAll("input:not([type=checkbox])")) input.value = "";
    start(); limit = PAGE_SIZE; showEvaluations();
  });
  byId("more").addEventListener("click", () => { limit += PAGE_SIZE; showCards(); });
  byId("play").addEventListener("click", () => player.toggle());
  byId("scrub").addEventListener("input", () => { const time = Number(byId("scrub").value); player.set(false); player.seek(time); });
  byId("speed").addEventListener("change", () => player.near.forEach((video) => player.follow(video)));
  byId("setting").addEventListener("input", settings);
  for (const id of ["differences", "defaults"]) byId(id).addEventListener("change", settings);
  let timer = 0;
  byId("smoothing").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => showCurves(byId("charts"), Number(byId("smoothing").value)), 60); });
  player.show();
}

begin();
