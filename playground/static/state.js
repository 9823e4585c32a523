/** What the page knows, and what follows from it. Views read it and are told of each change. */

import { colourAt } from "./colours.js";

/** @import { Box, Concept, Instance, Picture, Shown } from "./types.js" */

export const LOWEST_THRESHOLD = 0.05;
const MAX_CONCEPTS = 10;

export class State {
  /** @type {Picture | null} */
  picture = null;
  /** @type {Concept[]} */
  concepts = [];
  /** The concept that new boxes belong to. @type {Concept | null} */
  active = null;
  threshold = 0.5;
  /** Under the pointer, or focused. @type {Instance | null} */
  lit = null;
  /** What the pointer does. @type {"look" | "positive" | "negative"} */
  mode = "look";
  /** `at` is a share of the width. @type {{left: Concept, right: Concept, at: number} | null} */
  comparison = null;

  #nextId = 1;
  #isAnnounced = false;
  /** @type {(() => void)[]} */
  #views = [];

  /** Call `view` after changes, once a frame. @param {() => void} view */
  onChange(view) {
    this.#views.push(view);
  }

  /** Tell the views that something has changed. */
  changed() {
    if (this.#isAnnounced) return;
    this.#isAnnounced = true;
    requestAnimationFrame(() => {
      this.#isAnnounced = false;
      for (const view of this.#views) view();
    });
  }

  /** Begin with another picture; the concepts stay, their boxes and results do not. @param {Picture | null} picture */
  setPicture(picture) {
    this.picture = picture;
    this.concepts = this.concepts.filter((concept) => concept.text !== null);
    for (const concept of this.concepts) Object.assign(concept, { boxes: [], result: null, isShown: true });
    this.active = this.concepts.at(-1) ?? null;
    this.lit = null;
    this.comparison = null;
    this.mode = "look";
    this.changed();
  }

  /**
   * The concept with this text, added if it is new.
   * @param {string | null} text null: boxes alone
   * @returns {Concept | null} null: there are too many
   */
  addConcept(text) {
    const known = this.concepts.find((concept) => concept.text === text);
    if (!known && this.concepts.length >= MAX_CONCEPTS) return null;
    const concept = known ?? { id: this.#nextId++, text, boxes: [], isShown: true, result: null };
    if (!known) this.concepts.push(concept);
    concept.isShown = true;
    this.active = concept;
    this.changed();
    return concept;
  }

  /** @param {Concept} concept */
  removeConcept(concept) {
    this.concepts = this.concepts.filter((each) => each !== concept);
    if (this.active === concept) this.active = this.concepts.at(-1) ?? null;
    if (this.comparison && [this.comparison.left, this.comparison.right].includes(concept)) this.comparison = null;
    this.lit = null;
    this.changed();
  }

  /** Add a box to the active concept, or to one of boxes alone. @param {Box} box */
  addBox(box) {
    const concept = this.active ?? this.addConcept(null);
    concept?.boxes.push(box);
    this.changed();
  }

  /** @param {Box[]} boxes those of the active concept that go */
  removeBoxes(boxes) {
    const concept = this.active;
    if (!concept) return;
    concept.boxes = concept.boxes.filter((box) => !boxes.includes(box));
    if (concept.text === null && concept.boxes.length === 0) this.removeConcept(concept);
    this.changed();
  }

  /** Concepts whose answer is missing, or is one to another question. @returns {Concept[]} */
  get unanswered() {
    return this.concepts.filter((concept) => concept.result?.asked !== askedOf(concept));
  }

  /** Concepts that have an answer. @returns {Concept[]} */
  get answered() {
    return this.concepts.filter((concept) => concept.result !== null);
  }

  /** Whether its score passes; at the lowest threshold all do that the server sent. @param {Instance} instance */
  passes(instance) {
    return this.threshold <= LOWEST_THRESHOLD || instance.score > this.threshold;
  }

  /** Whether an instance of a concept is shown. @param {Concept} concept @param {Instance} instance */
  isShown(concept, instance) {
    return concept.isShown && !instance.isRemoved && this.passes(instance);
  }

  /** Its colour: one a concept if there are several, else one an instance. @param {Concept} concept @param {number} index */
  colourOf(concept, index) {
    return colourAt(this.answered.length > 1 ? this.concepts.indexOf(concept) : index);
  }

  /** The instances that are shown, in the order of their numbers. @returns {Shown[]} */
  get shown() {
    /** @type {Shown[]} */
    const shown = [];
    this.concepts.forEach((concept, conceptIndex) => {
      concept.result?.instances.forEach((instance, index) => {
        if (!this.isShown(concept, instance)) return;
        const colour = this.colourOf(concept, index);
        shown.push({ number: shown.length + 1, concept, conceptNumber: conceptIndex + 1, instance, colour });
      });
    });
    return shown;
  }
}

/** What a request about a concept asks; equal texts are equal questions. @param {Concept} concept */
export function askedOf(concept) {
  return JSON.stringify([concept.text, concept.boxes.map((box) => [box.label, ...box.corners])]);
}

/** How a concept is called. @param {Concept} concept */
export function nameOf(concept) {
  return concept.text ?? "like the boxes";
}

/** Instances from bottom to top: the higher score is on top, then the lower number. @param {Shown[]} shown */
export function bottomToTop(shown) {
  return [...shown].sort((a, b) => a.instance.score - b.instance.score || b.number - a.number);
}
