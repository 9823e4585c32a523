/** The instances as a list of buttons, and the threshold with the scores above it. */

import { cssOf } from "./colours.js";
import { announce, byId, make, setText } from "./elements.js";
import { describe } from "./stage.js";
import { LOWEST_THRESHOLD, nameOf } from "./state.js";

/** @import { Concept, Instance, Shown } from "./types.js" */
/** @import { State } from "./state.js" */

/**
 * @typedef {object} Row of one instance
 * @property {HTMLElement} row
 * @property {HTMLElement} number
 * @property {HTMLButtonElement} choose
 * @property {HTMLButtonElement} remove
 */

export class InstanceList {
  /** @type {State} */
  #state;
  #section = byId("results", HTMLElement);
  #list = byId("instances", HTMLElement);
  #slider = byId("threshold", HTMLInputElement);
  #scores = byId("scores", HTMLElement);
  /** @type {Map<Instance, Row>} */
  #rows = new Map();
  /** @type {Map<Concept, {head: HTMLInputElement, count: HTMLElement, empty: HTMLElement}>} */
  #heads = new Map();
  /** Of the list that is drawn. @type {unknown[]} */
  #drawn = [];

  /** @param {State} state */
  constructor(state) {
    this.#state = state;
    state.onChange(() => this.#show());
    this.#slider.addEventListener("input", () => {
      state.threshold = Number(this.#slider.value);
      state.changed();
    });
    this.#slider.addEventListener("change", () => announce(this.#summary()));
    document.addEventListener("choose-instance", (event) => {
      const instance = /** @type {CustomEvent<Instance>} */ (event).detail;
      this.#rows.get(instance)?.choose.focus({ preventScroll: true }); // the picture stays in view
    });
  }

