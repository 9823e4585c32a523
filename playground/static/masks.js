/** Masks: COCO's run lengths to what is drawn and to px of the whole picture. */

/** @import { Corners, Piece, Rle } from "./types.js" */

export const INSIDE = 1;
export const EDGE = 2;
/** Just outside of the mask: a dark line, so that the edge is seen on any ground. */
export const SHADE = 3;

/** A mask that does not fit its size. */
export class BadMask extends Error {}

/**
 * The px that are set, as half-open ranges; px are counted column by column.
 * @param {Rle} rle
 * @param {(start: number, end: number) => void} use
 */
export function forEachRun({ size: [height, width], counts }, use) {
  let position = 0;
  runLengths(counts).forEach((length, index) => {
    if (index % 2 === 1 && length > 0) use(position, position + length);
    position += length;
  });
  if (position !== height * width) throw new BadMask("the mask does not fit the picture's size");
}

/**
 * Run lengths from COCO's text: groups of five bits, lowest first, 48 added to each. From the fourth on, a
 * number is the difference to the one two before.
 * @param {string} text
 * @returns {number[]}
 */
function runLengths(text) {
  const lengths = [];
  for (let place = 0; place < text.length; ) {
    let value = 0;
    let shift = 0;
    let bits = 0;
    do {
      if (place >= text.length || shift > 30) throw new BadMask("the mask's run lengths end in the middle");
      bits = text.charCodeAt(place) - 48;
      place += 1;
      value |= (bits & 0x1f) << shift;
      shift += 5;
    } while (bits & 0x20);
    if (bits & 0x10 && shift < 32) value |= -1 << shift;
    if (lengths.length > 2) value += lengths[lengths.length - 2];
    if (value < 0) throw new BadMask("the mask has a negative run length");
    lengths.push(value);
  }
  return lengths;
}

/**
 * The number of px that are set, and their tight rectangle.
 * @param {Rle} rle
 * @returns {{area: number, bounds: Corners}} bounds: x, y, width, height
 */
export function measure(rle) {
  const height = rle.size[0];
  let area = 0;
  let [x0, y0, x1, y1] = [Infinity, Infinity, -1, -1];
  forEachRun(rle, (start, end) => {
    area += end - start;
    const [first, last] = [Math.floor(start / height), Math.floor((end - 1) / height)];
    x0 = Math.min(x0, first);
    x1 = Math.max(x1, last);
    y0 = Math.min(y0, first < last ? 0 : start % height);
    y1 = Math.max(y1, first < last ? height - 1 : (end - 1) % height);
  });
  return { area, bounds: area ? [x0, y0, x1 - x0 + 1, y1 - y0 + 1] : [0, 0, 0, 0] };
}

/**
 * Set the mask's px of a whole picture.
 * @param {Uint8Array | Uint16Array} px of the picture, row by row
 * @param {Rle} rle
 * @param {number} value
 */
export function paint(px, rle, value) {
  const [height, width] = rle.size;
  forEachRun(rle, (start, end) => {
    for (let place = start, x = Math.floor(start / height), y = start % height; place < end; place += 1) {
      px[y * width + x] = value;
      y += 1;
      if (y === height) {
        y = 0;
        x += 1;
      }
    }
  });
}

/**
 * What is drawn of a mask on a layer that may be smaller than the picture: a px of the layer is inside if the
 * picture's px at its centre is.
 * @param {Rle} rle
 * @param {Corners} bounds of the mask, as `measure` gives them
 * @param {{width: number, height: number, line: number}} layer `line`: px of the edge
 * @returns {Piece}
 */
export function pieceOf(rle, bounds, layer) {
  const [imageHeight, imageWidth] = rle.size;
  const [scaleX, scaleY] = [layer.width / imageWidth, layer.height / imageHeight];
  // A px more on each side, for the dark line.
  const left = Math.floor(bounds[0] * scaleX) - 1;
  const top = Math.floor(bounds[1] * scaleY) - 1;
  const width = Math.ceil((bounds[0] + bounds[2]) * scaleX) + 1 - left;
  const height = Math.ceil((bounds[1] + bounds[3]) * scaleY) + 1 - top;
  const piece = { left, top, width, height, px: new Uint8Array(width * height) };
  const columnOf = columnsOfLayer(imageWidth, layer.width);
  forEachRun(rle, (start, end) => {
    for (let place = start; place < end; ) {
      const x = Math.floor(place / imageHeight);
      const columnEnd = Math.min(end, (x + 1) * imageHeight);
      if (columnOf[x] >= 0) {
        fillColumn(piece, columnOf[x] - left, centresIn(place - x * imageHeight, columnEnd - x * imageHeight, scaleY));
      }
      place = columnEnd;
    }
  });
  markEdges(piece, layer.line);
  return piece;
}

/** The layer's column whose centre is in each column of the picture, or -1. @param {number} imageWidth @param {number} width */
function columnsOfLayer(imageWidth, width) {
  const columns = new Int32Array(imageWidth).fill(-1);
  for (let column = 0; column < width; column += 1) {
    columns[Math.min(imageWidth - 1, Math.floor(((column + 0.5) * imageWidth) / width))] = column;
  }
  return columns;
}

/** Rows of the layer whose centres are in a range of the picture's rows. @param {number} y0 @param {number} y1 @param {number} scale */
function centresIn(y0, y1, scale) {
  return [Math.ceil(y0 * scale - 0.5), Math.ceil(y1 * scale - 0.5)];
}

/** @param {Piece} piece @param {number} x in the piece @param {number[]} rows of the layer, first and end */
function fillColumn(piece, x, [first, end]) {
  for (let y = Math.max(0, first - piece.top); y < Math.min(piece.height, end - piece.top); y += 1) {
    piece.px[y * piece.width + x] = INSIDE;
  }
}

/** Mark px of the edge, `line` deep, and the dark line round the mask. @param {Piece} piece @param {number} line */
function markEdges({ px, width, height }, line) {
  for (let depth = 0; depth < line; depth += 1) {
    const before = px.slice();
    for (let y = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1) {
        const place = y * width + x;
        const isInside = before[place] === INSIDE;
        if (!isInside && (before[place] !== 0 || depth > 0)) continue;
        if (touchesOther(before, x, y, width, height)) px[place] = isInside ? EDGE : SHADE;
      }
    }
  }
}

/**
 * Whether one of the four neighbours is inside and the px is not, or the other way round.
 * @param {Uint8Array} px
 * @param {number} x
 * @param {number} y
 * @param {number} width
 * @param {number} height
 */
function touchesOther(px, x, y, width, height) {
  const place = y * width + x;
  const isInside = px[place] === INSIDE;
  return (
    (x > 0 && (px[place - 1] === INSIDE) !== isInside) ||
    (x < width - 1 && (px[place + 1] === INSIDE) !== isInside) ||
    (y > 0 && (px[place - width] === INSIDE) !== isInside) ||
    (y < height - 1 && (px[place + width] === INSIDE) !== isInside)
  );
}

/** Whether a px of the layer is in the mask. @param {Piece} piece @param {number} x @param {number} y */
export function holds({ left, top, width, height, px }, x, y) {
  const [column, row] = [x - left, y - top];
  if (column < 0 || row < 0 || column >= width || row >= height) return false;
  const value = px[row * width + column];
  return value === INSIDE || value === EDGE;
}
