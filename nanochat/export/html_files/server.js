// The page of the web chat asks its server by fetch(). Here the page answers itself: the three paths below behave as those
// of nanochat/serve, and nothing is loaded from elsewhere.

const HEALTH_SECONDS = 4; // how long the first answer about the state may take; the page gives up after 5
const SELF_CHECK_TOKENS = 3;
const MAX_LOGIT_ERROR = .05; // of a GPU in the self-check; right ones differ from JavaScript by less than 0.001

const localModel = { status: 'loading' };
localModel.loaded = load().then(
  parts => Object.assign(localModel, parts, { status: 'ok' }),
  error => Object.assign(localModel, { status: 'failed', message: `The model cannot be loaded: ${error.message}.` }));

// ---- loading ----

async function load() {
  if (document.readyState === 'loading') { // the weights come after this script
    await new Promise(resolve => document.addEventListener('DOMContentLoaded', resolve, { once: true }));
  }
  const description = JSON.parse(document.getElementById('model').textContent);
  const tensors = await readTensors(description);
  const tokenizer = new Tokenizer(description.tokenizer);
  const fallback = new JavaScriptBackend(description.config, tensors);
  const { backend, reason } = await chooseBackend(description, tensors, fallback);
  const parts = { description, tokenizer, fallback, reason };
  parts.generator = new Generator(backend, tokenizer, description.config);
  describe(parts);
  return parts;
}

/** A GPU if there is one and it computes the right numbers; `?backend=` in the address says which instead. */
async function chooseBackend(description, tensors, fallback) {
  const wanted = new URLSearchParams(location.search).get('backend');
  if (wanted === 'javascript') return { backend: fallback, reason: 'as the address says' };
  try {
    const kernels = document.getElementById('kernels').textContent;
    const backend = await WebGPUBackend.create(description.config, tensors, kernels, wanted === 'webgpu');
    await selfCheck(backend, fallback);
    return { backend, reason: '' };
  } catch (error) {
    return { backend: fallback, reason: error.message };
  }
}

/** Compares the logits after a few tokens. Throws an Error if they differ. */
async function selfCheck(backend, fallback) {
  for (let token = 0; token < SELF_CHECK_TOKENS; token++) {
    const logits = await backend.step(token, token - 1, token, true);
    const expected = await fallback.step(token, token - 1, token, true);
    const isClose = logits.every((logit, i) => Math.abs(logit - expected[i]) < MAX_LOGIT_ERROR);
    if (!isClose) throw new Error('the GPU computes other numbers');
  }
}

/** Shows which model the page runs, and how. The speed stands below each response. */
function describe({ description, generator, reason }) {
  const { name, numParameters, numBytes } = description;
  const size = `${numParameters} parameters in 8 bits (${(numBytes / 1e6).toFixed(1)} MB)`;
  const hint = document.getElementById('hint');
  document.querySelector('#welcome p').textContent =
    'A small language model that runs in this page, without a server. It makes many mistakes.';
  hint.textContent = `${name}: ${size} · ${generator.backend.name}`;
  hint.title = reason && `No GPU: ${reason}`;
}

// ---- responses ----

let lastTurn = Promise.resolve(); // the conversations share one KV cache: a response waits for the one before

/** Yields the events of a response, as the server's native_events(). */
async function* respond({ messages, temperature, top_k: topK, max_tokens: maxTokens }, signal) {
  const { generator, tokenizer, description } = localModel;
  const fitted = renderToFit(messages, tokenizer, description.config.context, maxTokens);
  if (!fitted) {
    yield { error: 'The message is too long for this model: shorten it.' };
    return;
  }
  const { prompt, dropped } = fitted;
  const reader = new PartReader(tokenizer);
  const completion = generator.generate(prompt, { temperature, topK, maxTokens, signal });
  let numTokens = 0;
  for (;;) {
    const { done, value } = await completion.next();
    if (done) {
      yield { done: true, finish_reason: value, tokens: numTokens, prompt_tokens: prompt.length, dropped };
      return;
    }
    numTokens++;
    const token = reader.read(value);
    if (token) yield reader.kind === 'text' ? { token } : { token, part: reader.kind };
  }
}

/** As respond(), when its turn has come; if the GPU fails, the next response is computed without it. */
async function* respondInTurn(body, signal) {
  const turn = lastTurn;
  let endTurn;
  lastTurn = new Promise(resolve => endTurn = resolve);
  try {
    await localModel.loaded;
    await turn;
    signal?.throwIfAborted();
    if (localModel.status === 'failed') yield { error: localModel.message };
    else yield* respond(body, signal);
  } catch (error) {
    const { generator, fallback } = localModel;
    if (error.name === 'AbortError' || generator?.backend === fallback) throw error;
    localModel.generator = new Generator(fallback, localModel.tokenizer, localModel.description.config);
    localModel.reason = error.message;
    describe(localModel);
    yield { error: `The GPU has failed (${error.message}). The page now computes without it: try again.` };
  } finally {
    endTurn();
  }
}

/** A response with server-sent events. Generation advances as they are read, and ends when the request is aborted. */
function eventStream(events, signal) {
  const encoder = new TextEncoder();
  const stream = new ReadableStream({
    start(controller) {
      signal?.addEventListener('abort', () => {
        controller.error(signal.reason);
        events.return();
      });
    },
    async pull(controller) {
      const { done, value } = await events.next();
      if (signal?.aborted) return;
      if (done) controller.close();
      else controller.enqueue(encoder.encode(`data: ${JSON.stringify(value)}\n\n`));
    },
  }, { highWaterMark: 0 });
  return new Response(stream);
}

const jsonResponse = value => new Response(JSON.stringify(value));

async function health() {
  await Promise.race([localModel.loaded, new Promise(resolve => setTimeout(resolve, HEALTH_SECONDS * 1000))]);
  return jsonResponse({ status: localModel.status, message: localModel.message });
}

globalThis.fetch = async (path, { body, signal } = {}) => {
  if (path === 'health') return health();
  if (path === 'v1/models') return jsonResponse({ data: [{ id: localModel.description.name }] });
  return eventStream(respondInTurn(JSON.parse(body), signal), signal);
};

globalThis.localModel = Object.assign(localModel, { calculate, renderToFit, sample }); // for the console, and for tests
