// The model on a GPU: kernels.wgsl, launched one token at a time. Weights and KV cache stay on the GPU; what comes back are
// the logits.

const MAX_HEAD_SIZE = 256; // of the kernels
const ROWS_PER_GROUP = 4; // of the kernel `multiply`
const THREADS = 64;
const EPILOGUES = { store: 0, add: 1, squaredRelu: 2, softcap: 3 };
const MAX_STEPS_AHEAD = 32; // tokens of a prompt that are queued on the GPU, so that stopping takes effect soon

class WebGPUBackend {
  /** Throws an Error that says why there is no usable GPU. */
  static async create(config, tensors, kernels, allowSoftware) {
    if (!navigator.gpu) throw new Error('this browser has no WebGPU');
    const adapter = await navigator.gpu.requestAdapter({ powerPreference: 'high-performance' });
    if (!adapter) throw new Error('WebGPU finds no GPU');
    if (adapter.info.isFallbackAdapter && !allowSoftware) throw new Error('WebGPU has a software adapter only');
    if (config.headSize > MAX_HEAD_SIZE) throw new Error(`heads of ${config.headSize} channels`);
    const { maxBufferSize, maxStorageBufferBindingSize } = adapter.limits;
    const device = await adapter.requestDevice({ requiredLimits: { maxBufferSize, maxStorageBufferBindingSize } });
    const backend = new WebGPUBackend(device, config, tensors);
    device.pushErrorScope('out-of-memory');
    device.pushErrorScope('validation');
    await backend.build(kernels);
    for (const error of [await device.popErrorScope(), await device.popErrorScope()]) {
      if (error) throw new Error(error.message);
    }
    const { vendor, architecture } = adapter.info;
    backend.name = ['WebGPU', vendor, architecture].filter(Boolean).join(' ');
    return backend;
  }

  constructor(device, config, tensors) {
    Object.assign(this, { device, config, tensors });
    this.commands = []; // the kernels of a step up to the last layer: {pipeline, bindings, numGroups}
    this.headCommands = []; // those of the logits
    this.pipelines = new Map(); // kernel and constants → pipeline
    this.numStepsAhead = 0;
    this.lost = null;
    device.lost.then(({ message }) => this.lost = new Error(message || 'the GPU was lost'));
  }

  // ---- buffers ----

  buffer(numFloats, usage = GPUBufferUsage.STORAGE) {
    const flags = usage | GPUBufferUsage.COPY_DST | GPUBufferUsage.COPY_SRC;
    return this.device.createBuffer({ size: Math.max(16, numFloats * 4), usage: flags });
  }

  /** A buffer with these bytes; several arrays are joined. Lengths are multiples of 4 bytes. */
  upload(...arrays) {
    const numBytes = arrays.reduce((sum, array) => sum + array.byteLength, 0);
    const buffer = this.buffer(numBytes / 4);
    let offset = 0;
    for (const array of arrays) {
      this.device.queue.writeBuffer(buffer, offset, array);
      offset += array.byteLength;
    }
    return buffer;
  }

  /** Uploads matrices with the same number of columns as one, their rows below each other. */
  matrix(...matrices) {
    return {
      rows: matrices.reduce((sum, { rows }) => sum + rows, 0),
      columns: matrices[0].columns,
      values: this.upload(...matrices.map(({ values }) => values)),
      scales: this.upload(...matrices.map(({ scales }) => scales)),
    };
  }

  // ---- the commands of a step ----

  async build(code) {
    const { config, device, tensors } = this;
    const { channels, kvWidth, context, vocabSize, hiddenSize } = config;
    this.module = device.createShaderModule({ code });
    this.stepBuffer = this.buffer(4, GPUBufferUsage.UNIFORM);
    this.rotary = this.upload(rotaryTable(config));
    this.empty = this.buffer(4); // bound in place of what a model does not have
    this.x = this.buffer(channels);
    this.x0 = this.buffer(channels);
    this.middle = this.buffer(channels);
    this.qkv = this.buffer(channels + 2 * kvWidth);
    this.attended = this.buffer(channels);
    this.hidden = this.buffer(hiddenSize);
    this.logits = this.buffer(vocabSize);
    this.readback = device.createBuffer({
      size: vocabSize * 4, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST,
    });
    await this.addEmbedding();
    for (let layer = 0; layer < config.numLayers; layer++) {
      const cache = [this.buffer(context * kvWidth), this.buffer(context * kvWidth)]; // keys, values
      await this.addLayer(layer, cache);
      if (layer === config.middleLayer && tensors.backout_lambda) await this.addMix(this.middle, 0, this.x, 1);
    }
    if (tensors.backout_lambda) {
      await this.addMix(this.x, 1, this.middle, -tensors.backout_lambda[0], this.headCommands);
    }
    const head = this.matrix(tensors['lm_head.weight']);
    const options = { HAS_NORM: 1, EPILOGUE: EPILOGUES.softcap, SOFTCAP: config.softcap };
    await this.addProduct(head, this.x, this.logits, options, this.headCommands);
  }

