/** Pictures: the samples, and files of a person, checked before anything is sent. */

/** @import { Picture } from "./types.js" */

/** The longest side of what is kept to be drawn. */
const MAX_DRAWN_SIDE = 4096;

/** @type {{name: string, title: string, suggestions: string[]}[]} */
export const SAMPLES = [
  { name: "sample-circles.jpg", title: "Circles", suggestions: ["red circle", "blue circle", "star"] },
  { name: "sample-stars.jpg", title: "Stars and rings", suggestions: ["purple star", "rings", "orange star"] },
  { name: "sample-mixed.jpg", title: "Shapes", suggestions: ["triangles", "red shape", "crosses"] },
];

/** What a server takes unless it says otherwise: 10 MB, 2^26 px. */
export const DEFAULT_LIMITS = { max_image_bytes: 10 * 1024 * 1024, max_image_pixels: 2 ** 26 };

/** A file that cannot be used; the message is a sentence for a person. */
export class BadPicture extends Error {}

/** @param {string} name */
export function sampleUrl(name) {
  return new URL(`playground/${name}`, document.baseURI).href;
}

/** @param {{name: string, suggestions: string[]}} sample @returns {Promise<Picture>} */
export async function readSample({ name, suggestions }) {
  const response = await fetch(sampleUrl(name)).catch(() => null);
  if (!response?.ok) throw new BadPicture("The sample could not be loaded. Is the server still running?");
  const picture = await readPicture(await response.blob(), name, DEFAULT_LIMITS);
  return { ...picture, isSample: true, suggestions };
}

/**
 * Read a file of a person.
 * @param {Blob} file
 * @param {string} name
 * @param {{max_image_bytes: number, max_image_pixels: number}} limits
 * @returns {Promise<Picture>}
 */
export async function readPicture(file, name, limits) {
  if (file.size > limits.max_image_bytes) {
    throw new BadPicture(`The file has ${megabytes(file.size)}; the server takes up to ${megabytes(limits.max_image_bytes)}.`);
  }
  if (!(await isPicture(file))) {
    throw new BadPicture("This file is no picture that the server reads. Choose a PNG, JPEG or WEBP file.");
  }
  const whole = await decoded(file);
  const { width, height } = whole;
  if (width * height > limits.max_image_pixels) {
    whole.close();
    throw new BadPicture(
      `The picture has ${width} x ${height} px; the server takes up to ${Math.floor(limits.max_image_pixels / 1e6)} megapixels.`,
    );
  }
  const bitmap = await shrunk(whole);
  return { file, name: printable(name), isSample: false, suggestions: [], bitmap, width, height };
}

/** By its content: a name and a type may be wrong. @param {Blob} file */
async function isPicture(file) {
  let head;
  try {
    head = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  } catch {
    throw new BadPicture("The file cannot be read. A folder cannot be used; choose one picture.");
  }
  const text = String.fromCharCode(...head);
  return (
    text.startsWith("\x89PNG\r\n\x1a\n") ||
    text.startsWith("\xff\xd8\xff") ||
    (text.startsWith("RIFF") && text.slice(8, 12) === "WEBP")
  );
}

/** Turned as EXIF says, as the server turns it. @param {Blob} file */
async function decoded(file) {
  try {
    return await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new BadPicture("The picture is damaged, or of a kind that this browser cannot show.");
  }
}

/** @param {ImageBitmap} bitmap */
async function shrunk(bitmap) {
  const scale = MAX_DRAWN_SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1) return bitmap;
  const smaller = await createImageBitmap(bitmap, {
    resizeWidth: Math.max(1, Math.round(bitmap.width * scale)),
    resizeHeight: Math.max(1, Math.round(bitmap.height * scale)),
    resizeQuality: "high",
  });
  bitmap.close();
  return smaller;
}

/** Without characters that change what a terminal or a line shows. @param {string} name */
function printable(name) {
  return name.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, "_") || "picture";
}

/** @param {number} bytes */
function megabytes(bytes) {
  return `${(bytes / 2 ** 20).toFixed(1).replace(/\.0$/u, "")} MB`;
}