  #summary() {
    const all = this.#state.answered.flatMap((concept) => concept.result?.instances ?? []);
    return `Threshold ${this.#state.threshold.toFixed(2)}: ${this.#state.shown.length} of ${all.length} instances shown`;
  }

  #show() {
    const { answered, threshold } = this.#state;
    this.#section.hidden = answered.length === 0;
    const wanted = answered.flatMap((concept) => [concept, concept.result]);
    if (wanted.length !== this.#drawn.length || wanted.some((each, index) => each !== this.#drawn[index])) {
      this.#drawn = wanted;
      this.#draw();
    }
    this.#slider.value = String(threshold);
    this.#slider.setAttribute("aria-valuetext", this.#summary());
    setText(byId("threshold-value", HTMLElement), threshold.toFixed(2));
    const shown = new Map(this.#state.shown.map((each) => [each.instance, each]));
    for (const concept of answered) this.#showConcept(concept, shown);
  }

  /** @param {Concept} concept @param {Map<Instance, Shown>} shown */
  #showConcept(concept, shown) {
    const instances = concept.result?.instances ?? [];
    const count = instances.filter((instance) => shown.has(instance)).length;
    const head = this.#heads.get(concept);
    if (head) {
      head.head.checked = concept.isShown;
      setText(head.count, `${count} of ${instances.length}`);
      head.empty.hidden = instances.some((instance) => this.#state.passes(instance));
      setText(head.empty, emptyText(instances));
    }
    for (const instance of instances) this.#showRow(concept, instance, shown.get(instance));
  }

  /** @param {Concept} concept @param {Instance} instance @param {Shown | undefined} shown */
  #showRow(concept, instance, shown) {
    const row = this.#rows.get(instance);
    if (!row) return;
    row.row.hidden = !concept.isShown || !this.#state.passes(instance);
    row.row.classList.toggle("removed", instance.isRemoved);
    row.row.classList.toggle("lit", this.#state.lit === instance);
    setText(row.number, shown ? String(shown.number) : "–");
    const words = shown ? describe(shown) : `${nameOf(concept)}, taken away`;
    row.choose.setAttribute("aria-label", words);
    setText(row.remove, instance.isRemoved ? "Bring back" : "×");
    row.remove.setAttribute("aria-label", instance.isRemoved ? `Bring back ${nameOf(concept)}` : `Take away ${words}`);
  }

  #draw() {
    const scroll = this.#list.scrollTop;
    this.#rows.clear();
    this.#heads.clear();
    const parts = this.#state.answered.map((concept) => this.#conceptPart(concept));
    this.#list.replaceChildren(...parts);
    this.#list.scrollTop = scroll;
    const dots = this.#state.answered.flatMap((concept) =>
      (concept.result?.instances ?? []).map((instance, index) => this.#dot(instance, this.#state.colourOf(concept, index))),
    );
    this.#scores.replaceChildren(...dots);
  }

  /** @param {Concept} concept */
  #conceptPart(concept) {
    const instances = concept.result?.instances ?? [];
    const head = make("input", { type: "checkbox" });
    head.addEventListener("change", () => {
      concept.isShown = head.checked;
      this.#state.changed();
    });
    const count = make("span", { class: "count" });
    const empty = make("p", { class: "empty" });
    this.#heads.set(concept, { head, count, empty });
    const rows = instances.map((instance, index) => this.#row(concept, instance, index));
    return make(
      "section",
      { class: "found" },
      make("label", { class: "found-head" }, head, make("span", { class: "text" }, nameOf(concept)), count),
      empty,
      make("ul", { class: "rows", "aria-label": `Instances of ${nameOf(concept)}` }, ...rows),
    );
  }

  /** @param {Concept} concept @param {Instance} instance @param {number} index */
  #row(concept, instance, index) {
    const [x0, y0, x1, y1] = instance.box.map((side) => Math.round(side));
    const number = make("span", { class: "number" });
    const choose = make(
      "button",
      { type: "button", class: "choose" },
      number,
      make("span", { class: "facts" }, `${x1 - x0} × ${y1 - y0} · ${instance.area.toLocaleString("en")} px`),
      make("span", { class: "score" }, instance.score.toFixed(2)),
    );
    const remove = make("button", { type: "button", class: "remove" });
    const row = make("li", { class: "row" }, choose, remove);
    row.style.setProperty("--colour", cssOf(this.#state.colourOf(concept, index)));
    row.addEventListener("pointerenter", () => this.#light(instance));
    row.addEventListener("pointerleave", () => this.#light(null));
    row.addEventListener("focusin", () => this.#light(instance));
    row.addEventListener("focusout", () => this.#light(null));
    row.addEventListener("keydown", (event) => {
      if (event.key === "Delete") this.#toggle(concept, instance);
    });
    remove.addEventListener("click", () => this.#toggle(concept, instance));
    this.#rows.set(instance, { row, number, choose, remove });
    return row;
  }

  /** @param {Concept} concept @param {Instance} instance */
  #toggle(concept, instance) {
    instance.isRemoved = !instance.isRemoved;
    announce(`${nameOf(concept)} ${instance.isRemoved ? "taken away" : "brought back"}, ${this.#state.shown.length} shown`);
    this.#state.changed();
  }

  /** @param {Instance | null} instance */
  #light(instance) {
    this.#state.lit = instance;
    this.#state.changed();
  }

  /** A dot above the slider where its thumb would be at this score. @param {Instance} instance @param {number[]} colour */
  #dot(instance, colour) {
    const [low, high] = [Number(this.#slider.min), Number(this.#slider.max)];
    const share = Math.min(1, Math.max(0, (instance.score - low) / (high - low)));
    const dot = make("span", { class: "dot" });
    dot.style.setProperty("--share", String(share));
    dot.style.setProperty("--colour", cssOf(colour));
    return dot;
  }
}

/** @param {Instance[]} instances */
function emptyText(instances) {
  const best = instances[0]?.score;
  if (best === undefined) return `Nothing found, not even at ${LOWEST_THRESHOLD.toFixed(2)}.`;
  return `Nothing above this threshold; the best score is ${best.toFixed(2)}.`;
}
