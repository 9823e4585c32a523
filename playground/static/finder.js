/** Asks the server about each concept that has no answer yet, one after another; shows progress and errors. */

import { isAbort, RequestFailed, segment, withRetries } from "./api.js";
import { layerOf } from "./drawing.js";
import { announce, byId, make, setText } from "./elements.js";
import { isPossibleKey, storedKey } from "./key.js";
import { BadMask, measure, pieceOf } from "./masks.js";
import { askedOf, nameOf } from "./state.js";

/** @import { Answer } from "./api.js" */
/** @import { Concept, Picture, Result } from "./types.js" */
/** @import { State } from "./state.js" */

const TICK_MS = 100;

export class Finder {
  /** @type {State} */
  #state;
  /** @type {AbortController | null} */
  #running = null;
  #progress = byId("progress", HTMLElement);
  #text = byId("progress-text", HTMLElement);
  #error = byId("error", HTMLElement);
  /** @type {(message: string) => void} */
  #askForKey;

  /**
   * @param {State} state
   * @param {(message: string) => void} askForKey says why, at the field of the key
   */
  constructor(state, askForKey) {
    this.#state = state;
    this.#askForKey = askForKey;
    byId("cancel", HTMLElement).addEventListener("click", () => this.cancel());
    state.onChange(() => {
      const isStale = state.answered.length > 0 && state.unanswered.length > 0;
      byId("find", HTMLElement).classList.toggle("wanted", isStale && !this.#running);
    });
  }

  /** End what is running; what was found stays. */
  cancel() {
    this.#running?.abort();
    this.#running = null;
    this.#progress.hidden = true;
  }

  /** Ask about all concepts without an answer. */
  async find() {
    if (this.#running || !this.#isReady()) return;
    const running = new AbortController();
    this.#running = running;
    this.hideError();
    try {
      await this.#findAll(running.signal);
    } catch (error) {
      this.#onError(error);
    } finally {
      if (this.#running === running) this.cancel();
      this.#state.changed();
    }
  }

  /** Whether there is a picture, something to find, and a key; else it says what is missing. */
  #isReady() {
    const { picture, concepts } = this.#state;
    if (!picture) {
      this.showError("Choose a picture first: a sample, or one of your own.");
      byId("samples", HTMLElement).querySelector("button")?.focus();
      return false;
    }
    if (concepts.length === 0) {
      this.showError("Type what to find, or draw a box round an example.");
      byId("concept", HTMLElement).focus();
      return false;
    }
    if (!isPossibleKey(storedKey())) {
      this.#askForKey(storedKey() ? "This key has characters that no key has." : "Type the API key first.");
      return false;
    }
    return true;
  }

  /** @param {AbortSignal} signal */
  async #findAll(signal) {
    const { picture } = this.#state;
    if (!picture) return;
    let done = 0;
    for (let concept = this.#state.unanswered[0]; concept; concept = this.#state.unanswered[0]) {
      const count = done + this.#state.unanswered.length;
      const answer = await this.#ask(picture, concept, count > 1 ? ` (${done + 1} of ${count})` : "", signal);
      if (signal.aborted) return;
      done += 1;
      if (answer) this.#take(concept, answer);
    }
    announce(this.#state.answered.map((concept) => `${this.#countOf(concept)} of ${nameOf(concept)}`).join(", "));
  }

  /** @param {Concept} concept */
  #countOf(concept) {
    return this.#state.shown.filter((each) => each.concept === concept).length;
  }

  /**
   * @param {Picture} picture
   * @param {Concept} concept
   * @param {string} place "(1 of 2)"
   * @param {AbortSignal} signal
   */
  async #ask(picture, concept, place, signal) {
    const asked = askedOf(concept);
    const name = nameOf(concept);
    const startedMs = performance.now();
    let waiting = "";
    this.#progress.hidden = false;
    const tick = () => {
      const seconds = ((performance.now() - startedMs) / 1000).toFixed(1);
      setText(this.#text, waiting || `Finding “${name}”${place}, ${seconds} s`);
    };
    tick();
    announce(`Finding ${name}${place}`);
    const timer = setInterval(tick, TICK_MS);
    try {
      const answer = await withRetries(
        () => {
          waiting = "";
          return segment(storedKey(), picture.file, concept.text, [...concept.boxes], signal);
        },
        (failed, leftS) => {
          waiting = `${sentence(failed.message)} Trying again in ${leftS} s.`;
          tick();
        },
        signal,
      );
      return resultOf(picture, asked, answer);
    } finally {
      clearInterval(timer);
    }
  }

  /** @param {Concept} concept @param {Result} result */
  #take(concept, result) {
    concept.result = result;
    concept.isShown = true;
    this.#state.changed();
  }

  /** @param {unknown} error */
  #onError(error) {
    if (isAbort(error)) {
      announce("Cancelled");
    } else if (error instanceof RequestFailed && error.status === 401) {
      this.#askForKey("The server does not know this key.");
    } else if (error instanceof RequestFailed) {
      this.showError(sentence(error.message), [error.code, error.requestId && `request ${error.requestId}`]);
    } else if (error instanceof BadMask) {
      this.showError("The server's masks cannot be read. Is a proxy changing its answers?");
    } else {
      throw error;
    }
  }

  /** @param {string} message @param {string[]} facts small, below it */
  showError(message, facts = []) {
    const close = make("button", { type: "button", class: "remove", "aria-label": "Close this message" }, "×");
    close.addEventListener("click", () => {
      this.hideError();
      byId("concept", HTMLElement).focus();
    });
    const small = facts.filter(Boolean).join(" · ");
    this.#error.replaceChildren(make("p", {}, message), ...(small ? [make("p", { class: "facts" }, small)] : []), close);
    this.#error.hidden = false;
  }

  hideError() {
    this.#error.hidden = true;
    this.#error.replaceChildren();
  }
}

/**
 * The server's answer with what drawing needs. Throws `RequestFailed` where the server reads another size of
 * picture than this browser: its masks would lie beside what is shown.
 * @param {Picture} picture
 * @param {string} asked
 * @param {Answer} answer
 * @returns {Result}
 */
function resultOf(picture, asked, answer) {
  if (answer.image_width !== picture.width || answer.image_height !== picture.height) {
    const sizes = `${answer.image_width} x ${answer.image_height} px, this browser ${picture.width} x ${picture.height}`;
    throw new RequestFailed(`The server reads the picture as ${sizes}: they turn it differently. Save it anew and try that.`);
  }
  const layer = layerOf(picture);
  const instances = answer.data.map(({ mask, box, score }) => {
    const { area, bounds } = measure(mask);
    return { mask, box, score, area, bounds, piece: pieceOf(mask, bounds, layer), isRemoved: false };
  });
  return { asked, presence: answer.presence, instances };
}

/** With a capital and a full stop, as the server's messages have neither. @param {string} message */
function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/u.test(text) ? text : `${text}.`;
}
