/** The requests to the server. Paths are relative, so that the page works below a prefix too. */

import { LOWEST_THRESHOLD } from "./state.js";

/** @import { Box, Corners, Rle } from "./types.js" */

export const SEGMENT_URL = new URL("v1/images/segmentations", document.baseURI).href;
const INFO_URL = new URL("api/v1/model/info", document.baseURI).href;
const HEALTH_URL = new URL("health", document.baseURI).href;

const DEFAULT_WAIT_S = 2;
const MAX_WAITING_S = 180;
const RETRIED = new Set([429, 503]);

/** A request that did not succeed; the message is a sentence for a person. */
export class RequestFailed extends Error {
  /**
   * @param {string} message
   * @param {object} facts
   * @param {number} [facts.status] of HTTP; 0: no answer
   * @param {string} [facts.code]
   * @param {string} [facts.requestId]
   * @param {number} [facts.waitS] after which it may be sent again
   */
  constructor(message, { status = 0, code = "", requestId = "", waitS = DEFAULT_WAIT_S } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.requestId = requestId;
    this.waitS = waitS;
  }

  get isRetried() {
    return RETRIED.has(this.status);
  }
}

/**
 * @typedef {object} Answer of the direct route
 * @property {{mask: Rle, box: Corners, score: number}[]} data
 * @property {number} presence
 * @property {number} image_width
 * @property {number} image_height
 *
 * @typedef {object} ModelInfo
 * @property {string} model_version
 * @property {string} checkpoint
 * @property {boolean} demo
 * @property {string} device
 * @property {number} score_threshold
 * @property {{max_image_bytes: number, max_image_pixels: number, max_prompt_characters: number}} limits
 *
 * @typedef {object} Health
 * @property {string} status
 * @property {string} [detail]
 */

/** The fields of a request about one concept, as a form holds them. @param {string | null} text @param {Box[]} boxes @param {number} threshold */
export function fieldsOf(text, boxes, threshold) {
  /** @type {[string, string][]} */
  const fields = [];
  if (text !== null) fields.push(["prompt", text]);
  if (boxes.length) {
    fields.push(["boxes", JSON.stringify(boxes.map((box) => box.corners))]);
    fields.push(["box_labels", JSON.stringify(boxes.map((box) => box.label))]);
  }
  fields.push(["score_threshold", String(threshold)], ["mask_format", "rle"]);
  return fields;
}

/**
 * Find the instances of one concept, down to the lowest threshold of the page.
 * @param {string} key
 * @param {Blob} file
 * @param {string | null} text
 * @param {Box[]} boxes
 * @param {AbortSignal} signal
 * @returns {Promise<Answer>}
 */
export async function segment(key, file, text, boxes, signal) {
  const form = new FormData();
  form.append("image", file, "image");
  for (const [name, value] of fieldsOf(text, boxes, LOWEST_THRESHOLD)) form.append(name, value);
  return /** @type {Promise<Answer>} */ (
    answerOf(SEGMENT_URL, { method: "POST", headers: { "X-API-Key": key }, body: form, signal })
  );
}

/** What is loaded, and what requests may hold. @param {string} key @returns {Promise<ModelInfo>} */
export async function modelInfo(key) {
  return /** @type {Promise<ModelInfo>} */ (answerOf(INFO_URL, { headers: { "X-API-Key": key } }));
}

/** Whether the model is loaded. Needs no key. @returns {Promise<Health>} */
export async function health() {
  return /** @type {Promise<Health>} */ (answerOf(HEALTH_URL, {}));
}

/**
 * Call until the server has time, for three minutes at most.
 * @template T
 * @param {() => Promise<T>} call
 * @param {(failed: RequestFailed, leftS: number) => void} onWait each second
 * @param {AbortSignal} signal
 * @returns {Promise<T>}
 */
export async function withRetries(call, onWait, signal) {
  for (let waitedS = 0; ; ) {
    try {
      return await call();
    } catch (error) {
      if (!(error instanceof RequestFailed) || !error.isRetried || waitedS + error.waitS > MAX_WAITING_S) throw error;
      for (let leftS = error.waitS; leftS > 0; leftS -= 1) {
        onWait(error, leftS);
        await pause(1000, signal);
      }
      waitedS += error.waitS;
    }
  }
}

/** @param {string} url @param {RequestInit} options @returns {Promise<unknown>} */
async function answerOf(url, options) {
  let response;
  try {
    response = await fetch(url, { credentials: "omit", cache: "no-store", redirect: "error", ...options });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new RequestFailed("The server did not answer. Is it running, and is the network there?");
  }
  const body = await jsonOf(response);
  if (!response.ok) throw failureOf(response, body);
  if (body === null) throw new RequestFailed("The server's answer is not complete.", { status: response.status });
  return body;
}

/** @param {Response} response @returns {Promise<any>} null: no JSON */
async function jsonOf(response) {
  try {
    return await response.json();
  } catch (error) {
    if (isAbort(error)) throw error;
    return null;
  }
}

/** @param {Response} response @param {any} body */
function failureOf(response, body) {
  const waitS = Number(response.headers.get("Retry-After"));
  return new RequestFailed(String(body?.error?.message ?? `The server answered with status ${response.status}.`), {
    status: response.status,
    code: String(body?.error?.code ?? ""),
    requestId: String(body?.request_id ?? ""),
    waitS: Number.isFinite(waitS) && waitS > 0 ? Math.ceil(waitS) : DEFAULT_WAIT_S,
  });
}

/** @param {unknown} error */
export function isAbort(error) {
  return error instanceof DOMException && error.name === "AbortError";
}

/** @param {number} ms @param {AbortSignal} signal @returns {Promise<void>} */
function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      reject(new DOMException("cancelled", "AbortError"));
    };
    if (signal.aborted) {
      reject(new DOMException("cancelled", "AbortError"));
      return;
    }
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", end);
      resolve();
    }, ms);
    signal.addEventListener("abort", end, { once: true });
  });
}
