"""
Write the primer, a small generated corpus, to a folder, as shards for pretraining. Needs no network.

    python -m scripts.primer --data-dir ~/primer
    NANOCHAT_DATA_DIR=~/primer python -m scripts.tok_train --vocab-size 2048
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat import primer
from nanochat.cli import SEED, command, flag
from nanochat.common import base_dir


@dataclass(frozen=True)
class Flags:
    data_dir: str = flag("", "folder for the shards: empty or with an older primer; default: $NANOCHAT_BASE_DIR/primer")
    seed: int = flag(0, "seed for the choice and order of the wordings", SEED)


@command
def main(flags: Flags) -> None:
    directory = Path(flags.data_dir or base_dir() / "primer").expanduser()
    shards = primer.write_shards(directory, flags.seed)
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{directory}: {len(shards)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
