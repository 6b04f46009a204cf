// The notice: one message about the whole page, with a button to try again or a form for the access token.
//
// Rules of this file:
// - It shows one message at a time. It moves into an open dialog, because the rest of the page cannot be used then.

import { $ } from "./dom.js";

/** Show a text, and one control (`retry` or `token-form`) with it. An empty text hides the notice. */
export function say(text, control = null) {
  $("notice").hidden = text === "";
  $("notice-text").textContent = text;
  $("retry").hidden = $("token-form").hidden = true;
  if (control !== null) $(control).hidden = false;
}

/** Move the notice to the start of an element, and back to its own place if that is null. */
export function moveNotice(target) {
  (target ?? $("notice-place")).prepend($("notice"));
}
