/** The colours of instances: those of the server's overlay, outputs/palette.py. Black text is readable on each. */
const PALETTE = [
  [255, 34, 170],
  [187, 221, 0],
  [119, 204, 238],
  [170, 102, 17],
  [153, 68, 255],
  [51, 187, 0],
  [255, 153, 153],
  [0, 136, 119],
  [170, 136, 255],
  [136, 255, 170],
];

/** @param {number} index @returns {number[]} red, green, blue */
export function colourAt(index) {
  return PALETTE[index % PALETTE.length];
}

/** @param {number[]} colour @returns {string} for CSS and canvas */
export function cssOf([red, green, blue]) {
  return `rgb(${red} ${green} ${blue})`;
}
