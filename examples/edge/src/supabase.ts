/** The task's row: as the user, under row level security, and for what no user is there to do. */
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
 * Lets nobody past whose token the database does not accept, and keeps the user's id and client.
 *
 * PostgREST verifies the token (signature, expiry); only then is what stands in it believed. A project with
 * asymmetric signing keys can verify it here instead, without a request: supabase.auth.getClaims(token).
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

/** Answers 503 when the database could not be asked; its own message is for the log alone. */
export function refuseIfFailed(error: { code: string } | null): void {
  if (!error) return;
  console.error("the database refused or failed", error.code);
  throw new HTTPException(503, { message: "the database is not available; try again" });
}

/** Ends a task that the backend never began; rows that it has claimed are its own to end. Throws on failure. */
export async function endUnlessBegun(env: Env, task: Task, message: string): Promise<void> {
  const response = await fetch(
    `${env.SUPABASE_URL}/rest/v1/${TABLE}?id=eq.${task.task_id}&status=eq.pending`,
    {
      method: "PATCH",
      // In apikey alone: it is no JWT, and supabase-js 2.119 would send it as a bearer's token as well.
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
