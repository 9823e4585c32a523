/** One call of the SAM3 backend, and the next step after its answer. */
import type { Env, Task } from "./env";

/** `finished`: the row has the result. `refused`: a permanent error. `retry`: call again. */
export type Outcome =
  | { kind: "finished" }
  | { kind: "refused"; code: string; message: string }
  | { kind: "retry"; reason: string; delaySeconds?: number };

/** Permanent errors. All others may be temporary: a busy or unavailable backend, a wrong key, a proxy's answer. */
const PERMANENT_ERRORS = new Set([
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
  // JSON leaves out what is undefined, so a task without a box or outputs sends what it always sent.
  const [route, promptFields] =
    prompts.length > 1
      ? ["predict/batch", { prompts }]
      : ["predict", { text_prompt: prompts[0], boxes: box && [box] }];
  try {
    const response = await fetch(`${env.BACKEND_URL}/api/v1/${route}`, {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        "X-API-Key": env.BACKEND_API_KEY,
        "X-Request-ID": task_id, // identifies the task in the backend's log
        "X-Deadline-Ms": String(timeoutMs), // a busy backend answers 429 at once if it cannot be done in this time
      },
      body: JSON.stringify({ image_url: image_key, user_id, task_id, outputs, ...promptFields }),
      signal: AbortSignal.timeout(timeoutMs),
    });
    const text = await response.text();
    return response.ok ? { kind: "finished" } : outcomeOfError(response, text);
  } catch (error) {
    // A timeout, or no connection. The backend may still be working on the task.
    return { kind: "retry", reason: String(error) };
  }
}

function outcomeOfError(response: Response, text: string): Outcome {
  const { code, message } = errorIn(text);
  if (PERMANENT_ERRORS.has(code)) return { kind: "refused", code, message };
  const retryAfterS = Number(response.headers.get("Retry-After"));
  const reason = `${response.status} ${code}`;
  if (!(retryAfterS > 0)) return { kind: "retry", reason };
  return { kind: "retry", reason, delaySeconds: Math.min(Math.ceil(retryAfterS), MAX_QUEUE_DELAY_S) };
}

/** The backend's errors are {"error": {"code", "message"}, "request_id"}; those of a proxy differ. */
function errorIn(text: string): { code: string; message: string } {
  try {
    const { code, message } = JSON.parse(text).error;
    if (typeof code === "string" && typeof message === "string") return { code, message };
  } catch {
    // not the backend's answer
  }
  return { code: "", message: "" };
}
