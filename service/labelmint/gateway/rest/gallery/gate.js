// The gate: which scores pass, and at which quantile of the calibration a score lies.
//
// Rules of this file:
// - The page applies the gate by the service's rule: a score passes if it is at most the threshold.

import { state } from "./state.js";

export function defaultGate() {
  return state.model.calibration && { max_quantile: state.model.calibration.threshold_quantile };
}

/** The threshold in nats, null without a gate. */
export function threshold() {
  if (state.gate === null) return null;
  return state.gate.max_js ?? scoreAt(state.gate.max_quantile);
}

/** "accepted", "rejected", or "not judged" without a gate. */
export function verdictOn(score) {
  const limit = threshold();
  if (limit === null) return "not judged";
  return score <= limit ? "accepted" : "rejected";
}

/** The score at a quantile, interpolated linearly between the 101 measured quantiles. */
function scoreAt(quantile) {
  const scores = state.model.calibration.quantiles;
  const place = Number((quantile * 100).toFixed(9));
  const low = Math.floor(place);
  return low >= 100 ? scores[100] : scores[low] + (scores[low + 1] - scores[low]) * (place - low);
}

/** The quantile of a score, 0 to 1. */
export function quantileOf(score) {
  const scores = state.model.calibration.quantiles;
  const above = scores.findIndex((measured) => measured > score);
  if (above <= 0) return above === 0 ? 0 : 1;
  return (above - 1 + (score - scores[above - 1]) / (scores[above] - scores[above - 1])) / 100;
}
