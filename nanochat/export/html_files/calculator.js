// The calculator: arithmetic expressions and 'text'.count('part') of Python's syntax, with the same results and limits as
// calculate() in nanochat/tools.py. Numbers are exact fractions of BigInts.

const MAX_LENGTH = 300; // characters of an expression
const MAX_DEPTH = 100; // nested operations
const MAX_VALUE = 10n ** 30n; // absolute value of every intermediate result
const EXACT_DIGITS = 30; // significant digits up to which a result is shown exactly
const ROUNDED_DIGITS = 12; // significant digits of all other results, such as 1/3

const STRING_OR_NUMBER = /'[^']*'|"[^"]*"|(?<![\w.,])\d{1,3}(?:,\d{3})+(?!\w)/g;
const PYTHON_NUMBER = /\p{Nd}\.?[A-Za-z_]/u; // 0x10, 1_000, 1e5, 2j
// What Python's str.strip() removes: its white space differs from that of JavaScript.
const PYTHON_SPACE = '[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+';
const OUTER_SPACE = new RegExp(`^${PYTHON_SPACE}|${PYTHON_SPACE}$`, 'g');
// The tokens of Python that may occur. Strings in triple quotes come first; a prefix of r or u changes nothing here.
const PYTHON_TOKEN = new RegExp([
  /(?<space>[ \t\f]+|#[^\n]*)/,
  /(?<newline>\n)/,
  /[rRuU]?(?:'''(?<single3>[^]*?)'''|"""(?<double3>[^]*?)"""|'(?<single>[^'\n]*)'|"(?<double>[^"\n]*)")/,
  /(?<number>\d+\.?\d*|\.\d+)/,
  /(?<name>count)(?![\p{ID_Continue}])/,
  /(?<symbol>\/\/|[-+*/%().,])/,
].map(part => part.source).join('|'), 'uy');

/** The result of an expression as text; null for anything else. */
function calculate(expression) {
  if ([...expression].length > MAX_LENGTH || /[\\\0]/.test(expression)) return null;
  if (PYTHON_NUMBER.test(expression.replace(STRING_OR_NUMBER, ''))) return null;
  const withoutSeparators = match => /^\d/.test(match) ? match.replaceAll(',', '') : match;
  const source = expression.replace(OUTER_SPACE, '').replace(STRING_OR_NUMBER, withoutSeparators);
  try {
    const value = evaluate(new ExpressionParser(source).parse(), MAX_DEPTH);
    const isTooSmall = value.top !== 0n && absolute(value.top) * MAX_VALUE < value.bottom;
    return isTooSmall ? null : formatNumber(value);
  } catch (error) {
    if (error instanceof NotArithmetic) return null;
    throw error;
  }
}

/** The expression is not arithmetic, or one of its values is out of bounds. */
class NotArithmetic extends Error {}

function require(condition) {
  if (!condition) throw new NotArithmetic();
}

/** Splits Python source into [{kind, text}, …]. The expression ends with its line, outside parentheses. */
function pythonTokens(source) {
  const tokens = [];
  const text = source.replace(/\r\n?/g, '\n');
  let depth = 0; // of parentheses
  let hasEnded = false;
  let isIndented = false; // an error for the first token
  PYTHON_TOKEN.lastIndex = 0;
  while (PYTHON_TOKEN.lastIndex < text.length) {
    const groups = PYTHON_TOKEN.exec(text)?.groups;
    require(groups);
    const { space, newline, number, name, symbol } = groups;
    if (space !== undefined || newline !== undefined) {
      isIndented = tokens.length === 0 && /^[ \t]/.test(space);
      hasEnded ||= newline !== undefined && depth === 0 && tokens.length > 0;
      continue;
    }
    require(!hasEnded && !isIndented);
    if (number !== undefined) tokens.push({ kind: 'number', text: number });
    else if (name !== undefined) tokens.push({ kind: 'name', text: name });
    else if (symbol !== undefined) tokens.push({ kind: 'symbol', text: symbol });
    else {
      const { single3, double3, single, double } = groups;
      tokens.push({ kind: 'string', text: single3 ?? double3 ?? single ?? double });
    }
    depth += (symbol === '(') - (symbol === ')');
  }
  return tokens;
}

/** A recursive descent parser of the part of Python's grammar that calculate() accepts. */
class ExpressionParser {
  constructor(source) {
    this.tokens = pythonTokens(source);
    this.next = 0;
  }

  parse() {
    const tree = this.sum();
    require(this.next === this.tokens.length);
    return tree;
  }

  /** Whether the next token is this symbol, which is then consumed. */
  accept(...symbols) {
    const token = this.tokens[this.next];
    if (token?.kind !== 'symbol' || !symbols.includes(token.text)) return null;
    this.next++;
    return token.text;
  }

  sum() {
    return this.binary(['+', '-'], () => this.product());
  }

  product() {
    return this.binary(['*', '//', '/', '%'], () => this.factor());
  }

  binary(operators, operand) {
    let left = operand();
    for (let operator; (operator = this.accept(...operators));) left = { operator, left, right: operand() };
    return left;
  }

