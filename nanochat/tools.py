"""
Tool use during generation: a calculator, and the state machine that calls it when a model writes an expression.

    >>> calculate("1,200 * 3 / 4")
    '900'
    >>> calculate("'strawberry'.count('r')")
    '3'
    >>> calculate("2 ** 100") is None  # powers are not supported
    True
"""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal, Inexact
from fractions import Fraction

from nanochat.tokenizer import Tokenizer

# Bounds on what one expression may cost; heuristic, not tuned: far above what a person would write.
MAX_LENGTH = 300  # characters of an expression
MAX_DEPTH = 100  # nested operations
MAX_VALUE = 10**30  # absolute value of every intermediate result
MIN_VALUE = Fraction(1, MAX_VALUE)  # absolute value of a result that is not zero

EXACT_DIGITS = 30  # significant digits up to which a result is shown exactly
ROUNDED_DIGITS = 12  # significant digits of all other results, such as 1/3

OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

# A string literal, which must stay as it is, or a number with thousands separators.
STRING_OR_NUMBER = re.compile(r"""'[^']*'|"[^"]*"|(?<![\w.,])\d{1,3}(?:,\d{3})+(?!\w)""")

# Rejected: Python's other notations for numbers (0x10, 1_000, 1e5, 1.e5, 2j), and a word right after a number, for
# which Python's parser prints a warning.
PYTHON_NUMBER = re.compile(r"\d\.?[A-Za-z_]")


def calculate(expression: str) -> str | None:
    """
    Evaluate an arithmetic expression or 'text'.count('part') and return the result as text, None for anything else.

    The arithmetic is exact: numbers are fractions, not floats. A result whose decimal expansion ends within 30
    significant digits is shown exactly, integers without a decimal point. All others are rounded to 12 significant
    digits, or to two decimal places where the integer part is long.

    >>> calculate("48/2"), calculate("0.07*100"), calculate("9999999999999/3")
    ('24', '7', '3333333333333')
    >>> calculate("1/8"), calculate("1/3"), calculate("10000000000000/3")
    ('0.125', '0.333333333333', '3333333333333.33')

    The expression comes from a model: it is parsed and never executed, and its length, depth and values are bounded.
    """
    if len(expression) > MAX_LENGTH or "\\" in expression:  # without escapes, a string ends at its next quote
        return None
    if PYTHON_NUMBER.search(STRING_OR_NUMBER.sub("", expression)):
        return None
    source = STRING_OR_NUMBER.sub(_remove_separators, expression.strip())
    try:
        tree = ast.parse(source, mode="eval")
        value = _evaluate(tree.body, source, MAX_DEPTH)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):  # the last two: from the parser
        return None
    if value and abs(value) < MIN_VALUE:
        return None
    return format_number(value)


def _remove_separators(match: re.Match[str]) -> str:
    is_number = match[0][0].isdigit()
    return match[0].replace(",", "") if is_number else match[0]


def _evaluate(node: ast.expr, source: str, depth: int) -> Fraction:
    """Evaluate a syntax tree; ValueError for a node that is not in the whitelist or a value out of bounds."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=number) if type(number) in (int, float):  # not bool, which is an int too
            value = Fraction(ast.get_source_segment(source, node) or "")  # the float itself would be rounded
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = _evaluate(operand, source, depth - 1)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_evaluate(operand, source, depth - 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            operate = OPERATORS[type(op)]
            value = Fraction(operate(_evaluate(left, source, depth - 1), _evaluate(right, source, depth - 1)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = Fraction(text.count(part))
        case _:
            raise ValueError("not arithmetic")
    if abs(value) > MAX_VALUE:
        raise ValueError("too large")
    return value


def format_number(value: Fraction) -> str:
    """
    Writes a number in decimal notation, exactly if EXACT_DIGITS significant digits suffice, else rounded.

    >>> format_number(Fraction(24)), format_number(Fraction(5, 2)), format_number(Fraction(22, 7))
    ('24', '2.5', '3.14285714286')
    """
    numerator, denominator = Decimal(value.numerator), Decimal(value.denominator)
    try:
        decimal = Context(prec=EXACT_DIGITS, traps=[Inexact]).divide(numerator, denominator)
    except Inexact:
        num_integer_digits = len(str(abs(int(value))))
        digits = max(ROUNDED_DIGITS, num_integer_digits + 2)
        decimal = Context(prec=digits).divide(numerator, denominator)
    text = f"{decimal:f}"  # without an exponent
    return text.rstrip("0").rstrip(".") if "." in text else text


class ToolUse:
    """
    Follows one completion token by token and runs the calculator when the model calls it.

    The tokens sampled between python_start and python_end are the expression. The result is forced into the completion
    between output_start and output_end. Each completion has its own instance.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.expression: list[int] | None = None  # tokens since python_start; None outside a call

    def observe(self, token: int) -> list[int]:
        """
        Takes the next sampled token and returns the tokens to force after it: an empty list, or after python_end the
        result between its markers. Forced tokens may be observed too; they change nothing.
        """
        special = self.tokenizer.special
        if token == special("<|python_start|>"):
            self.expression = []
        elif self.expression is not None and token == special("<|python_end|>"):
            result = calculate(self.tokenizer.decode(self.expression))
            self.expression = None
            if result is not None:
                return [special("<|output_start|>"), *self.tokenizer.encode(result), special("<|output_end|>")]
        elif self.expression is not None:
            self.expression.append(token)
        return []
