/** One call of the SAM3 backend, and the next step after its answer. */
import { createClient, Sam3Error } from "sam3-client";
import type { Env, Task } from "./env";

/** `finished`: the row has the result. `refused`: a permanent error. `retry`: call again. */
export type Outcome =
  | { kind: "finished" }
  | { kind: "refused"; code: string; message: string }
  | { kind: "retry"; reason: string; delaySeconds?: number };

/** Permanent errors. All others may be temporary: a busy or unavailable backend, a wrong key, a proxy's answer. */
const PERMANENT_ERRORS: ReadonlySet<Sam3Error["code"]> = new Set([
  "INVALID_REQUEST",
  "FORBIDDEN",
  "IMAGE_NOT_FOUND",
  "TASK_NOT_FOUND",
  "FILE_TOO_LARGE",
  "UNSUPPORTED_IMAGE",
]);
const MAX_QUEUE_DELAY_S = 12 * 3600;

/** Can be repeated: the backend does the work for a task_id once, and answers repeats from the row. Never throws. */
export async function callBackend(env: Env, task: Task, timeoutMs: number): Promise<Outcome> {
  const { task_id, user_id, image_key, prompts, box, outputs } = task;
  const backend = createClient({ url: env.BACKEND_URL, key: env.BACKEND_API_KEY });
  const common = { image_url: image_key, user_id, task_id, ...(outputs && { outputs }) };
  // The queue retries. The id identifies the task in the backend's log.
  const options = { deadlineMs: timeoutMs, retries: 0, requestId: task_id };
  try {
    if (prompts.length > 1) await backend.predictBatch({ ...common, prompts }, options);
    else await backend.predict({ ...common, ...promptOf(prompts[0], box) }, options);
    return { kind: "finished" };
  } catch (error) {
    return outcomeOf(error);
  }
}

/** A text, a box, or both. */
function promptOf(text: string | undefined, box: Task["box"]) {
  if (!box) return { text_prompt: text ?? "" };
  return { boxes: [box], ...(text !== undefined && { text_prompt: text }) };
}

function outcomeOf(error: unknown): Outcome {
  if (!(error instanceof Sam3Error)) return { kind: "retry", reason: String(error) };
  const { code, message, status, retryAfterS } = error;
  if (PERMANENT_ERRORS.has(code)) return { kind: "refused", code, message };
  // Without an answer the backend may still be working on the task.
  const reason = `${status} ${code}`;
  if (retryAfterS === undefined) return { kind: "retry", reason };
  return { kind: "retry", reason, delaySeconds: Math.min(Math.ceil(retryAfterS), MAX_QUEUE_DELAY_S) };
}
