// What the page shows: the model, the pairs, the view, the gate, the conditions and the open pair.
//
// Rules of this file:
// - There is one state. `address.js` writes all of it into the URL and reads it from there, except `isolated`.

export const SEED_END = 2 ** 32;
export const MAX_COUNT = 96;
export const VIEWS = ["overlay", "label", "uncertainty"];

export const state = {
  models: [],
  model: null, // as /v1/models describes it, with the calibration of `classIndex`
  classIndex: null, // the class that the generator draws; null: its generator has no classes
  seed: 0,
  count: 24,
  view: "overlay",
  gate: null, // { max_quantile } or { max_js }; null: none, because the model is not calibrated
  where: [], // conditions, each in the API's form NAME:MIN..MAX
  isolated: null, // index of the only class or keypoint to draw; null: draw all
  pair: null, // the seed of the pair that is open
  mixing: null, // { style_seed, crossover } of the open pair
};

/** The label names of the model, with their colours. Other lists of a model have no colours. */
export function labels() {
  return Object.values(state.model).filter(Array.isArray).flat().filter((entry) => entry.rgb !== undefined);
}
