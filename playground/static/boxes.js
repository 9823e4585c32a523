/** Exemplar boxes over the picture: drawn, moved, resized and removed by pointer or by keys. */

import { byId, make, setText } from "./elements.js";

/** @import { Box, Corners } from "./types.js" */
/** @import { State } from "./state.js" */

const MAX_BOXES = 32;
/** A drag shorter than this, in px of the screen, is a click. */
const MIN_DRAG = 4;
/** Keys move by a share of the picture's longer side. */
const KEY_SHARE = 0.01;
const KEYS = new Map([
  ["ArrowLeft", [-1, 0]],
  ["ArrowRight", [1, 0]],
  ["ArrowUp", [0, -1]],
  ["ArrowDown", [0, 1]],
]);

/**
 * A drag in progress.
 * @typedef {object} Drag
 * @property {Box} box
 * @property {Corners} before
 * @property {"draw" | "move" | "resize"} kind
 * @property {number[]} from px of the picture
 */

export class BoxEditor {
  /** @type {State} */
  #state;
  #overlay = byId("boxes", HTMLElement);
  /** @type {Map<Box, HTMLElement>} */
  #elements = new Map();
  /** @type {Drag | null} */
  #drag = null;

  /** @param {State} state */
  constructor(state) {
    this.#state = state;
    state.onChange(() => this.#show());
    this.#overlay.addEventListener("pointerdown", (event) => this.#begin(event));
    this.#overlay.addEventListener("pointermove", (event) => this.#continue(event));
    this.#overlay.addEventListener("pointerup", () => this.#end());
    this.#overlay.addEventListener("pointercancel", () => this.#cancel());
    byId("add-box", HTMLElement).addEventListener("click", () => this.#addInMiddle());
    byId("clear-boxes", HTMLElement).addEventListener("click", () => {
      state.removeBoxes(state.active?.boxes ?? []);
      byId("add-box", HTMLElement).focus();
    });
  }

  get #side() {
    const picture = this.#state.picture;
    return { width: picture?.width ?? 1, height: picture?.height ?? 1 };
  }

  #show() {
    const { active, concepts, mode, picture } = this.#state;
    const isDrawing = picture !== null && mode !== "look";
    this.#overlay.classList.toggle("drawing", isDrawing);
    byId("add-box", HTMLElement).hidden = !isDrawing;
    byId("clear-boxes", HTMLElement).hidden = !active?.boxes.length;
    const help = byId("mode-help", HTMLElement);
    help.hidden = !isDrawing;
    setText(help, helpOf(mode, active ? active.text : null));
    const boxes = concepts.flatMap((concept) => concept.boxes);
    if (this.#drag?.kind === "draw") boxes.push(this.#drag.box);
    for (const [box, element] of this.#elements) {
      if (boxes.includes(box)) continue;
      element.remove();
      this.#elements.delete(box);
    }
    for (const box of boxes) this.#showBox(box, active?.boxes.indexOf(box) ?? -1);
  }

  /** @param {Box} box @param {number} index in the active concept; -1: of another one */
  #showBox(box, index) {
    let element = this.#elements.get(box);
    if (!element) {
      element = this.#made(box);
      this.#elements.set(box, element);
      this.#overlay.append(element);
    }
    const { width, height } = this.#side;
    const [x0, y0, x1, y1] = box.corners;
    element.classList.toggle("of-other", index < 0 && this.#drag?.box !== box);
    element.tabIndex = index < 0 ? -1 : 0;
    element.style.left = `${(100 * x0) / width}%`;
    element.style.top = `${(100 * y0) / height}%`;
    element.style.width = `${(100 * (x1 - x0)) / width}%`;
    element.style.height = `${(100 * (y1 - y0)) / height}%`;
    const kind = box.label ? "more like it" : "not like it";
    element.setAttribute(
      "aria-label",
      `Box ${index + 1}, ${kind}: x ${x0} to ${x1}, y ${y0} to ${y1} px. ` +
        "Arrow keys move it, with Shift they resize it, Delete removes it.",
    );
  }

  /** @param {Box} box */
  #made(box) {
    const remove = make("button", { type: "button", class: "remove", "aria-label": "Remove this box" }, "×");
    remove.addEventListener("click", () => this.#remove(box));
    const kind = box.label ? "positive" : "negative";
    const element = make("div", { class: `box ${kind}`, role: "group", "data-kind": kind }, make("span", { class: "corner" }), remove);
    element.addEventListener("keydown", (event) => this.#onKey(event, box));
    return element;
  }

  /** @param {PointerEvent} event */
  #begin(event) {
    const target = /** @type {Element} */ (event.target);
    if (event.button !== 0 || target.closest(".remove")) return;
    const held = [...this.#elements].find(([, element]) => element.contains(target))?.[0];
    if (!held && this.#state.mode === "look") return;
    event.preventDefault();
    const from = this.#place(event);
    const kind = target.closest(".corner") ? "resize" : "move";
    const box = held ?? { corners: rectangle(from, from), label: this.#label };
    this.#drag = { box, before: box.corners, kind: held ? kind : "draw", from };
    this.#overlay.setPointerCapture(event.pointerId);
    if (held) this.#elements.get(held)?.focus();
  }

  /** @returns {0 | 1} */
  get #label() {
    return this.#state.mode === "negative" ? 0 : 1;
  }

  /** @param {PointerEvent} event */
  #continue(event) {
    if (!this.#drag) return;
    const { box, before, kind, from } = this.#drag;
    const at = this.#place(event);
    const [dx, dy] = [at[0] - from[0], at[1] - from[1]];
    if (kind === "draw") box.corners = rectangle(from, at);
    else if (kind === "move") this.#move(box, before, dx, dy);
    else this.#resize(box, before, dx, dy);
    this.#state.changed();
  }

  #end() {
    const drag = this.#drag;
    this.#drag = null;
    if (!drag) return;
    if (drag.kind === "draw" && this.#isLargeEnough(drag.box) && this.#hasRoom()) {
      this.#state.addBox(drag.box);
    }
    this.#state.changed();
  }

  #cancel() {
    if (this.#drag) this.#drag.box.corners = this.#drag.before;
    this.#drag = null;
    this.#state.changed();
  }

  #hasRoom() {
    return (this.#state.active?.boxes.length ?? 0) < MAX_BOXES;
  }

  #addInMiddle() {
    if (!this.#hasRoom()) return;
    const { width, height } = this.#side;
    const corners = [0.4 * width, 0.4 * height, 0.6 * width, 0.6 * height].map(Math.round);
    const [x0, y0, x1, y1] = corners;
    const box = { corners: rectangle([x0, y0], [Math.max(x1, x0 + 1), Math.max(y1, y0 + 1)]), label: this.#label };
    this.#state.addBox(box);
    this.#show();
    this.#elements.get(box)?.focus();
  }

  /** @param {Box} box */
  #remove(box) {
    const boxes = this.#state.active?.boxes ?? [];
    const next = boxes[boxes.indexOf(box) + 1] ?? boxes[boxes.indexOf(box) - 1];
    this.#state.removeBoxes([box]);
    (next ? this.#elements.get(next) : byId("add-box", HTMLElement))?.focus();
  }

  /** @param {KeyboardEvent} event @param {Box} box */
  #onKey(event, box) {
    if (event.target !== event.currentTarget) return;
    if (event.key === "Delete" || event.key === "Backspace") {
      event.preventDefault();
      this.#remove(box);
      return;
    }
    const direction = KEYS.get(event.key);
    if (!direction || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const { width, height } = this.#side;
    const step = Math.max(1, Math.round(KEY_SHARE * Math.max(width, height)));
    const [dx, dy] = direction.map((each) => each * step);
    if (event.shiftKey) this.#resize(box, box.corners, dx, dy);
    else this.#move(box, box.corners, dx, dy);
    this.#state.changed();
  }

  /** @param {Box} box @param {Corners} corners @param {number} dx @param {number} dy */
  #move(box, [x0, y0, x1, y1], dx, dy) {
    const { width, height } = this.#side;
    const x = clamp(x0 + dx, 0, width - (x1 - x0));
    const y = clamp(y0 + dy, 0, height - (y1 - y0));
    box.corners = [x, y, x + x1 - x0, y + y1 - y0];
  }

  /** The lower right corner moves. @param {Box} box @param {Corners} corners @param {number} dx @param {number} dy */
  #resize(box, [x0, y0, x1, y1], dx, dy) {
    const { width, height } = this.#side;
    box.corners = [x0, y0, clamp(x1 + dx, x0 + 1, width), clamp(y1 + dy, y0 + 1, height)];
  }

  /** @param {Box} box */
  #isLargeEnough({ corners: [x0, y0, x1, y1] }) {
    const minimum = (MIN_DRAG * this.#side.width) / this.#overlay.clientWidth;
    return x1 - x0 >= Math.max(1, minimum) && y1 - y0 >= Math.max(1, minimum);
  }

  /** Where a pointer is, in whole px of the picture. @param {PointerEvent} event */
  #place(event) {
    const frame = this.#overlay.getBoundingClientRect();
    const { width, height } = this.#side;
    return [
      clamp(Math.round(((event.clientX - frame.left) / frame.width) * width), 0, width),
      clamp(Math.round(((event.clientY - frame.top) / frame.height) * height), 0, height),
    ];
  }
}

/** @param {string} mode @param {string | null} text of the active concept */
function helpOf(mode, text) {
  const begin = "Drag a box, or add one and move it by keys. Then press Find: ";
  const what = text === null ? "the boxes alone are searched" : `it counts for “${text}”`;
  return mode === "negative" ? `${begin}what is like it is left out; ${what}.` : `${begin}what is like it is found; ${what}.`;
}

/** @param {number[]} a @param {number[]} b @returns {Corners} */
function rectangle(a, b) {
  return [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
}

/** @param {number} value @param {number} low @param {number} high */
function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}
