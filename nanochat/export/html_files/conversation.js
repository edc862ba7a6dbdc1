// Conversations to token ids and generated tokens to text, as in nanochat/conversation.py.

const PART_MARKERS = {
  python: ['<|python_start|>', '<|python_end|>'],
  python_output: ['<|output_start|>', '<|output_end|>'],
};

/** The token ids of messages {role, content}, where an assistant's content is a list of parts {type, text}. */
function renderMessages(messages, tokenizer) {
  const ids = [tokenizer.special('<|bos|>')];
  const add = (start, text, end) => {
    if (start) ids.push(tokenizer.special(start));
    for (const id of tokenizer.encode(text)) ids.push(id);
    if (end) ids.push(tokenizer.special(end));
  };
  for (const { role, content } of messages) {
    if (role === 'user') {
      add('<|user_start|>', content, '<|user_end|>');
      continue;
    }
    add('<|assistant_start|>', '');
    for (const { type, text } of content) {
      const [start, end] = PART_MARKERS[type] ?? [];
      add(start, text, end);
    }
    add('', '', '<|assistant_end|>');
  }
  return ids;
}

/**
 * The prompt for the next response, without the oldest exchanges, so that there is room for a response of maxTokens or of
 * half the context, whichever is less. Returns the ids and the number of messages left out; null if even the last message
 * is too long.
 */
function renderToFit(messages, tokenizer, context, maxTokens) {
  const room = context - Math.min(maxTokens, Math.floor(context / 2));
  for (let dropped = 0; dropped < messages.length; dropped += 2) {
    const prompt = renderMessages(messages.slice(dropped), tokenizer);
    prompt.push(tokenizer.special('<|assistant_start|>'));
    if (prompt.length <= room) return { prompt, dropped };
  }
  return null;
}

/** Converts generated tokens to text, token by token, and tracks the kind of part that the text belongs to. */
class PartReader {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.kinds = new Map(); // special token → the kind of part after it
    for (const [kind, [start, end]] of Object.entries(PART_MARKERS)) {
      this.kinds.set(tokenizer.special(start), kind).set(tokenizer.special(end), 'text');
    }
    this.startPart('text');
  }

  startPart(kind) {
    this.kind = kind;
    this.decoder = utf8Decoder(); // a character may span several tokens
  }

  /** The characters that this token completes, possibly none. */
  read(token) {
    if (this.kinds.has(token)) this.startPart(this.kinds.get(token));
    if (this.tokenizer.isSpecial(token)) return '';
    return this.decoder.decode(this.tokenizer.bytes(token), { stream: true });
  }
}

/** Follows one response token by token and runs the calculator when the model calls it. */
class ToolUse {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.expression = null; // tokens since <|python_start|>; null outside a call
  }

  /** Takes the next sampled token and returns the tokens to force after it. */
  observe(token) {
    const special = name => this.tokenizer.special(name);
    if (token === special('<|python_start|>')) {
      this.expression = [];
    } else if (this.expression && token === special('<|python_end|>')) {
      const result = calculate(this.tokenizer.decode(this.expression));
      this.expression = null;
      if (result !== null) {
        return [special('<|output_start|>'), ...this.tokenizer.encode(result), special('<|output_end|>')];
      }
    } else if (this.expression) {
      this.expression.push(token);
    }
    return [];
  }
}
