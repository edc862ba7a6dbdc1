// The model's weights in the page: a description in JSON, and their bytes in base64 in several <script> elements.
//
// A matrix {rows, columns, values, scales} has 8-bit integers, row by row; row r stands for scales[r] * values. Gates and
// scalars are Float32Arrays.

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return fromByteString(atob(text));
}

/** Decodes the bytes and removes their elements, which hold the same once more. */
async function readBytes(numBytes) {
  const bytes = new Uint8Array(numBytes);
  let offset = 0;
  for (const element of document.querySelectorAll('script.weights')) {
    const text = element.textContent.trim();
    const part = decodeBase64(text.slice(0, text.length - text.length % 4)); // an incomplete file can end anywhere
    bytes.set(part, offset);
    offset += part.length;
    element.remove();
    await pause();
  }
  if (offset !== numBytes) throw new Error(`the file is incomplete: it has ${offset} of ${numBytes} bytes of weights`);
  return bytes.buffer;
}

/** Returns parameter name → matrix or Float32Array. */
async function readTensors({ tensors, numBytes }) {
  const buffer = await readBytes(numBytes);
  const entries = Object.entries(tensors).map(([name, { offset, length, rows, columns, scales }]) => {
    if (length) return [name, new Float32Array(buffer, offset, length)];
    const values = new Int8Array(buffer, offset, rows * columns);
    return [name, { rows, columns, values, scales: new Float32Array(buffer, scales, rows) }];
  });
  return Object.fromEntries(entries);
}

/** cos and sin of each position's rotation angles as gpt.rotary_table has them: in float32, D/2 pairs per position. */
function rotaryTable({ context, headSize, ropeBase }) {
  const half = headSize / 2;
  const table = new Float32Array(context * headSize);
  for (let j = 0; j < half; j++) {
    const frequency = Math.fround(ropeBase ** Math.fround(-2 * j / headSize));
    for (let position = 0; position < context; position++) {
      const angle = Math.fround(position * frequency);
      table[(position * half + j) * 2] = Math.cos(angle);
      table[(position * half + j) * 2 + 1] = Math.sin(angle);
    }
  }
  return table;
}

/** The parameters of a layer, by their names after `transformer.h.<layer>.`. */
const layerTensor = (tensors, layer, name) => tensors[`transformer.h.${layer}.${name}.weight`];
