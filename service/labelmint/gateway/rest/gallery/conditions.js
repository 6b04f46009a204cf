// The conditions on what a pair contains: the form that adds one, and a chip for each that removes it.
//
// Rules of this file:
// - The state has conditions in the API's form NAME:MIN..MAX. People see areas in percent.
// - Whether a condition makes sense for the model is the service's decision; the page shows what it says.

import { $, element, percent } from "./dom.js";
import { labels, state } from "./state.js";

/** Show the conditions of the state, and the names that another one can be about. */
export function showConditions(whenChanged) {
  const areas = state.model.task !== "keypoints";
    $("content").replaceChildren(...labels().map(({ name }) => new Option(name, name)));
  for (const bound of ["least", "most"]) {
    $(`${bound}-unit`).textContent = areas ? "%" : "0 to 1";
    $(bound).title = areas ? "Percent of the image" : "Confidence of the keypoint";
    $(bound).max = areas ? 100 : 1;
  }
  $("chips").replaceChildren(...state.where.map((condition) => chip(condition, whenChanged)));
  $("chips").hidden = state.where.length === 0;
}

/** Let the form add conditions. `whenChanged` is called after each change. */
export function wireConditions(whenChanged) {
  const bounds = [$("least"), $("most")];
  const complain = (text) => bounds[0].setCustomValidity(text);
  bounds.forEach((bound) => bound.addEventListener("input", () => complain("")));
  $("conditions").addEventListener("submit", (event) => {
    event.preventDefault();
    complain(bounds.every((bound) => bound.value === "") ? "Give a minimum, a maximum or both." : "");
    if (!$("conditions").reportValidity()) return;
    const name = $("content").value;
    const others = state.where.filter((condition) => nameOf(condition) !== name); // one condition for each name
    state.where = [...others, `${name}:${bounds.map((bound) => share(bound.value)).join("..")}`];
    bounds.forEach((bound) => (bound.value = ""));
    whenChanged();
  });
}

function chip(condition, whenChanged) {
  const words = inWords(condition);
  const cross = element("span", { textContent: "×" });
  cross.setAttribute("aria-hidden", "true");
  const button = element("button", { type: "button", title: `Remove the condition ${words}` }, words, cross);
  button.setAttribute("aria-label", `Remove the condition ${words}`);
  button.addEventListener("click", () => {
    state.where = state.where.filter((other) => other !== condition);
    whenChanged();
    ($("chips").querySelector("button") ?? $("content")).focus();
  });
  return element("li", {}, button);
}

function nameOf(condition) {
  return condition.slice(0, condition.lastIndexOf(":"));
}

/** What a field's text means to the API: a share of 1. An empty field is no bound. */
function share(text) {
  if (text === "" || state.model.task === "keypoints") return text;
  return String(Number((Number(text) / 100).toPrecision(12)));
}

/** A condition for people. One that is not in the API's form stays as it is. */
function inWords(condition) {
  const [, name, low, high] = /^(.+):([\d.eE-]*?)\.\.([\d.eE-]*)$/.exec(condition) ?? [];
  const numbers = [low, high].every((bound) => Number.isFinite(Number(bound)));
  if (name === undefined || !numbers || low + high === "") return condition;
  const shown = (bound) => (state.model.task === "keypoints" ? bound : percent(Number(bound)));
  if (high === "") return `${name} ≥ ${shown(low)}`;
  return low === "" ? `${name} ≤ ${shown(high)}` : `${name} ${shown(low)} to ${shown(high)}`;
}
