"""Rows of the tasks: from a mirror of the hub on this machine, else from the hub."""

import os
from pathlib import Path
from typing import Any

from nanochat.common import UserError, base_dir


def load(repo: str, config: str | None, split: str) -> Any:
    """
    Loads one split of "owner/name", a datasets.Dataset, from $NANOCHAT_DATASETS_DIR/owner/name if that folder exists,
    else from the hub ($HF_ENDPOINT if set) or what `datasets` has kept of it. UserError if it cannot be had.
    """
    import datasets  # takes a second

    mirrors = Path(os.environ.get("NANOCHAT_DATASETS_DIR") or os.devnull).expanduser()
    if os.environ.get("NANOCHAT_DATASETS_DIR") and not mirrors.is_dir():
        raise UserError(f"NANOCHAT_DATASETS_DIR is {mirrors}, which is no folder: name the mirror's, or unset it")
    source = str(mirrors / repo) if (mirrors / repo).is_dir() else repo
    had_progress_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, config, split=split, cache_dir=str(base_dir() / "datasets"))
    except ConnectionError as error:
        raise UserError(
            f"{repo} cannot be reached: go online, or name a folder that holds {repo} laid out as on the hub "
            "in NANOCHAT_DATASETS_DIR"
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}, config {config or 'default'}, split {split} cannot be loaded: {reason}") from error
    finally:
        if had_progress_bars:
            datasets.enable_progress_bars()
