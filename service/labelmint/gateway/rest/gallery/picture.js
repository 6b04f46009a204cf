// The pictures of a pair: its image, and its label, overlay or uncertainty drawn on a canvas.
//
// Rules of this file:
// - A label is drawn pixel by pixel, without smoothing, in the model's colours.

import { capitalized } from "./dom.js";
import { labels, state } from "./state.js";

// The scale of /uncertainty.png: dark for agreement, bright from ln 2 nats on.
export const HEAT = [[8, 6, 36], [84, 18, 110], [187, 55, 84], [249, 142, 9], [252, 255, 164]];
export const MAX_JS = Math.LN2;
const DOT_SIDE = 384; // side of the canvas on which a keypoint's dot has its radius in pixels

export class Picture {
  /** Draws into an <img> and a <canvas> of at least `side` pixels. */
  constructor(image, canvas, side) {
    this.image = image;
    this.canvas = canvas;
    this.side = side;
    this.sample = this.decoded = this.label = this.heat = null;
  }

  /** Whether everything that the view needs is there. */
  get whole() {
    return this.sample !== null && (state.view !== "uncertainty" || this.heat !== null);
  }

  /** Show a sample. Another sample may come to be shown meanwhile: `signal` then aborts this one. */
  async show(sample, signal) {
    const size = sample.image.height;
    const image = Object.assign(new Image(), { src: `data:image/png;base64,${sample.image.data}` });
    await image.decode();
    const label = sample.label === null ? null : await labelLayer(sample.label, size);
    signal.throwIfAborted();
    this.sample = sample;
    this.decoded = image;
    this.label = label;
    this.heat = sample.js_map ? heatLayer(new Float32Array(bytes(sample.js_map).buffer), size) : null;
    this.image.src = image.src;
    this.canvas.width = this.canvas.height = Math.max(size, this.side);
    this.image.hidden = this.canvas.hidden = false;
    this.draw();
  }

  draw() {
    if (!this.sample) return;
    const context = this.canvas.getContext("2d");
    const side = this.canvas.width;
    context.reset();
    if (state.view === "uncertainty") {
      context.imageSmoothingEnabled = false;
      if (this.heat) context.drawImage(this.heat, 0, 0, side, side);
      return;
    }
    if (state.view === "overlay") context.drawImage(this.decoded, 0, 0, side, side);
    if (this.label) this.#drawLabel(context, side);
    else this.#drawKeypoints(context, side);
  }

  #drawLabel(context, side) {
    const size = this.sample.label.height;
    const pixels = this.label.getImageData(0, 0, size, size);
    if (state.isolated !== null) {
      const [r, g, b] = colour(labels()[state.isolated].rgb);
      for (let i = 0; i < pixels.data.length; i += 4) {
        const same = pixels.data[i] === r && pixels.data[i + 1] === g && pixels.data[i + 2] === b;
        if (!same) pixels.data[i + 3] = 0;
      }
    }
    const drawn = layer(size);
    drawn.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.globalAlpha = state.view === "overlay" ? 0.6 : 1;
    context.drawImage(drawn, 0, 0, side, side);
  }

  #drawKeypoints(context, side) {
    const scale = side / this.sample.image.height;
    this.sample.keypoints.forEach(({ x, y }, index) => {
      if (state.isolated !== null && state.isolated !== index) return;
      for (const [radius, fill] of [[10, "#fafaf8"], [8, "#1c1e24"], [6, labels()[index].rgb]]) {
        context.beginPath();
        context.arc((x + 0.5) * scale, (y + 0.5) * scale, (radius * side) / DOT_SIDE, 0, 2 * Math.PI);
        context.fillStyle = fill;
        context.fill();
      }
    });
  }

  /** What the canvas shows, in words. */
  describe() {
    if (state.view === "uncertainty") return "Uncertainty of each pixel";
    const all = this.label ? "Label" : capitalized(state.model.task);
    const shown = state.isolated === null ? all : `${labels()[state.isolated].name} alone, label`;
    return state.view === "overlay" ? `${shown} over the image` : shown;
  }

  /** What the pair contains: for each label name its share of the pixels, or the confidence of the keypoint. */
  content() {
    if (!this.label) return this.sample.keypoints.map(({ confidence }) => confidence);
    const size = this.sample.label.height;
    const { data } = this.label.getImageData(0, 0, size, size);
    const counts = new Map();
    for (let i = 0; i < data.length; i += 4) {
      const key = (data[i] << 16) | (data[i + 1] << 8) | data[i + 2];
      counts.set(key, (counts.get(key) ?? 0) + 1);
    }
    return labels().map(({ rgb }) => (counts.get(parseInt(rgb.slice(1), 16)) ?? 0) / (size * size));
  }
}

async function labelLayer(label, size) {
  const picture = await createImageBitmap(new Blob([bytes(label.data)]), { colorSpaceConversion: "none" });
  const context = layer(size).getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  return context;
}

function heatLayer(nats, size) {
  const drawn = layer(size);
  const pixels = new ImageData(size, size);
  nats.forEach((value, index) => {
    const at = Math.min(1, Math.max(0, value / MAX_JS)) * (HEAT.length - 1);
    const low = Math.min(HEAT.length - 2, Math.floor(at));
    for (let c = 0; c < 3; c += 1) {
      pixels.data[4 * index + c] = Math.round(HEAT[low][c] + (HEAT[low + 1][c] - HEAT[low][c]) * (at - low));
    }
    pixels.data[4 * index + 3] = 255;
  });
  drawn.getContext("2d").putImageData(pixels, 0, 0);
  return drawn;
}

function layer(size) {
  return Object.assign(document.createElement("canvas"), { width: size, height: size });
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function colour(rgb) {
  return [1, 3, 5].map((at) => parseInt(rgb.slice(at, at + 2), 16));
}
