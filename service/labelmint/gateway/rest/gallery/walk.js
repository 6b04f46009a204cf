// The walk: it looks for seeds whose pairs satisfy the conditions, from a seed on and in order.
//
// Rules of this file:
// - It delivers what a stream of the service delivers under the same conditions, and rejected pairs too.
// - It stops after MAX_EMPTY seeds in a row without a pair, as a stream does after a number that its gateway sets.

import { getOutcomes } from "./api.js";
import { SEED_END, state } from "./state.js";

const STRIDE = 8; // seeds in a request: few, so that the first pair comes soon
const MAX_EMPTY = 256;

export class Walk {
  constructor(seed) {
    this.next = seed; // the first seed that was not looked at
    this.found = 0;
    this.empty = 0; // seeds in a row without a pair
    this.ended = ""; // why the walk stopped
  }

  /** Look at the next seeds. Returns the samples of the first `room` of them that satisfy the conditions. */
  async step(room, signal) {
    const count = Math.min(STRIDE, SEED_END - this.next);
    const seeds = Array.from({ length: count }, (_, index) => this.next + index);
    const asked = { where: state.where, include_js_map: state.view === "uncertainty" };
    const outcomes = await getOutcomes(seeds, { signal, ...asked });
    const samples = outcomes.filter((outcome) => !outcome.filtered).slice(0, room);
    this.next = samples.length === room ? samples.at(-1).seed + 1 : seeds.at(-1) + 1;
    this.found += samples.length;
    this.empty = samples.length === 0 ? this.empty + count : this.next - samples.at(-1).seed - 1;
    if (this.next >= SEED_END) this.ended = "There are no more seeds.";
    else if (this.empty >= MAX_EMPTY) this.ended = `None of ${this.empty} seeds in a row satisfies the conditions.`;
    return samples;
  }
}
