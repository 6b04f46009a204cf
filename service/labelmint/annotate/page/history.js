// The strokes (or points) of one image with undo and redo, and their saving: one request at a time, always the newest.

import { Trouble, saveDrawing } from "./api.js";

const RETRY_MS = 2000;
const PASSING = ["OFFLINE", "CANNOT_SAVE"]; // the reasons of failures that may end without the person

export class History {
  // kind: "strokes" or "points". `told(state)` hears "saved", "saving", "unsaved" or "changed elsewhere".
  constructor(seed, kind, { revision, list, told, stored }) {
    this.seed = seed;
    this.kind = kind;
    this.list = list;
    this.revision = revision;
    this.done = [];
    this.undone = [];
    this.told = told;
    this.stored = stored;
    this.dirty = false;
    this.waiting = false; // for another try to save
    this.saving = null;
    this.retry = 0; // its timer
  }

  get canUndo() {
    return this.done.length > 0;
  }

  get canRedo() {
    return this.undone.length > 0;
  }

  change(list) {
    this.done.push(this.list);
    this.undone = [];
    this.replace(list);
  }

  undo() {
    if (!this.canUndo) return;
    this.undone.push(this.list);
    this.replace(this.done.pop());
  }

  redo() {
    if (!this.canRedo) return;
    this.done.push(this.list);
    this.replace(this.undone.pop());
  }

  replace(list) {
    this.list = list;
    this.dirty = true;
    this.save();
  }

  // Resolves when everything is saved or cannot be saved now.
  save() {
    this.saving ??= this.send().finally(() => (this.saving = null));
    return this.saving;
  }

  async send() {
    while (this.dirty) {
      this.dirty = false;
      this.told("saving");
      try {
        const image = await saveDrawing(this.seed, this.kind, this.revision, this.list);
        this.revision = image.revision;
        this.waiting = false;
        this.stored(image);
      } catch (error) {
        this.dirty = true;
        this.told(error.reason === "CHANGED_ELSEWHERE" ? "changed elsewhere" : "unsaved", error.message);
        this.waiting = error instanceof Trouble && PASSING.includes(error.reason);
        clearTimeout(this.retry);
        if (this.waiting) this.retry = setTimeout(() => this.save(), RETRY_MS);
        return;
      }
    }
    this.told("saved");
  }
}
