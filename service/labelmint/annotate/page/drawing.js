// The tools of segmentation: what the pointer and the keys do to the strokes of the open image.

import { regionAt } from "./api.js";
import { painted } from "./strokes.js";

const CLOSE_PX = 10; // a click so near to a polygon's first point closes it, in screen pixels

export class Drawing {
  constructor(state, view) {
    this.state = state;
    this.view = view;
    this.current = null; // the stroke that the pointer is drawing
    this.polygon = []; // the points of an open polygon
    this.pointer = null;
    this.cached = { list: null, canvas: null };
  }

  reset() {
    this.current = null;
    this.polygon = [];
  }

  down(point) {
    const { tool, classId, radius } = this.state;
    if (tool === "brush") this.current = { tool, class: classId, radius, points: [point] };
    else if (tool === "erase") this.current = { tool, radius, points: [point] };
    else if (tool === "polygon") this.addCorner(point);
    else if (tool === "fill") this.fill(point);
    this.view.paint();
  }

  move(point) {
    this.pointer = point;
    if (this.current) {
      const [x, y] = this.current.points.at(-1);
      // Nearer points add nothing that a pixel shows.
      if (Math.hypot(point[0] - x, point[1] - y) > 0.3) this.current.points.push(point);
    }
    this.view.paint();
  }

  up() {
    const stroke = this.current;
    this.current = null;
    if (stroke) this.add({ ...stroke, points: stroke.points.map(rounded) });
  }

  leave() {
    this.pointer = null;
    this.view.paint();
  }

  key(event) {
    if (event.key === "Enter" && this.polygon.length >= 3) this.closePolygon();
    else if (event.key === "Escape") this.reset();
    else if (event.key === "Backspace" && this.polygon.length) this.polygon.pop();
    else return false;
    this.view.paint();
    return true;
  }

  addCorner(point) {
    const reach = (CLOSE_PX * window.devicePixelRatio) / this.view.scale;
    const first = this.polygon[0];
    if (this.polygon.length >= 3 && Math.hypot(point[0] - first[0], point[1] - first[1]) < reach) this.closePolygon();
    else this.polygon.push(point);
  }

  closePolygon() {
    const points = this.polygon.map(rounded);
    this.polygon = [];
    this.add({ tool: "polygon", class: this.state.classId, points });
  }

  async fill(point) {
    const { preview, history, classId } = this.state;
    const size = this.view.size;
    const inside = point.every((each) => each >= -0.5 && each <= size - 0.5);
    if (!inside) return;
    if (!preview) {
      this.state.tell("There is no prediction to fill from yet: draw two classes first.");
      return;
    }
    const found = await this.state.attempt(() => regionAt(history.seed, preview, point));
    if (found && history === this.state.history) {
      this.add({ tool: "fill", class: classId, at: rounded(point), region: found.region });
    }
  }

  add(stroke) {
    this.state.history.change([...this.state.history.list, stroke]);
    this.state.changed();
  }

  // The drawn pixels, painted anew only when they change.
  layer(context, opacity) {
    const { history, colours } = this.state;
    const list = this.current ? [...history.list, this.current] : history.list;
    if (this.cached.list !== history.list || this.cached.colours !== colours || this.current || this.cached.live) {
      this.cached = { list: history.list, colours, live: Boolean(this.current), canvas: painted(list, this.view.size, colours) };
    }
    context.globalAlpha = opacity;
    context.drawImage(this.cached.canvas, -0.5, -0.5);
  }

  // The outline of an open polygon, and the circle of the brush.
  outline(context, pixel) {
    const { tool, radius, colours, classId } = this.state;
    context.lineWidth = 2 * pixel;
    if (this.polygon.length) {
      context.strokeStyle = css(colours[classId]);
      context.beginPath();
      for (const [x, y] of [...this.polygon, ...(this.pointer ? [this.pointer] : [])]) context.lineTo(x, y);
      context.stroke();
      context.fillStyle = "#fff";
      for (const [x, y] of this.polygon) context.fillRect(x - 3 * pixel, y - 3 * pixel, 6 * pixel, 6 * pixel);
    }
    if (this.pointer && (tool === "brush" || tool === "erase")) {
      for (const [colour, width] of [["#000", 3], ["#fff", 1.5]]) {
        context.strokeStyle = colour;
        context.lineWidth = width * pixel;
        context.beginPath();
        context.arc(...this.pointer, radius, 0, 2 * Math.PI);
        context.stroke();
      }
    }
  }
}

function css(rgb) {
  return rgb ? `rgb(${rgb})` : "#fff";
}

// A hundredth of a pixel is finer than any hand, and keeps the files small.
function rounded([x, y]) {
  return [Math.round(100 * x) / 100, Math.round(100 * y) / 100];
}
