// The model in plain JavaScript, one token at a time. Formulas and names are those of nanochat/gpt.py. Sums are in float64,
// activations and the KV cache in float32.

class JavaScriptBackend {
  name = 'JavaScript';

  constructor(config, tensors) {
    Object.assign(this, { config, tensors });
    const { channels, kvWidth, numLayers, context, vocabSize, hiddenSize } = config;
    const floats = length => new Float32Array(length);
    this.rotary = rotaryTable(config);
    this.x = floats(channels); // the residual stream
    this.x0 = floats(channels); // the embedding
    this.middle = floats(channels); // the residual stream after the middle layer
    this.previousEmbedding = floats(channels);
    this.normed = floats(channels);
    this.q = floats(channels);
    this.attended = floats(channels);
    this.hidden = floats(hiddenSize);
    this.output = floats(channels);
    this.logits = floats(vocabSize);
    this.keys = Array.from({ length: numLayers }, () => floats(context * kvWidth)); // (position, K, D)
    this.values = Array.from({ length: numLayers }, () => floats(context * kvWidth));
  }

  /** Reads a token at a position; `previous` is the token before it, or -1. Returns the logits if they are wanted. */
  async step(token, previous, position, wantsLogits) {
    const { x, x0, middle, normed, tensors, config } = this;
    this.embed(token, previous);
    for (let layer = 0; layer < config.numLayers; layer++) {
      if (tensors.resid_lambdas) mix(x, tensors.resid_lambdas[layer], x0, tensors.x0_lambdas[layer]);
      this.attention(layer, token, position);
      this.feedForward(layer);
      if (layer === config.middleLayer) middle.set(x);
    }
    if (!wantsLogits) return null;
    if (tensors.backout_lambda) mix(x, 1, middle, -tensors.backout_lambda[0]);
    norm(x, normed);
    multiply(tensors['lm_head.weight'], normed, this.logits);
    if (config.softcap) softcap(this.logits, config.softcap);
    return this.logits;
  }

  embed(token, previous) {
    const { x, x0, previousEmbedding, tensors } = this;
    const table = tensors['transformer.wte.weight'];
    readRow(table, token, x);
    norm(x, x);
    if (tensors.smear_lambda && previous >= 0) {
      readRow(table, previous, previousEmbedding);
      norm(previousEmbedding, previousEmbedding);
      const gate = sigmoid(dot(tensors['smear_gate.weight'], 0, x, 0, tensors['smear_gate.weight'].length));
      mix(x, 1, previousEmbedding, tensors.smear_lambda[0] * gate);
    }
    x0.set(x);
  }

  attention(layer, token, position) {
    const { x, normed, q, attended, output, tensors, config } = this;
    const { headSize, kvWidth, qkGain } = config;
    const start = position * kvWidth;
    const k = this.keys[layer].subarray(start, start + kvWidth);
    const v = this.values[layer].subarray(start, start + kvWidth);
    norm(x, normed);
    multiply(layerTensor(tensors, layer, 'attn.c_q'), normed, q);
    multiply(layerTensor(tensors, layer, 'attn.c_k'), normed, k);
    multiply(layerTensor(tensors, layer, 'attn.c_v'), normed, v);
    this.addValueEmbedding(layer, token, v);
    for (const heads of [q, k]) {
      for (let head = 0; head < heads.length; head += headSize) this.rotate(heads, head, position, qkGain);
    }
    attended.fill(0);
    for (let head = 0; head < config.numHeads; head++) this.attend(layer, head, position);
    multiply(layerTensor(tensors, layer, 'attn.c_proj'), attended, output);
    mix(x, 1, output, 1);
  }

  addValueEmbedding(layer, token, v) {
    const table = this.tensors[`value_embeds.${layer}.weight`];
    if (!table) return;
    const { headSize, valueGateScale } = this.config;
    const gateWeights = layerTensor(this.tensors, layer, 'attn.ve_gate');
    const numInputs = gateWeights.length / (v.length / headSize);
    for (let head = 0; head * headSize < v.length; head++) {
      const gate = valueGateScale * sigmoid(dot(gateWeights, head * numInputs, this.normed, 0, numInputs));
      const factor = gate * table.scales[token];
      for (let i = head * headSize; i < (head + 1) * headSize; i++) v[i] += factor * table.values[token * v.length + i];
    }
  }

