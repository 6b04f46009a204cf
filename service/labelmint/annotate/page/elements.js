// Small helpers for the page's elements.

export const $ = (id) => document.getElementById(id);

// An element with properties, attributes (names with a dash) and children.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

export function chosen(name) {
  return document.querySelector(`input[name="${name}"]:checked`).value;
}

export function choose(name, value) {
  const input = document.querySelector(`input[name="${name}"][value="${value}"]`);
  if (!input || input.disabled) return false;
  input.checked = true;
  return true;
}

export const percent = (share) => (share > 0 && share < 0.01 ? "<1 %" : `${Math.round(100 * share)} %`);
