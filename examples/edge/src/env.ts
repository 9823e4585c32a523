/** The Worker's bindings, and its message. */
import type { Box, Output } from "sam3-client";

/** From wrangler.jsonc and the secrets. */
export interface Env {
  IMAGES: R2Bucket;
  TASKS: Queue<Task>;
  SUPABASE_URL: string;
  SUPABASE_PUBLISHABLE_KEY: string;
  /** sb_secret_..., for this Worker only: ends tasks that the backend has not claimed. */
  SUPABASE_SECRET_KEY: string;
  BACKEND_URL: string;
  BACKEND_API_KEY: string;
  R2_PUBLIC_BASE_URL: string;
}

/** Files that the backend can store beside the mask; the example asks for two of its five `outputs`. */
export const OUTPUTS = ["overlay", "label_map"] as const satisfies Output[];

/** One task, as sent to the queue. Its row in segmentation_results has the same id. */
export interface Task {
  task_id: string;
  user_id: string;
  image_key: string;
  /** Empty where the box alone is the prompt. */
  prompts: string[];
  /** An exemplar: find more like what is in it. */
  box?: Box;
  outputs?: (typeof OUTPUTS)[number][];
}
