// The kernels of webgpu.js: one token of the model at a time, in float32. Formulas and names are those of nanochat/gpt.py.
// The upper-case constants are set when a pipeline is created.

override CHANNELS: u32 = 4;
override HEAD_SIZE: u32 = 2; // at most MAX_HEAD_SIZE
override NUM_HEADS: u32 = 1;
override NUM_KV_HEADS: u32 = 1;
override NORM_EPS: f32 = 1e-7;
override QK_GAIN: f32 = 1;

const THREADS = 64u; // of a workgroup
const MAX_HEAD_SIZE = 256u;

struct Step {
  token: u32,
  previous: u32, // the token before it
  has_previous: u32, // 0 for the first token
  position: u32,
}

/** One of the four 8-bit integers in a word. */
fn byte_of(word: u32, i: u32) -> f32 {
  return f32(extractBits(bitcast<i32>(word), 8 * i, 8u));
}

fn bytes_of(word: u32) -> vec4f {
  return vec4f(byte_of(word, 0), byte_of(word, 1), byte_of(word, 2), byte_of(word, 3));
}

fn sigmoid(x: f32) -> f32 {
  return 1 / (1 + exp(-x));
}

var<workgroup> partial: array<f32, THREADS>;

/** The sum of one number of each thread. */
fn sum_of_all(thread: u32, x: f32) -> f32 {
  workgroupBarrier(); // others may still read the last sum
  partial[thread] = x;
  for (var half = THREADS / 2; half > 0; half /= 2) {
    workgroupBarrier();
    if (thread < half) {
      partial[thread] += partial[thread + half];
    }
  }
  workgroupBarrier();
  return partial[0];
}

// ---- embed: x = x0 = norm(embedding) + smear. One workgroup. ----

override HAS_SMEAR: bool = false;
override SMEAR_CHANNELS: u32 = 24;

@group(0) @binding(0) var<uniform> embed_step: Step;
@group(0) @binding(1) var<storage> embed_table: array<u32>;
@group(0) @binding(2) var<storage> embed_scales: array<f32>;
@group(0) @binding(3) var<storage> smear_gate: array<f32>; // the gate's weights, then smear_lambda
@group(0) @binding(4) var<storage, read_write> embed_x: array<f32>;
@group(0) @binding(5) var<storage, read_write> embed_x0: array<f32>;

fn embedding(token: u32, channel: u32) -> f32 {
  let i = token * CHANNELS + channel;
  return embed_scales[token] * byte_of(embed_table[i / 4], i % 4);
}

/** The factor by which the RMS norm multiplies the embedding. */
fn embedding_norm(token: u32, thread: u32) -> f32 {
  var squares = 0.0;
  for (var i = thread; i < CHANNELS; i += THREADS) {
    squares += pow2(embedding(token, i));
  }
  return inverseSqrt(sum_of_all(thread, squares) / f32(CHANNELS) + NORM_EPS);
}

fn pow2(x: f32) -> f32 {
  return x * x;
}

@compute @workgroup_size(THREADS)
fn embed(@builtin(local_invocation_index) thread: u32) {
  let factor = embedding_norm(embed_step.token, thread);
  let previous_factor = embedding_norm(embed_step.previous, thread);
  var gate = 0.0;
  if (HAS_SMEAR && embed_step.has_previous == 1) {
    for (var i = 0u; i < SMEAR_CHANNELS; i++) {
      gate += smear_gate[i] * factor * embedding(embed_step.token, i);
    }
    gate = smear_gate[SMEAR_CHANNELS] * sigmoid(gate);
  }
  for (var i = thread; i < CHANNELS; i += THREADS) {
    let previous = previous_factor * embedding(embed_step.previous, i);
    embed_x[i] = factor * embedding(embed_step.token, i) + gate * previous;
    embed_x0[i] = embed_x[i];
  }
}

// ---- mix: x = a * x + b * y, for residual scalars and backout ----

@group(0) @binding(0) var<storage> mix_factors: vec2f; // a, b
@group(0) @binding(1) var<storage, read_write> mix_x: array<f32>;
@group(0) @binding(2) var<storage> mix_y: array<f32>;

