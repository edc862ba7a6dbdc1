"""The export formats by the names that --to takes. Importing them needs no optional package."""

from nanochat.export import gguf, hf, html

FORMATS = {"hf": hf.FORMAT, "gguf": gguf.FORMAT, "html": html.FORMAT}
