/** The two ways to bring a task to the backend: after the answer (waitUntil), and from a Queue. */
import { callBackend, type Outcome } from "./backend";
import type { Env, Task } from "./env";
import { endUnlessBegun } from "./supabase";

/** Workers cancel what waitUntil holds 30 s after the answer; the rest is for the queue. */
const WAIT_UNTIL_TIMEOUT_MS = 22_000;
/** Over the backend's REQUEST_TIMEOUT_S and its waiting for rows; a consumer has 15 minutes. */
const QUEUE_TIMEOUT_MS = 120_000;
const GIVEN_UP = "the service could not be reached; try again later";

/**
 * For ctx.waitUntil. Nobody waits for this answer, and 30 s may be too short for it: the row is the result.
 * What could not be finished goes to the queue; a task that the backend is at work on meets its own result there.
 */
export async function callSoon(env: Env, task: Task): Promise<void> {
  const later = await attempt(env, task, WAIT_UNTIL_TIMEOUT_MS);
  if (later) await enqueue(env, task, later.delaySeconds);
}

/** Leaves the task to the queue; one that cannot be queued ends at once. Throws then. */
export async function enqueue(env: Env, task: Task, delaySeconds = 0): Promise<void> {
  try {
    await env.TASKS.send(task, { delaySeconds });
  } catch (error) {
    await endUnlessBegun(env, task, GIVEN_UP);
    throw error;
  }
}

/** One message of the queue: acknowledged when the row tells the result, else delivered again. */
export async function deliver(env: Env, message: Message<Task>): Promise<void> {
  const later = await attempt(env, message.body, QUEUE_TIMEOUT_MS);
  if (!later) return message.ack();
  // Without a delay of the backend's, the queue's own retry_delay.
  message.retry(later.delaySeconds === undefined ? {} : { delaySeconds: later.delaySeconds });
}

/** One message of the dead letter queue: every try has failed, and the user must see that. */
export async function giveUp(env: Env, message: Message<Task>): Promise<void> {
  console.error("task given up", message.body.task_id);
  await endUnlessBegun(env, message.body, GIVEN_UP);
  message.ack();
}

/** Calls the backend once, and makes sure that a refusal stands in the row; returns what is left to do. */
async function attempt(
  env: Env,
  task: Task,
  timeoutMs: number,
): Promise<Extract<Outcome, { kind: "later" }> | null> {
  const outcome = await callBackend(env, task, timeoutMs);
  if (outcome.kind === "finished") return null;
  if (outcome.kind === "later") {
    console.warn("task to be tried again", task.task_id, outcome.reason);
    return outcome;
  }
  console.warn("task refused", task.task_id, outcome.code);
  try {
    // A body that breaks a rule is refused before the row is claimed.
    await endUnlessBegun(env, task, outcome.message);
  } catch (error) {
    return { kind: "later", reason: String(error) };
  }
  return null;
}
