// The gallery's script: it reads the URL, fetches the samples over REST and draws them.
//
// Rules of this file:
// - The URL is the whole state: a link shows everyone the same pairs, the same view and the same gate.
// - The page sends at most MAX_IN_FLIGHT requests at once, and only for pairs near the viewport. If the service is
//   busy, down or needs a token, all requests wait together.
// - The page applies the gate by the service's rule: a score passes if it is at most the threshold.
// - Data of the service enters the page as text and pixels, never as markup.

const MAX_IN_FLIGHT = 2;
const MAX_COUNT = 96;
const SEED_END = 2 ** 32;
const VIEWS = ["overlay", "label", "uncertainty"];
const MAX_PAUSE_SECONDS = 30;
const TOKEN_KEY = "labelmint-token"; // in this tab's sessionStorage: gone when the tab is closed
// The scale of /uncertainty.png: dark for agreement, bright from ln 2 nats on.
const HEAT = [[8, 6, 36], [84, 18, 110], [187, 55, 84], [249, 142, 9], [252, 255, 164]];
const MAX_JS = Math.LN2;
const CANVAS = 384; // pixels, or the model's resolution if that is larger

const $ = (id) => document.getElementById(id);
const number = (value) => String(Number(value.toPrecision(4)));

let models = [];
let model = null;
let state = { seed: 0, count: 24, view: "overlay", gate: null };
let cards = [];
let written = null; // the query string of the pairs on the page
let isolated = null; // index of the only class or keypoint to draw; null: draw all

// ---- Requests -----------------------------------------------------------------------------------------------------

class Refused extends Error {}

let pause = null; // set while all requests wait: { over: Promise, end() }
let failures = 0; // in a row

/** Fetch the JSON of a path. Retries while the service is overloaded, down or needs a token; else throws Refused. */
async function ask(path, signal) {
  for (;;) {
    await pause?.over;
    signal?.throwIfAborted();
    const token = sessionStorage.getItem(TOKEN_KEY);
    const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
    let answer, body;
    try {
      answer = await fetch(path, { headers, signal });
      body = await answer.json();
    } catch (error) {
      if (signal?.aborted) throw error;
      if (answer?.ok) throw new Refused(`The answer to ${path} is not JSON.`);
    }
    if (answer?.ok) {
      failures = 0;
      return body;
    }
    const status = answer?.status;
    if (status === 401) {
      if (token === sessionStorage.getItem(TOKEN_KEY)) pause ??= waitForToken(token !== null);
    } else if (status === undefined) {
      pause ??= waitSeconds("The service does not answer.", null);
    } else if (status === 429 || status === 503) {
      const what = status === 429 ? "The service is busy." : "The service is not ready.";
      const detail = body?.detail ? ` ${body.detail.replace(/\.?$/, ".")}` : "";
      pause ??= waitSeconds(what + detail, answer.headers.get("Retry-After"));
    } else {
      throw new Refused(body?.detail ?? `The service answered with status ${status}.`);
    }
  }
}

/** Start a pause, which `end()` ends. The notice shows the reason. */
function startPause(text, control) {
  const started = {};
  started.over = new Promise((resolve) => {
    started.end = () => {
      if (pause === started) pause = null;
      clearTimeout(started.timer);
      say("");
      resolve();
    };
  });
  say(text);
  control.hidden = false;
  return started;
}

function waitSeconds(text, retryAfter) {
  failures += 1;
  // Retry-After is either a number of seconds or a date.
  const asked = /^\d+$/.test(retryAfter ?? "") ? Number(retryAfter) : (Date.parse(retryAfter) - Date.now()) / 1000;
  const seconds = Math.max(1, Math.ceil(asked >= 0 ? asked : Math.min(MAX_PAUSE_SECONDS, 2 ** failures)));
  const started = startPause(`${text} Trying again in ${seconds} s.`, $("retry"));
  started.timer = setTimeout(started.end, seconds * 1000);
  return started;
}

function waitForToken(refused) {
  const text = refused ? "The service did not accept this access token." : "The service asks for an access token.";
  const started = startPause(text, $("token-form"));
  $("token").focus();
  return started;
}

function say(text) {
  $("notice").hidden = text === "";
  $("notice-text").textContent = text;
  $("retry").hidden = $("token-form").hidden = true;
}

