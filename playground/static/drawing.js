/** Draws the picture, the masks over it, their numbers, and the dividing line of a comparison. */

import { cssOf } from "./colours.js";
import { EDGE, INSIDE, SHADE } from "./masks.js";
import { bottomToTop } from "./state.js";

/** @import { Picture, Shown } from "./types.js" */

const MAX_LAYER_SIDE = 1600;
const LINE_SIDE = 240;
const MAX_NUMBERS = 60;
/** Opacities, of 255: as usual, of the one that is lit, and of the others meanwhile, which are not filled. */
const FILL = { usual: 60, lit: 52 };
const LINE = { usual: 255, dim: 110 };
const SHADE_OPACITY = 190;
/** The opacity of the dark over all that is in no mask, as usual and where one is lit. */
const VEIL = { usual: 84, lit: 128 };

/**
 * The size of the layer on which masks are drawn, and the px of their edges.
 * @param {{width: number, height: number}} picture
 */
export function layerOf({ width, height }) {
  const scale = Math.min(1, MAX_LAYER_SIDE / Math.max(width, height));
  const layer = { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
  return { ...layer, line: Math.max(1, Math.round(Math.min(layer.width, layer.height) / LINE_SIDE)) };
}

/**
 * What is drawn.
 * @typedef {object} Scene
 * @property {Picture} picture
 * @property {Shown[]} shown
 * @property {Shown | null} lit
 * @property {{left: Shown[], right: Shown[], at: number} | null} comparison in place of `shown`
 * @property {boolean} isVeiled the picture is darker where no mask is
 */

/**
 * Draw a scene over the whole canvas.
 * @param {CanvasRenderingContext2D} context
 * @param {Scene} scene
 * @param {number} unit px of the canvas for a px of the screen
 */
export function drawScene(context, scene, unit) {
  const { width, height } = context.canvas;
  context.save();
  context.fillStyle = "white"; // what is transparent is white to the server too
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(scene.picture.bitmap, 0, 0, width, height);
  const { comparison } = scene;
  if (comparison) {
    const divide = Math.round(width * comparison.at);
    drawPart(context, scene, comparison.left, [0, divide], unit);
    drawPart(context, scene, comparison.right, [divide, width], unit);
    drawDivide(context, divide, unit);
  } else {
    drawPart(context, scene, scene.shown, [0, width], unit);
  }
  context.restore();
}

/** Between two columns of the canvas. @param {CanvasRenderingContext2D} context @param {Scene} scene @param {Shown[]} shown @param {number[]} columns @param {number} unit */
function drawPart(context, { picture, lit, isVeiled }, shown, [start, end], unit) {
  const { width, height } = context.canvas;
  context.save();
  context.beginPath();
  context.rect(start, 0, end - start, height);
  context.clip();
  const litHere = shown.find((each) => each.instance === lit?.instance) ?? null;
  const veil = isVeiled && shown.length ? VEIL[litHere ? "lit" : "usual"] : 0;
  context.drawImage(paintedLayer(picture, shown, litHere, veil), 0, 0, width, height);
  if (litHere) drawBox(context, picture, litHere, unit);
  const named = litHere ? [litHere] : shown.slice(0, MAX_NUMBERS);
  for (const each of named) drawNumber(context, picture, each, unit);
  context.restore();
}

/**
 * The masks, over a veil of this opacity.
 * @param {Picture} picture
 * @param {Shown[]} shown
 * @param {Shown | null} lit
 * @param {number} veil
 * @returns {OffscreenCanvas}
 */
function paintedLayer(picture, shown, lit, veil) {
  const { width, height } = layerOf(picture);
  const layer = new OffscreenCanvas(width, height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (layer.getContext("2d"));
  const pixels = context.createImageData(width, height);
  if (veil) for (let place = 3; place < pixels.data.length; place += 4) pixels.data[place] = veil;
  const order = bottomToTop(shown.filter((each) => each !== lit));
  if (lit) order.push(lit);
  const isDim = (/** @type {Shown} */ each) => lit !== null && each !== lit;
  for (const each of order) if (!isDim(each)) paintValue(pixels, each, INSIDE, lit ? FILL.lit : FILL.usual);
  for (const each of order) {
    if (!isDim(each)) paintValue(pixels, each, SHADE, SHADE_OPACITY);
    paintValue(pixels, each, EDGE, isDim(each) ? LINE.dim : LINE.usual);
  }
  context.putImageData(pixels, 0, 0);
  return layer;
}

/** Set the layer's px where a piece has this value. @param {ImageData} pixels @param {Shown} shown @param {number} value @param {number} opacity */
function paintValue(pixels, { instance: { piece }, colour }, value, opacity) {
  const [red, green, blue] = value === SHADE ? [0, 0, 0] : colour;
  const firstX = Math.max(0, -piece.left);
  const endX = Math.min(piece.width, pixels.width - piece.left);
  for (let y = Math.max(0, -piece.top); y < Math.min(piece.height, pixels.height - piece.top); y += 1) {
    for (let x = firstX; x < endX; x += 1) {
      if (piece.px[y * piece.width + x] !== value) continue;
      const place = 4 * ((piece.top + y) * pixels.width + piece.left + x);
      pixels.data[place] = red;
      pixels.data[place + 1] = green;
      pixels.data[place + 2] = blue;
      pixels.data[place + 3] = opacity;
    }
  }
}

/** @param {CanvasRenderingContext2D} context @param {Picture} picture @param {Shown} shown @param {number} unit */
function drawBox(context, picture, { instance, colour }, unit) {
  const [x0, y0, x1, y1] = onCanvas(context, picture, instance.box);
  context.setLineDash([6 * unit, 4 * unit]);
  context.lineWidth = 1.5 * unit;
  context.strokeStyle = cssOf(colour);
  context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  context.setLineDash([]);
}

/** The instance's number at the upper left of its box. @param {CanvasRenderingContext2D} context @param {Picture} picture @param {Shown} shown @param {number} unit */
function drawNumber(context, picture, { number, instance, colour }, unit) {
  const [x0, y0] = onCanvas(context, picture, instance.box);
  const text = String(number);
  context.font = `600 ${12 * unit}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  context.textAlign = "center";
  const height = 18 * unit;
  const width = Math.max(height, context.measureText(text).width + 10 * unit);
  const left = Math.max(0, Math.min(context.canvas.width - width, x0));
  const top = Math.max(0, Math.min(context.canvas.height - height, y0));
  context.beginPath();
  context.roundRect(left, top, width, height, 5 * unit);
  context.fillStyle = cssOf(colour);
  context.fill();
  context.fillStyle = "black";
  context.fillText(text, left + width / 2, top + height / 2 + unit / 2);
}

/** @param {CanvasRenderingContext2D} context @param {number} x @param {number} unit */
function drawDivide(context, x, unit) {
  const { height } = context.canvas;
  const middle = height / 2;
  context.fillStyle = "white";
  context.shadowColor = "rgb(0 0 0 / 50%)";
  context.shadowBlur = 6 * unit;
  context.fillRect(x - unit, 0, 2 * unit, height);
  context.beginPath();
  context.arc(x, middle, 16 * unit, 0, 2 * Math.PI);
  context.fill();
  context.shadowColor = "transparent";
  context.fillStyle = "#1c2423";
  for (const side of [-1, 1]) {
    context.beginPath();
    context.moveTo(x + side * 10 * unit, middle);
    context.lineTo(x + side * 4 * unit, middle - 5 * unit);
    context.lineTo(x + side * 4 * unit, middle + 5 * unit);
    context.fill();
  }
}

/** Corners in px of the picture as px of the canvas. @param {CanvasRenderingContext2D} context @param {Picture} picture @param {number[]} corners */
function onCanvas(context, picture, [x0, y0, x1, y1]) {
  const [scaleX, scaleY] = [context.canvas.width / picture.width, context.canvas.height / picture.height];
  return [x0 * scaleX, y0 * scaleY, x1 * scaleX, y1 * scaleY];
}
