// Small helpers for the elements of the page and for numbers as text.
//
// Rules of this file:
// - Data of the service enters the page as text and pixels, never as markup.

export const $ = (id) => document.getElementById(id);

export const number = (value) => String(Number(value.toPrecision(4)));

/** A share of 1 in percent, as text: 0.0123 is "1.23 %". */
export const percent = (share) => `${Number((share * 100).toPrecision(3))} %`;

/** A new element with properties and children. Strings become text. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function capitalized(word) {
  return word[0].toUpperCase() + word.slice(1);
}
