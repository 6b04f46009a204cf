// The page: its state, and what connects the parts. The parts know the state and not each other.

import { Trouble, drawingOf, imageUrl, jobStatus, openImage, session, skipImage } from "./api.js";
import { Classes } from "./classes.js";
import { Drawing } from "./drawing.js";
import { $, choose, chosen, make, percent } from "./elements.js";
import { Estimating } from "./estimating.js";
import { History } from "./history.js";
import { Placing } from "./placing.js";
import { Pointers } from "./pointers.js";
import { Predictions } from "./predictions.js";
import { Serving } from "./serving.js";
import { View } from "./view.js";

const TOOL_KEYS = { b: "brush", e: "erase", p: "polygon", f: "fill", h: "pan" };
const ARROWS = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const SAYS = { saved: "Saved", saving: "Saving ...", unsaved: "Not saved", "changed elsewhere": "Changed elsewhere" };

class State {
  constructor() {
    this.session = null;
    this.history = null; // of the open image
    this.picture = null;
    this.classId = 0;
    this.preview = null; // the number of the newest prediction
    this.view = new View($("canvas"));
    this.classList = new Classes(this);
    this.predictions = new Predictions(this);
    this.serving = new Serving(this);
    this.estimating = new Estimating(this);
    this.pointers = new Pointers(this, this.view);
    this.view.layers = [
      (context) => this.picture && context.drawImage(this.picture, -0.5, -0.5),
      (context, pixel) => this.paintLayer(context, pixel),
      (context, pixel) => this.history && this.tools.outline(context, pixel),
    ];
  }

  get classes() {
    return this.session.classes;
  }

  get colours() {
    return this.palette;
  }

  get tool() {
    return chosen("tool");
  }

  get radius() {
    return Number($("radius").value);
  }

  get kind() {
    return this.session.task === "segmentation" ? "strokes" : "points";
  }

  async start() {
    await this.renamed(await session());
    const keypoints = this.session.task === "keypoints";
    this.tools = keypoints ? new Placing(this, this.view) : new Drawing(this, this.view);
    for (const id of ["tools", "size", "preview-head", "labelme"]) $(id).hidden = keypoints;
    $("placing").hidden = !keypoints;
    if (keypoints) $("preview-said").textContent = "";
    $("names-title").textContent = keypoints ? "Keypoints" : "Classes";
    $("radius").max = Math.max(8, this.session.resolution / 8);
    $("radius").value = Math.max(1.5, this.session.resolution / 40);
    this.showRadius();
    const last = this.session.images.at(-1);
    if (last) await this.open(last.seed);
    else await this.next();
    this.serving.watch(await jobStatus());
  }

  // Run a request for the person. A failure is shown, and gives undefined.
  async attempt(request) {
    try {
      const found = await request();
      this.tell("");
      return found;
    } catch (error) {
      if (!(error instanceof Trouble)) throw error;
      this.tell(error.message);
      return undefined;
    }
  }

  tell(message) {
    $("trouble").textContent = message;
    $("trouble").hidden = !message;
  }

  // Names, colours or images have changed.
  async renamed(found) {
    const points = this.history?.kind === "points";
    this.session = found;
    this.palette = found.classes.map((each) => each.rgb);
    this.classId = Math.min(this.classId, Math.max(found.classes.length - 1, 0));
    this.classList.show();
    this.showImages();
    // The server has renamed the points that are stored, so undo would bring back old names.
    if (points) await this.open(this.history.seed);
    this.view.paint();
  }

  async next() {
    $("next").disabled = true;
    await this.open(null, true);
    $("next").disabled = false;
  }

  async open(seed, fresh = false) {
    await this.history?.save();
    if (this.history?.waiting) return; // the page says why; the image stays open until it is saved
    if (fresh) {
      const image = await this.attempt(() => openImage(seed));
      if (!image) return;
      seed = image.seed;
      this.session = await session();
      this.predictions.proposed = [];
    }
    const [found, picture] = await Promise.all([drawingOf(seed, this.kind), load(imageUrl(seed))]);
    this.history = new History(seed, this.kind, {
      revision: found.revision,
      list: found[this.kind],
      told: (state, message) => this.showSaved(state, message),
      stored: (image) => this.stored(image),
    });
    this.picture = picture;
    this.predictions.forget();
    this.tools.reset();
    this.view.show(this.session.resolution);
    this.showSaved("saved");
    this.showImages();
    this.showHistory();
    this.predictions.stroke();
  }

