/** Access to the task's row: as the user, under row level security, and as the Worker, to end unclaimed tasks. */
import { createClient, type SupabaseClient } from "@supabase/supabase-js";
import type { MiddlewareHandler } from "hono";
import { HTTPException } from "hono/http-exception";
import { decode } from "hono/jwt";
import type { Env, Task } from "./env";

export const TABLE = "segmentation_results";
export const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
const TIMEOUT_MS = 5_000;

export interface SignedIn {
  Bindings: Env;
  Variables: { userId: string; rows: SupabaseClient };
}

/**
 * Refuses requests whose token the database does not accept, and sets the user's id and client.
 *
 * PostgREST verifies the token (signature, expiry) before its content is used. A project with asymmetric
 * signing keys can verify it here without a request: supabase.auth.getClaims(token).
 */
export const signedIn: MiddlewareHandler<SignedIn> = async (c, next) => {
  const token = /^Bearer (\S+)$/.exec(c.req.header("Authorization") ?? "")?.[1];
  const userId = token && subjectOf(token);
  if (!userId) throw new HTTPException(401, { message: "sign in" });
  const rows = createClient(c.env.SUPABASE_URL, c.env.SUPABASE_PUBLISHABLE_KEY, {
    accessToken: async () => token,
    db: { timeout: TIMEOUT_MS },
  });
  const { error } = await rows.from(TABLE).select("id").limit(0);
  if (error?.code.startsWith("PGRST30")) throw new HTTPException(401, { message: "sign in again" });
  refuseIfFailed(error);
  c.set("userId", userId);
  c.set("rows", rows);
  await next();
};

/** Answers 503 if the database refused or failed; the database's error is only logged. */
export function refuseIfFailed(error: { code: string } | null): void {
  if (!error) return;
  console.error("the database refused or failed", error.code);
  throw new HTTPException(503, { message: "the database is not available; try again" });
}

/** Ends a pending task as error; the backend ends the rows that it has claimed. Throws on failure. */
export async function endIfPending(env: Env, task: Task, message: string): Promise<void> {
  const response = await fetch(
    `${env.SUPABASE_URL}/rest/v1/${TABLE}?id=eq.${task.task_id}&status=eq.pending`,
    {
      method: "PATCH",
      // Only as apikey: it is not a JWT, and supabase-js 2.119 would also send it as a bearer token.
      headers: { apikey: env.SUPABASE_SECRET_KEY, "Content-Type": "application/json" },
      body: JSON.stringify({ status: "error", metadata: { error_message: message } }),
      signal: AbortSignal.timeout(TIMEOUT_MS),
    },
  );
  await response.body?.cancel();
  if (!response.ok) throw new Error(`the row could not be ended: ${response.status}`);
}

function subjectOf(token: string): string | undefined {
  try {
    const { sub } = decode(token).payload;
    return typeof sub === "string" && UUID.test(sub) ? sub : undefined;
  } catch {
    return undefined;
  }
}