$("retry").addEventListener("click", () => pause?.end());
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN_KEY, $("token").value);
  $("token").value = "";
  pause?.end();
});

// ---- The URL ------------------------------------------------------------------------------------------------------

/** Read the state from the URL. Invalid values are replaced by defaults; returns a message about them. */
function readAddress() {
  const asked = new URLSearchParams(location.search);
  const problems = [];
  const read = (name, fallback, parse, wanted) => {
    if (!asked.has(name)) return fallback;
    const value = parse(asked.get(name));
    if (value !== undefined) return value;
    problems.push(`The address asks for ${name} "${asked.get(name)}"; it must be ${wanted}.`);
    return fallback;
  };
  const between = (low, high, whole) => (text) => {
    const value = text.trim() === "" ? NaN : Number(text);
    return value >= low && value <= high && (!whole || Number.isInteger(value)) ? value : undefined;
  };
  const named = (name) => models.find((entry) => entry.name === name);
  model = read("model", models[0], named, `one of ${models.map((entry) => entry.name).join(", ")}`);
  state = {
    seed: read("seed", 0, between(0, SEED_END - 1, true), `a whole number from 0 to ${SEED_END - 1}`),
    count: read("count", 24, between(1, MAX_COUNT, true), `a whole number from 1 to ${MAX_COUNT}`),
    view: read("view", "overlay", (text) => VIEWS.find((view) => view === text), `one of ${VIEWS.join(", ")}`),
    gate: defaultGate(),
  };
  const js = read("max_js", null, between(0, Number.MAX_VALUE, false), "a number of nats, at least 0");
  const quantile = read("max_quantile", null, between(1e-9, 1, false), "above 0 and at most 1");
  if (js !== null) state.gate = { max_js: js };
  else if (quantile !== null && model.calibration) state.gate = { max_quantile: quantile };
  else if (quantile !== null) problems.push(`${model.name} is not calibrated: a gate needs max_js.`);
  return problems.join(" ");
}

function writeAddress(write) {
  const { seed, count, view, gate } = state;
  history[write](null, "", `?${new URLSearchParams({ model: model.name, seed, count, view, ...gate })}`);
  written = location.search;
}

function defaultGate() {
  return model.calibration && { max_quantile: model.calibration.threshold_quantile };
}

// ---- The gate -----------------------------------------------------------------------------------------------------

/** The score at a quantile, interpolated linearly between the 101 measured quantiles. */
function scoreAt(quantile) {
  const scores = model.calibration.quantiles;
  const place = Number((quantile * 100).toFixed(9));
  const low = Math.floor(place);
  return low >= 100 ? scores[100] : scores[low] + (scores[low + 1] - scores[low]) * (place - low);
}

/** The quantile of a score, 0 to 1. */
function quantileOf(score) {
  const scores = model.calibration.quantiles;
  const above = scores.findIndex((measured) => measured > score);
  if (above <= 0) return above === 0 ? 0 : 1;
  return (above - 1 + (score - scores[above - 1]) / (scores[above] - scores[above - 1])) / 100;
}

/** The threshold in nats, null without a gate. */
function threshold() {
  if (state.gate === null) return null;
  return state.gate.max_js ?? scoreAt(state.gate.max_quantile);
}

function showGate() {
  const limit = threshold();
  $("by-quantile").hidden = !model.calibration;
  $("max-js").value = limit === null ? "" : number(limit);
  if (model.calibration) {
    const quantile = state.gate.max_quantile ?? quantileOf(limit);
    const kept = `${Number((quantile * 100).toFixed(1))} %`;
    $("gate").value = quantile;
    $("gate").style.setProperty("--at", place(quantile));
    $("gate").setAttribute("aria-valuetext", `${kept} of seeds: JS score at most ${number(limit)} nats`);
    $("kept").textContent = kept;
  }
  cards.forEach((card) => card.judge());
  const ready = cards.filter((card) => card.sample && model.calibration);
  $("rug").replaceChildren(...ready.map((card) => {
    const tick = document.createElement("i");
    tick.style.setProperty("--at", place(quantileOf(card.sample.js_score)));
    tick.className = card.accepted ? "accepted" : "rejected";
    return tick;
  }));
  summarize();
}

