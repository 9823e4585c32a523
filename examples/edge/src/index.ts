/** The Worker: stores images, creates tasks, sends them to the SAM3 backend, and returns rows and masks. */
import { Hono } from "hono";
import { HTTPException } from "hono/http-exception";
import type { Box } from "sam3-client";
import { callAfterAnswer, deliver, enqueue, giveUp } from "./delivery";
import { type Env, OUTPUTS, type Task } from "./env";
import { refuseIfFailed, signedIn, type SignedIn, TABLE, UUID } from "./supabase";

const IMAGE_TYPES = new Set(["image/png", "image/jpeg", "image/webp"]);
const MAX_IMAGE_BYTES = 10 * 1024 * 1024;
const MAX_PROMPTS = 10;
/** The backend's rule: 1 to 200 characters, at least one visible; no control characters, no line separators. */
const PROMPT = /^(?=.*[^\p{Z}\p{Cf}])[^\p{Cc}\p{Cs}\p{Zl}\p{Zp}]{1,200}$/u;
const KEY = /^\P{C}{1,1024}$/u;
const DEAD_LETTERS = "sam3-tasks-dead";

const app = new Hono<SignedIn>();
app.use(signedIn);

/** Stores the body as an image of the user. The Worker chooses the key, so that the user cannot choose its owner. */
app.post("/images", async (c) => {
  const contentType = c.req.header("Content-Type") ?? "";
  if (!IMAGE_TYPES.has(contentType)) refuse(415, "send a PNG, a JPEG or a WEBP");
  const size = Number(c.req.header("Content-Length"));
  if (!(size > 0)) refuse(411, "send the image's Content-Length");
  if (size > MAX_IMAGE_BYTES) refuse(413, "send at most 10 MB");
  const image_key = `uploads/${c.var.userId}/${crypto.randomUUID()}`;
  await c.env.IMAGES.put(image_key, c.req.raw.body, { httpMetadata: { contentType } });
  return c.json({ image_key }, 201);
});

/**
 * Creates a task: {image_key, text_prompt | prompts | box, outputs?, via?: "waitUntil" | "queue"}; a box may be sent
 * with a text_prompt too. Its row gets the result.
 */
app.post("/tasks", async (c) => {
  const { via, ...fields } = parseTask(await c.req.json().catch(() => null));
  const task: Task = { task_id: crypto.randomUUID(), user_id: c.var.userId, ...fields };
  // The row comes first, because the backend claims rows and inserts none.
  const { error } = await c.var.rows.from(TABLE).insert({
    id: task.task_id,
    user_id: task.user_id,
    source_image_url: task.image_key,
    text_prompt: task.prompts.join(", ") || "visual", // the backend's name for a box without a text
  });
  refuseIfFailed(error);
  // The backend refuses a key that is not below uploads/{user_id}/, and writes the error to the row.
  if (via === "queue") await enqueue(c.env, task);
  else c.executionCtx.waitUntil(callAfterAnswer(c.env, task));
  return c.json({ task_id: task.task_id }, 202);
});

app.get("/tasks/:id", async (c) => {
  const { id, status, labels, metadata } = await rowOf(c.var, c.req.param("id"));
  return c.json({ task_id: id, status, labels, metadata });
});

/** The mask, or one of the task's outputs, read from the bucket, which need not be public. */
app.get("/tasks/:id/:file{mask|overlay|label_map}", async (c) => {
  const { id, file } = c.req.param();
  const row = await rowOf(c.var, id);
  // Users can edit their rows: a URL outside their own folder must not give access.
  const prefix = `${c.env.R2_PUBLIC_BASE_URL}/masks/${c.var.userId}/${row.id}/`;
  const url: unknown = file === "mask" ? row.mask_image_url : row.metadata?.outputs?.[file];
  if (typeof url !== "string" || !url.startsWith(prefix)) refuse(404, `this task has no ${file}`);
  const stored = await c.env.IMAGES.get(url.slice(c.env.R2_PUBLIC_BASE_URL.length + 1));
  if (!stored) refuse(404, `this task's ${file} no longer exists`);
  return c.body(stored.body, 200, {
    "Content-Type": file === "overlay" ? "image/jpeg" : "image/png",
    "Content-Length": String(stored.size),
    "Cache-Control": "private, max-age=31536000, immutable",
    ETag: stored.httpEtag,
  });
});

app.onError((error, c) => {
  if (error instanceof HTTPException) return c.json({ error: error.message }, error.status);
  console.error(error);
  return c.json({ error: "internal error" }, 500);
});

function refuse(status: 400 | 404 | 411 | 413 | 415, message: string): never {
  throw new HTTPException(status, { message });
}

/** The user's row; another user's row gives 404, like a missing one. */
async function rowOf({ rows }: SignedIn["Variables"], id: string) {
  if (!UUID.test(id)) refuse(404, "no such task");
  const columns = "id, status, labels, metadata, mask_image_url";
  const { data, error } = await rows.from(TABLE).select(columns).eq("id", id).maybeSingle();
  refuseIfFailed(error);
  return data ?? refuse(404, "no such task");
}

function parseTask(body: unknown): Omit<Task, "task_id" | "user_id"> & { via: string } {
  const { image_key, text_prompt, box, outputs, via = "waitUntil", ...rest } = Object(body);
  const { prompts = box !== undefined && text_prompt === undefined ? [] : [text_prompt] } = rest;
  if (!isText(image_key, KEY)) refuse(400, "image_key: send the one from the answer of POST /images");
  const fits = Array.isArray(prompts) && prompts.length >= (isBox(box) ? 0 : 1) && prompts.length <= MAX_PROMPTS;
  if (!fits || !prompts.every((prompt) => isText(prompt, PROMPT))) {
    refuse(400, `text_prompt, or 1 to ${MAX_PROMPTS} prompts: 1 to 200 characters each`);
  }
  if (box !== undefined && !(isBox(box) && prompts.length <= 1)) {
    refuse(400, "box: [x0, y0, x1, y1] in px, x0 < x1 and y0 < y1, with one text_prompt at most");
  }
  if (outputs !== undefined && !areOutputs(outputs)) refuse(400, `outputs: of ${OUTPUTS.join(", ")}, each once`);
  if (via !== "waitUntil" && via !== "queue") refuse(400, 'via: "waitUntil" or "queue"');
  return { image_key, prompts, box, outputs, via };
}

function isBox(value: unknown): value is Box {
  if (!Array.isArray(value) || value.length !== 4 || !value.every(Number.isFinite)) return false;
  const [x0, y0, x1, y1] = value as Box;
  return x0 < x1 && y0 < y1;
}

function areOutputs(value: unknown): value is NonNullable<Task["outputs"]> {
  return Array.isArray(value) && new Set(value).size === value.length && value.every((each) => OUTPUTS.includes(each));
}

function isText(value: unknown, shape: RegExp): value is string {
  return typeof value === "string" && shape.test(value);
}

export default {
  fetch: app.fetch,
  async queue(batch, env) {
    const handle = batch.queue === DEAD_LETTERS ? giveUp : deliver;
    await Promise.all(
      batch.messages.map((message) =>
        handle(env, message).catch((error) => {
          console.error("message will be retried", message.body.task_id, error);
          message.retry();
        }),
      ),
    );
  },
} satisfies ExportedHandler<Env, Task>;
