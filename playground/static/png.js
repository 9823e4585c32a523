/** PNGs of one grey channel: a canvas would write four. */

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const BAND_BYTES = 1 << 20;

const CRC_TABLE = new Uint32Array(256).map((_, index) => {
  let value = index;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

/**
 * A PNG of 8 bits a px, or of 16.
 * @param {Uint8Array | Uint16Array} px row by row
 * @param {number} width
 * @param {number} height
 * @returns {Promise<Blob>}
 */
export async function greyPng(px, width, height) {
  const bytesOfPx = px.BYTES_PER_ELEMENT;
  const head = new DataView(new ArrayBuffer(13));
  head.setUint32(0, width);
  head.setUint32(4, height);
  head.setUint8(8, 8 * bytesOfPx); // then: grey, deflate, filters, not interlaced, all 0
  const data = await deflated(bands(px, width, height, bytesOfPx));
  return new Blob(
    [new Uint8Array(SIGNATURE), chunk("IHDR", new Uint8Array(head.buffer)), chunk("IDAT", data), chunk("IEND", new Uint8Array())],
    { type: "image/png" },
  );
}

/**
 * The rows, each after its filter type 0, some at a time.
 * @param {Uint8Array | Uint16Array} px
 * @param {number} width
 * @param {number} height
 * @param {number} bytesOfPx
 */
function* bands(px, width, height, bytesOfPx) {
  const rowBytes = 1 + width * bytesOfPx;
  const bandRows = Math.max(1, Math.floor(BAND_BYTES / rowBytes));
  for (let top = 0; top < height; top += bandRows) {
    const rows = Math.min(bandRows, height - top);
    const band = new Uint8Array(rows * rowBytes);
    for (let row = 0; row < rows; row += 1) {
      const start = (top + row) * width;
      const line = px.subarray(start, start + width);
      const place = row * rowBytes + 1;
      if (bytesOfPx === 1) band.set(line, place);
      else setBigEndian(band, place, line);
    }
    yield band;
  }
}

/** @param {Uint8Array} band @param {number} place @param {Uint8Array | Uint16Array} line */
function setBigEndian(band, place, line) {
  for (let x = 0; x < line.length; x += 1) {
    band[place + 2 * x] = line[x] >> 8;
    band[place + 2 * x + 1] = line[x] & 0xff;
  }
}

/** @param {Iterable<Uint8Array<ArrayBuffer>>} pieces @returns {Promise<Uint8Array<ArrayBuffer>>} */
async function deflated(pieces) {
  const stream = new CompressionStream("deflate");
  const whole = new Response(stream.readable).arrayBuffer();
  const writer = stream.writable.getWriter();
  for (const piece of pieces) await writer.write(piece);
  await writer.close();
  return new Uint8Array(await whole);
}

/** @param {string} type four letters @param {Uint8Array} data */
function chunk(type, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(Array.from(type, (letter) => letter.charCodeAt(0)), 4);
  bytes.set(data, 8);
  view.setUint32(8 + data.length, crc32(bytes.subarray(4, 8 + data.length)));
  return bytes;
}

/** @param {Uint8Array} bytes */
function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}