/** The position of a quantile on the slider, 0 to 1. */
function place(quantile) {
  return Math.max(0, (quantile - 0.01) / 0.99);
}

let summarizing;
/** Update the summary after changes have settled, because a screen reader reads every update aloud. */
function summarize() {
  clearTimeout(summarizing);
  summarizing = setTimeout(() => {
    const ready = cards.filter((card) => card.sample);
    const limit = threshold();
    const accepted = ready.filter((card) => card.accepted).length;
    const last = cards.at(-1).seed;
    const parts = [`Seeds ${state.seed} to ${last}.`];
    if (limit === null) parts.push(`${model.name} is not calibrated: give a JS score to judge its pairs.`);
    else parts.push(`${accepted} accepted, ${ready.length - accepted} rejected at JS ≤ ${number(limit)} nats.`);
    if (ready.length < cards.length) parts.push(`${ready.length} of ${cards.length} loaded.`);
    $("summary").textContent = parts.join(" ");
  }, 300);
}

// ---- Pairs --------------------------------------------------------------------------------------------------------

class Card {
  constructor(seed) {
    this.seed = seed;
    this.near = this.loading = false;
    this.sample = this.heat = null;
    this.element = $("pair").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    [this.image, this.canvas, this.verdict] = [find("img"), find("canvas"), find(".verdict")];
    [this.score, this.meter, this.failure] = [find(".score"), find(".meter"), find(".failure")];
    find(".seed").textContent = `Seed ${seed}`;
    this.element.setAttribute("aria-busy", "true");
    find("button").addEventListener("click", () => {
      this.failure.hidden = true;
      pump();
    });
  }

  /** Whether everything that the view needs is loaded. */
  get whole() {
    return this.sample !== null && (state.view !== "uncertainty" || this.heat !== null);
  }

  get wanted() {
    return this.near && !this.loading && !this.whole && this.failure.hidden;
  }

  get accepted() {
    const limit = threshold();
    return limit === null ? null : this.sample.js_score <= limit;
  }

  async load(signal) {
    const query = new URLSearchParams({ include_rejected: true });
    if (state.view === "uncertainty") query.set("include_js_map", true);
    if (!model.calibration) query.set("max_js", 0); // the service needs a gate; the page applies its own
    const path = `v1/models/${encodeURIComponent(model.name)}/samples/${this.seed}?${query}`;
    this.loading = true;
    try {
      const sample = await ask(path, signal);
      await this.show(sample);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Refused)) throw error;
      this.failure.firstElementChild.textContent = error.message;
      this.failure.hidden = false;
      this.element.setAttribute("aria-busy", "false");
    } finally {
      this.loading = false;
    }
  }

  async show(sample) {
    const size = sample.image.height;
    this.image.src = `data:image/png;base64,${sample.image.data}`;
    await this.image.decode();
    if (sample.label) {
      const picture = await createImageBitmap(new Blob([bytes(sample.label.data)]), { colorSpaceConversion: "none" });
      this.label = layer(size).getContext("2d", { willReadFrequently: true });
      this.label.drawImage(picture, 0, 0);
    }
    if (sample.js_map) this.heat = heatLayer(new Float32Array(bytes(sample.js_map).buffer), size);
    this.sample = sample;
    this.canvas.width = this.canvas.height = Math.max(size, CANVAS);
    this.image.hidden = this.canvas.hidden = false;
    this.draw();
    showGate();
  }

  draw() {
    if (!this.sample) return;
    this.element.setAttribute("aria-busy", String(!this.whole));
    const context = this.canvas.getContext("2d");
    const side = this.canvas.width;
    context.reset();
    if (state.view === "uncertainty") {
      context.imageSmoothingEnabled = false;
      if (this.heat) context.drawImage(this.heat, 0, 0, side, side);
      return;
    }
    if (state.view === "overlay") context.drawImage(this.image, 0, 0, side, side);
    if (this.label) this.drawLabel(context, side);
    else this.drawKeypoints(context, side);
  }

  drawLabel(context, side) {
    const size = this.sample.label.height;
    const pixels = this.label.getImageData(0, 0, size, size);
    if (isolated !== null) {
      const [r, g, b] = colour(labels()[isolated].rgb);
      for (let i = 0; i < pixels.data.length; i += 4) {
        const same = pixels.data[i] === r && pixels.data[i + 1] === g && pixels.data[i + 2] === b;
        if (!same) pixels.data[i + 3] = 0;
      }
    }
    const drawn = layer(size);
    drawn.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.globalAlpha = state.view === "overlay" ? 0.6 : 1;
    context.drawImage(drawn, 0, 0, side, side);
  }

  drawKeypoints(context, side) {
    const scale = side / this.sample.image.height;
    this.sample.keypoints.forEach(({ x, y }, index) => {
      if (isolated !== null && isolated !== index) return;
      for (const [radius, fill] of [[10, "#fafaf8"], [8, "#1c1e24"], [6, labels()[index].rgb]]) {
        context.beginPath();
        context.arc((x + 0.5) * scale, (y + 0.5) * scale, (radius * side) / CANVAS, 0, 2 * Math.PI);
        context.fillStyle = fill;
        context.fill();
      }
    });
  }

  /** Update the verdict, the score and the text alternatives of the pictures. */
  judge() {
    if (!this.sample) return;
    const { js_score: score } = this.sample;
    const limit = threshold();
    const verdict = limit === null ? "not judged" : this.accepted ? "accepted" : "rejected";
    const end = model.calibration?.quantiles[100] ?? Math.max(...cards.map((card) => card.sample?.js_score ?? 0));
    this.element.dataset.verdict = verdict;
    this.verdict.textContent = verdict;
    this.score.textContent = `JS ${number(score)}${limit === null ? "" : ` ${this.accepted ? "≤" : ">"} ${number(limit)}`}`;
    this.meter.style.setProperty("--score", Math.min(1, score / end));
    this.meter.style.setProperty("--gate", limit === null ? 0 : Math.min(1, limit / end));
    const evidence = `${verdict}, JS score ${number(score)} nats${limit === null ? "" : `, gate ${number(limit)}`}`;
    this.image.alt = `Generated image of seed ${this.seed}: ${evidence}`;
    this.canvas.setAttribute("aria-label", `${this.describe()} of seed ${this.seed}`);
  }

  describe() {
    if (state.view === "uncertainty") return "Uncertainty of each pixel";
    const shown = isolated === null ? (this.label ? "Label" : capitalized(model.task)) : `${labels()[isolated].name} alone, label`;
    return state.view === "overlay" ? `${shown} over the image` : shown;
  }
}

