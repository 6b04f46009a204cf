// The list of classes or keypoints: choose, rename, recolour, add.

import { saveClasses } from "./api.js";
import { $, make } from "./elements.js";

// Colours that differ well from each other, also for most colour-blind people (Okabe and Ito 2008), then variations.
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#8a5a2b", "#7f7f7f"];

export class Classes {
  constructor(state) {
    this.state = state;
    $("new-class").addEventListener("submit", (event) => {
      event.preventDefault();
      this.add($("new-name").value.trim());
    });
  }

  show() {
    const { classes, classId } = this.state;
    $("classes").replaceChildren(...classes.map((each) => this.row(each, each.id === classId)));
  }

  row({ id, name, rgb }, pressed) {
    const button = make("button", { type: "button", title: "Double-click or F2 renames", "aria-pressed": String(pressed) }, name);
    button.addEventListener("click", () => this.state.choose(id));
    button.addEventListener("dblclick", () => this.rename(id));
    button.addEventListener("keydown", (event) => event.key === "F2" && this.rename(id));
    const colour = make("input", { type: "color", value: hex(rgb), "aria-label": `Colour of ${name}` });
    colour.addEventListener("change", () => this.change(id, { rgb: rgbOf(colour.value) }));
    return make("li", {}, make("kbd", {}, id < 9 ? String(id + 1) : ""), button, colour);
  }

  rename(id) {
    const item = $("classes").children[id];
    const input = make("input", { value: this.state.classes[id].name, maxLength: 128, "aria-label": "New name" });
    let ended = false;
    const end = async (keep) => {
      if (ended) return;
      ended = true;
      const name = input.value.trim();
      if (!keep || !name || name === this.state.classes[id].name || !(await this.change(id, { name }))) this.show();
      $("classes").children[id]?.querySelector("button")?.focus();
    };
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") end(true);
      else if (event.key === "Escape") end(false);
    });
    input.addEventListener("blur", () => end(true));
    item.querySelector("button").replaceWith(input);
    input.focus();
    input.select();
  }

  async add(name) {
    if (!name) return;
    const number = this.state.classes.length;
    const rgb = rgbOf(COLOURS[(number + COLOURS.length - 1) % COLOURS.length]);
    $("new-name").value = ""; // at once, so that a name typed meanwhile stays
    if (await this.save([...this.state.classes, { name, rgb }])) this.state.choose(number);
    else $("new-name").value = name;
  }

  change(id, change) {
    return this.save(this.state.classes.map((each) => (each.id === id ? { ...each, ...change } : each)));
  }

  async save(classes) {
    await this.state.history?.save();
    const session = await this.state.attempt(() => saveClasses(classes.map(({ name, rgb }) => ({ name, rgb }))));
    if (session) await this.state.renamed(session);
    return Boolean(session);
  }
}

function hex(rgb) {
  return `#${rgb.map((each) => each.toString(16).padStart(2, "0")).join("")}`;
}

function rgbOf(text) {
  return [1, 3, 5].map((at) => Number.parseInt(text.slice(at, at + 2), 16));
}
