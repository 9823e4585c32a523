/** Client of the SAM3 inference backend, for Cloudflare Workers, Node.js and browsers. It has no dependencies. */
export {
  type CallOptions,
  type Client,
  type ClientOptions,
  createClient,
  type ImageFile,
  type SegmentFields,
} from "./client.ts";
export { type ErrorCode, type LocalErrorCode, Sam3Error } from "./errors.ts";
export type * from "./types.ts";
