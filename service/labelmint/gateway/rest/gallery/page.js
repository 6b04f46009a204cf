// The gallery's page: it reads the URL, shows the pairs, and lets the controls change the state.
//
// Rules of this file:
// - Each control changes the state, writes the URL and shows what has changed, in this order.
// - The gate and the view need no new pairs. Everything else lays the page out anew.

import { changed, choose, readAddress, writeAddress } from "./address.js";
import { listModels } from "./api.js";
import { showConditions, wireConditions } from "./conditions.js";
import { openPair, redrawPair, showNeighbours, showPair } from "./dialog.js";
import { $, element, number } from "./dom.js";
import { defaultGate, quantileOf, threshold, verdictOn } from "./gate.js";
import { say } from "./notice.js";
import * as pairs from "./pairs.js";
import { HEAT, MAX_JS } from "./picture.js";
import { SEED_END, labels, state } from "./state.js";

// ---- The whole page -------------------------------------------------------------------------------------------------

/** Replace everything on the page by what the state asks for. */
function layOut() {
  state.isolated = null;
  pairs.layOut(showProgress);
  showChosen();
  showConditions(turnBack);
  showView();
  showProgress();
}

function showChosen() {
  const { model } = state;
  const classes = model.generator_classes ?? [];
  $("model").value = model.name;
  $("class-field").hidden = classes.length === 0;
  $("class").replaceChildren(...classes.map((name, index) => new Option(name, index)));
  $("class").value = state.classIndex;
  $("seed").value = state.seed;
  $("count").value = state.count;
  $("about").textContent =
    `${model.name}: ${model.task}, ${model.resolution} × ${model.resolution} pixels, labelled by ${model.num_heads} heads`;
  const measured = model.calibration
    ? `gate measured over ${model.calibration.seed_count} seeds at truncation ψ ${model.calibration.truncation_psi}`
    : "not calibrated";
  $("provenance").textContent = `Model digest ${model.digest.slice(0, 16)} · version ${model.version} · ${measured}`;
}

/** Show what depends on the pairs: their verdicts, their count, and which seeds come next. */
function showProgress() {
  const next = pairs.nextSeed();
  $("previous").disabled = state.where.length === 0 ? state.seed === 0 : !history.state?.turned;
  $("next").disabled = next >= SEED_END || next === state.seed;
  document.title = `${state.model.name}, seeds ${range()} · labelmint`;
  showGate();
  showNeighbours();
}

/** The seeds that the page has looked at. */
function range() {
  const last = pairs.nextSeed() - 1;
  return last < state.seed ? `from ${state.seed} on` : `${state.seed} to ${last}`;
}

// ---- The gate -------------------------------------------------------------------------------------------------------

function showGate() {
  const limit = threshold();
  const { calibration } = state.model;
  $("by-quantile").hidden = !calibration;
  $("max-js").value = limit === null ? "" : number(limit);
  if (calibration) {
    const quantile = state.gate.max_quantile ?? quantileOf(limit);
    const kept = `${Number((quantile * 100).toFixed(1))} %`;
    $("gate").value = quantile;
    $("gate").style.setProperty("--at", place(quantile));
    $("gate").setAttribute("aria-valuetext", `${kept} of seeds: JS score at most ${number(limit)} nats`);
    $("kept").textContent = kept;
  }
  pairs.judge();
  $("rug").replaceChildren(...(calibration ? pairs.scores().map(tick) : []));
  summarize();
}

function tick(score) {
  const mark = element("i", { className: verdictOn(score) });
  mark.style.setProperty("--at", place(quantileOf(score)));
  return mark;
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
    const scores = pairs.scores();
    const limit = threshold();
    const accepted = scores.filter((score) => verdictOn(score) === "accepted").length;
    const parts = [`Seeds ${range()}.`];
    if (limit === null) parts.push(`${state.model.name} is not calibrated: give a JS score to judge its pairs.`);
    else parts.push(`${accepted} accepted, ${scores.length - accepted} rejected at JS ≤ ${number(limit)} nats.`);
    if (state.where.length > 0) parts.push(`${pairs.filteredCount()} filtered by the conditions.`);
    if (scores.length < pairs.cardCount()) parts.push(`${scores.length} of ${pairs.cardCount()} loaded.`);
    $("summary").textContent = parts.join(" ");
  }, 300);
}

// ---- The view -------------------------------------------------------------------------------------------------------

