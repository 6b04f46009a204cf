// The open pair: its pictures large, what is known of it, its files, a link to it, and style mixing.
//
// Rules of this file:
// - The open pair and its mixing are in the state, and so in the URL. Opening, turning and closing replace the URL.
// - A mixed pair has no calibrated gate, so the page sends the threshold as max_js, and says so.

import { Refused, download, getSample, hasToken, samplePath } from "./api.js";
import { writeAddress } from "./address.js";
import { $, element, number, percent } from "./dom.js";
import { threshold, verdictOn } from "./gate.js";
import { moveNotice } from "./notice.js";
import { focusOn, seeds } from "./pairs.js";
import { Picture } from "./picture.js";
import { SEED_END, labels, state } from "./state.js";

const CANVAS = 1024; // pixels, or the model's resolution if that is larger
const FILES = { json: "", npz: ".npz", "image.png": "/image.png", "label.png": "/label.png" };

const dialog = $("open");
const picture = new Picture($("open-image"), $("open-canvas"), CANVAS);
let loading = new AbortController(); // aborts the request of the open pair when another replaces it
let shown = null; // the seed of the open pair

/** Show the pair of the state, or close the dialog if there is none. */
export function showPair() {
  if (state.pair === null) {
    dialog.close();
    return;
  }
  if (!dialog.open) {
    dialog.showModal();
    moveNotice(dialog);
  }
  shown = state.pair;
  $("open-seed").textContent = `Seed ${shown}`;
  showNeighbours();
  showMixing();
  showFiles();
  load();
}

export function openPair(seed, mixing = null) {
  Object.assign(state, { pair: seed, mixing });
  writeAddress("replaceState");
  showPair();
}

/** Draw the pictures anew after a change of the view. */
export function redrawPair() {
  picture.draw();
  if (picture.sample) describePictures();
}

/** Say which pairs lie before and after the open one. They are known as the page finds them. */
export function showNeighbours() {
  for (const [id, step] of [["open-previous", -1], ["open-next", 1]]) {
    const button = $(id);
    const missing = neighbour(step) === undefined;
    if (missing && document.activeElement === button) $("open-seed").focus(); // a disabled button loses the keyboard
    button.disabled = missing;
  }
}

function neighbour(step) {
  const place = seeds().indexOf(state.pair);
  return place < 0 ? undefined : seeds()[place + step];
}

function turn(step) {
  const seed = neighbour(step);
  if (seed !== undefined) openPair(seed);
}

// ---- The pair -------------------------------------------------------------------------------------------------------

/** The gate of a request for the pair. The service accepts no calibrated one with mixing. */
function gate() {
  return state.mixing === null ? state.gate : { max_js: threshold() ?? 0 };
}

async function load() {
  loading.abort();
  loading = new AbortController();
  const { signal } = loading;
  $("open-failure").textContent = "";
  dialog.setAttribute("aria-busy", "true");
  try {
    const sample = await getSample(state.pair, { signal, gate: gate(), include_js_map: true, ...state.mixing });
    await picture.show(sample, signal);
    describePictures();
    showFacts(sample);
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Refused)) throw error;
    $("open-failure").textContent = error.message;
  }
  dialog.setAttribute("aria-busy", "false");
}

function describePictures() {
  const { seed, js_score: score } = picture.sample;
  const mixed = picture.sample.style_seed === null ? "" : `, with the style of seed ${picture.sample.style_seed}`;
  picture.image.alt = `Generated image of seed ${seed}${mixed}: ${verdictOn(score)}, JS score ${number(score)} nats`;
  picture.canvas.setAttribute("aria-label", `${picture.describe()} of seed ${seed}${mixed}`);
}

