/**
 * The types of the page's values.
 *
 * Lengths are px of the picture as a viewer shows it, x to the right and y down.
 *
 * @typedef {[number, number, number, number]} Corners x0, y0, x1, y1
 *
 * @typedef {object} Box an exemplar
 * @property {Corners} corners
 * @property {0 | 1} label 1: find more like it; 0: leave out what is like it
 *
 * @typedef {object} Rle a mask as the server sends it
 * @property {[number, number]} size height, width
 * @property {string} counts COCO's compressed run lengths, column by column, px outside first
 *
 * @typedef {object} Piece the part of a mask that is drawn, at the layer's resolution
 * @property {number} left may be -1: a dark line is drawn round the mask
 * @property {number} top
 * @property {number} width
 * @property {number} height
 * @property {Uint8Array} px row by row: 0 outside, `INSIDE`, `EDGE` or `SHADE`
 *
 * @typedef {object} Instance one object that was found
 * @property {number} score
 * @property {Corners} box
 * @property {Rle} mask
 * @property {number} area px of the mask
 * @property {Corners} bounds x, y, width, height of the mask's tight rectangle
 * @property {Piece} piece
 * @property {boolean} isRemoved a person took it away
 *
 * @typedef {object} Result
 * @property {string} asked what was asked; see `askedOf`
 * @property {number} presence
 * @property {Instance[]} instances best score first
 *
 * @typedef {object} Concept
 * @property {number} id
 * @property {string | null} text null: the boxes alone
 * @property {Box[]} boxes
 * @property {boolean} isShown
 * @property {Result | null} result
 *
 * @typedef {object} Picture
 * @property {Blob} file as it is sent
 * @property {string} name without control characters; still what somebody else wrote
 * @property {boolean} isSample
 * @property {string[]} suggestions concepts to try
 * @property {CanvasImageSource} bitmap what is drawn, perhaps smaller than the picture
 * @property {number} width
 * @property {number} height
 *
 * @typedef {object} Shown an instance that is shown now
 * @property {number} number from 1, through all concepts
 * @property {Concept} concept
 * @property {number} conceptNumber from 1
 * @property {Instance} instance
 * @property {number[]} colour red, green, blue
 */

export {};