  /** Rotates one head by minus the angle of the position, then norms it and multiplies it by the gain. */
  rotate(heads, start, position, gain) {
    const { headSize } = this.config;
    const half = headSize / 2;
    for (let j = 0; j < half; j++) {
      const cos = this.rotary[(position * half + j) * 2];
      const sin = this.rotary[(position * half + j) * 2 + 1];
      const first = heads[start + j];
      const second = heads[start + half + j];
      heads[start + j] = first * cos + second * sin;
      heads[start + half + j] = second * cos - first * sin;
    }
    const head = heads.subarray(start, start + headSize);
    norm(head, head, gain);
  }

  /** Adds one head's attention to the keys of its window to `attended`. */
  attend(layer, head, position) {
    const { config, q, attended } = this;
    const { headSize, kvWidth, numHeads, windows } = config;
    const keys = this.keys[layer];
    const values = this.values[layer];
    const queryStart = head * headSize;
    const kvStart = Math.floor(head * (kvWidth / headSize) / numHeads) * headSize; // heads share keys in groups
    const first = Math.max(0, position - windows[layer]);
    const weights = new Float64Array(position + 1 - first);
    let largest = -Infinity;
    for (let i = 0; i < weights.length; i++) {
      weights[i] = dot(q, queryStart, keys, (first + i) * kvWidth + kvStart, headSize) / Math.sqrt(headSize);
      largest = Math.max(largest, weights[i]);
    }
    let total = 0;
    for (let i = 0; i < weights.length; i++) total += weights[i] = Math.exp(weights[i] - largest);
    for (let i = 0; i < weights.length; i++) {
      const weight = weights[i] / total;
      const valueStart = (first + i) * kvWidth + kvStart;
      for (let d = 0; d < headSize; d++) attended[queryStart + d] += weight * values[valueStart + d];
    }
  }

  feedForward(layer) {
    const { x, normed, hidden, output, tensors } = this;
    norm(x, normed);
    multiply(layerTensor(tensors, layer, 'mlp.c_fc'), normed, hidden);
    for (let i = 0; i < hidden.length; i++) hidden[i] = Math.max(hidden[i], 0) ** 2;
    multiply(layerTensor(tensors, layer, 'mlp.c_proj'), hidden, output);
    mix(x, 1, output, 1);
  }
}

// ---- vectors ----

const NORM_EPS = 2 ** -23; // of float32

const sigmoid = x => 1 / (1 + Math.exp(-x));

function dot(a, aStart, b, bStart, length) {
  let sum = 0;
  for (let i = 0; i < length; i++) sum += a[aStart + i] * b[bStart + i];
  return sum;
}

/** x = a * x + b * y */
function mix(x, a, y, b) {
  for (let i = 0; i < x.length; i++) x[i] = a * x[i] + b * y[i];
}

/** RMS norm, times a gain. */
function norm(x, out, gain = 1) {
  const factor = gain / Math.sqrt(dot(x, 0, x, 0, x.length) / x.length + NORM_EPS);
  for (let i = 0; i < x.length; i++) out[i] = x[i] * factor;
}

function softcap(logits, cap) {
  for (let i = 0; i < logits.length; i++) logits[i] = cap * Math.tanh(logits[i] / cap);
}

function readRow({ columns, values, scales }, row, out) {
  for (let i = 0; i < columns; i++) out[i] = scales[row] * values[row * columns + i];
}

/** out = matrix * x. Four rows at a time: their sums do not wait for each other. */
function multiply({ rows, columns, values, scales }, x, out) {
  let row = 0;
  for (; row + 4 <= rows; row += 4) {
    const row0 = row * columns;
    const row1 = row0 + columns;
    const row2 = row1 + columns;
    const row3 = row2 + columns;
    let sum0 = 0;
    let sum1 = 0;
    let sum2 = 0;
    let sum3 = 0;
    for (let i = 0; i < columns; i++) {
      const input = x[i];
      sum0 += values[row0 + i] * input;
      sum1 += values[row1 + i] * input;
      sum2 += values[row2 + i] * input;
      sum3 += values[row3 + i] * input;
    }
    out[row] = sum0 * scales[row];
    out[row + 1] = sum1 * scales[row + 1];
    out[row + 2] = sum2 * scales[row + 2];
    out[row + 3] = sum3 * scales[row + 3];
  }
  for (; row < rows; row++) out[row] = dot(values, row * columns, x, 0, columns) * scales[row];
}
