"""
Writes src/unicode.bin, the tables of src/unicode.rs: which code points are letters, numbers and white space.

    pip install tiktoken && python rustbpe/tools/unicode_tables.py

The classes are those of Python's unicodedata. Every code point that it has is checked against tiktoken, because
encoding with tiktoken must split text as training did. Where tiktoken's Unicode is the newer one, the code points that
are unassigned for Python are taken from tiktoken. Run it again when tiktoken moves to a newer Unicode: the test of the
tables (tests/test_rustbpe.py) fails then.
"""

import sys
import unicodedata
from pathlib import Path

import tiktoken

OTHER, LETTER, NUMBER, SPACE = range(4)
CLASS_OF = {"L": LETTER, "N": NUMBER}
# \s is the property White_Space, which unicodedata does not have: the separators Z* and these controls.
CONTROLS = {0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x85}
PAGE = 256


def from_python(code: int) -> int:
    category = unicodedata.category(chr(code))
    return SPACE if category[0] == "Z" or code in CONTROLS else CLASS_OF.get(category[0], OTHER)


def from_tiktoken() -> list[int]:
    classes = [OTHER] * (sys.maxunicode + 1)
    codes = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pattern, kind in ((r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)):
        encoding = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        matched = encoding.encode_ordinary("".join(map(chr, codes)))  # what matches nothing is left out
        for character in bytes(matched).decode():
            classes[ord(character)] = kind
    return classes


def main() -> None:
    classes = from_tiktoken()
    newer = 0
    for code, kind in enumerate(classes):
        if unicodedata.category(chr(code)) == "Cn":
            newer += kind != OTHER
        elif kind != from_python(code):
            sys.exit(f"U+{code:04X}: class {kind} in tiktoken, {from_python(code)} in Python")

    pages, blocks = [], []
    for start in range(0, len(classes), PAGE):
        page = classes[start : start + PAGE]
        block = bytes(page[i] | page[i + 1] << 2 | page[i + 2] << 4 | page[i + 3] << 6 for i in range(0, PAGE, 4))
        if block not in blocks:
            blocks.append(block)
        pages.append(blocks.index(block))
    path = Path(__file__).resolve().parent.parent / "src" / "unicode.bin"
    path.write_bytes(bytes(pages) + b"".join(blocks))
    versions = f"Unicode {unicodedata.unidata_version} of Python and tiktoken {tiktoken.__version__}"
    print(f"{path}: {len(blocks)} blocks, from {versions}; {newer} code points are newer than this Python")


if __name__ == "__main__":
    main()
