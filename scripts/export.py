"""
Export a trained model for other programs.

    python -m scripts.export -i sft --to hf --out my-model                      # the newest fine-tuned model
    python -m scripts.export -i sft -g d12 -s 500 --to hf --dtype bfloat16 --out my-model
    python -m scripts.export -i sft --to gguf --dtype q8_0 --out my-model/model.gguf
    python -m scripts.export -i sft --to html --out chat.html

--to hf: a folder that transformers loads, for chat, fine-tuning with TRL and PEFT, and serving in vLLM.
--to gguf: a file for llama.cpp and ollama, and an ollama Modelfile; only for models of base_train --portable.
--to html: a page with the model in 8 bits, which chats with it in any browser, offline and without a server.
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat import checkpoint_manager
from nanochat.cli import STEP, command, flag
from nanochat.common import UserError
from nanochat.export.common import Source, describe_size, export
from nanochat.export.formats import FORMATS
from nanochat.progress import track


@dataclass(frozen=True)
class Flags:
    source: str = flag("sft", "stage of the model", short="-i", choices=("base", "mid", "sft", "rl"))
    model_tag: str = flag("", "name of the checkpoints; default: the one written last", short="-g")
    step: int = flag(-1, "step of the checkpoint; -1 = the newest", STEP, short="-s")
    to: str = flag("hf", "format", choices=tuple(FORMATS))
    out: str = flag("", "file or folder to write; it must not exist, or be an empty folder")
    dtype: str = flag("", "dtype of the weights; default: the first that the format offers")


@command
def main(flags: Flags) -> None:
    if not flags.out:
        raise UserError("--out is missing: name the file or folder to write")
    target_format = FORMATS[flags.to]
    dtype = flags.dtype or target_format.dtypes[0]
    if dtype not in target_format.dtypes:
        raise UserError(f"--dtype {dtype}: --to {flags.to} offers {', '.join(target_format.dtypes)}")
    checkpoint = checkpoint_manager.find(flags.source, flags.model_tag, flags.step)
    tokenizer = checkpoint.load_tokenizer()
    out = Path(flags.out).expanduser()
    export(Source(checkpoint, tokenizer, flags.source, dtype, track), target_format, out)
    print(f"exported {checkpoint.path} to {out} ({describe_size(out)})")


if __name__ == "__main__":
    main()
