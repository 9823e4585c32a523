/** The one error of the client. */
import type { components } from "./schema.ts";

/** The codes of the server's errors: docs/contracts/api-contracts.md. A newer server may have more. */
export type ErrorCode = components["schemas"]["ErrorDetail"]["code"];

/**
 * Codes for calls that have no answer of the server. `UNREACHABLE`: it could not be reached, or the connection broke.
 * `TIMEOUT`: the deadline has passed. `BAD_ANSWER`: something else answered, such as a proxy.
 */
export type LocalErrorCode = "UNREACHABLE" | "TIMEOUT" | "BAD_ANSWER";

/** A call that failed. */
export class Sam3Error extends Error {
  override readonly name = "Sam3Error";
  /** Of the answer; 0 if there was none. */
  readonly status: number;
  readonly code: ErrorCode | LocalErrorCode;
  /** Names the request in the server's log; empty if there was no answer of the server. */
  readonly requestId: string;
  /** Seconds after which to try again, where the server says so. */
  readonly retryAfterS: number | undefined;

  constructor(
    code: ErrorCode | LocalErrorCode,
    message: string,
    answer: { status?: number; requestId?: string; retryAfterS?: number | undefined; cause?: unknown } = {},
  ) {
    super(message, { cause: answer.cause });
    this.code = code;
    this.status = answer.status ?? 0;
    this.requestId = answer.requestId ?? "";
    this.retryAfterS = answer.retryAfterS;
  }
}

/** The error for an answer other than 200. */
export function errorOf(response: Response, text: string): Sam3Error {
  const { status, headers } = response;
  const seconds = Number(headers.get("Retry-After"));
  const retryAfterS = seconds > 0 ? seconds : undefined;
  const body = parse(text) as Partial<components["schemas"]["ErrorResponse"]> | null | undefined;
  const { code, message } = body?.error ?? {};
  if (typeof code !== "string" || typeof message !== "string") return badAnswer(status, retryAfterS);
  return new Sam3Error(code, message, { status, requestId: body?.request_id ?? "", retryAfterS });
}

/** The error for an answer that the server does not give. */
export function badAnswer(status: number, retryAfterS?: number): Sam3Error {
  const message = `the answer (status ${status}) is not the SAM3 server's: check the URL, and what is in between`;
  return new Sam3Error("BAD_ANSWER", message, { status, retryAfterS });
}

/** The value of a JSON text; undefined if it is not JSON. */
export function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
