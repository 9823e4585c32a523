/** The concepts: typed, suggested, chosen for new boxes, taken away. */

import { cssOf, colourAt } from "./colours.js";
import { byId, make } from "./elements.js";
import { askedOf, nameOf } from "./state.js";

/** @import { Concept } from "./types.js" */
/** @import { State } from "./state.js" */

export class ConceptList {
  /** @type {State} */
  #state;
  #list = byId("concepts", HTMLElement);
  #input = byId("concept", HTMLInputElement);
  #suggestions = byId("suggestions", HTMLElement);
  #drawn = "";
  #suggested = "";

  /**
   * @param {State} state
   * @param {() => void} find what is not answered yet
   */
  constructor(state, find) {
    this.#state = state;
    this.find = find;
    state.onChange(() => this.#show());
    this.#input.addEventListener("input", () => {
      if (/[,\n]/u.test(this.#input.value)) this.takeTyped();
    });
    this.#input.addEventListener("keydown", (event) => {
      const last = state.concepts.at(-1);
      if (event.key === "Backspace" && this.#input.value === "" && last) state.removeConcept(last);
    });
  }

  /** Make concepts of what is typed, separated by commas. */
  takeTyped() {
    const texts = this.#input.value.split(/[,\n]/u).map((text) => text.trim()).filter(Boolean);
    for (const text of texts) this.#state.addConcept(text);
    this.#input.value = "";
  }

  #show() {
    const { concepts, active, answered, picture } = this.#state;
    const drawn = JSON.stringify([
      concepts.map((each) => [each.id, each.text, each.boxes.length, each.result?.asked === askedOf(each), each.result !== null]),
      active?.id,
      answered.length,
    ]);
    if (drawn !== this.#drawn) {
      this.#drawn = drawn;
      this.#draw();
    }
    const texts = concepts.map(({ text }) => text);
    const open = (picture?.suggestions ?? []).filter((text) => !texts.includes(text));
    if (open.join() !== this.#suggested) {
      this.#suggested = open.join();
      this.#suggestions.replaceChildren("Try ", ...open.map((text) => this.#suggestion(text)));
      this.#suggestions.hidden = open.length === 0;
    }
  }

  #draw() {
    const focused = document.activeElement instanceof HTMLElement ? document.activeElement.dataset.chip : undefined;
    this.#list.replaceChildren(...this.#state.concepts.map((concept, index) => this.#chip(concept, index)));
    if (!focused) return;
    const again = this.#list.querySelector(`[data-chip="${focused}"]`);
    if (again instanceof HTMLElement) again.focus();
    else this.#input.focus();
  }

  /** @param {Concept} concept @param {number} index */
  #chip(concept, index) {
    const { active, answered } = this.#state;
    const name = nameOf(concept);
    const isOpen = concept.result?.asked !== askedOf(concept);
    const parts = [name];
    if (concept.boxes.length) parts.push(`${concept.boxes.length} ${concept.boxes.length === 1 ? "box" : "boxes"}`);
    const choose = make(
      "button",
      { type: "button", class: "name", "aria-pressed": String(concept === active), "data-chip": `name-${concept.id}`, title: "New boxes count for this concept" },
      ...(answered.length > 1 ? [make("span", { class: "swatch" })] : []),
      make("span", { class: "text" }, name),
      ...(concept.boxes.length ? [make("span", { class: "count" }, parts[1])] : []),
    );
    choose.addEventListener("click", () => {
      this.#state.active = concept;
      this.#state.changed();
    });
    const remove = make("button", { type: "button", class: "remove", "aria-label": `Remove ${name}`, "data-chip": `remove-${concept.id}` }, "×");
    remove.addEventListener("click", () => this.#state.removeConcept(concept));
    const chip = make("li", { class: `chip${isOpen ? " open" : ""}${concept === active ? " active" : ""}` }, choose, remove);
    chip.style.setProperty("--colour", cssOf(colourAt(index)));
    return chip;
  }

  /** @param {string} text */
  #suggestion(text) {
    const button = make("button", { type: "button", class: "suggestion", "aria-label": `Find ${text}` }, `+ ${text}`);
    button.addEventListener("click", () => {
      this.#state.addConcept(text);
      this.find();
      this.#input.focus();
    });
    return button;
  }
}
