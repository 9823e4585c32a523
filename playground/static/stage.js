/** The picture with its masks: size, pointer, caption, comparison. */

import { drawScene, layerOf } from "./drawing.js";
import { byId, make, setText } from "./elements.js";
import { holds } from "./masks.js";
import { bottomToTop, nameOf } from "./state.js";

/** @import { Concept, Shown } from "./types.js" */
/** @import { State } from "./state.js" */

const MAX_HEIGHT_SHARE = 0.76;
const MIN_HEIGHT = 240;
const MAX_ENLARGEMENT = 3;

export class Stage {
  /** @type {State} */
  #state;
  #work = byId("work", HTMLElement);
  #frame = byId("frame", HTMLElement);
  #canvas = byId("canvas", HTMLCanvasElement);
  #swipe = byId("swipe", HTMLInputElement);
  #left = byId("left", HTMLSelectElement);
  #right = byId("right", HTMLSelectElement);
  #isSwiping = false;

  /** @param {State} state */
  constructor(state) {
    this.#state = state;
    state.onChange(() => this.show());
    new ResizeObserver(() => state.changed()).observe(this.#work);
    addEventListener("resize", () => state.changed());
    this.#frame.addEventListener("pointermove", (event) => this.#onPointer(event));
    this.#frame.addEventListener("pointerleave", () => this.#light(null));
    this.#frame.addEventListener("click", (event) => this.#onClick(event));
    this.#frame.addEventListener("pointerdown", (event) => this.#beginSwipe(event));
    this.#frame.addEventListener("pointerup", () => (this.#isSwiping = false));
    this.#frame.addEventListener("pointercancel", () => (this.#isSwiping = false));
    byId("compare", HTMLElement).addEventListener("click", () => this.#toggleComparison());
    this.#swipe.addEventListener("input", () => this.#divideAt(Number(this.#swipe.value) / 100));
    for (const select of [this.#left, this.#right]) select.addEventListener("change", () => this.#choose());
  }

  /** Show the state. */
  show() {
    const { picture } = this.#state;
    byId("start", HTMLElement).hidden = picture !== null;
    this.#work.hidden = picture === null;
    if (!picture) return;
    const available = this.#work.clientWidth;
    const maxHeight = Math.max(MIN_HEIGHT, MAX_HEIGHT_SHARE * innerHeight);
    const scale = Math.min(available / picture.width, maxHeight / picture.height, MAX_ENLARGEMENT);
    const [width, height] = [picture.width, picture.height].map((side) => Math.max(1, Math.round(side * scale)));
    this.#frame.style.width = `${width}px`;
    this.#frame.style.height = `${height}px`;
    const density = Math.min(devicePixelRatio || 1, 2);
    this.#canvas.width = Math.round(width * density);
    this.#canvas.height = Math.round(height * density);
    this.#draw(density);
    this.#showComparison();
    this.#showCaption();
  }

  /** @param {number} density */
  #draw(density) {
    const { picture, shown, lit, comparison } = this.#state;
    const context = this.#canvas.getContext("2d");
    if (!picture || !context) return;
    const of = (/** @type {Concept} */ concept) => shown.filter((each) => each.concept === concept);
    const scene = {
      picture,
      shown,
      lit: shown.find((each) => each.instance === lit) ?? null,
      comparison: comparison && { left: of(comparison.left), right: of(comparison.right), at: comparison.at },
      isVeiled: true,
    };
    drawScene(context, scene, density);
    const count = shown.length === 1 ? "1 instance" : `${shown.length} instances`;
    this.#canvas.setAttribute("aria-label", `${picture.name}, ${picture.width} by ${picture.height} px, ${count} outlined`);
  }

  #showComparison() {
    const { answered, comparison } = this.#state;
    const button = byId("compare", HTMLElement);
    button.hidden = answered.length < 2;
    button.setAttribute("aria-pressed", String(comparison !== null));
    byId("swipe-row", HTMLElement).hidden = comparison === null;
    this.#frame.classList.toggle("swiping", comparison !== null);
    for (const [select, side] of /** @type {[HTMLSelectElement, "left" | "right"][]} */ ([
      [this.#left, "left"],
      [this.#right, "right"],
    ])) {
      const tag = byId(`${side}-name`, HTMLElement);
      tag.hidden = comparison === null;
      if (!comparison) continue;
      setText(tag, nameOf(comparison[side]));
      fillSelect(select, answered, comparison[side]);
    }
    if (comparison) this.#swipe.value = String(Math.round(100 * comparison.at));
  }

  #toggleComparison() {
    const { answered, comparison } = this.#state;
    const [left, right] = answered;
    this.#state.comparison = comparison || !right ? null : { left, right, at: 0.5 };
    if (this.#state.comparison) left.isShown = right.isShown = true;
    this.#state.changed();
  }

  #choose() {
    const { comparison, answered } = this.#state;
    const of = (/** @type {HTMLSelectElement} */ select) => answered.find(({ id }) => id === Number(select.value));
    const [left, right] = [of(this.#left), of(this.#right)];
    if (!comparison || !left || !right) return;
    Object.assign(comparison, { left, right });
    left.isShown = right.isShown = true;
    this.#state.changed();
  }

  /** @param {number} at */
  #divideAt(at) {
    if (!this.#state.comparison) return;
    this.#state.comparison.at = Math.min(1, Math.max(0, at));
    this.#state.changed();
  }

  #showCaption() {
    const { shown, lit, mode } = this.#state;
    const each = shown.find(({ instance }) => instance === lit);
    const hint = mode === "look" ? "Point at an instance, or go through the list, to see one alone." : "";
    setText(byId("caption", HTMLElement), each ? describe(each) : shown.length ? hint : "");
  }

  /** @param {PointerEvent} event */
  #beginSwipe(event) {
    const isBox = /** @type {Element} */ (event.target).closest(".box");
    if (!this.#state.comparison || this.#state.mode !== "look" || isBox || event.button !== 0) return;
    this.#isSwiping = true;
    this.#frame.setPointerCapture(event.pointerId);
    this.#divideAt(this.#share(event)[0]);
  }

  /** @param {PointerEvent} event */
  #onPointer(event) {
    if (this.#isSwiping) this.#divideAt(this.#share(event)[0]);
    else if (this.#state.mode === "look") this.#light(this.#under(event));
  }

  /** To the instance's own button, which lights it and can take it away. @param {MouseEvent} event */
  #onClick(event) {
    if (this.#state.mode !== "look" || this.#state.comparison) return;
    const each = this.#under(event);
    if (each) document.dispatchEvent(new CustomEvent("choose-instance", { detail: each.instance }));
  }

  /** @param {Shown | null} each */
  #light(each) {
    const instance = each?.instance ?? null;
    if (this.#state.lit === instance) return;
    this.#state.lit = instance;
    this.#state.changed();
  }

  /** The topmost instance under the pointer. @param {MouseEvent} event @returns {Shown | null} */
  #under(event) {
    const { picture, shown, comparison } = this.#state;
    if (!picture) return null;
    const share = this.#share(event);
    const side = comparison && (share[0] < comparison.at ? comparison.left : comparison.right);
    const { width, height } = layerOf(picture);
    const [x, y] = [Math.floor(share[0] * width), Math.floor(share[1] * height)];
    const candidates = shown.filter(({ concept, instance }) => (!side || side === concept) && holds(instance.piece, x, y));
    return bottomToTop(candidates).at(-1) ?? null;
  }

  /** Where a pointer is, as shares of the picture. @param {MouseEvent} event */
  #share(event) {
    const frame = this.#canvas.getBoundingClientRect();
    return [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
  }
}

/** An instance in words. @param {Shown} shown */
export function describe({ number, concept, instance }) {
  const [x0, y0, x1, y1] = instance.box.map((side) => Math.round(side));
  const area = instance.area.toLocaleString("en");
  return `${number} · ${nameOf(concept)} · score ${instance.score.toFixed(2)} · box ${x0}, ${y0} to ${x1}, ${y1} px · area ${area} px`;
}

/** @param {HTMLSelectElement} select @param {Concept[]} concepts @param {Concept} chosen */
function fillSelect(select, concepts, chosen) {
  const wanted = concepts.map(({ id }) => String(id)).join();
  if ([...select.options].map(({ value }) => value).join() !== wanted) {
    select.replaceChildren(...concepts.map((concept) => make("option", { value: concept.id }, nameOf(concept))));
  }
  select.value = String(chosen.id);
}