@compute @workgroup_size(THREADS)
fn mix_vectors(@builtin(global_invocation_id) id: vec3u) {
  if (id.x < CHANNELS) {
    mix_x[id.x] = mix_factors.x * mix_x[id.x] + mix_factors.y * mix_y[id.x];
  }
}

// ---- multiply: a matrix of 8-bit weights times a vector. A workgroup computes ROWS_PER_GROUP rows. ----

override ROWS: u32 = 1;
override COLUMNS: u32 = 4; // a multiple of 4
override HAS_NORM: bool = false; // the vector is normed first
override EPILOGUE: u32 = 0; // what happens to the product: 0 stored, 1 added to the output, 2 relu², 3 softcap
override SOFTCAP: f32 = 0; // 0 = none

const ROWS_PER_GROUP = 4u;
const THREADS_PER_ROW = THREADS / ROWS_PER_GROUP;

@group(0) @binding(0) var<storage> matrix: array<u32>;
@group(0) @binding(1) var<storage> matrix_scales: array<f32>;
@group(0) @binding(2) var<storage> vector: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> product: array<f32>;

var<workgroup> partial_products: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn multiply(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let num_words = COLUMNS / 4;
  let row = group.x * ROWS_PER_GROUP + thread / THREADS_PER_ROW;
  var sum = 0.0;
  if (row < ROWS) {
    for (var i = thread % THREADS_PER_ROW; i < num_words; i += THREADS_PER_ROW) {
      sum += dot(bytes_of(matrix[row * num_words + i]), vector[i]);
    }
  }
  partial_products[thread] = sum;
  var factor = 1.0;
  if (HAS_NORM) {
    var squares = 0.0;
    for (var i = thread; i < num_words; i += THREADS) {
      squares += dot(vector[i], vector[i]);
    }
    factor = inverseSqrt(sum_of_all(thread, squares) / f32(COLUMNS) + NORM_EPS);
  }
  workgroupBarrier();
  if (thread % THREADS_PER_ROW > 0 || row >= ROWS) {
    return;
  }
  var result = 0.0;
  for (var i = 0u; i < THREADS_PER_ROW; i++) {
    result += partial_products[thread + i];
  }
  result *= factor * matrix_scales[row];
  if (EPILOGUE == 1) {
    result += product[row];
  } else if (EPILOGUE == 2) {
    result = pow2(max(result, 0));
  } else if (EPILOGUE == 3 && SOFTCAP > 0) {
    result = SOFTCAP * tanh(clamp(result / SOFTCAP, -15, 15)); // beyond ±15 it is ±1, and some GPUs return NaN
  }
  product[row] = result;
}

// ---- heads: rotates and norms queries and keys, adds value embeddings, fills the KV cache. A workgroup per query head,
// then one per key head. ----

override HAS_VALUE_EMBEDS: bool = false;
override VALUE_GATE_CHANNELS: u32 = 12;
override VALUE_GATE_SCALE: f32 = 3;

@group(0) @binding(0) var<uniform> heads_step: Step;
@group(0) @binding(1) var<storage, read_write> heads_qkv: array<f32>; // queries, keys, values of the token
@group(0) @binding(2) var<storage> rotary: array<vec2f>; // cos and sin, HEAD_SIZE / 2 per position
@group(0) @binding(3) var<storage> heads_x: array<f32>; // the residual stream, for the gate of the value embeddings
@group(0) @binding(4) var<storage> value_gate: array<f32>;
@group(0) @binding(5) var<storage> value_table: array<u32>;
@group(0) @binding(6) var<storage> value_scales: array<f32>;
@group(0) @binding(7) var<storage, read_write> new_keys: array<f32>;
@group(0) @binding(8) var<storage, read_write> new_values: array<f32>;

