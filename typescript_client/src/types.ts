/** Names for the types that are generated from the server's API description; `schema.ts` describes each field. */
import type { components, operations } from "./schema.ts";

type Schemas = components["schemas"];

export type PredictRequest = Schemas["PredictRequest"];
export type PredictResponse = Schemas["PredictResponse"];
export type BatchRequest = Schemas["BatchRequest"];
export type BatchResponse = Schemas["BatchResponse"];
/** A prompt of a batch that has boxes or a threshold of its own. */
export type PromptItem = Schemas["PromptItem"];
/** One object that was found for a task. */
export type Instance = Schemas["InstanceModel"];
export type CocoRle = Schemas["CocoRle"];
/** x0, y0, x1, y1 in px of the image as a viewer shows it. */
export type Box = Instance["box"];
export type Output = NonNullable<PredictRequest["outputs"]>[number];
export type Health = Schemas["Health"];
export type ModelInfo = Schemas["ModelInfo"];

/** `png`: base64 of a PNG of the image's size, 255 inside. `rle`: COCO's run lengths. */
export type MaskFormat = NonNullable<DirectForm["mask_format"]>;
export type Mask<Format extends MaskFormat> = Format extends "rle" ? CocoRle : string;

/** The fields of a direct request's form. */
export type DirectForm = operations["segment_directly"]["requestBody"]["content"]["multipart/form-data"];
/** The answer to a direct request, with its masks in one format. */
export type SegmentResponse<Format extends MaskFormat = "png"> = Omit<Schemas["DirectAnswer"], "data"> & {
  data: (Omit<Schemas["DirectInstance"], "mask"> & { mask: Mask<Format> })[];
};
