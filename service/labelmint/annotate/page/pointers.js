// Mouse, pen and touch on the canvas: one pointer draws, two fingers move and zoom, and a pen keeps the palm out.

export class Pointers {
  constructor(state, view) {
    this.state = state;
    this.view = view;
    this.fingers = new Map(); // touch pointers by id, in canvas pixels
    this.drawing = null; // the id of the pointer that draws
    this.panning = null; // the pointer that moves the image, and its last place
    this.space = false;
    const { canvas } = view;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => this.drawing === null && this.state.tools?.leave());
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  down(event) {
    if (!this.state.history) return;
    this.view.canvas.focus({ preventScroll: true });
    this.view.canvas.setPointerCapture(event.pointerId);
    if (event.pointerType === "touch") {
      this.fingers.set(event.pointerId, this.view.place(event));
      if (this.fingers.size === 2) this.giveUp();
      if (this.fingers.size >= 2 || this.drawing !== null) return;
    }
    if (event.button === 1 || this.space || this.state.tool === "pan") {
      this.panning = { id: event.pointerId, at: this.view.place(event) };
    } else if (event.button === 0) {
      this.drawing = event.pointerId;
      this.state.tools.down(this.view.inImage(event));
    }
  }

  move(event) {
    if (this.fingers.has(event.pointerId) && this.fingers.size >= 2) {
      this.pinch(event);
    } else if (this.panning?.id === event.pointerId) {
      const at = this.view.place(event);
      this.view.move(at[0] - this.panning.at[0], at[1] - this.panning.at[1]);
      this.panning.at = at;
    } else if (this.state.history && (this.drawing === null || this.drawing === event.pointerId)) {
      // All places of the pointer since the last frame, so that fast lines stay round.
      const all = this.drawing === null ? [event] : (event.getCoalescedEvents?.() ?? []);
      for (const each of all.length ? all : [event]) this.state.tools.move(this.view.inImage(each));
    }
  }

  up(event) {
    this.fingers.delete(event.pointerId);
    if (this.panning?.id === event.pointerId) this.panning = null;
    if (this.drawing !== event.pointerId) return;
    this.drawing = null;
    if (event.type === "pointercancel") this.state.tools.reset();
    else this.state.tools.up();
    if (event.pointerType === "touch") this.state.tools.leave();
    this.view.paint();
  }

  // A second finger: what the first one has begun to draw was the beginning of a gesture.
  giveUp() {
    this.drawing = null;
    this.state.tools.reset();
    this.view.paint();
  }

  pinch(event) {
    const other = [...this.fingers].find(([id]) => id !== event.pointerId)[1];
    const before = this.fingers.get(event.pointerId);
    const now = this.view.place(event);
    this.fingers.set(event.pointerId, now);
    const apart = ([x, y]) => Math.max(Math.hypot(x - other[0], y - other[1]), 1);
    this.view.move((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
    this.view.zoom(apart(now) / apart(before), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
  }

  wheel(event) {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    this.view.zoom(Math.exp(-0.0015 * lines * event.deltaY), this.view.place(event));
  }
}