function showView() {
  document.querySelectorAll(`input[value=${state.view}]`).forEach((radio) => (radio.checked = true));
  $("legend").replaceChildren(...(state.view === "uncertainty" ? heatLegend() : labels().map(legendEntry)));
  $("open-legend").replaceChildren(...(state.view === "uncertainty" ? heatLegend() : []));
  pairs.redraw();
  pairs.judge();
  redrawPair();
}

function legendEntry({ name, rgb }, index) {
  const swatch = element("i");
  swatch.style.backgroundColor = rgb;
  const button = element("button", { type: "button", title: `Show ${name} alone` }, swatch, name);
  button.setAttribute("aria-pressed", state.isolated === index);
  button.addEventListener("click", () => {
    state.isolated = state.isolated === index ? null : index;
    showView();
    $("legend").children[index].focus();
  });
  return button;
}

function heatLegend() {
  const bar = element("i", { className: "heat" });
  bar.style.backgroundImage = `linear-gradient(to right, ${HEAT.map((rgb) => `rgb(${rgb})`).join()})`;
  const text = (words) => element("span", { textContent: words });
  const most = state.model.task === "keypoints" ? "summed over the keypoints" : "two halves of them disagree";
  return [text("0 nats: the heads agree"), bar, text(`${number(MAX_JS)} nats (ln 2): ${most}`)];
}

// ---- The controls ---------------------------------------------------------------------------------------------------

/** Show the pairs from a seed on. `turned`: from the pairs before them, to which Previous leads back. */
function turn(seed, turned = false) {
  state.seed = Math.min(Math.max(0, seed), SEED_END - 1);
  writeAddress("pushState", turned);
  layOut();
}

/** Show the pairs from the same seed on, under other options. */
function turnBack() {
  turn(state.seed);
}

/** Change the URL for what needs no new pairs. */
function adjust() {
  writeAddress("replaceState");
  pairs.relink();
}

/** Show another model, or another class of its generator. A gate and conditions of one say nothing of another. */
async function chooseAnother(model, classIndex, where) {
  try {
    await choose(model, classIndex);
  } catch (error) {
    say(error.message);
    return;
  }
  state.where = where;
  turnBack();
}

$("controls").addEventListener("submit", (event) => event.preventDefault());
$("model").addEventListener("change", () => {
  const model = state.models.find((entry) => entry.name === $("model").value);
  chooseAnother(model, model.generator_classes?.length ? 0 : null, []);
});
$("class").addEventListener("change", () => {
  const model = state.models.find((entry) => entry.name === state.model.name);
  chooseAnother(model, Number($("class").value), state.where);
});
for (const name of ["seed", "count"]) {
  $(name).addEventListener("change", () => {
    if (!$(name).reportValidity()) return;
    state[name] = $(name).valueAsNumber;
    turnBack();
  });
}
$("previous").addEventListener("click", () => {
  // With conditions, only the history knows where the pairs before these began.
  if (state.where.length > 0) history.back();
  else turn(state.seed - state.count);
});
for (const id of ["next", "go-on"]) $(id).addEventListener("click", () => turn(pairs.nextSeed(), true));
wireConditions(turnBack);
$("gate").addEventListener("input", () => {
  state.gate = { max_quantile: $("gate").valueAsNumber };
  adjust();
  showGate();
});
$("max-js").addEventListener("change", () => {
  if (!$("max-js").reportValidity()) return;
  state.gate = $("max-js").value === "" ? defaultGate() : { max_js: $("max-js").valueAsNumber };
  adjust();
  showGate();
});
document.querySelectorAll(".view input").forEach((radio) => {
  radio.addEventListener("change", () => {
    state.view = radio.value;
    adjust();
    showView();
  });
});
$("pairs").addEventListener("click", (event) => {
  const link = event.target.closest(".seed a");
  if (link === null || event.ctrlKey || event.metaKey || event.shiftKey) return; // those open a tab or a window
  event.preventDefault();
  openPair(Number(link.dataset.seed));
});
window.addEventListener("popstate", async () => {
  if (!changed()) return; // only the fragment changed
  await showAddress();
});

/** Show what the URL asks for. */
async function showAddress() {
  const problems = await readAddress();
  writeAddress("replaceState");
  layOut();
  showPair();
  say(problems);
}

async function start() {
  state.models = await listModels();
  $("model").replaceChildren(...state.models.map(({ name }) => new Option(name, name)));
  $("chosen").disabled = $("wanted").disabled = $("gated").hidden = false;
  await showAddress();
}

start().catch((error) => say(error.message));
