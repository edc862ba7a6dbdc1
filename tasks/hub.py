"""Loads the datasets of the tasks, from a local mirror of the Hugging Face Hub or from the hub itself."""

import os
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir
from tasks.common import SEED


def load(repo: str, config: str | None, split: str) -> Any:
    """
    Returns one split of the dataset "owner/name" as a datasets.Dataset, in a fixed random order.

    The dataset is read from the folder $NANOCHAT_DATASETS_DIR/owner/name if that variable is set. Otherwise it is
    downloaded from the hub (or $HF_ENDPOINT) and cached. Raises UserError if it cannot be loaded.
    """
    source = repo
    if mirror := os.environ.get("NANOCHAT_DATASETS_DIR"):
        source = str(find_in_mirror(Path(mirror).expanduser(), repo))
    import datasets  # here, because it takes a second

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


def find_in_mirror(mirror: Path, repo: str) -> Path:
    """
    The folder of a dataset in $NANOCHAT_DATASETS_DIR. UserError if it is missing: it is not downloaded instead, because
    where a mirror is used the network may be missing, and retries take minutes.
    """
    if not mirror.is_dir():
        raise UserError(f"NANOCHAT_DATASETS_DIR is {mirror}, which is not a folder: correct it or unset it")
    if not (mirror / repo).is_dir():
        raise UserError(f"NANOCHAT_DATASETS_DIR, {mirror}, lacks {repo}: copy it there, or unset the variable")
    return mirror / repo
