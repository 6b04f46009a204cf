// The quick prediction: its label and uncertainty over this image, and its label over six others.

import { look, previewUrl, suggestions } from "./api.js";
import { $, make } from "./elements.js";

const OTHERS = 6;

export class Predictions {
  constructor(state) {
    this.state = state;
    this.proposed = []; // seeds with reasons
    this.running = false;
    this.again = false;
    this.pictures = {}; // of the open image: name to Image
    $("look").addEventListener("click", () => this.ask());
  }

  // After a stroke. While one prediction is computed, only the newest of the later requests is kept.
  stroke() {
    if ($("auto").checked && this.state.session.task === "segmentation") this.ask();
  }

  async ask() {
    this.again = this.running;
    if (this.running) return;
    this.running = true;
    $("look").setAttribute("aria-busy", "true");
    do {
      this.again = false;
      await this.once();
    } while (this.again);
    this.running = false;
    $("look").removeAttribute("aria-busy");
  }

  async once() {
    const { history } = this.state;
    if (!history) return;
    await history.save();
    if (!this.proposed.length) await this.propose();
    try {
      const others = this.proposed.map((each) => each.seed).filter((seed) => seed !== history.seed);
      const found = await look(history.seed, others.slice(0, OTHERS));
      this.state.preview = found.preview;
      $("preview-said").textContent = `${found.seconds.toFixed(1)} s, from ${found.pixels.toLocaleString("en")} drawn pixels`;
      if (history === this.state.history) await this.load(found.preview, history.seed);
      this.show(found);
    } catch (error) {
      $("preview-said").textContent = error.message;
    }
  }

  async propose() {
    this.proposed = (await this.state.attempt(() => suggestions(OTHERS))) ?? [];
  }

  async load(preview, seed) {
    this.pictures = {};
    await Promise.all(
      ["label", "uncertainty"].map(async (name) => {
        const picture = new Image();
        picture.src = previewUrl(preview, seed, name);
        await picture.decode();
        this.pictures[name] = picture;
      }),
    );
    this.state.view.paint();
  }

  forget() {
    this.pictures = {};
    this.state.preview = null;
  }

  show({ preview, images }) {
    const reasons = new Map(this.proposed.map((each) => [each.seed, each.reason]));
    const others = images.filter(({ seed }) => seed !== this.state.history?.seed);
    $("others").replaceChildren(...others.map(({ seed }) => this.figure(preview, seed, reasons.get(seed) ?? "")));
  }

  figure(preview, seed, reason) {
    const label = make("img", { src: previewUrl(preview, seed, "label"), alt: "" });
    label.style.opacity = $("opacity").value;
    const shown = make("img", { src: previewUrl(preview, seed, "image"), alt: `Seed ${seed} with its predicted label` });
    const draw = make("button", { type: "button", "aria-label": `Draw on seed ${seed}` }, "Draw");
    draw.addEventListener("click", () => this.state.open(seed, true));
    const skip = make("button", { type: "button", "aria-label": `Skip seed ${seed}` }, "Skip");
    skip.addEventListener("click", () => this.skip(seed));
    const text = make("figcaption", {}, `${seed}: ${reason}`);
    const known = this.state.session.images.some((each) => each.seed === seed);
    const buttons = known ? [] : [make("p", {}, draw, skip)];
    return make("li", {}, make("figure", {}, make("div", {}, shown, label), text), ...buttons);
  }

  async skip(seed) {
    await this.state.skip(seed);
    this.proposed = [];
    await this.ask();
  }

  layer(context, name, opacity) {
    const picture = this.pictures[name];
    if (!picture) return false;
    context.globalAlpha = opacity;
    context.drawImage(picture, -0.5, -0.5);
    return true;
  }
}

