"""
Tool use: a calculator, and the state machine that runs it while a row is generated.

    calculate("1,200 * 3 / 4")              # '900'
    calculate("'strawberry'.count('r')")    # '3'
    calculate("2 ** 100")                   # None: what it does not know, it does not compute
"""

import ast
import operator
import re
from collections.abc import Callable

from nanochat.tokenizer import Tokenizer

# Arbitrary, far above what a person would type, far below what would keep the machine busy.
MAX_LENGTH = 300  # characters of an expression
MAX_DEPTH = 100  # nested operations
MAX_VALUE = 10**30  # of every intermediate result
FLOAT_DIGITS = 12  # significant digits shown: hides binary rounding, 0.07 * 100 is 7 and not 7.000000000000001

OPERATORS: dict[type, Callable[..., int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}

# A string literal, which must stay as it is, or a number with thousands separators.
STRING_OR_NUMBER = re.compile(r"""'[^']*'|"[^"]*"|(?<![\w.,])\d{1,3}(?:,\d{3})+(?!\w)""")


# Python's other numbers (0x10, 1_000, 1e5, 2j) and words stuck to a number, of which its parser would warn.
ODD_NUMBER = re.compile(r"\d[A-Za-z_]")


def calculate(expression: str) -> str | None:
    """
    The value of an arithmetic expression, or of 'text'.count('part'), as the training data writes it: 24, not 24.0.
    None for anything else. The text comes from a model, so it is parsed and never executed, and its cost is bounded.
    """
    if len(expression) > MAX_LENGTH or "\\" in expression:  # without escapes, quotes end where they seem to
        return None
    if ODD_NUMBER.search(STRING_OR_NUMBER.sub("", expression)):
        return None
    try:
        tree = ast.parse(STRING_OR_NUMBER.sub(_without_separators, expression.strip()), mode="eval")
        value = _evaluate(tree.body, MAX_DEPTH)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):  # the last two: from the parser
        return None
    if isinstance(value, float):
        value = float(f"{value:.{FLOAT_DIGITS}g}")
        return str(int(value)) if value.is_integer() else str(value)
    return str(value)


def _without_separators(match: re.Match[str]) -> str:
    return match[0].replace(",", "") if match[0][0].isdigit() else match[0]


def _evaluate(node: ast.expr, depth: int) -> int | float:
    """The number that the tree stands for; ValueError outside the whitelist or the bounds."""
    if depth == 0:
        raise ValueError("nested too deeply")
    value: int | float
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_evaluate(operand, depth - 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_evaluate(left, depth - 1), _evaluate(right, depth - 1))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = text.count(part)
        case _:
            raise ValueError("not arithmetic")
    if not abs(value) <= MAX_VALUE:  # written so that nan fails too
        raise ValueError("too large")
    return value


class ToolUse:
    """
    Follows one row: what is sampled between python_start and python_end is an expression, and its result is forced
    into the row. One instance per row.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.expression: list[int] | None = None  # tokens since python_start; None outside

    def observe(self, token: int) -> list[int]:
        """
        Takes the next sampled token and returns the tokens to force after it: none, or after python_end the result
        between output_start and output_end. Forced tokens may be observed too; they change nothing.
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
