"""
The calculator: exact results in the notation of the training data, None for everything else, and bounded cost. ToolUse:
results are forced into the completion after a call.

    python -m pytest tests/test_tools.py
"""

import random
import warnings

import pytest

from nanochat.tools import MAX_DEPTH, MAX_LENGTH, ToolUse, calculate


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("12*3", "36"),
        ("48/2", "24"),
        (" 7 ", "7"),
        ("24.0", "24"),
        ("-(2+3)*+4", "-20"),
        ("-0.0", "0"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        ("7%4", "3"),
        ("5.5%2", "1.5"),
        (".5*5", "2.5"),
        ("2*20*.01", "0.4"),
        ("0.07*100", "7"),
        ("0.1+0.2", "0.3"),
        ("1/3*3", "1"),
        ("1,000", "1000"),
        ("1,234,567+1", "1234568"),
        ("1,000.50*2", "2001"),
        ("(1,000)/4", "250"),
        ("123456789*987654321", "121932631112635269"),
        ("10/0.5", "20"),
        ("'strawberry'.count('r')", "3"),
        ('"banana".count("an")', "2"),
        ("'a,b,c'.count(',')", "2"),
        ("'1,000 and 2,000'.count(',')", "2"),
        ("'1,000'.count(',') + 1,000", "1001"),
        ("'abc'.count('z')", "0"),
        ("('word'.count('w') + 1) * 2", "4"),
        ("'naïve 水水'.count('水')", "2"),
        ('"it\'s".count("\'")', "1"),
        ("+".join(["1"] * MAX_DEPTH), str(MAX_DEPTH)),
    ],
)
def test_calculate_arithmetic_and_count_returns_the_value(expression, expected):
    assert calculate(expression) == expected


