// The tokenizer: text to token ids and back, as in nanochat/tokenizer.py.

/** A byte string has one character per byte, U+0000 to U+00FF. */
function toByteString(text) {
  let bytes = '';
  for (const byte of new TextEncoder().encode(text)) bytes += String.fromCharCode(byte);
  return bytes;
}

const fromByteString = bytes => Uint8Array.from(bytes, character => character.charCodeAt(0));

/** A decoder that replaces invalid bytes by U+FFFD, as Python's with errors="replace". */
const utf8Decoder = () => new TextDecoder('utf-8', { ignoreBOM: true });

class Tokenizer {
  /** pattern: the split pattern for a RegExp; tokens: each token's bytes in base64, by id; specialTokens: their names */
  constructor({ pattern, tokens, specialTokens }) {
    this.pattern = new RegExp(pattern, 'gu');
    this.tokens = tokens.map(token => atob(token)); // id → byte string
    this.ranks = new Map(this.tokens.map((token, id) => [token, id]));
    this.specialIds = new Map(specialTokens.map((name, i) => [name, tokens.length + i]));
    this.specialNames = specialTokens;
  }

  special(name) {
    return this.specialIds.get(name);
  }

  isSpecial(id) {
    return id >= this.tokens.length;
  }

  /** The token ids of a text, never a special token. */
  encode(text) {
    const ids = [];
    for (const [piece] of text.matchAll(this.pattern)) {
      for (const part of this.mergePairs(toByteString(piece))) ids.push(this.ranks.get(part));
    }
    return ids;
  }

  /** Joins the pair of neighbours whose union has the lowest id, the first of equals, until there is none. */
  mergePairs(piece) {
    if (this.ranks.has(piece)) return [piece];
    const parts = [...piece];
    const rankAt = i => this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
    const ranks = parts.map((_, i) => i + 1 < parts.length ? rankAt(i) : Infinity);
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) {
        if (ranks[i] < ranks[best]) best = i;
      }
      if (ranks[best] === Infinity) return parts;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best + 1, 1);
      for (const i of [best - 1, best]) {
        if (i >= 0) ranks[i] = i + 1 < parts.length ? rankAt(i) : Infinity;
      }
    }
  }

  /** The bytes of a token; those of its name for a special token. */
  bytes(id) {
    return fromByteString(this.isSpecial(id) ? this.specialNames[id - this.tokens.length] : this.tokens[id]);
  }

  /** The text of token ids. Special tokens appear by name. */
  decode(ids) {
    const decoder = utf8Decoder();
    return ids.map(id => decoder.decode(this.bytes(id), { stream: true })).join('') + decoder.decode();
  }
}
