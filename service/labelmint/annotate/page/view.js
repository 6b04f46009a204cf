// The canvas: where the image lies on it, and everything that is painted on it. It decides nothing about tools.

const LEAST = 0.25;
const MOST = 64;

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.size = 1; // of the image, in its pixels
    this.scale = 1; // device pixels for each pixel of the image
    this.left = this.top = 0; // of the image on the canvas, in device pixels
    this.fitted = true;
    this.layers = []; // functions that paint, in this order, in the image's coordinates
    this.pending = false;
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  show(size) {
    this.size = size;
    this.fit();
  }

  resize() {
    const ratio = window.devicePixelRatio;
    const width = Math.round(this.canvas.clientWidth * ratio);
    const height = Math.round(this.canvas.clientHeight * ratio);
    if (width === this.canvas.width && height === this.canvas.height) return;
    this.canvas.width = width;
    this.canvas.height = height;
    if (this.fitted) this.fit();
    this.paint();
  }

  fit() {
    const { width, height } = this.canvas;
    this.scale = (0.98 * Math.min(width, height)) / this.size;
    this.left = (width - this.scale * this.size) / 2;
    this.top = (height - this.scale * this.size) / 2;
    this.fitted = true;
    this.paint();
  }

  zoom(factor, at = [this.canvas.width / 2, this.canvas.height / 2]) {
    const fit = Math.min(this.canvas.width, this.canvas.height) / this.size;
    const scale = Math.min(Math.max(this.scale * factor, fit * LEAST), MOST * Math.max(fit, 1));
    this.left = at[0] - ((at[0] - this.left) * scale) / this.scale;
    this.top = at[1] - ((at[1] - this.top) * scale) / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.paint();
  }

  move(x, y) {
    // Part of the image always stays on the canvas.
    const side = this.scale * this.size;
    this.left = Math.min(Math.max(this.left + x, 32 - side), this.canvas.width - 32);
    this.top = Math.min(Math.max(this.top + y, 32 - side), this.canvas.height - 32);
    this.fitted = false;
    this.paint();
  }

  // The place of a pointer on the canvas, in device pixels.
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio;
    return [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
  }

  // The same in the image: (0, 0) is the centre of its first pixel.
  inImage(event) {
    const [x, y] = this.place(event);
    return [(x - this.left) / this.scale - 0.5, (y - this.top) / this.scale - 0.5];
  }

  paint() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      const { context, canvas } = this;
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, canvas.width, canvas.height);
      context.imageSmoothingEnabled = false;
      for (const layer of this.layers) {
        context.save();
        context.setTransform(this.scale, 0, 0, this.scale, this.left + this.scale / 2, this.top + this.scale / 2);
        layer(context, 1 / this.scale);
        context.restore();
      }
    });
  }
}
