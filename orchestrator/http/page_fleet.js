// --- fleet ---

async function models() {
  const response = await ask("/v1/models");
  if (!response.ok) throw await refused(response);
  const listed = (await response.json()).data.map(model => model.id);
  const known = [...$("model").options].map(option => option.value);
  if (listed.join() !== known.join()) $("model").replaceChildren(...listed.map(name => new Option(name, name)));
}

// The latest answer's timeline. A lane for each worker, one for the session, one for the network.
function draw(events) {
  const lanes = events.filter(one => one.ph === "M").sort((a, b) => place(a.args.name) - place(b.args.name));
  const shown = events.filter(one => one.ph !== "M").slice(0, MARKS);
  const steps = shown.filter(one => one.name === "verify step");
  if (!steps.length) return;
  // A usual step is wide enough to be pointed at; what is longer than the page scrolls, what is shorter fills it.
  const usual = steps.map(one => one.dur).sort((a, b) => a - b)[steps.length >> 1] || 1;
  const from = Math.min(...shown.map(one => one.ts)), until = Math.max(...shown.map(one => one.ts + (one.dur || 0)));
  const page = document.querySelector("main:not([hidden])").clientWidth - LABELS_PX - 2 * MARGIN_PX;
  const scale = Math.min(Math.max(STEP_PX / usual, page / (until - from)), WIDEST_PX / (until - from));
  const width = (until - from) * scale + 2 * MARGIN_PX, height = LANE_PX * lanes.length + 18;
  const labels = $("lanes"), drawing = svg("svg", {width, height, viewBox: `${-MARGIN_PX} 0 ${width} ${height}`}, null, "");
  labels.replaceChildren();
  lanes.forEach((lane, index) => {
    const worker = workers.get(lane.args.name);
    element("div", worker ? worker.role : lane.args.name, labels).title = worker ? `${worker.model} at ${worker.address}` : "";
    for (const one of shown.filter(one => one.pid === lane.pid)) mark(one, worker, index * LANE_PX, from, scale, drawing);
  });
  const tick = [1e3, 1e4, 1e5, 1e6, 1e7].find(one => one * scale > 70) || 1e8;
  for (let at = Math.ceil(from / tick) * tick; at <= until; at += tick) {
    svg("path", {d: `M${(at - from) * scale},0V${LANE_PX * lanes.length}`}, drawing, "", "tick");
    svg("text", {x: (at - from) * scale + 3, y: LANE_PX * lanes.length + 13}, drawing, `${at / 1000} ms`);
  }
  const busy = steps.reduce((sum, one) => sum + one.dur, 0) / (until - from);
  const drafts = shown.filter(one => one.name === "draft step").length;
  const hits = steps.filter(one => one.args.guessed).length;
  $("timeline-summary").textContent = `${steps.length} verify steps, ${hits} of them with guesses that were right; ` +
    `${drafts} draft steps. The verifier was busy ${percent(Math.min(1, busy))} of the time.`;
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", $("timeline-summary").textContent);
  $("lanes-scroll").replaceChildren(drawing);
  $("timeline").hidden = false;
  $("no-timeline").hidden = true;
}

const place = name => name === "session" ? 0 : name === "network" ? 3 : (workers.get(name) || {}).role === "verifier" ? 1 : 2;

function mark(one, worker, top, from, scale, drawing) {
  const x = (one.ts - from) * scale, told = Object.entries(one.args).map(([name, value]) => `${name} ${value}`).join(", ");
  const took = one.dur === undefined ? "" : ` ${(one.dur / 1000).toFixed(2)} ms`;
  const title = `${one.name}${took}${told && `: ${told}`}`;
  if (one.ph === "i") {
    const kind = one.name.startsWith("hit") ? "hit" : one.name === "miss" ? "miss" : "decision";
    svg("circle", {cx: x, cy: top + LANE_PX / 2, r: 4}, drawing, title, kind);
    return;
  }
  const kind = one.name === "verify step" ? "verifying" : one.name === "draft step" ? "drafting" : "travelling";
  const box = svg("rect", {x, y: top + 4, width: Math.max(1, one.dur * scale), height: LANE_PX - 8, rx: 2}, drawing, title, kind);
  if (worker && worker.source) paint(box, worker.source);
}

function svg(tag, attributes, parent, title, className) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (className) made.setAttribute("class", className);
  if (tag === "text") made.textContent = title;
  else if (title) made.append(Object.assign(document.createElementNS("http://www.w3.org/2000/svg", "title"), {textContent: title}));
  if (parent) parent.append(made);
  return made;
}

