/** The client: one function for each route, and one that sends, waits and tries again. */
import { errorOf, badAnswer, parse, Sam3Error } from "./errors.ts";
import type { operations, paths } from "./schema.ts";
import type { DirectForm, MaskFormat, SegmentResponse } from "./types.ts";

export interface ClientOptions {
  /** Of the server, such as `https://sam3.example.com`. */
  url: string;
  /** For the header `X-API-Key`. */
  key: string;
  /** Replaces the global `fetch`, for example by that of a service binding. */
  fetch?: (url: string, init: RequestInit) => Promise<Response>;
  /** Defaults of all calls. */
  deadlineMs?: number;
  retries?: number;
}

export interface CallOptions {
  /**
   * How long the call may take, retries included; 60 s by default. The server is told what is left of it
   * (`X-Deadline-Ms`), and refuses at once what it cannot do in this time.
   */
  deadlineMs?: number;
  /** How often the call is tried again after a temporary error; 3 by default. */
  retries?: number;
  /** Ends the call, which then throws the signal's reason. A task that the server has claimed is done all the same. */
  signal?: AbortSignal;
  /** Names the request in the server's log: 1 to 128 of `A-Za-z0-9._:-`. The server makes one if it is left out. */
  requestId?: string;
}

/** A PNG, JPEG or WEBP. */
export type ImageFile = Blob | ArrayBuffer | Uint8Array<ArrayBuffer>;

/** What a direct request asks for besides its image. */
export type SegmentFields = Fields<DirectForm>;
/** Of each alternative: a text, boxes, or both. */
type Fields<Form> = Form extends unknown ? Omit<Form, "image" | "model" | "mask_format"> : never;

type Operation = keyof operations;
type Answer<Name extends Operation> = operations[Name]["responses"][200]["content"]["application/json"];
type Body<Name extends "predict" | "predict_batch"> =
  operations[Name]["requestBody"]["content"]["application/json"];

/** The server's routes. Every call throws `Sam3Error`, or the reason of its `signal`. */
export interface Client {
  /** Segments an image in the store for one prompt, and settles the task's row. The same body may be sent again. */
  predict(body: Body<"predict">, options?: CallOptions): Promise<Answer<"predict">>;
  /** The same for 1 to 10 prompts; the results are in the order of the prompts. */
  predictBatch(body: Body<"predict_batch">, options?: CallOptions): Promise<Answer<"predict_batch">>;
  /** Segments an image that is sent along; nothing is stored. The server must have `DIRECT_API=true`. */
  segment<Format extends MaskFormat = "png">(
    image: ImageFile,
    fields: SegmentFields & { mask_format?: Format },
    options?: CallOptions,
  ): Promise<SegmentResponse<Format>>;
  /** The state of the model and its GPUs, whatever it is; never tried again. */
  health(options?: CallOptions): Promise<Answer<"health">>;
  /** What is loaded, and what requests may hold. */
  modelInfo(options?: CallOptions): Promise<Answer<"model_info">>;
}

const DEADLINE_MS = 60_000;
const MAX_DEADLINE_MS = 600_000;
const RETRIES = 3;
const FIRST_DELAY_MS = 500;
const MAX_DELAY_MS = 20_000;

/** After these a task may be sent again: its task_id makes it safe (docs/contracts/api-contracts.md, How to call it). */
const TASK_RETRIED: ReadonlySet<number> = new Set([408, 409, 429, 500, 502, 503, 504]);
/** For routes that store nothing: what a moment's wait can mend. */
const RETRIED: ReadonlySet<number> = new Set([408, 429, 502, 503]);

