/** The client against the real server, which tests/test_typescript_client.py starts. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import { type Client, createClient, Sam3Error, type SegmentFields } from "../src/index.ts";

interface Setup {
  url: string;
  key: string;
  /** The path of a picture. The server's store has it as `uploads/user-1/typescript-{name}`. */
  picture: string;
  /** Names objects in it. */
  prompt: string;
}

const { url, key, picture, prompt } = JSON.parse(process.env.SAM3_TEST ?? "{}") as Setup;
const client = createClient({ url, key });

/** A new task. The proxy before the server treats some names in its own way. */
function body(name: "good" | "flaky" | "busy" | "hanging" | "waiting" | "proxied") {
  const image_url = `uploads/user-1/typescript-${name}`;
  return { image_url, user_id: "user-1", task_id: crypto.randomUUID(), text_prompt: prompt };
}

async function file(): Promise<Uint8Array<ArrayBuffer>> {
  return new Uint8Array(await readFile(picture));
}

/** The error of a call that must fail. */
async function errorOf(call: Promise<unknown>): Promise<Sam3Error> {
  const error = await call.then(() => assert.fail("the call succeeded"), (thrown: unknown) => thrown);
  assert(error instanceof Sam3Error, String(error));
  return error;
}

test("predict answers with instances, and again when it is sent again", async () => {
  const asked = { ...body("good"), segmentation: "coco_rle" } as const;
  const answer = await client.predict(asked);
  assert.deepEqual(answer.labels, [prompt]);
  const best = answer.instances[0];
  assert(best && best.score > 0.5 && best.area > 0);
  assert(best.segmentation && "counts" in best.segmentation);
  assert.deepEqual(best.segmentation.size, [answer.image_height, answer.image_width]);
  assert.deepEqual(await client.predict(asked), answer);
});

test("predictBatch takes texts and objects, and answers in their order", async () => {
  const { text_prompt, ...task } = body("good");
  const answer = await client.predictBatch({ ...task, prompts: [{ text: text_prompt, score_threshold: 0 }, "star"] });
  assert.equal(answer.results.length, 2);
  assert.equal(answer.results[0]?.labels[0], text_prompt);
  assert.deepEqual(answer.settings?.score_thresholds, [0, 0.5]);
});

test("segment returns a mask of each instance, as PNG or as run lengths", async () => {
  const image = await file();
  const png = await client.segment(image, { prompt });
  const found = png.data[0];
  assert(found);
  const bytes = Uint8Array.from(atob(found.mask), (character) => character.charCodeAt(0));
  assert.deepEqual([...bytes.slice(1, 4)], [..."PNG"].map((letter) => letter.charCodeAt(0)));

  const boxed = { boxes: [found.box], box_labels: [1], max_instances: 1 };
  const rle = await client.segment(new Blob([image]), { ...boxed, mask_format: "rle" });
  assert.equal(rle.data.length, 1);
  assert.deepEqual(rle.data[0]?.mask.size, [rle.image_height, rle.image_width]);
});

test("health and modelInfo say what is loaded", async () => {
  assert.equal((await client.health()).status, "ok");
  const info = await client.modelInfo();
  assert.equal(info.checkpoint, "demo");
  assert(info.limits.max_prompts > 0);
});

test("a wrong key is an error with status, code and the id of the request", async () => {
  const error = await errorOf(createClient({ url, key: "wrong" }).predict(body("good"), { requestId: "wrong-key" }));
  const { status, code, requestId, retryAfterS } = error;
  assert.deepEqual(
    { status, code, requestId, retryAfterS },
    { status: 401, code: "AUTH_INVALID", requestId: "wrong-key", retryAfterS: undefined },
  );
});

test("an invalid field is named, of a task and of a form", async () => {
  for (const error of [
    await errorOf(client.predict({ ...body("good"), score_threshold: 2 })),
    await errorOf(client.segment(await file(), { prompt, score_threshold: 2 })),
  ]) {
    assert.deepEqual([error.status, error.code], [400, "INVALID_REQUEST"]);
    assert.match(error.message, /^score_threshold: /);
  }
});

test("a broken connection and a loading server are tried again, after Retry-After", async () => {
  const answer = await client.predict(body("flaky"));
  assert.deepEqual(answer.labels, [prompt]);
});

test("a call is not tried again when Retry-After is later than its deadline", async () => {
  const { status, code, retryAfterS } = await errorOf(client.predict(body("busy"), { deadlineMs: 5_000 }));
  assert.deepEqual([status, code, retryAfterS], [429, "OVERLOADED", 30]);
});

test("a call ends at its deadline", async () => {
  const { status, code } = await errorOf(client.predict(body("hanging"), { deadlineMs: 300 }));
  assert.deepEqual([status, code], [0, "TIMEOUT"]);
});

test("an aborted signal ends a request, and the wait before the next", { timeout: 10_000 }, async () => {
  for (const name of ["hanging", "waiting"] as const) {
    const leaving = new AbortController();
    setTimeout(() => leaving.abort("the user left"), 200);
    const error = await client.predict(body(name), { signal: leaving.signal }).catch((thrown: unknown) => thrown);
    assert.equal(error, "the user left");
  }
});

test("a proxy's page and an absent server are errors with codes of their own", async () => {
  const proxied = await errorOf(client.predict(body("proxied"), { retries: 0 }));
  assert.deepEqual([proxied.status, proxied.code], [502, "BAD_ANSWER"]);
  const absent = await errorOf(createClient({ url: "http://127.0.0.1:1", key, retries: 0 }).modelInfo());
  assert.deepEqual([absent.status, absent.code], [0, "UNREACHABLE"]);
});

/** Never run: the type check fails if one of these lines has no type error. */
export function refusedByTypes(some: Client, image: Blob): unknown[] {
  const task = { image_url: "uploads/user-1/a", user_id: "user-1", task_id: "5f0c8a52-6c5b-4a43-9d35-3f3a6d2b8d10" };
  // @ts-expect-error neither a text nor boxes
  const unprompted: SegmentFields = { score_threshold: 0.3 };
  return [
    unprompted,
    // @ts-expect-error neither a text nor boxes
    some.predict(task),
    // @ts-expect-error no such field
    some.predict({ ...task, text_prompt: "star", threshold: 0.3 }),
    // @ts-expect-error no such form
    some.predict({ ...task, text_prompt: "star", outputs: ["masks"] }),
    // @ts-expect-error a box has four sides
    some.segment(image, { boxes: [[1, 2, 3]] }),
    // @ts-expect-error the masks of this answer are texts
    some.segment(image, { prompt: "star" }).then(({ data }) => data[0]?.mask.counts),
  ];
}
