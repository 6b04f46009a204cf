// The URL: it holds the whole state, so a link shows everyone the same pairs, view, gate, conditions and open pair.
//
// Rules of this file:
// - An invalid value is replaced by its default, and a message names it. What a condition means only the service
//   decides, so conditions are passed on as they are.

import { describeModel } from "./api.js";
import { defaultGate } from "./gate.js";
import { MAX_COUNT, SEED_END, VIEWS, state } from "./state.js";

let written = null; // the query string of what the page shows

/** Whether the URL asks for something else than the page shows. */
export function changed() {
  return location.search !== written;
}

/** The query string of the state with some values replaced. */
export function address(replaced = {}) {
  const { model, classIndex, seed, count, view, gate, where, pair, mixing } = { ...state, ...replaced };
  const query = new URLSearchParams({ model: model.name });
  if (classIndex !== null) query.set("class_index", classIndex);
  for (const [name, value] of Object.entries({ seed, count, view, ...gate })) query.set(name, value);
  where.forEach((condition) => query.append("where", condition));
  if (pair !== null) for (const [name, value] of Object.entries({ pair, ...mixing })) query.set(name, value);
  return `?${query}`;
}

/** Put the state into the URL: `write` is "pushState" for other pairs, else "replaceState". `turned`: see page.js. */
export function writeAddress(write, turned = write === "replaceState" && Boolean(history.state?.turned)) {
  history[write]({ turned }, "", address());
  written = location.search;
}

/** Read the state from the URL. Returns a message about its invalid values, or "". */
export async function readAddress() {
  written = location.search;
  const asked = new Asked(new URLSearchParams(location.search));
  const named = (name) => state.models.find((entry) => entry.name === name);
  const model = asked.read("model", state.models[0], named, `one of ${state.models.map(({ name }) => name).join(", ")}`);
  const classes = model.generator_classes?.length ?? 0;
  const wanted = classes ? `a whole number from 0 to ${classes - 1}` : `left out, because ${model.name} has no classes to draw`;
  const classIndex = asked.read("class_index", classes ? 0 : null, between(0, classes - 1, true), wanted);
  await choose(model, classIndex);
  Object.assign(state, {
    seed: asked.seed("seed", 0),
    count: asked.read("count", 24, between(1, MAX_COUNT, true), `a whole number from 1 to ${MAX_COUNT}`),
    view: asked.read("view", "overlay", (text) => VIEWS.find((view) => view === text), `one of ${VIEWS.join(", ")}`),
    gate: asked.gate(),
    where: asked.query.getAll("where"),
    pair: asked.seed("pair", null),
  });
  state.mixing = asked.mixing();
  return asked.problems.join(" ");
}

/** Make a model, and a class of its generator, the ones that the page shows. */
export async function choose(model, classIndex) {
  state.model = classIndex === null ? model : await describeModel(model.name, classIndex);
  state.classIndex = classIndex;
  state.gate = defaultGate();
}

/** Returns a parser of numbers from `low` to `high`, which gives undefined for any other text. */
function between(low, high, whole) {
  return (text) => {
    const value = text.trim() === "" ? NaN : Number(text);
    return value >= low && value <= high && (!whole || Number.isInteger(value)) ? value : undefined;
  };
}

/** The values that a query asks for. It notes those that cannot be. */
class Asked {
  constructor(query) {
    this.query = query;
    this.problems = [];
  }

  read(name, fallback, parse, wanted) {
    if (!this.query.has(name)) return fallback;
    const value = parse(this.query.get(name));
    if (value !== undefined) return value;
    this.problems.push(`The address asks for ${name} "${this.query.get(name)}"; it must be ${wanted}.`);
    return fallback;
  }

  seed(name, fallback) {
    return this.read(name, fallback, between(0, SEED_END - 1, true), `a whole number from 0 to ${SEED_END - 1}`);
  }

  gate() {
    const js = this.read("max_js", null, between(0, Number.MAX_VALUE, false), "a number of nats, at least 0");
    const quantile = this.read("max_quantile", null, between(1e-9, 1, false), "above 0 and at most 1");
    if (js !== null) return { max_js: js };
    if (quantile === null) return defaultGate();
    if (state.model.calibration) return { max_quantile: quantile };
    this.problems.push(`${state.model.name} is not calibrated: a gate needs max_js.`);
    return null;
  }

  mixing() {
    const last = state.model.num_ws - 1;
    const style = this.seed("style_seed", null);
    const crossover = this.read("crossover", null, between(1, last, true), `a whole number from 1 to ${last}`);
    if (state.pair !== null && style !== null && crossover !== null) return { style_seed: style, crossover };
    const given = ["pair", "style_seed", "crossover"].filter((name) => this.query.has(name));
    if (this.problems.length === 0 && given.some((name) => name !== "pair")) {
      this.problems.push(`The address asks for ${given.join(" and ")}; style mixing needs pair, style_seed and crossover.`);
    }
    return null;
  }
}