function showFacts(sample) {
  const limit = threshold();
  const verdict = verdictOn(sample.js_score);
  dialog.dataset.verdict = verdict;
  $("open-verdict").textContent = verdict;
  const quantile = state.gate?.max_quantile;
  const asked = quantile === undefined ? "" : ` (quantile ${quantile})`;
  const facts = {
    "JS score": `${number(sample.js_score)} nats`,
    Gate: limit === null ? "none: not calibrated" : `${number(limit)} nats${asked}`,
    Model: `${sample.model}, version ${sample.model_version}`,
    ...(state.classIndex === null ? {} : { Class: state.model.generator_classes[state.classIndex] }),
    "Truncation ψ": String(sample.truncation_psi),
    ...(sample.group_id ? { "Group of its shape": sample.group_id.slice(0, 16) } : {}),
    "Model digest": sample.model_digest.slice(0, 16),
  };
  $("facts").replaceChildren(...rows(facts));
  const content = picture.content().map((value, index) => [labels()[index], value]).filter(([, value]) => value > 0);
  content.sort(([, left], [, right]) => right - left);
  $("holds").classList.toggle("long", labels().some(({ name }) => name.length > 12));
  $("holds").replaceChildren(...content.map(([{ name, rgb }, value]) => {
    const swatch = element("i");
    swatch.style.backgroundColor = rgb;
    return element("li", {}, swatch, name, element("b", { textContent: picture.label ? percent(value) : number(value) }));
  }));
}

function rows(facts) {
  return Object.entries(facts).flatMap(([term, value]) => [
    element("dt", { textContent: term }),
    element("dd", { textContent: value }),
  ]);
}

// ---- Files and the link -----------------------------------------------------------------------------------------------

/** Let the links lead to the files of the pair. Their names tell the model, the seed and the mixing. */
function showFiles() {
  const { mixing } = state;
  const ofClass = state.classIndex === null ? "" : `-class-${state.classIndex}`;
  const mixed = mixing === null ? "" : `-style-${mixing.style_seed}-from-${mixing.crossover}`;
  $("files").replaceChildren(...Object.entries(FILES).map(([ending, suffix]) => {
    const href = samplePath(state.pair, suffix, { gate: gate() ?? undefined, ...mixing });
    const link = element("a", { href, download: `${state.model.name}${ofClass}-${state.pair}${mixed}.${ending}` }, ending);
    const missing = ending === "label.png" && state.model.task === "keypoints";
    return element("li", { hidden: missing }, link);
  }));
  $("link").href = location.href;
  $("copy").textContent = "Copy link";
  $("copy").hidden = navigator.clipboard === undefined; // browsers have it in secure contexts only
}

$("files").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (link === null || !hasToken()) return;
  event.preventDefault();
  download(link).catch((error) => ($("open-failure").textContent = error.message));
});
$("link").addEventListener("click", (event) => event.preventDefault()); // the page is already there
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(location.href);
  $("copy").textContent = "Copied";
});

// ---- Style mixing -----------------------------------------------------------------------------------------------------

function showMixing() {
  const last = state.model.num_ws - 1;
  const limit = threshold();
  $("mixing").hidden = last < 1;
  $("crossover").max = last;
  $("style-seed").max = SEED_END - 1;
  $("style-seed").value = state.mixing?.style_seed ?? "";
  $("crossover").value = state.mixing?.crossover ?? Math.ceil(state.model.num_ws / 2);
  $("unmix").disabled = state.mixing === null;
  const gated = limit === null ? "." : `, so the page gives its threshold explicitly: max_js=${number(limit)}.`;
  $("mixing-gate").textContent = `Layers 1 to ${last}. The gate was measured without mixing${gated}`;
}

$("mixing").addEventListener("submit", (event) => {
  event.preventDefault();
  openPair(state.pair, { style_seed: $("style-seed").valueAsNumber, crossover: $("crossover").valueAsNumber });
});
$("unmix").addEventListener("click", () => {
  openPair(state.pair);
  $("style-seed").focus();
});

// ---- Opening, turning, closing ------------------------------------------------------------------------------------------

$("open-previous").addEventListener("click", () => turn(-1));
$("open-next").addEventListener("click", () => turn(1));
$("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step === undefined || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input")) return;
  event.preventDefault();
  turn(step);
});
dialog.addEventListener("close", () => {
  loading.abort();
  moveNotice(null);
  Object.assign(state, { pair: null, mixing: null });
  writeAddress("replaceState");
  focusOn(shown);
});
