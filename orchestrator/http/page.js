"use strict";
const $ = id => document.getElementById(id);
const TARGET = 0, EMPTY = "–", RETRIES = 5, POLL_MS = 2000, HISTORY = 60;
const OWN_TEXT = 0xffffffff;
const names = new Map([[TARGET, "the target itself"], [OWN_TEXT, "the verifier, from this text"]]);
const workers = new Map();  // By address, as last heard of.
const MARKS = 4000, LANE_PX = 26, STEP_PX = 22, WIDEST_PX = 30000, MARGIN_PX = 6, LABELS_PX = 140;
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
    Object.assign(this, {speculated, started: performance.now(), first: null, count: 0, steps: 0, most: 4, ids: [], said: ""});
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
    this.most = Math.max(this.most, tokens);
    bar.style.setProperty("--tokens", tokens);
    $("bars").style.setProperty("--most", this.most);
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
    $("other").textContent = `Compare: the same ${run.speculated ? "without" : "with"} speculation`;
    $("other").hidden = false;
    return ended;
  }
  const best = Math.max(fast.rate, plain.rate), times = fast.rate / plain.rate;
  for (const [name, one] of [["fast", fast], ["plain", plain]]) {
    $(name).textContent = `${one.rate.toFixed(1)} tokens/s`;
    $(`${name}-bar`).style.width = `${100 * one.rate / best}%`;
  }
  $("times").textContent = `${times.toFixed(times < 10 ? 1 : 0)}\u00d7`;
  const same = fast.ids.join() === plain.ids.join();
  $("verdict").textContent = same ? "as fast, and the same tokens" : "as fast; other tokens, by near-ties of rounding";
  $("race").hidden = false;
  return ended;
}

function explain(error) {
  const lost = error instanceof TypeError;  // What fetch throws where nobody answers.
  $("error").textContent = lost ? "The orchestrator does not answer. Is it still running?" : `Not generated: ${error.message}`;
  $("error").hidden = false;
}

async function generate() {
  for (const id of ["count", "rate", "first", "tau", "acceptance"]) $(id).textContent = EMPTY;
  for (const id of ["output", "legend", "bars"]) $(id).replaceChildren();
  for (const id of ["error", "steps", "other", "race"]) $(id).hidden = true;
  $("summary").textContent = "";
  // On a phone the answer is below what asks for it.
  if ($("numbers").getBoundingClientRect().top > innerHeight / 2) $("numbers").scrollIntoView({behavior: "smooth"});
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
