"use strict";
const $ = id => document.getElementById(id);
const TARGET = 0, EMPTY = "–", RETRIES = 5, POLL_MS = 2000, HISTORY = 60;
const names = new Map([[TARGET, "the target itself"]]);
const workers = new Map();  // By address, as last heard of.
const MARKS = 4000, LANE_PX = 26, STEP_PX = 22, WIDEST_PX = 30000;
const lastRuns = new Map();  // By request: what came of it with speculation, and without.
let running = null, only = null, before = null, rates = [];

// The origin is spelled out: a page that was opened with a key in its address may not fetch otherwise.
const ask = (path, options) => fetch(location.origin + path, options);
const nameOf = source => names.get(source) || `drafter ${source}`;
const percent = share => `${(100 * share).toFixed(0)} %`;

function element(tag, text, parent, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  if (parent) parent.append(made);
  return made;
}

// Golden-angle hues: neighbours differ, and a source keeps its colour.
const paint = (node, source) => node.style.setProperty("--hue", (source * 137.5 + 70) % 360);

async function refused(response) {
  const told = await response.json().catch(() => null);
  const message = told && told.error ? told.error.message : `the server said ${response.status}`;
  const wait = response.headers.get("retry-after");
  return new Error(wait ? `${message} (again in ${wait} s)` : message);
}

// --- playground ---

function requestBody() {
  const chat = $("kind").value === "chat";
  const body = {
    model: $("model").value, max_tokens: +$("tokens").value, temperature: +$("temperature").value,
    seed: +$("seed").value, stream: true, stream_options: {include_usage: true}, return_token_ids: true,
  };
  if (chat) Object.assign(body, {messages: [{role: "user", content: $("prompt").value}], logprobs: true});
  else Object.assign(body, {prompt: $("prompt").value, logprobs: 0});
  return [chat ? "/v1/chat/completions" : "/v1/completions", body];
}

// Events as they come. A stream that breaks is asked for again, from the last event on.
async function* stream(path, body, signal) {
  let last = null, retries = 0;
  for (;;) {
    const headers = {"content-type": "application/json"};
    if (last) headers["last-event-id"] = last;
    try {
      const response = await ask(path, {method: "POST", headers, body: JSON.stringify(body), signal});
      if (!response.ok) throw Object.assign(await refused(response), {said: true});
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const {value, done} = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n\n");
        rest = parts.pop();
        for (const part of parts) {
          const fields = new Map(part.split("\n").map(line => line.split(/: (.*)/s, 2)));
          if (fields.get("data") === "[DONE]") return;
          const event = JSON.parse(fields.get("data"));
          if (event.error) throw Object.assign(new Error(event.error.message), {said: true});
          last = fields.get("id") || last;
          retries = 0;
          yield event;
        }
      }
      throw new TypeError("the stream broke");
    } catch (error) {
      if (error.said || error.name === "AbortError" || !last || ++retries > RETRIES) throw error;
      $("summary").textContent = "The connection broke; going on …";
      await new Promise(resolve => setTimeout(resolve, 200 * 2 ** retries));
    }
  }
}

function bytesOf(token) {
  if (token.bytes) return new Uint8Array(token.bytes);
  // What is no whole character is spelled as its bytes.
  const spelled = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(token);
  if (!spelled) return new TextEncoder().encode(token);
  return new Uint8Array(spelled[1].slice(2).split("\\x").map(byte => parseInt(byte, 16)));
}

class Run {
  constructor(speculated) {
    Object.assign(this, {speculated, started: performance.now(), first: null, count: 0, steps: 0, ids: [], said: ""});
    this.bySource = new Map();
    this.decoder = new TextDecoder();
  }

  // One span for each token, so that a character cut in two shows where it ends.
  take(choice) {
    const scored = choice.logprobs;
    this.said += (choice.delta ? choice.delta.content : choice.text) || "";
    if (!scored) return;
    const tokens = scored.content || scored.tokens, output = $("output");
    const follow = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
    tokens.forEach((token, index) => {
      const source = (choice.token_sources || [])[index] || TARGET;
      const span = element("span", this.decoder.decode(bytesOf(token), {stream: true}), output);
      if (source) {
        span.className = `guess style-${source % 4}`;
        paint(span, source);
      }
      span.dataset.source = source;
      span.title = nameOf(source);
      span.classList.toggle("faded", only !== null && only !== source);
      this.bySource.set(source, (this.bySource.get(source) || 0) + 1);
    });
    this.ids.push(...(choice.token_ids || []));
    this.count += tokens.length;
    this.steps += 1;
    this.now = performance.now();
    if (this.first === null) this.first = this.now;
    this.bar(tokens.length);
    this.show();
    if (follow) output.scrollTop = output.scrollHeight;
  }

  bar(tokens) {
    $("steps").hidden = false;
    const bar = element("i", undefined, $("bars"));
    bar.style.height = `${Math.min(100, 12 * tokens)}%`;
    bar.title = `${tokens} token${tokens > 1 ? "s" : ""}`;
  }

  get rate() { return this.count * 1000 / (this.now - this.started); }