  /** Adds the launch of a kernel. `options` are its own constants. */
  async add(entryPoint, buffers, numGroups, options = {}, commands = this.commands) {
    const pipeline = await this.pipeline(entryPoint, options);
    const entries = buffers.map((buffer, binding) => ({ binding, resource: { buffer } }));
    const bindings = this.device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries });
    commands.push({ pipeline, bindings, numGroups });
  }

  /** The kernel, compiled for these constants; layers share it. */
  async pipeline(entryPoint, options) {
    const key = entryPoint + JSON.stringify(options);
    if (!this.pipelines.has(key)) {
      const { module, config } = this;
      const constants = {
        CHANNELS: config.channels,
        HEAD_SIZE: config.headSize,
        NUM_HEADS: config.numHeads,
        NUM_KV_HEADS: config.kvWidth / config.headSize,
        NORM_EPS,
        QK_GAIN: config.qkGain,
        VALUE_GATE_SCALE: config.valueGateScale,
        ...options,
      };
      const compute = { module, entryPoint, constants };
      this.pipelines.set(key, await this.device.createComputePipelineAsync({ layout: 'auto', compute }));
    }
    return this.pipelines.get(key);
  }

  async addEmbedding() {
    const { tensors, empty } = this;
    const table = this.matrix(tensors['transformer.wte.weight']);
    const weights = tensors['smear_gate.weight'];
    const gate = weights ? this.upload(weights, tensors.smear_lambda) : empty;
    const options = weights ? { HAS_SMEAR: 1, SMEAR_CHANNELS: weights.length } : {};
    await this.add('embed', [this.stepBuffer, table.values, table.scales, gate, this.x, this.x0], 1, options);
  }

  async addMix(x, a, y, b, commands = this.commands) {
    const numGroups = Math.ceil(this.config.channels / THREADS);
    await this.add('mix_vectors', [this.upload(Float32Array.of(a, b)), x, y], numGroups, {}, commands);
  }

  async addProduct({ rows, columns, values, scales }, input, output, options, commands = this.commands) {
    const sizes = { ROWS: rows, COLUMNS: columns };
    const numGroups = Math.ceil(rows / ROWS_PER_GROUP);
    await this.add('multiply', [values, scales, input, output], numGroups, { ...sizes, ...options }, commands);
  }

  async addLayer(layer, cache) {
    const { config, tensors, x, x0, qkv, attended, hidden } = this;
    const tensor = name => layerTensor(tensors, layer, name);
    if (tensors.resid_lambdas) await this.addMix(x, tensors.resid_lambdas[layer], x0, tensors.x0_lambdas[layer]);
    const inputs = this.matrix(tensor('attn.c_q'), tensor('attn.c_k'), tensor('attn.c_v'));
    await this.addProduct(inputs, x, qkv, { HAS_NORM: 1 });
    await this.addHeads(layer, cache);
    const window = { WINDOW: config.windows[layer] };
    await this.add('attend', [this.stepBuffer, qkv, ...cache, attended], config.numHeads, window);
    await this.addProduct(this.matrix(tensor('attn.c_proj')), attended, x, { EPILOGUE: EPILOGUES.add });
    const activation = { HAS_NORM: 1, EPILOGUE: EPILOGUES.squaredRelu };
    await this.addProduct(this.matrix(tensor('mlp.c_fc')), x, hidden, activation);
    await this.addProduct(this.matrix(tensor('mlp.c_proj')), hidden, x, { EPILOGUE: EPILOGUES.add });
  }

  async addHeads(layer, cache) {
    const { config, tensors, empty } = this;
    const numKvHeads = config.kvWidth / config.headSize;
    const embeddings = tensors[`value_embeds.${layer}.weight`];
    let valueBuffers = [empty, empty, empty];
    let options = {};
    if (embeddings) {
      const gate = layerTensor(tensors, layer, 'attn.ve_gate');
      const { values, scales } = this.matrix(embeddings);
      valueBuffers = [this.upload(gate), values, scales];
      options = { HAS_VALUE_EMBEDS: 1, VALUE_GATE_CHANNELS: gate.length / numKvHeads };
    }
    const buffers = [this.stepBuffer, this.qkv, this.rotary, this.x, ...valueBuffers, ...cache];
    await this.add('heads', buffers, config.numHeads + numKvHeads, options);
  }

  // ---- a step ----

  /** As in JavaScriptBackend. Without logits, it returns before the GPU has finished. */
  async step(token, previous, position, wantsLogits) {
    if (this.lost) throw this.lost;
    const { device, readback, logits } = this;
    const hasPrevious = previous >= 0 ? 1 : 0;
    device.queue.writeBuffer(this.stepBuffer, 0, Uint32Array.of(token, hasPrevious ? previous : 0, hasPrevious, position));
    const encoder = device.createCommandEncoder();
    this.launch(encoder, wantsLogits ? [...this.commands, ...this.headCommands] : this.commands);
    if (wantsLogits) encoder.copyBufferToBuffer(logits, 0, readback, 0, readback.size);
    device.queue.submit([encoder.finish()]);
    if (!wantsLogits) {
      if (++this.numStepsAhead % MAX_STEPS_AHEAD === 0) await device.queue.onSubmittedWorkDone();
      return null;
    }
    await readback.mapAsync(GPUMapMode.READ);
    const result = new Float32Array(readback.getMappedRange()).slice();
    readback.unmap();
    return result;
  }

  launch(encoder, commands) {
    const pass = encoder.beginComputePass();
    for (const { pipeline, bindings, numGroups } of commands) {
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, bindings);
      pass.dispatchWorkgroups(numGroups);
    }
    pass.end();
  }
}
