/** One call of the SAM3 backend, and what its answer asks of the caller. */
import type { Env, Task } from "./env";

/** `finished`: the row tells how. `refused`: no try will do better. `later`: try again. */
export type Outcome =
  | { kind: "finished" }
  | { kind: "refused"; code: string; message: string }
  | { kind: "later"; reason: string; delaySeconds?: number };

/** Every other error may be over at the next try: a busy or absent backend, a wrong key, a proxy's own answer. */
const REFUSALS = new Set([
  "INVALID_REQUEST",
  "FORBIDDEN",
  "IMAGE_NOT_FOUND",
  "TASK_NOT_FOUND",
  "FILE_TOO_LARGE",
  "UNSUPPORTED_IMAGE",
]);
const MAX_QUEUE_DELAY_S = 12 * 3600;

/** Repeating a call is safe: the backend works once for a task_id, and answers again from the row. Never throws. */
export async function callBackend(env: Env, task: Task, timeoutMs: number): Promise<Outcome> {
  const { task_id, user_id, image_key, prompts } = task;
  const [route, asked] =
    prompts.length === 1 ? ["predict", { text_prompt: prompts[0] }] : ["predict/batch", { prompts }];
  try {
    const response = await fetch(`${env.BACKEND_URL}/api/v1/${route}`, {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        "X-API-Key": env.BACKEND_API_KEY,
        "X-Request-ID": task_id, // finds the task in the backend's log
      },
      body: JSON.stringify({ image_url: image_key, user_id, task_id, ...asked }),
      signal: AbortSignal.timeout(timeoutMs),
    });
    const text = await response.text();
    return response.ok ? { kind: "finished" } : outcomeOfError(response, text);
  } catch (error) {
    // Timed out, or no connection. The backend may be at work all the same.
    return { kind: "later", reason: String(error) };
  }
}

function outcomeOfError(response: Response, text: string): Outcome {
  const { code, message } = errorIn(text);
  if (REFUSALS.has(code)) return { kind: "refused", code, message };
  const retryAfterS = Number(response.headers.get("Retry-After"));
  const reason = `${response.status} ${code}`;
  if (!(retryAfterS > 0)) return { kind: "later", reason };
  return { kind: "later", reason, delaySeconds: Math.min(Math.ceil(retryAfterS), MAX_QUEUE_DELAY_S) };
}

/** The backend's errors are {"error": {"code", "message"}, "request_id"}; what stands before it has its own. */
function errorIn(text: string): { code: string; message: string } {
  try {
    const { code, message } = JSON.parse(text).error;
    if (typeof code === "string" && typeof message === "string") return { code, message };
  } catch {
    // not the backend's answer
  }
  return { code: "", message: "" };
}