  factor() {
    const sign = this.accept('+', '-');
    return sign ? { sign, operand: this.factor() } : this.primary();
  }

  primary() {
    const atom = this.atom();
    if (!this.accept('.')) return atom;
    const method = this.tokens[this.next++];
    require(atom.string !== undefined && method?.kind === 'name' && this.accept('('));
    const part = this.sum();
    this.accept(',');
    require(part.string !== undefined && this.accept(')'));
    return { count: part.string, text: atom.string };
  }

  atom() {
    if (this.accept('(')) {
      const inner = this.sum();
      require(this.accept(')'));
      return inner;
    }
    const token = this.tokens[this.next++];
    if (token?.kind === 'number') {
      require(token.text.includes('.') || !/^0+[1-9]/.test(token.text)); // 012 is an error in Python
      return { number: token.text };
    }
    require(token?.kind === 'string');
    let string = token.text;
    while (this.tokens[this.next]?.kind === 'string') string += this.tokens[this.next++].text; // 'a' 'b' is 'ab'
    return { string };
  }
}

// ---- fractions: {top, bottom}, in lowest terms, bottom > 0 ----

const absolute = number => number < 0n ? -number : number;
const greatestDivisor = (a, b) => b ? greatestDivisor(b, a % b) : absolute(a);

function fraction(top, bottom) {
  require(bottom !== 0n);
  const divisor = greatestDivisor(top, bottom) * (bottom < 0n ? -1n : 1n);
  return { top: top / divisor, bottom: bottom / divisor };
}

function floorDivide(a, b) {
  const { top, bottom } = fraction(a.top * b.bottom, a.bottom * b.top);
  const isRoundedUp = top < 0n && top % bottom !== 0n; // BigInt division rounds towards 0
  return { top: top / bottom - (isRoundedUp ? 1n : 0n), bottom: 1n };
}

const OPERATORS = {
  '+': (a, b) => fraction(a.top * b.bottom + b.top * a.bottom, a.bottom * b.bottom),
  '-': (a, b) => fraction(a.top * b.bottom - b.top * a.bottom, a.bottom * b.bottom),
  '*': (a, b) => fraction(a.top * b.top, a.bottom * b.bottom),
  '/': (a, b) => fraction(a.top * b.bottom, a.bottom * b.top),
  '//': floorDivide,
  '%': (a, b) => OPERATORS['-'](a, OPERATORS['*'](b, floorDivide(a, b))),
};

function evaluate(node, depth) {
  require(depth > 0);
  const value = valueOf(node, depth - 1);
  require(absolute(value.top) <= MAX_VALUE * value.bottom);
  return value;
}

function valueOf(node, depth) {
  if (node.number !== undefined) {
    const [whole, decimals = ''] = node.number.split('.');
    return fraction(BigInt(whole + decimals), 10n ** BigInt(decimals.length));
  }
  if (node.sign) {
    const { top, bottom } = evaluate(node.operand, depth);
    return { top: node.sign === '-' ? -top : top, bottom };
  }
  if (node.operator) return OPERATORS[node.operator](evaluate(node.left, depth), evaluate(node.right, depth));
  require(node.count !== undefined);
  const isEmpty = node.count === '';
  const count = isEmpty ? [...node.text].length + 1 : node.text.split(node.count).length - 1;
  return { top: BigInt(count), bottom: 1n };
}

/** A fraction in decimal notation: exactly if 30 significant digits suffice, otherwise rounded half to even. */
function formatNumber({ top, bottom }) {
  const size = absolute(top);
  const sign = top < 0n ? '-' : '';
  const numIntegerDigits = String(size / bottom).length;
  const exact = decimalDigits(size, bottom, EXACT_DIGITS);
  const isExact = exact.scaled * bottom === size * 10n ** exact.decimals;
  const rounded = isExact ? exact : decimalDigits(size, bottom, Math.max(ROUNDED_DIGITS, numIntegerDigits + 2));
  const { scaled, decimals } = rounded;
  const digits = String(scaled).padStart(Number(decimals) + 1, '0');
  const point = digits.length - Number(decimals);
  const fractional = digits.slice(point).replace(/0+$/, '');
  return sign + digits.slice(0, point) + (fractional && '.' + fractional);
}

/** size / bottom ≈ scaled / 10^decimals, with this many significant digits, or more if its integer part has more. */
function decimalDigits(size, bottom, numDigits) {
  if (size === 0n) return { scaled: 0n, decimals: 0n };
  const smallest = bottom * 10n ** BigInt(numDigits - 1);
  let decimals = BigInt(Math.max(0, numDigits - String(size / bottom).length));
  while (size * 10n ** decimals < smallest) decimals++;
  const scaledTop = size * 10n ** decimals;
  const scaled = scaledTop / bottom;
  const twiceRest = 2n * (scaledTop % bottom);
  const isUp = twiceRest > bottom || twiceRest === bottom && scaled % 2n === 1n;
  return { scaled: isUp ? scaled + 1n : scaled, decimals };
}
