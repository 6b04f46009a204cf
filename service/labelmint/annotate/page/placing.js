// The tools of keypoints: click to place the chosen one, drag to move, hide, or say that it is not in the image.

const REACH_PX = 12; // of a pointer to a keypoint, in screen pixels

export class Placing {
  constructor(state, view) {
    this.state = state;
    this.view = view;
    this.dragged = null;
  }

  reset() {
    this.dragged = null;
  }

  get name() {
    return this.state.classes[this.state.classId]?.name;
  }

  down(point) {
    const near = this.nearest(point);
    if (near) {
      this.dragged = { ...near };
      this.state.choose(this.state.classes.findIndex((each) => each.name === near.name));
    } else if (this.name !== undefined) {
      this.dragged = { name: this.name, visible: this.placed()?.visible || 2 };
      this.move(point);
    }
    this.view.paint();
  }

  move(point) {
    if (!this.dragged) return;
    const edge = this.view.size - 0.5;
    [this.dragged.x, this.dragged.y] = point.map((each) => Math.round(100 * Math.min(Math.max(each, -0.5), edge)) / 100);
    this.view.paint();
  }

  up() {
    const placed = this.dragged;
    this.dragged = null;
    if (placed) this.put(placed);
  }

  leave() {}

  key(event) {
    if (event.key === "Escape") this.dragged = null;
    else if (event.key === "x" || event.key === "X") this.hide();
    else if (event.key === "Delete") this.absent();
    else return false;
    this.view.paint();
    return true;
  }

  hide() {
    const placed = this.placed();
    if (placed?.visible) this.put({ ...placed, visible: placed.visible === 1 ? 2 : 1 });
    else this.state.tell("Place the keypoint first, where it would be; then hide it.");
  }

  absent() {
    if (this.name !== undefined) this.put({ name: this.name, x: 0, y: 0, visible: 0 });
  }

  placed() {
    return this.state.history.list.find((each) => each.name === this.name);
  }

  nearest([x, y]) {
    const reach = (REACH_PX * window.devicePixelRatio) / this.view.scale;
    const far = (each) => Math.hypot(each.x - x, each.y - y);
    const near = this.state.history.list.filter((each) => each.visible && far(each) < reach);
    return near.sort((one, other) => far(one) - far(other))[0];
  }

  put(placed) {
    const { history, classes } = this.state;
    const order = classes.map((each) => each.name);
    const list = [...history.list.filter((each) => each.name !== placed.name), placed];
    history.change(list.sort((one, other) => order.indexOf(one.name) - order.indexOf(other.name)));
    this.state.changed();
  }

  layer(context, opacity, pixel) {
    const moved = this.dragged?.name;
    const list = this.state.history.list.filter((each) => each.name !== moved);
    for (const each of moved === undefined ? list : [...list, this.dragged]) {
      if (!each.visible) continue;
      const { rgb } = this.state.classes.find((entry) => entry.name === each.name);
      context.beginPath();
      context.arc(each.x, each.y, (each.name === this.name ? 8 : 6) * pixel, 0, 2 * Math.PI);
      context.lineWidth = 3 * pixel;
      context.strokeStyle = "#000";
      context.stroke();
      context.lineWidth = 1.5 * pixel;
      context.strokeStyle = "#fff";
      context.stroke();
      if (each.visible === 2) {
        context.fillStyle = `rgb(${rgb})`;
        context.fill();
      }
    }
  }

  outline() {}
}
