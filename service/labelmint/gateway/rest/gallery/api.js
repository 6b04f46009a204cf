// The REST API as the page uses it: requests that wait while the service is busy, down or needs a token.
//
// Rules of this file:
// - If the service is busy, down or needs a token, all requests wait together, and the notice says why.
// - A request that the service refuses for any other reason throws Refused, with the service's own words.
// - The page judges samples itself, so every request for one has include_rejected. A model without a calibration needs
//   a gate all the same, and a gate of 0 does.

import { $ } from "./dom.js";
import { say } from "./notice.js";
import { state } from "./state.js";

const MAX_PAUSE_SECONDS = 30;
const TOKEN_KEY = "labelmint-token"; // in this tab's sessionStorage: gone when the tab is closed

export class Refused extends Error {}

let pause = null; // set while all requests wait: { over: Promise, end() }
let failures = 0; // in a row

/** Fetch the JSON of a path; `body` makes it a POST. */
export async function ask(path, { signal, body } = {}) {
  const answer = await request(path, { signal, body });
  try {
    return await answer.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused(`The answer to ${path} is not JSON.`);
  }
}

/** Fetch a path until the service answers; throws Refused. */
async function request(path, { signal, body }) {
  for (;;) {
    await pause?.over;
    signal?.throwIfAborted();
    const token = sessionStorage.getItem(TOKEN_KEY);
    let answer, problem;
    try {
      answer = await fetch(path, { signal, ...withBody(body, authorization(token)) });
      if (!answer.ok) problem = await answer.json();
    } catch (error) {
      if (signal?.aborted) throw error;
    }
    if (answer?.ok) {
      failures = 0;
      return answer;
    }
    const status = answer?.status;
    if (status === 401) {
      if (token === sessionStorage.getItem(TOKEN_KEY)) pause ??= waitForToken(token !== null);
    } else if (status === undefined) {
      pause ??= waitSeconds("The service does not answer.", null);
    } else if (status === 429 || status === 503) {
      const what = status === 429 ? "The service is busy." : "The service is not ready.";
      const detail = problem?.detail ? ` ${problem.detail.replace(/\.?$/, ".")}` : "";
      pause ??= waitSeconds(what + detail, answer.headers.get("Retry-After"));
    } else {
      throw new Refused(problem?.detail ?? `The service answered with status ${status}.`);
    }
  }
}

function authorization(token) {
  return token === null ? {} : { Authorization: `Bearer ${token}` };
}

function withBody(body, headers) {
  if (body === undefined) return { headers };
  return { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) };
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
  say(text, control);
  return started;
}

function waitSeconds(text, retryAfter) {
  failures += 1;
  // Retry-After is either a number of seconds or a date.
  const asked = /^\d+$/.test(retryAfter ?? "") ? Number(retryAfter) : (Date.parse(retryAfter) - Date.now()) / 1000;
  const seconds = Math.max(1, Math.ceil(asked >= 0 ? asked : Math.min(MAX_PAUSE_SECONDS, 2 ** failures)));
  const started = startPause(`${text} Trying again in ${seconds} s.`, "retry");
  started.timer = setTimeout(started.end, seconds * 1000);
  return started;
}

function waitForToken(refused) {
  const text = refused ? "The service did not accept this access token." : "The service asks for an access token.";
  const started = startPause(text, "token-form");
  $("token").focus();
  return started;
}

$("retry").addEventListener("click", () => pause?.end());
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN_KEY, $("token").value);
  $("token").value = "";
  pause?.end();
});

// ---- Models -------------------------------------------------------------------------------------------------------

export async function listModels() {
  return (await ask("v1/models")).models;
}

/** The model with the calibration of one of its generator's classes. */
export function describeModel(name, classIndex) {
  return ask(`v1/models/${encodeURIComponent(name)}?class_index=${classIndex}`);
}

// ---- Samples ------------------------------------------------------------------------------------------------------

/** The options that decide which sample a seed gives, and that it is returned whatever its score. */
function options(gate) {
  const ofClass = state.classIndex === null ? {} : { class_index: state.classIndex };
  return { include_rejected: true, ...ofClass, ...(gate ?? (state.model.calibration ? {} : { max_js: 0 })) };
}

function samplesPath() {
  return `v1/models/${encodeURIComponent(state.model.name)}/samples`;
}

/** The path of a form of a sample: "" for its JSON, or a suffix such as ".npz". `asked` adds to its query. */
export function samplePath(seed, suffix, { gate, ...asked } = {}) {
  return `${samplesPath()}/${seed}${suffix}?${new URLSearchParams({ ...options(gate), ...asked })}`;
}

export function getSample(seed, { signal, ...asked }) {
  return ask(samplePath(seed, "", asked), { signal });
}

/** The outcomes of several seeds: a sample for each that satisfies `where`, else `filtered` with its content. */
export async function getOutcomes(seeds, { signal, ...asked }) {
  return (await ask(`${samplesPath()}:batchGet`, { signal, body: { seeds, ...options(), ...asked } })).outcomes;
}

/** Save what a link leads to under the link's file name. A link alone cannot send the access token. */
export async function download(link) {
  const answer = await request(link.href, {});
  const url = URL.createObjectURL(await answer.blob());
  Object.assign(document.createElement("a"), { href: url, download: link.download }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser may still be reading it
}

export function hasToken() {
  return sessionStorage.getItem(TOKEN_KEY) !== null;
}