@pytest.mark.parametrize(
    "expression, expected",
    [
        # exact, however long
        ("9999999999999/3", "3333333333333"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0.123456789012345678901234567890", "0.12345678901234567890123456789"),
        ("123456789012345.67+0.01", "123456789012345.68"),
        ("0.00001", "0.00001"),
        ("1/1024/1024", "0.00000095367431640625"),
        ("1,000,000,000,000,000.25*4", "4000000000000001"),
        # rounded: the expansion does not end, or not within 30 digits
        ("1/3", "0.333333333333"),
        ("-2/3", "-0.666666666667"),
        ("22/7", "3.14285714286"),
        ("1/300000", "0.00000333333333333"),
        ("99999999999/7", "14285714285.57"),
        ("10000000000000/3", "3333333333333.33"),
        ("0.1111111111111111*0.1111111111111111", "0.0123456790123"),
    ],
)
def test_calculate_long_results_are_exact_or_rounded_after_the_point(expression, expected):
    assert calculate(expression) == expected


@pytest.mark.parametrize(
    "expression",
    [
        "", " ", "x", "1+", "1=1", "1 2", "1;2", "1\n2", "\0", "a = 1", "1 < 2", "True", "not 1", "1j", "None", "...",
        "1/0", "1//0", "1%0", "1.5%0", "0/0", "1e999", "-1e999", "1e999-1e999", "nan", "inf", "float('nan')",
        "2**10", "9**9**9**9", "pow(9, 9)", "1<<999999999", "~1", "1@2", "1|2", "1 if 1 else 2", "1 and 2", "1:=2",
        "9" * 200, "9" * 5000, "*".join(["99999999999"] * 20), "1e300*1e300", "1e300", "1/1e-300",
        "(" * 5000 + "1" + ")" * 5000, "-" * (MAX_DEPTH + 1) + "1",
        "-" * (MAX_LENGTH - 1) + "1", "+".join(["1"] * (MAX_DEPTH + 1)), "[" * 250, "0" * MAX_LENGTH + "1",
        "1e5", "1.e5", "1.e999999999", "0x10", "1_000", "1.j", "0." + "0" * 30 + "1", "1/3/" + "9" * 30,
        "1,00", "1,0000", "1000,000", "1,2", "0.123,456", ",100", "1,000,", "max(1,000)", "1 ,000",
        "'x'*10**9", "'x'*1000000000", "1000000000*'x'", "'a'+'b'", "'abc'", "'%s' % 5", "'%999999999d' % 1", "('a',)",
        "'x'*9 .count('x')", "('x'*9).count('x')", "f'{1}'", "f'{1}'.count('1')", "b'aa'.count(b'a')", "'a'.count(1)",
        "'a'.count()", "'a'.count('a', 1)", "'a'.count('a', 0, 1)", "'a'.count(x='a')", "'a'.count(*['a'])",
        "'a'.count",
        "'a'.upper()", "'a'.count('a').bit_length()", "'a'.__class__", "'a'.__len__()", "'{}'.format(1)", "count('a')",
        "'a'.replace('a', 'b').count('b')", "'a'.join(['b']).count('a')", "'" + "a" * 10**6 + "'.count('a')",
        "__import__('os').system('true')", "eval('1')", "exec('1')", "open('/etc/passwd')", "().__class__.__bases__",
        "(lambda: 1)()", "[x for x in (1,)]", "[1].count(1)", "(1).real", "1 .real", "print(1)", "globals()", "{}",
        r"'\x41'.count('A')", r"'a\'.count('a')", "'unclosed", "'a'.count('a'",
    ],
)  # fmt: skip
def test_calculate_anything_else_returns_none(expression):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's parser comments on some of these
        assert calculate(expression) is None


def test_calculate_random_text_neither_raises_nor_returns_long_results():
    rng = random.Random(0)
    alphabet = ["1", "23", "4.5", ",000", "+", "-", "*", "/", "//", "%", "(", ")", "'a'", '"', "'", ".count(", "e9"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3000):
            result = calculate("".join(rng.choices(alphabet, k=rng.randint(1, 12))))
            assert result is None or len(result) <= 64


def special(tokenizer, *names):
    return [tokenizer.special(f"<|{name}|>") for name in names]


def test_tool_use_call_with_result_forces_it_between_markers(golden_tokenizer):
    start, end, output_start, output_end = special(
        golden_tokenizer, "python_start", "python_end", "output_start", "output_end"
    )
    tool_use = ToolUse(golden_tokenizer)
    for expression, result in (("12*3", "36"), ("'a,b,c'.count(',')", "2")):  # a completion may have several calls
        before = [golden_tokenizer.bos, *golden_tokenizer.encode("It is "), start, *golden_tokenizer.encode(expression)]
        assert all(tool_use.observe(token) == [] for token in before)
        forced = tool_use.observe(end)
        assert forced == [output_start, *golden_tokenizer.encode(result), output_end]
        assert all(tool_use.observe(token) == [] for token in forced)


def test_tool_use_call_without_result_forces_nothing(golden_tokenizer):
    start, end, user_start = special(golden_tokenizer, "python_start", "python_end", "user_start")
    one, bad = golden_tokenizer.encode("1"), golden_tokenizer.encode("1/0")
    for row in ([end], [*one, end], [start, end], [start, *bad, end], [start, user_start, end]):
        tool_use = ToolUse(golden_tokenizer)
        assert all(tool_use.observe(token) == [] for token in row)
        assert tool_use.observe(end) == []  # and the expression is forgotten
        assert tool_use.observe(start) == tool_use.observe(one[0]) == []
        assert len(tool_use.observe(end)) == 3


def test_tool_use_second_start_restarts_the_expression(golden_tokenizer):
    start, end = special(golden_tokenizer, "python_start", "python_end")
    tool_use = ToolUse(golden_tokenizer)
    for token in [start, *golden_tokenizer.encode("1+"), start, *golden_tokenizer.encode("5")]:
        assert tool_use.observe(token) == []
    assert golden_tokenizer.decode(tool_use.observe(end)) == "<|output_start|>5<|output_end|>"


def test_tool_use_partial_character_in_expression_forces_nothing(golden_tokenizer):
    start, end = special(golden_tokenizer, "python_start", "python_end")
    tool_use = ToolUse(golden_tokenizer)
    half = golden_tokenizer.encode("\U0010ffff")[0]
    assert all(tool_use.observe(token) == [] for token in (start, half, end))