  show() {
    $("first").textContent = `${(this.first - this.started).toFixed(0)} ms`;
    $("count").textContent = this.count;
    $("rate").textContent = this.rate.toFixed(1);
    $("tau").textContent = (this.count / this.steps).toFixed(2);
    const legend = $("legend");
    for (const [source, count] of this.bySource) {
      let item = legend.querySelector(`[data-source="${source}"]`);
      if (!item) {
        item = element("button", undefined, legend);
        item.type = "button";
        item.dataset.source = source;
        item.setAttribute("aria-pressed", only === source);
        paint(element("span", undefined, item, source ? "swatch by" : "swatch"), source);
        item.append(nameOf(source));
        element("b", "", item);
        item.addEventListener("click", () => single(source));
      }
      item.lastChild.textContent = count;
    }
  }

  // The token that ends the output is none of its text.
  end() {
    const last = $("output").lastChild, whole = $("output").textContent;
    if (!last || !last.textContent || whole !== this.said + last.textContent) return;
    last.title = `the end, ${last.textContent}: ${last.title}`;
    last.textContent = " \u25a0";
  }

  told(metrics) {
    $("tau").textContent = metrics.mean_acceptance_length.toFixed(2);
    $("acceptance").textContent = metrics.num_draft_tokens ? percent(metrics.draft_acceptance_rate) : EMPTY;
  }
}

function single(source) {
  only = only === source ? null : source;
  for (const item of $("legend").children) item.setAttribute("aria-pressed", only === +item.dataset.source);
  for (const span of $("output").querySelectorAll("span"))
    span.classList.toggle("faded", only !== null && only !== +span.dataset.source);
}

// The same request with and without speculation: is the text the same, and how much sooner did it come?
function compare(key, run, reason) {
  const ended = reason === "length" ? "Stopped at the most tokens that were asked for." : "Ended by itself.";
  const runs = lastRuns.get(key) || {};
  runs[run.speculated] = run;
  lastRuns.set(key, runs);
  const fast = runs[true], plain = runs[false];
  if (!fast || !plain) {
    const other = run.speculated ? "off" : "on";
    return `${ended} Switch speculation ${other} and generate again to compare.`;
  }
  const same = fast.ids.join() === plain.ids.join() ? "The same tokens" : "Other tokens (near-ties of rounding)";
  return `${ended} ${same} with and without speculation: ${fast.rate.toFixed(1)} and ` +
    `${plain.rate.toFixed(1)} tokens/s, ${(fast.rate / plain.rate).toFixed(2)} times.`;
}

function explain(error) {
  const lost = error instanceof TypeError;  // What fetch throws where nobody answers.
  $("error").textContent = lost ? "The orchestrator does not answer. Is it still running?" : `Not generated: ${error.message}`;
  $("error").hidden = false;
}

async function generate() {
  for (const id of ["count", "rate", "first", "tau", "acceptance"]) $(id).textContent = EMPTY;
  for (const id of ["output", "legend", "bars"]) $(id).replaceChildren();
  $("error").hidden = $("steps").hidden = true;
  $("summary").textContent = "";
  only = null;
  running = new AbortController();
  $("go").textContent = "Stop";
  $("go").classList.add("stop");
  $("output").setAttribute("aria-busy", "true");
  const [path, body] = requestBody();
  const key = path + JSON.stringify(body), run = new Run($("speculate").checked);
  let reason = null;
  try {
    const speculative = {enabled: run.speculated, timeline: true};
    for await (const event of stream(path, {...body, speculative}, running.signal)) {
      for (const choice of event.choices) {
        run.take(choice);
        reason = choice.finish_reason || reason;
        if (choice.finish_reason === "stop") run.end();
      }
      const metrics = event.metrics && event.metrics.speculative_decoding;
      if (metrics) run.told(metrics);
      if (event.metrics && event.metrics.timeline) draw(event.metrics.timeline.traceEvents);
    }
    $("summary").textContent = run.count ? compare(key, run, reason) : "The answer is empty.";
  } catch (error) {
    $("summary").textContent = run.count ? "Stopped; this is not all of it." : "";
    if (error.name !== "AbortError") explain(error);
  } finally {
    running = null;
    $("go").textContent = "Generate";
    $("go").classList.remove("stop");
    $("output").removeAttribute("aria-busy");
  }
}

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
  // A usual step is wide enough to be pointed at; whatever is longer than the page scrolls.
  const usual = steps.map(one => one.dur).sort((a, b) => a - b)[steps.length >> 1] || 1;
  const from = Math.min(...shown.map(one => one.ts)), until = Math.max(...shown.map(one => one.ts + (one.dur || 0)));
  const scale = Math.min(STEP_PX / usual, WIDEST_PX / (until - from)), width = Math.max(40, (until - from) * scale);
  const labels = $("lanes"), drawing = svg("svg", {width, height: LANE_PX * lanes.length + 18}, null, "");
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
  add("sessions", worker.sessions);
  add("verify step", verifier && worker.step_s ? `${(worker.step_s * 1000).toFixed(1)} ms` : "");
  add("KV tokens", verifier ? worker.kv_tokens_used : "");
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
  $("line").setAttribute("points", rates.map((r, i) => `${x(i)},${(29 - 27 * r / peak).toFixed(1)}`).join(" "));
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