@compute @workgroup_size(THREADS)
fn heads(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let kv_width = NUM_KV_HEADS * HEAD_SIZE;
  let start = group.x * HEAD_SIZE;
  let half = HEAD_SIZE / 2;
  var squares = 0.0; // rotation does not change their sum
  for (var i = thread; i < HEAD_SIZE; i += THREADS) {
    squares += pow2(heads_qkv[start + i]);
  }
  let factor = QK_GAIN * inverseSqrt(sum_of_all(thread, squares) / f32(HEAD_SIZE) + NORM_EPS);
  for (var j = thread; j < half; j += THREADS) {
    let turn = rotary[heads_step.position * half + j];
    let first = factor * heads_qkv[start + j];
    let second = factor * heads_qkv[start + half + j];
    let rotated = vec2f(first * turn.x + second * turn.y, second * turn.x - first * turn.y);
    if (group.x < NUM_HEADS) {
      heads_qkv[start + j] = rotated.x;
      heads_qkv[start + half + j] = rotated.y;
    } else {
      let slot = heads_step.position * kv_width + start - CHANNELS;
      new_keys[slot + j] = rotated.x;
      new_keys[slot + half + j] = rotated.y;
    }
  }
  if (group.x < NUM_HEADS) {
    return;
  }

  let head = group.x - NUM_HEADS;
  var gate = 0.0;
  if (HAS_VALUE_EMBEDS) {
    squares = 0.0;
    for (var i = thread; i < CHANNELS; i += THREADS) {
      squares += pow2(heads_x[i]);
    }
    let x_factor = inverseSqrt(sum_of_all(thread, squares) / f32(CHANNELS) + NORM_EPS);
    for (var i = 0u; i < VALUE_GATE_CHANNELS; i++) {
      gate += value_gate[head * VALUE_GATE_CHANNELS + i] * x_factor * heads_x[i];
    }
    gate = VALUE_GATE_SCALE * sigmoid(gate) * value_scales[heads_step.token];
  }
  for (var i = head * HEAD_SIZE + thread; i < (head + 1) * HEAD_SIZE; i += THREADS) {
    let entry = heads_step.token * kv_width + i;
    var value = heads_qkv[CHANNELS + kv_width + i];
    if (HAS_VALUE_EMBEDS) {
      value += gate * byte_of(value_table[entry / 4], entry % 4);
    }
    new_values[heads_step.position * kv_width + i] = value;
  }
}

// ---- attend: a workgroup per query head reads the keys of the window in tiles of one key per thread, with the running
// maximum and sum of FlashAttention (arXiv 2205.14135) ----

override WINDOW: u32 = 0;

@group(0) @binding(0) var<uniform> attend_step: Step;
@group(0) @binding(1) var<storage> queries: array<f32>;
@group(0) @binding(2) var<storage> keys: array<f32>;
@group(0) @binding(3) var<storage> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> attended: array<f32>;

var<workgroup> weights: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn attend(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let kv_width = NUM_KV_HEADS * HEAD_SIZE;
  let query_start = group.x * HEAD_SIZE;
  let kv_start = group.x * NUM_KV_HEADS / NUM_HEADS * HEAD_SIZE; // heads share keys in groups
  let position = attend_step.position;
  let first = position - min(position, WINDOW);
  var sums: array<f32, MAX_HEAD_SIZE / THREADS>; // channels thread, thread + THREADS, …
  var largest = -3e38;
  var total = 0.0;
  for (var tile = first; tile <= position; tile += THREADS) {
    let num_keys = min(THREADS, position + 1 - tile);
    var score = -3e38;
    if (thread < num_keys) {
      score = 0.0;
      for (var d = 0u; d < HEAD_SIZE; d++) {
        score += queries[query_start + d] * keys[(tile + thread) * kv_width + kv_start + d];
      }
      score *= inverseSqrt(f32(HEAD_SIZE));
    }
    weights[thread] = score;
    workgroupBarrier();
    var new_largest = largest;
    for (var i = 0u; i < num_keys; i++) {
      new_largest = max(new_largest, weights[i]);
    }
    workgroupBarrier();
    weights[thread] = exp(score - new_largest);
    workgroupBarrier();
    let shrink = exp(largest - new_largest);
    largest = new_largest;
    total *= shrink;
    for (var i = 0u; i < num_keys; i++) {
      total += weights[i];
    }
    for (var part = 0u; part * THREADS + thread < HEAD_SIZE; part++) {
      let d = part * THREADS + thread;
      var sum = shrink * sums[part];
      for (var i = 0u; i < num_keys; i++) {
        sum += weights[i] * values[(tile + i) * kv_width + kv_start + d];
      }
      sums[part] = sum;
    }
    workgroupBarrier();
  }
  for (var part = 0u; part * THREADS + thread < HEAD_SIZE; part++) {
    attended[query_start + part * THREADS + thread] = sums[part] / total;
  }
}
