/** What is shown, as files: a mask, a label map, COCO's JSON, a picture with the masks over it. */

import { drawScene } from "./drawing.js";
import { paint } from "./masks.js";
import { greyPng } from "./png.js";
import { bottomToTop, nameOf } from "./state.js";

/** @import { Picture, Shown } from "./types.js" */

const MAX_OVERLAY_SIDE = 4096;
/** A px of the overlay's marks for so many px of its shorter side. */
const UNIT_SIDE = 720;
const MAX_NUMBER_OF_8_BITS = 255;

/** @type {Record<string, {ending: string, make: (picture: Picture, shown: Shown[]) => Promise<Blob>}>} */
export const DOWNLOADS = {
  mask: { ending: "mask.png", make: unionPng },
  labelMap: { ending: "label-map.png", make: labelMapPng },
  coco: { ending: "coco.json", make: cocoJson },
  overlay: { ending: "overlay.jpg", make: overlayJpeg },
};

/** 255 where any instance is, else 0. @param {Picture} picture @param {Shown[]} shown */
export async function unionPng({ width, height }, shown) {
  const px = new Uint8Array(width * height);
  for (const { instance } of shown) paint(px, instance.mask, 255);
  return greyPng(px, width, height);
}

/** Each px is the number of its instance, or 0; the higher score is on top. @param {Picture} picture @param {Shown[]} shown */
export async function labelMapPng({ width, height }, shown) {
  const Numbers = shown.length > MAX_NUMBER_OF_8_BITS ? Uint16Array : Uint8Array;
  const px = new Numbers(width * height);
  for (const { number, instance } of bottomToTop(shown)) paint(px, instance.mask, number);
  return greyPng(px, width, height);
}

/** As the server's own COCO document. @param {Picture} picture @param {Shown[]} shown */
export async function cocoJson({ name, width, height }, shown) {
  const names = [...new Set(shown.map(({ concept }) => nameOf(concept)))];
  const document = {
    info: { description: "Instances found by SAM 3" },
    images: [{ id: 1, file_name: name, width, height }],
    categories: names.map((each, index) => ({ id: index + 1, name: each, supercategory: "" })),
    annotations: shown.map(({ number, concept, instance }) => ({
      id: number,
      image_id: 1,
      category_id: names.indexOf(nameOf(concept)) + 1,
      bbox: instance.bounds,
      area: instance.area,
      iscrowd: 0,
      segmentation: instance.mask,
      score: instance.score,
    })),
  };
  return new Blob([JSON.stringify(document)], { type: "application/json" });
}

/** The picture with the masks over it. @param {Picture} picture @param {Shown[]} shown @returns {Promise<Blob>} */
export async function overlayJpeg(picture, shown) {
  const scale = Math.min(1, MAX_OVERLAY_SIDE / Math.max(picture.width, picture.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const unit = Math.max(1, Math.min(canvas.width, canvas.height) / UNIT_SIDE);
  drawScene(context, { picture, shown, lit: null, comparison: null, isVeiled: false }, unit);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the picture is too large"))), "image/jpeg", 0.92);
  });
}

/** A name for a file that no system misreads. @param {Picture} picture @param {string} ending */
export function fileNameOf({ name }, ending) {
  const stem = name.replace(/\.[^.]*$/u, "").replace(/[^\p{L}\p{N}_-]+/gu, "-").replace(/^-+|-+$/gu, "").slice(0, 60);
  return `${stem || "picture"}-${ending}`;
}

/** Give a file to the person. @param {Blob} blob @param {string} name */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
