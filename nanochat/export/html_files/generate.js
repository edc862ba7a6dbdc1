// Generation: reads a prompt, samples tokens, runs the calculator. What Engine in nanochat/engine.py and ActiveRequest in
// nanochat/request.py do for many requests, for one at a time.

const PAUSE_INTERVAL = 12; // ms of work before the browser may handle events and paint

/** Lets the browser handle events and paint. setTimeout would wait for at least 4 ms. */
function pause() {
  return new Promise(resolve => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

class Generator {
  constructor(backend, tokenizer, config) {
    Object.assign(this, { backend, tokenizer, config });
    this.tokens = []; // whose keys and values are in the cache
    this.stopTokens = [tokenizer.special('<|assistant_end|>'), tokenizer.special('<|bos|>')];
    this.pauseTime = 0;
  }

  /** Reads a token after those in the cache. */
  async read(token, wantsLogits) {
    const position = this.tokens.length;
    const previous = position ? this.tokens[position - 1] : -1;
    const logits = await this.backend.step(token, previous, position, wantsLogits);
    this.tokens.push(token);
    if (performance.now() > this.pauseTime) {
      await pause();
      this.pauseTime = performance.now() + PAUSE_INTERVAL;
    }
    return logits;
  }

  /**
   * Yields the tokens of a completion and returns why it ended: "stop", "length" or "context". Only the part of the
   * prompt that differs from the tokens in the cache is read.
   */
  async *generate(prompt, { temperature, topK, maxTokens, signal }) {
    const room = this.config.context + 1 - prompt.length; // + 1: the last token is never read
    const limit = Math.min(maxTokens, room);
    const toolUse = new ToolUse(this.tokenizer);
    const forced = [];
    let numShared = 0;
    while (numShared < prompt.length - 1 && this.tokens[numShared] === prompt[numShared]) numShared++;
    this.tokens.length = numShared;
    for (let i = numShared; i < prompt.length - 1; i++) {
      signal?.throwIfAborted();
      await this.read(prompt[i], false);
    }
    let token = prompt.at(-1);
    for (let count = 1; ; count++) {
      signal?.throwIfAborted();
      const isForced = forced.length > 0;
      const logits = await this.read(token, !isForced);
      token = isForced ? forced.shift() : sample(logits, temperature, topK);
      if (!isForced && this.stopTokens.includes(token)) return 'stop';
      if (!isForced) forced.push(...toolUse.observe(token));
      yield token;
      if (count >= limit) return room < maxTokens ? 'context' : 'length';
    }
  }
}

/** The most likely token for temperature 0, otherwise one of the topK most likely (0 = all) by their probabilities. */
function sample(logits, temperature, topK) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  if (temperature === 0) return logits.indexOf(largest);
  const isLimited = topK > 0 && topK < logits.length;
  const smallest = isLimited ? logits.slice().sort().at(-topK) : -Infinity;
  const weights = Float64Array.from(logits, logit =>
    logit < smallest ? 0 : Math.exp((logit - largest) / temperature));
  let rest = Math.random() * weights.reduce((a, b) => a + b);
  const token = weights.findIndex(weight => (rest -= weight) < 0);
  return token < 0 ? logits.indexOf(largest) : token; // < 0: rounding
}