/** A client of one server. It holds no connection, so a Worker may make one for each request. */
export function createClient(client: ClientOptions): Client {
  const send = client.fetch ?? ((url: string, init: RequestInit) => fetch(url, init));
  const base = new URL(client.url).href.replace(/\/+$/, ""); // TypeError for what is no URL

  /** Sends one request, again after a temporary error, until the deadline. */
  async function call<Name extends Operation>(
    path: keyof paths,
    init: RequestInit,
    options: CallOptions,
    retried: ReadonlySet<number>,
  ): Promise<Answer<Name>> {
    const until = Date.now() + (options.deadlineMs ?? client.deadlineMs ?? DEADLINE_MS);
    const retries = options.retries ?? client.retries ?? RETRIES;
    for (let failures = 0; ; failures += 1) {
      try {
        return (await attempt(path, init, options, until)) as Answer<Name>;
      } catch (error) {
        const isTemporary = error instanceof Sam3Error && (error.code === "UNREACHABLE" || retried.has(error.status));
        if (!isTemporary || failures >= retries) throw error;
        const delayMs = delayBefore(failures, error.retryAfterS);
        if (Date.now() + delayMs >= until) throw error;
        await wait(delayMs, options.signal);
      }
    }
  }

  /** Sends one request once; returns the value of its answer. */
  async function attempt(path: keyof paths, init: RequestInit, options: CallOptions, until: number): Promise<unknown> {
    const leftMs = Math.max(1, Math.floor(until - Date.now()));
    const deadline = AbortSignal.timeout(leftMs);
    const headers = new Headers(init.headers);
    headers.set("X-API-Key", client.key);
    headers.set("X-Deadline-Ms", String(Math.min(leftMs, MAX_DEADLINE_MS)));
    if (options.requestId !== undefined) headers.set("X-Request-ID", options.requestId);
    try {
      const response = await send(base + path, {
        ...init,
        headers,
        signal: options.signal ? AbortSignal.any([options.signal, deadline]) : deadline,
        redirect: "manual", // the server redirects nothing, and another host must not get the key
      });
      const text = await response.text();
      if (!response.ok) throw errorOf(response, text);
      return parse(text) ?? fail(badAnswer(response.status));
    } catch (error) {
      options.signal?.throwIfAborted();
      if (error instanceof Sam3Error) throw error;
      if (deadline.aborted) throw new Sam3Error("TIMEOUT", "the deadline has passed", { cause: error });
      throw new Sam3Error("UNREACHABLE", "the server cannot be reached, or the connection broke", { cause: error });
    }
  }

  return {
    predict: (body, options = {}) => call<"predict">("/api/v1/predict", json(body), options, TASK_RETRIED),
    predictBatch: (body, options = {}) =>
      call<"predict_batch">("/api/v1/predict/batch", json(body), options, TASK_RETRIED),
    segment: async <Format extends MaskFormat>(
      image: ImageFile,
      fields: SegmentFields & { mask_format?: Format },
      options: CallOptions = {},
    ) => {
      const init = { method: "POST", body: form(image, fields) };
      const answer = await call<"segment_directly">("/v1/images/segmentations", init, options, RETRIED);
      return answer as SegmentResponse<Format>; // in the format that was asked for
    },
    health: (options = {}) => call<"health">("/health", {}, { ...options, retries: 0 }, RETRIED),
    modelInfo: (options = {}) => call<"model_info">("/api/v1/model/info", {}, options, RETRIED),
  };
}

function json(body: object): RequestInit {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
}

/** Texts as they are, all else as JSON; a field that is undefined is left out. */
function form(image: ImageFile, fields: object): FormData {
  const data = new FormData();
  data.set("image", image instanceof Blob ? image : new Blob([image]), "image");
  for (const [name, value] of Object.entries(fields)) {
    if (value !== undefined) data.set(name, typeof value === "string" ? value : JSON.stringify(value));
  }
  return data;
}

/** At least Retry-After, and 0.5, 1, 2 s and so on; up to a quarter more, so that callers come back apart. */
function delayBefore(failures: number, retryAfterS = 0): number {
  const delayMs = Math.max(retryAfterS * 1000, Math.min(FIRST_DELAY_MS * 2 ** failures, MAX_DELAY_MS));
  return delayMs * (1 + Math.random() / 4);
}

/** Throws the signal's reason if it ends the wait. */
function wait(delayMs: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", end);
      resolve();
    }, delayMs);
    signal?.addEventListener("abort", end, { once: true });
  });
}

function fail(error: Error): never {
  throw error;
}
