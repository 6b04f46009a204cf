// The pairs on the page: one card for each, filled when it comes near the viewport.
//
// Rules of this file:
// - The page sends at most MAX_IN_FLIGHT requests at once, and only for pairs near the viewport.
// - Without conditions the cards have consecutive seeds. With conditions a walk gives each card its seed, in order.
// - A card's link leads to its pair, opened. `page.js` opens it without leaving the page.

import { Refused, getSample } from "./api.js";
import { address } from "./address.js";
import { $, number } from "./dom.js";
import { threshold, verdictOn } from "./gate.js";
import { Picture } from "./picture.js";
import { SEED_END, state } from "./state.js";
import { Walk } from "./walk.js";

const MAX_IN_FLIGHT = 2;
const CANVAS = 384; // pixels, or the model's resolution if that is larger

let cards = [];
let walk = null; // with conditions only
let turning = new AbortController(); // aborts the requests of the current pairs when others replace them
let inFlight = 0;
let changed = () => {}; // called after each change of what the cards show

class Card {
  constructor(seed) {
    this.near = this.loading = false;
    this.element = $("pair").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.picture = new Picture(find("img"), find("canvas"), CANVAS);
    [this.link, this.verdict, this.score] = [find(".seed a"), find(".verdict"), find(".score")];
    [this.meter, this.failure] = [find(".meter"), find(".failure")];
    this.#take(seed);
    this.element.setAttribute("aria-busy", "true");
    find("button").addEventListener("click", () => {
      this.failure.hidden = true;
      pump();
    });
  }

  /** Give the card its seed, null while it is not known. */
  #take(seed) {
    this.seed = seed;
    this.link.textContent = seed === null ? "Looking for a pair" : `Seed ${seed}`;
    this.relink();
  }

  relink() {
    if (this.seed === null) return;
    this.link.href = address({ pair: this.seed, mixing: null });
    this.link.dataset.seed = this.seed;
  }

  get wanted() {
    return this.near && this.seed !== null && !this.loading && !this.picture.whole && this.failure.hidden;
  }

  get sample() {
    return this.picture.sample;
  }

  /** Ask for the pair and show it. */
  load(signal) {
    const asked = state.view === "uncertainty" ? { include_js_map: true } : {};
    return this.#showing(signal, () => getSample(this.seed, { signal, ...asked }));
  }

  /** Show a pair that a walk found. */
  fill(sample, signal) {
    this.#take(sample.seed);
    return this.#showing(signal, async () => sample);
  }

  async #showing(signal, get) {
    this.loading = true;
    try {
      await this.picture.show(await get(), signal);
      this.draw();
      changed();
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

  draw() {
    this.picture.draw();
    this.element.setAttribute("aria-busy", String(!this.picture.whole && this.failure.hidden));
  }

  /** Update the verdict, the score and the text alternatives of the pictures. */
  judge() {
    if (!this.sample) return;
    const { js_score: score } = this.sample;
    const limit = threshold();
    const verdict = verdictOn(score);
    const scores = loaded().map((card) => card.sample.js_score);
    const end = state.model.calibration?.quantiles[100] ?? Math.max(...scores);
    const compared = limit === null ? "" : ` ${verdict === "accepted" ? "≤" : ">"} ${number(limit)}`;
    this.element.dataset.verdict = verdict;
    this.verdict.textContent = verdict;
    this.score.textContent = `JS ${number(score)}${compared}`;
    this.meter.style.setProperty("--score", Math.min(1, score / end));
    this.meter.style.setProperty("--gate", limit === null ? 0 : Math.min(1, limit / end));
    const evidence = `${verdict}, JS score ${number(score)} nats${limit === null ? "" : `, gate ${number(limit)}`}`;
    this.picture.image.alt = `Generated image of seed ${this.seed}: ${evidence}`;
    this.picture.canvas.setAttribute("aria-label", `${this.picture.describe()} of seed ${this.seed}`);
  }
}

// ---- What the rest of the page asks ---------------------------------------------------------------------------------

/** Replace the pairs on the page by those of the state. `whenChanged` is called after each change of them. */
export function layOut(whenChanged) {
  turning.abort();
  turning = new AbortController();
  viewport.disconnect();
  changed = whenChanged;
  walk = state.where.length === 0 ? null : new Walk(state.seed);
  const count = Math.min(state.count, SEED_END - state.seed);
  cards = Array.from({ length: count }, (_, index) => new Card(walk === null ? state.seed + index : null));
  $("pairs").replaceChildren(...cards.map((card) => card.element));
  cards.forEach((card) => viewport.observe(card.element));
  showEnd();
}

/** Draw the cards anew after a change of the view. */
export function redraw() {
  cards.forEach((card) => card.draw());
  pump();
}

/** Judge the cards anew after a change of the gate. */
export function judge() {
  cards.forEach((card) => card.judge());
}

/** Let the cards' links lead to what the page shows now. */
export function relink() {
  cards.forEach((card) => card.relink());
}

/** The seeds on the page, in order. */
export function seeds() {
  return cards.map((card) => card.seed).filter((seed) => seed !== null);
}

/** The scores of the pairs that are loaded. */
export function scores() {
  return loaded().map((card) => card.sample.js_score);
}

/** The seed after the last that the page looked at. */
export function nextSeed() {
  return walk === null ? state.seed + cards.length : walk.next;
}

/** How many seeds the page passed over, because their pairs do not satisfy the conditions. */
export function filteredCount() {
  return walk === null ? 0 : walk.next - state.seed - walk.found;
}

export function cardCount() {
  return cards.length;
}

/** Focus the link of a seed, if the page has it. */
export function focusOn(seed) {
  cards.find((card) => card.seed === seed)?.link.focus();
}

function loaded() {
  return cards.filter((card) => card.sample);
}

// ---- Loading --------------------------------------------------------------------------------------------------------

const viewport = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const card = cards.find((candidate) => candidate.element === entry.target);
    if (card) card.near = entry.isIntersecting;
  }
  pump();
}, { rootMargin: "400px" });

let searching = false; // a walk goes in order: one request at a time

function pump() {
  while (inFlight < MAX_IN_FLIGHT) {
    const work = nextWork();
    if (work === null) return;
    inFlight += 1;
    work.finally(() => {
      inFlight -= 1;
      pump();
    });
  }
}

function nextWork() {
  const card = cards.find((candidate) => candidate.wanted);
  if (card !== undefined) return card.load(turning.signal);
  const looking = walk !== null && walk.ended === "" && cards.some(({ near, seed }) => near && seed === null);
  return looking && !searching ? search(turning.signal) : null;
}

/** Let the walk look at its next seeds, and give the pairs that it finds to the cards that have none. */
async function search(signal) {
  searching = true;
  try {
    const free = cards.filter((card) => card.seed === null);
    const samples = await walk.step(free.length, signal);
    samples.forEach((sample, index) => free[index].fill(sample, signal));
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Refused)) throw error;
    walk.ended = error.message;
  } finally {
    searching = false;
  }
  if (walk.ended !== "") {
    cards.filter((card) => card.seed === null).forEach((card) => card.element.remove());
    cards = cards.filter((card) => card.seed !== null);
  }
  showEnd();
  changed();
}

/** Below the pairs: why a walk stopped, and the way on. */
function showEnd() {
  $("ended-text").textContent = walk?.ended ?? "";
  $("go-on").hidden = !walk?.ended || walk.next >= SEED_END;
  $("go-on").textContent = walk?.next === state.seed ? "Try again" : `Go on at seed ${walk?.next}`;
}
