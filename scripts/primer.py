"""
Write the embedded corpus as ordinary pretraining shards: a child's encyclopaedia, generated, no network needed.

    python -m scripts.primer --data-dir ~/primer
    NANOCHAT_DATA_DIR=~/primer python -m scripts.tok_train --vocab-size 2048
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat.cli import command, flag
from nanochat.common import base_dir
from nanochat.primer import documents as primer


@dataclass(frozen=True)
class Flags:
    data_dir: str = flag("", "folder for the shards; default <base>/primer")
    seed: int = flag(0, "of the wordings and their order")


@command
def main(flags: Flags) -> None:
    directory = Path(flags.data_dir).expanduser() if flags.data_dir else base_dir() / "primer"
    shards = primer.write_shards(directory, flags.seed)
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{directory}: {len(shards)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