function row(worker) {
  const made = element("tr"), verifier = worker.role === "verifier";
  const add = (label, text) => {
    const cell = element("td", text, made);
    cell.dataset.label = label;
    return cell;
  };
  const role = add("role", "");
  if (worker.source) paint(element("span", undefined, role, "swatch by"), worker.source);
  role.append(worker.role);
  add("model", worker.model || "?");
  add("address", worker.address);
  const state = add("state", worker.state);
  if (worker.reason) element("small", worker.reason, state);
  if (worker.state !== "ready") state.className = "bad";
  add("sessions", worker.sessions_max ? `${worker.sessions} of ${worker.sessions_max}` : worker.sessions);
  add("accepted", worker.draft_tokens ? percent(worker.accepted_tokens / worker.draft_tokens) : "").title =
    worker.draft_tokens ? `${worker.accepted_tokens} of ${worker.draft_tokens} guesses` : "";
  add("verify step", verifier && worker.step_s ? `${(worker.step_s * 1000).toFixed(1)} ms` : "");
  const share = worker.kv_used_ratio === null ? "" : ` (${percent(worker.kv_used_ratio)})`;
  add("KV tokens", verifier ? `${worker.kv_tokens_used}${share}` : "");
  add("waiting", verifier ? worker.waiting : "");
  return made;
}

function totals(state) {
  // Each step commits one token more than it accepts; `completion_tokens` counts what has ended.
  const now = performance.now(), tokens = state.rounds + state.accepted_tokens;
  if (before && tokens >= before.tokens)
    rates = [...rates, (tokens - before.tokens) * 1000 / (now - before.now)].slice(-HISTORY);
  before = {tokens, now};
  const rate = rates.length ? rates[rates.length - 1] : 0, peak = Math.max(1, ...rates);
  $("sessions").textContent = state.sessions;
  $("fleet-rate").textContent = rate.toFixed(1);
  $("fleet-tau").textContent = state.rounds ? (1 + state.accepted_tokens / state.rounds).toFixed(2) : EMPTY;
  $("fleet-acceptance").textContent = state.draft_tokens ? percent(state.accepted_tokens / state.draft_tokens) : EMPTY;
  $("fleet-tokens").textContent = state.completion_tokens;
  $("peak").textContent = rates.length ? `· peak ${peak.toFixed(0)}` : "";
  const x = index => (120 * (index + HISTORY - rates.length) / (HISTORY - 1)).toFixed(1);
  const line = rates.map((r, i) => `${x(i)},${(29 - 27 * r / peak).toFixed(1)}`).join(" ");
  $("line").setAttribute("points", line);
  $("area").setAttribute("points", rates.length ? `${x(0)},29 ${line} 120,29` : "");
}

function status(text, className) {
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").className = className;
}

async function look() {
  try {
    const response = await ask("/fleet");
    if (!response.ok) throw await refused(response);
    const state = await response.json();
    await models();
    if (state.prediction_source) names.set(state.prediction_source, "the client's prediction");
    const count = (role, model) => state.workers.filter(one => one.role === role && (!model || one.model === model) &&
      (model || one.state === "ready")).length;
    for (const one of state.workers) {
      if (!one.source) continue;
      const alone = count("drafter", one.model) === 1;
      names.set(one.source, alone ? one.model : `${one.model || "drafter"} at ${one.address}`);
    }
    workers.clear();
    for (const one of state.workers) workers.set(one.address, one);
    $("workers").replaceChildren(...state.workers.map(row));
    $("nobody").hidden = state.workers.length > 0;
    totals(state);
    const verifiers = count("verifier"), drafters = count("drafter"), s = number => number === 1 ? "" : "s";
    if (verifiers) status(`${verifiers} verifier${s(verifiers)}, ${drafters} drafter${s(drafters)}`, "ready");
    else status("no verifier is ready", "bad");
  } catch (error) {
    status(error instanceof TypeError ? "the orchestrator does not answer" : error.message, "bad");
  }
}

// --- both ---

function turn() {
  const fleet = location.hash === "#fleet";
  $("fleet").hidden = !fleet;
  $("playground").hidden = fleet;
  for (const [link, current] of [["to-fleet", fleet], ["to-playground", !fleet]])
    current ? $(link).setAttribute("aria-current", "page") : $(link).removeAttribute("aria-current");
  scrollTo(0, 0);
}

$("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) running.abort(); else generate();
});
$("other").addEventListener("click", () => {
  $("speculate").checked = !$("speculate").checked;
  if (!running) generate();
});
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) $("form").requestSubmit();
});
addEventListener("keydown", event => { if (event.key === "Escape" && running) running.abort(); });
addEventListener("hashchange", turn);
turn();
(async () => {
  for (;;) {
    await look();
    await new Promise(resolve => setTimeout(resolve, POLL_MS));
  }
})();
