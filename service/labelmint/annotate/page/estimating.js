// "Enough?": the curve of the estimate over the images annotated so far, and the table of classes.

import { estimate } from "./api.js";
import { $, make } from "./elements.js";

const WIDTH = 280;
const HEIGHT = 150;
const MARGIN = { left: 34, right: 8, top: 8, bottom: 24 };

export class Estimating {
  constructor(state) {
    $("estimate").addEventListener("click", async () => {
      $("estimate").disabled = true;
      $("estimated").replaceChildren("Computing ...");
      try {
        const found = await estimate();
        $("estimated").replaceChildren(make("p", {}, found.advice), curve(found), table(found));
      } catch (error) {
        $("estimated").replaceChildren(error.message);
      }
      $("estimate").disabled = false;
    });
  }
}

function curve({ curve: points, measure }) {
  const most = Math.max(...points.map((each) => each.images), 2);
  const x = (images) => MARGIN.left + ((WIDTH - MARGIN.left - MARGIN.right) * (images - 1)) / (most - 1);
  const y = (value) => HEIGHT - MARGIN.bottom - (HEIGHT - MARGIN.top - MARGIN.bottom) * Math.min(Math.max(value, 0), 1);
  const last = points.at(-1);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const text = `${measure} over ${last.images} images: ${last.miou.toFixed(2)} ± ${last.spread.toFixed(2)}`;
  svg.append(element("title", {}, text));
  for (const value of [0, 0.5, 1]) {
    svg.append(element("line", { x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y(value), y2: y(value), stroke: "currentColor", "stroke-opacity": 0.2 }));
    svg.append(element("text", { x: MARGIN.left - 4, y: y(value) + 4, "text-anchor": "end", "font-size": 11, fill: "currentColor" }, String(value)));
  }
  const edge = (sign) => points.map((each) => `${x(each.images)},${y(each.miou + sign * each.spread)}`);
  svg.append(element("polygon", { points: [...edge(1), ...edge(-1).reverse()].join(" "), fill: "currentColor", "fill-opacity": 0.15 }));
  const line = points.map((each) => `${x(each.images)},${y(each.miou)}`).join(" ");
  svg.append(element("polyline", { points: line, fill: "none", stroke: "currentColor", "stroke-width": 2 }));
  for (const each of points) svg.append(element("circle", { cx: x(each.images), cy: y(each.miou), r: 3, fill: "currentColor" }));
  svg.append(element("text", { x: WIDTH - MARGIN.right, y: HEIGHT - 6, "text-anchor": "end", "font-size": 11, fill: "currentColor" }, `images (1 to ${most})`));
  return svg;
}

function table({ classes, measure }) {
  const head = make("thead", {}, row("th", ["Class", measure, "±", "Images"]));
  const rows = classes.map((each) => row("td", [each.name, value(each.iou), value(each.spread), String(each.images)]));
  return make("table", {}, head, make("tbody", {}, ...rows));
}

function row(tag, cells) {
  return make("tr", {}, ...cells.map((cell, index) => make(index === 0 ? "th" : tag, index === 0 ? { scope: "row" } : {}, cell)));
}

const value = (number) => (number === null ? "?" : number.toFixed(2));

function element(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, each] of Object.entries(attributes)) made.setAttribute(name, each);
  made.append(...children);
  return made;
}
