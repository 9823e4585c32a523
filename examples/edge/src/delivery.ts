/** The two ways to send a task to the backend: after the answer (waitUntil), and from a Queue. */
import { callBackend, type Outcome } from "./backend";
import type { Env, Task } from "./env";
import { endIfPending } from "./supabase";

/** Workers cancel waitUntil's promises 30 s after the answer; the difference is for sending to the queue. */
const WAIT_UNTIL_TIMEOUT_MS = 22_000;
/** Above the backend's REQUEST_TIMEOUT_S and its wait for the database; a consumer has 15 minutes. */
const QUEUE_TIMEOUT_MS = 120_000;
const GIVEN_UP = "the service could not be reached; try again later";

/**
 * For ctx.waitUntil. The user does not wait for this call, because the row is the result. A task that is not
 * finished in time goes to the queue; if the backend finishes it meanwhile, the queue's call gets its result.
 */
export async function callAfterAnswer(env: Env, task: Task): Promise<void> {
  const retry = await attempt(env, task, WAIT_UNTIL_TIMEOUT_MS);
  if (retry) await enqueue(env, task, retry.delaySeconds);
}

/** Sends the task to the queue. If that fails, ends the task's row and throws. */
export async function enqueue(env: Env, task: Task, delaySeconds = 0): Promise<void> {
  try {
    await env.TASKS.send(task, { delaySeconds });
  } catch (error) {
    await endIfPending(env, task, GIVEN_UP);
    throw error;
  }
}

/** Handles one message of the queue: acknowledges it when the row has the result, otherwise retries it. */
export async function deliver(env: Env, message: Message<Task>): Promise<void> {
  const retry = await attempt(env, message.body, QUEUE_TIMEOUT_MS);
  if (!retry) return message.ack();
  // Without a delay from the backend, the queue's retry_delay applies.
  message.retry(retry.delaySeconds === undefined ? {} : { delaySeconds: retry.delaySeconds });
}

/** Handles one message of the dead letter queue: all retries have failed, so the row ends as error. */
export async function giveUp(env: Env, message: Message<Task>): Promise<void> {
  console.error("task given up", message.body.task_id);
  await endIfPending(env, message.body, GIVEN_UP);
  message.ack();
}

/** Calls the backend once; writes a permanent error to a pending row. Returns the retry, or null if finished. */
async function attempt(
  env: Env,
  task: Task,
  timeoutMs: number,
): Promise<Extract<Outcome, { kind: "retry" }> | null> {
  const outcome = await callBackend(env, task, timeoutMs);
  if (outcome.kind === "finished") return null;
  if (outcome.kind === "retry") {
    console.warn("task will be retried", task.task_id, outcome.reason);
    return outcome;
  }
  console.warn("task refused", task.task_id, outcome.code);
  try {
    // The backend refuses an invalid body before it claims the row.
    await endIfPending(env, task, outcome.message);
  } catch (error) {
    return { kind: "retry", reason: String(error) };
  }
  return null;
}
