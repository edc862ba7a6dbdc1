"""Loads the datasets of the tasks, from a local mirror of the Hugging Face Hub or from the hub itself."""

import os
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir
from tasks.common import SEED


def load(repo: str, config: str | None, split: str) -> Any:
    """
    Returns one split of the dataset "owner/name" as a datasets.Dataset, in a fixed random order.

    The dataset is read from the folder $NANOCHAT_DATASETS_DIR/owner/name if it exists. Otherwise it is downloaded from
    the hub (or $HF_ENDPOINT) and cached. Raises UserError if it cannot be loaded.
    """
    import datasets  # here, because it takes a second

    source = repo
    if mirror := os.environ.get("NANOCHAT_DATASETS_DIR"):
        folder = Path(mirror).expanduser()
        if not folder.is_dir():
            raise UserError(f"NANOCHAT_DATASETS_DIR is {folder}, which is not a folder: correct it or unset it")
        if (folder / repo).is_dir():
            source = str(folder / repo)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(source, config, split=split, cache_dir=str(base_dir() / "datasets"))
    except ConnectionError as error:
        raise UserError(
            f"{repo} cannot be reached: check the network, "
            f"or set NANOCHAT_DATASETS_DIR to a folder with a copy of {repo}"
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}, config {config or 'default'}, split {split} cannot be loaded: {reason}") from error
    return rows.shuffle(seed=SEED)