/** The label names of the model, with their colours. The fields of other tasks (`classes`, `..._classes`) are empty. */
function labels() {
  return Object.keys(model).filter((name) => name.endsWith("classes")).flatMap((name) => model[name]);
}

function capitalized(word) {
  return word[0].toUpperCase() + word.slice(1);
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function colour(rgb) {
  return [1, 3, 5].map((at) => parseInt(rgb.slice(at, at + 2), 16));
}

function layer(size) {
  return Object.assign(document.createElement("canvas"), { width: size, height: size });
}

function heatLayer(nats, size) {
  const drawn = layer(size);
  const pixels = new ImageData(size, size);
  nats.forEach((value, index) => {
    const at = Math.min(1, Math.max(0, value / MAX_JS)) * (HEAT.length - 1);
    const low = Math.min(HEAT.length - 2, Math.floor(at));
    for (let c = 0; c < 3; c += 1) {
      pixels.data[4 * index + c] = Math.round(HEAT[low][c] + (HEAT[low + 1][c] - HEAT[low][c]) * (at - low));
    }
    pixels.data[4 * index + 3] = 255;
  });
  drawn.getContext("2d").putImageData(pixels, 0, 0);
  return drawn;
}

let turning = new AbortController(); // aborts the requests of the current pairs when others replace them
let inFlight = 0;

const viewport = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const card = cards.find((candidate) => candidate.element === entry.target);
    if (card) card.near = entry.isIntersecting;
  }
  pump();
}, { rootMargin: "400px" });

function pump() {
  while (inFlight < MAX_IN_FLIGHT) {
    const card = cards.find((candidate) => candidate.wanted);
    if (card === undefined) return;
    inFlight += 1;
    card.load(turning.signal).finally(() => {
      inFlight -= 1;
      pump();
    });
  }
}

// ---- The page -----------------------------------------------------------------------------------------------------