  async skip(seed) {
    const found = await this.attempt(() => skipImage(seed));
    if (found) this.session = found;
    this.showImages();
  }

  stored(image) {
    this.session.images = this.session.images.map((each) => (each.seed === image.seed ? image : each));
    this.showImages();
  }

  // The drawing of the open image has changed.
  changed() {
    this.showHistory();
    this.view.paint();
    this.predictions.stroke();
  }

  choose(id) {
    if (id < 0 || id >= this.classes.length) return;
    this.classId = id;
    this.classList.show();
    this.view.paint();
  }

  paintLayer(context, pixel) {
    if (!this.history) return;
    const view = chosen("view");
    const opacity = Number($("opacity").value);
    if (view === "image") return;
    if (view !== "drawn" && this.predictions.layer(context, view, opacity)) return;
    this.tools.layer(context, opacity, pixel);
  }

  showImages() {
    const open = this.history?.seed;
    $("images").replaceChildren(
      ...this.session.images.map(({ seed, drawn, touched }) => {
        const share = this.kind === "points" ? (touched ? "✓" : "") : percent(drawn);
        const name = `Seed ${seed}, ${touched ? `${percent(drawn)} drawn` : "nothing drawn"}`;
        const button = make("button", { type: "button", title: name, "aria-label": name }, make("img", { src: imageUrl(seed), alt: "" }), make("small", {}, share));
        if (seed === open) button.setAttribute("aria-current", "true");
        button.addEventListener("click", () => this.open(seed));
        return make("li", {}, button);
      }),
    );
  }

  showHistory() {
    $("undo").disabled = !this.history.canUndo;
    $("redo").disabled = !this.history.canRedo;
  }

  showSaved(state, message = "") {
    $("saved").textContent = SAYS[state];
    if (state === "unsaved" || state === "changed elsewhere") this.tell(message);
    else if (state === "saved") this.tell("");
  }

  showRadius() {
    $("radius-shown").textContent = `${this.radius} px`;
    this.view.paint();
  }

  setRadius(radius) {
    $("radius").value = radius;
    this.showRadius();
  }

  step(back) {
    if (!this.history) return;
    if (back) this.history.undo();
    else this.history.redo();
    this.changed();
  }

  key(event) {
    const typing = event.target.matches("input:not([type]), input[type=number], summary, a, select");
    if (typing || event.altKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (event.ctrlKey || event.metaKey) {
      if (key === "z") this.step(!event.shiftKey);
      else if (key === "y") this.step(false);
      else return;
    } else if (this.history && event.target === $("canvas") && this.tools.key(event)) {
      // The tool took it.
    } else if (this.session.task === "segmentation" && TOOL_KEYS[key] && choose("tool", TOOL_KEYS[key])) {
      this.tools.reset();
    } else if (/^[1-9]$/.test(key)) this.choose(Number(key) - 1);
    else if (key === "[" || key === "]") this.setRadius(this.radius * (key === "]" ? 1.25 : 0.8));
    else if (key === "+" || key === "=") this.view.zoom(1.25);
    else if (key === "-") this.view.zoom(0.8);
    else if (key === "0") this.view.fit();
    else if (key === "n") this.next();
    else if (key === "l") this.predictions.ask();
    else if (ARROWS[key] && event.target === $("canvas")) this.view.move(...ARROWS[key].map((each) => 40 * each));
    else if (key === " " && event.target === $("canvas")) this.pointers.space = true;
    else return;
    event.preventDefault();
  }

  listen() {
    $("next").addEventListener("click", () => this.next());
    $("undo").addEventListener("click", () => this.step(true));
    $("redo").addEventListener("click", () => this.step(false));
    $("zoom-in").addEventListener("click", () => this.view.zoom(1.25));
    $("zoom-out").addEventListener("click", () => this.view.zoom(0.8));
    $("zoom-fit").addEventListener("click", () => this.view.fit());
    $("radius").addEventListener("input", () => this.showRadius());
    $("opacity").addEventListener("input", () => this.view.paint());
    $("views").addEventListener("change", () => this.view.paint());
    $("tools").addEventListener("change", () => this.tools.reset());
    $("hide").addEventListener("click", () => this.tools.hide());
    $("absent").addEventListener("click", () => this.tools.absent());
    document.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("keyup", (event) => event.key === " " && (this.pointers.space = false));
    window.addEventListener("beforeunload", (event) => this.history?.dirty && event.preventDefault());
  }
}

async function load(url) {
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  return picture;
}

const state = new State();
state.listen();
state.start().catch((error) => state.tell(error.message));