/** Replace the pairs on the page by those of the current state. */
function layOut() {
  turning.abort();
  turning = new AbortController();
  viewport.disconnect();
  const count = Math.min(state.count, SEED_END - state.seed);
  cards = Array.from({ length: count }, (_, index) => new Card(state.seed + index));
  $("pairs").replaceChildren(...cards.map((card) => card.element));
  cards.forEach((card) => viewport.observe(card.element));
  $("model").value = model.name;
  $("seed").value = state.seed;
  $("count").value = state.count;
  $("previous").disabled = state.seed === 0;
  $("next").disabled = state.seed + state.count >= SEED_END;
  document.title = `${model.name}, seeds ${state.seed} to ${cards.at(-1).seed} · labelmint`;
  $("about").textContent =
    `${model.name}: ${model.task}, ${model.resolution} × ${model.resolution} pixels, labelled by ${model.num_heads} heads`;
  const measured = model.calibration
    ? `gate measured over ${model.calibration.seed_count} seeds at truncation ψ ${model.calibration.truncation_psi}`
    : "not calibrated";
  $("provenance").textContent = `Model digest ${model.digest.slice(0, 16)} · version ${model.version} · ${measured}`;
  isolated = null;
  showView();
  showGate();
}

function showView() {
  document.querySelector(`input[name=view][value=${state.view}]`).checked = true;
  $("legend").replaceChildren(...(state.view === "uncertainty" ? heatLegend() : labels().map(legendEntry)));
  cards.forEach((card) => {
    card.draw();
    card.judge();
  });
  pump();
}

function legendEntry(entry, index) {
  const button = document.createElement("button");
  const swatch = document.createElement("i");
  swatch.style.backgroundColor = entry.rgb;
  button.type = "button";
  button.append(swatch, entry.name);
  button.title = `Show ${entry.name} alone`;
  button.setAttribute("aria-pressed", isolated === index);
  button.addEventListener("click", () => {
    isolated = isolated === index ? null : index;
    showView();
    $("legend").children[index].focus();
  });
  return button;
}

function heatLegend() {
  const bar = document.createElement("i");
  bar.className = "heat";
  bar.style.backgroundImage = `linear-gradient(to right, ${HEAT.map((rgb) => `rgb(${rgb})`).join()})`;
  const text = (words) => Object.assign(document.createElement("span"), { textContent: words });
  const most = model.task === "keypoints" ? "summed over the keypoints" : "two halves of them disagree";
  return [text("0 nats: the heads agree"), bar, text(`${number(MAX_JS)} nats (ln 2): ${most}`)];
}

function turn(seed) {
  state.seed = Math.min(Math.max(0, seed), SEED_END - 1);
  writeAddress("pushState");
  layOut();
}

$("controls").addEventListener("submit", (event) => event.preventDefault());
$("model").addEventListener("change", () => {
  model = models.find((entry) => entry.name === $("model").value);
  state.gate = defaultGate();
  turn(state.seed);
});
for (const name of ["seed", "count"]) {
  $(name).addEventListener("change", () => {
    if (!$(name).reportValidity()) return;
    state[name] = $(name).valueAsNumber;
    turn(state.seed);
  });
}
$("previous").addEventListener("click", () => turn(state.seed - state.count));
$("next").addEventListener("click", () => turn(state.seed + state.count));
$("gate").addEventListener("input", () => {
  state.gate = { max_quantile: $("gate").valueAsNumber };
  writeAddress("replaceState");
  showGate();
});
$("max-js").addEventListener("change", () => {
  if (!$("max-js").reportValidity()) return;
  state.gate = $("max-js").value === "" ? defaultGate() : { max_js: $("max-js").valueAsNumber };
  writeAddress("replaceState");
  showGate();
});
document.querySelectorAll("input[name=view]").forEach((radio) => {
  radio.addEventListener("change", () => {
    state.view = radio.value;
    writeAddress("replaceState");
    showView();
  });
});
window.addEventListener("popstate", () => {
  if (location.search === written) return; // only the fragment changed
  written = location.search;
  say(readAddress());
  layOut();
});

async function start() {
  ({ models } = await ask("v1/models"));
  $("model").replaceChildren(...models.map((entry) => new Option(entry.name, entry.name)));
  $("chosen").disabled = $("gated").hidden = false;
  const problems = readAddress();
  writeAddress("replaceState");
  layOut();
  say(problems);
}

start().catch((error) => say(error.message));
