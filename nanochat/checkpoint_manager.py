"""
Crash-safe checkpoints: writing, finding and loading them.

Each stage and tag has a folder, with one folder per saved step:

    base_checkpoints/d12/step_001000/
        model.safetensors        weights, float32; with LoRA the adapters alone
        optimizer.safetensors    whole tensors by parameter name, whatever the number of ranks
        data.safetensors         positions in the data, packing buffers, and the random generators of each rank
        state.json               format version, model configuration, loop state, flags, tokenizer fingerprint
        manifest.json            size and CRC-32 of each file

A step is written to a temporary folder, flushed to the disk and renamed. After a crash, a full disk or a kill, the
checkpoint before it is still complete, and --resume loads that one. A thread does the writing: training waits only
until everything is copied to host memory.

The parts: `CheckpointReader` and the functions that find a checkpoint, `run_lock` (one run per tag), `set_aside` (what
happens to an earlier run of the tag), and `CheckpointWriter`. nanochat/legacy.py reads checkpoints of older versions.
"""

import errno
import json
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanochat import legacy, lora
from nanochat.common import (
    UserError,
    atomic_path,
    base_dir,
    check_writable,
    describe_error,
    exclusive_lock,
    human,
    parse_json,
)
from nanochat.costs import param_counts
from nanochat.distributed import Dist, warn0
from nanochat.gpt import GPT, GPTConfig
from nanochat.logging import report_dir
from nanochat.muon import MuonAdamW, gather_weights
from nanochat.tokenizer import FILE_NAME, Tokenizer, default_dir, kept_file
from nanochat.train import TrainState

FORMAT = 1
NO_CHECKPOINT = "no checkpoint"  # CheckpointWriter.last_saved before the first one
META_BYTES = 2**20  # of a checkpoint's JSON files, at most
REQUIRED = {"model.safetensors", "state.json"}  # files of every checkpoint; an imported one has no others
STAGES = {  # stage → its folder, and the script that fills it
    "base": ("base_checkpoints", "base_train"),
    "mid": ("mid_checkpoints", "mid_train"),
    "sft": ("chatsft_checkpoints", "chat_sft"),
    "rl": ("chatrl_checkpoints", "chat_rl"),
}


def stage_dir(stage: str) -> Path:
    """The folder of a stage's checkpoints."""
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}: use {', '.join(STAGES)}")
    return base_dir() / STAGES[stage][0]


def tag_dir(stage: str, tag: str) -> Path:
    """The folder of one tag's checkpoints. UserError if the tag is no plain folder name."""
    if not tag or Path(tag).name != tag or tag.startswith("."):
        raise UserError(f"--model-tag {tag!r} must be a plain folder name")
    return stage_dir(stage) / tag


def step_dir(folder: Path, step: int) -> Path:
    """The folder of one step below that of its tag. Six digits, so that `ls` sorts them; the code sorts numbers."""
    return folder / f"step_{step:06d}"


# ---- a loaded checkpoint ----


@dataclass(frozen=True)
class Checkpoint:
    """One saved step: its folder (the .pt file of an older checkpoint) and the content of its state.json."""

    path: Path
    step: int
    meta: dict[str, Any]

    @property
    def config(self) -> GPTConfig:
        try:
            return GPTConfig(**legacy.upgrade_config(self.meta["model_config"]))
        except TypeError as error:
            raise UserError(f"{self.path}: unsupported model configuration: {error}") from error

    @property
    def tag(self) -> str:
        return self.path.parent.name

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameter name → tensor on the CPU. Adapters (lora.py) are merged into the weights of their base model."""
        if self.path.suffix == ".pt":
            return legacy.read_weights(self.path)
        if "lora" in self.meta:
            rank, base = self.meta["lora"]["rank"], self.lora_base().weights()
            return lora.merge(base, self.saved_weights(), rank, self.config.vocab_size)
        return self.saved_weights()

    def stored_weights(self) -> "StoredTensors":
        """The weights, each read when it is asked for: a sharded model never has all of them on one rank."""
        return StoredTensors(self.path / "model.safetensors")

    def saved_weights(self) -> dict[str, torch.Tensor]:
        """The content of model.safetensors: the weights, or the adapters alone if the model was trained with LoRA."""
        return _read_tensors(self.path / "model.safetensors")

    @property
    def weights_crc32(self) -> int:
        """Checksum of the file with the weights."""
        if self.path.suffix == ".pt":
            return _crc32(self.path)
        return json.loads((self.path / "manifest.json").read_text())["model.safetensors"]["crc32"]

    def lora_base(self) -> "Checkpoint":
        """The checkpoint that the adapters were trained on. UserError if it is missing or has changed."""
        name = self.meta["base"]
        problem = f"{self.path} contains adapters (LoRA) only, and their base model {name}"
        remedy = "restore that checkpoint, or rename its folder back if a new run has taken its name"
        try:
            base = find_by_path(name)
        except UserError as error:
            raise UserError(f"{problem} is missing ({error}): {remedy}") from error
        if base.weights_crc32 != self.meta["lora"]["base_crc32"]:
            raise UserError(f"{problem} has other weights now: {remedy}")
        return base

    def build_model(self, device: torch.device, dtype: torch.dtype) -> GPT:
        """Returns the model on the device. UserError names the parameters that do not match the configuration."""
        weights = {name: weight.float() for name, weight in self.weights().items()}
        found = sum(weight.numel() for weight in weights.values())
        expected = param_counts(self.config)["total"]
        if expected > 2 * found:  # memory for them is not even allocated: the numbers come from a damaged file
            raise UserError(f"{self.path} has {found:,} parameters, its configuration {expected:,}: use another step")
        model = GPT(self.config, device, dtype)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            problem = " ".join(str(error).split())  # torch's message has a line per parameter
            raise UserError(f"{self.path}: the weights do not fit the model configuration: {problem}") from error
        return model

    def load_tokenizer(self) -> Tokenizer:
        """
        The tokenizer that the model was trained with: the default one, or one that is kept beside it. UserError if it
        is missing.
        """
        fingerprint = self.meta.get("tokenizer")  # older checkpoints do not name it
        tokenizer = Tokenizer.find(default_dir(), fingerprint) if fingerprint else None
        if tokenizer is None:
            tokenizer = Tokenizer.load(default_dir())
            self.check_tokenizer(tokenizer)
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """UserError unless the model was trained with this tokenizer."""
        fingerprint = self.meta.get("tokenizer")
        same_size = tokenizer.vocab_size == self.config.vocab_size
        if same_size and fingerprint in (None, tokenizer.fingerprint):
            return
        file = kept_file(default_dir(), fingerprint) if fingerprint else default_dir() / FILE_NAME
        difference = f"fingerprint {fingerprint}, here {tokenizer.fingerprint}"
        if not same_size:
            difference = f"vocabulary {self.config.vocab_size}, here {tokenizer.vocab_size}"
        raise UserError(
            f"{self.path} was trained with another tokenizer ({difference}): put its own into {file}, or train a new "
            "model"
        )

    def check_resumable(self, tokenizer: Tokenizer, config: GPTConfig, dtype: torch.dtype) -> None:
        """UserError unless a run with this tokenizer, model and compute dtype can continue from here."""
        if self.path.suffix == ".pt" or "imported_from" in self.meta:
            raise UserError(f"{self.path} has weights only: it can be used for fine-tuning or chat, not resumed")
        self.check_tokenizer(tokenizer)
        if self.config != config:
            raise UserError(f"{self.path} is another model, {self.config}: use its flags, or another --model-tag")
        saved_dtype = self.meta.get("dtype", str(dtype))
        if saved_dtype != str(dtype):
            name = saved_dtype.removeprefix("torch.")
            raise UserError(f"the run was started in {name} and would continue in {dtype}: set NANOCHAT_DTYPE={name}")

    def restore_optimizer(self, optimizer: MuonAdamW) -> bool:
        """Loads the optimizer's state; returns False if none was saved (older checkpoints)."""
        file = self.path / "optimizer.safetensors"
        if not file.exists():
            return False
        optimizer.load_full_state(StoredTensors(file))
        return True

    def restore_run(self, optimizer: MuonAdamW, dist: Dist) -> tuple[TrainState, list[dict[str, Any]]]:
        """
        Restores optimizer and random generators for --resume; check_resumable has passed. Returns the state of the loop
        and the saved data states: one per stream of the text in pretraining, otherwise one per rank.
        """
        self.restore_optimizer(optimizer)
        data_states: list[dict[str, Any]] = [dict(numbers) for numbers in self.meta["data_states"]]
        for name, tensor in _read_tensors(self.path / "data.safetensors").items():
            rank, key = name.split(".", 1)
            if not key.startswith("rng."):
                data_states[int(rank)][key] = tensor
            elif int(rank) == dist.rank and key == "rng.cpu":
                torch.set_rng_state(tensor)
            elif int(rank) == dist.rank and dist.device.type == "cuda":
                torch.cuda.set_rng_state(tensor, dist.device)
        own = data_states[min(dist.rank, len(data_states) - 1)]
        return TrainState(**self.meta["train_state"], data_state=own), data_states


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file by name; each is read when it is asked for. UserError if it is damaged."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, "pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error
        self.names = list(self.file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# ---- reading ----


class CheckpointReader:
    """Lists and loads the checkpoints of one stage and tag."""

    def __init__(self, stage: str, tag: str):
        self.path = tag_dir(stage, tag)

    def steps(self) -> list[int]:
        """The saved steps in order, damaged ones too, and the steps of .pt files of older versions."""
        numbers = [folder.name.removeprefix("step_") for folder in self.path.glob("step_*") if folder.is_dir()]
        steps = {int(number) for number in numbers if number.isdigit()}
        return sorted(steps | legacy.checkpoint_steps(self.path))

    def load(self, step: int = -1) -> Checkpoint:
        """The checkpoint of a step; -1 = the newest intact one, with a warning for each that is damaged."""
        steps = self.steps()
        saved = f"it has {', '.join(map(str, steps)) or 'none'}"
        if step >= 0:
            if step not in steps:
                raise UserError(f"{self.path} has no checkpoint of step {step}: {saved}")
            checkpoint = self._read(step)
            if isinstance(checkpoint, str):
                raise UserError(f"{checkpoint}; choose another step of {self.path}: {saved}")
            return checkpoint
        for candidate in reversed(steps):
            checkpoint = self._read(candidate)
            if isinstance(checkpoint, Checkpoint):
                return checkpoint
            warn0(f"{checkpoint}: falling back to the checkpoint before it")
        raise UserError(f"no intact checkpoint in {self.path}: remove that folder and train again, without --resume")

    def last_written(self) -> float:
        """Time of the last write, in seconds since the epoch."""
        files = [*self.path.glob("step_*/manifest.json"), *self.path.glob("model_*.pt")]
        return max((file.stat().st_mtime for file in files), default=0.0)

    def _read(self, step: int) -> Checkpoint | str:
        """The checkpoint if it is intact (its files match the manifest), otherwise an error message."""
        path = step_dir(self.path, step)
        try:
            if not path.exists():
                model_file, meta = legacy.read_checkpoint(self.path, step)
                return Checkpoint(model_file, step, meta)
            if not (path / "manifest.json").exists():
                return f"{path} has no manifest.json"
            manifest = parse_json((path / "manifest.json").read_bytes())
            if not REQUIRED <= manifest.keys():
                return f"{path / 'manifest.json'} is incomplete"
            for name, expected in manifest.items():
                file = path / name
                if file.stat().st_size != expected["bytes"] or _crc32(file) != expected["crc32"]:
                    return f"{file} is corrupt"
            meta = parse_json((path / "state.json").read_bytes())
            saved_format = meta["format"]
        except legacy.UNREADABLE as error:
            first_line = str(error).partition("\n")[0]  # torch's messages have many
            return f"step {step} of {self.path} is not readable ({type(error).__name__}: {first_line})"
        if saved_format != FORMAT:
            raise UserError(f"{path} has format {saved_format}, this nanochat reads {FORMAT}: use a newer nanochat")
        return Checkpoint(path, step, meta)


def find(stage: str, tag: str = "", step: int = -1) -> Checkpoint:
    """A checkpoint of a stage. Default tag: the one written last; default step: the newest intact one."""
    readers = [CheckpointReader(stage, folder.name) for folder in sorted(stage_dir(stage).glob("[!.]*"))]
    by_tag = {reader.path.name: reader for reader in readers if reader.steps()}
    if not by_tag:
        raise UserError(f"no checkpoint in {stage_dir(stage)}: train one with python -m scripts.{STAGES[stage][1]}")
    if tag and tag not in by_tag:
        raise UserError(f"no {stage} checkpoint with tag {tag!r}: there are {', '.join(by_tag)}")
    reader = by_tag[tag] if tag else max(by_tag.values(), key=CheckpointReader.last_written)
    return reader.load(step)


def find_by_path(path: str) -> Checkpoint:
    """The checkpoint that a run recorded as `path`, also after the base folder has moved. UserError if it is gone."""
    folder, tag, name = Path(path).parts[-3:]
    stage = next(stage for stage, (stage_folder, _) in STAGES.items() if stage_folder == folder)
    return find(stage, tag, int(re.findall(r"\d+", name)[0]))  # step_001000, or model_001000.pt of older versions


def load_model(
    stage: str, tag: str, step: int, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, Tokenizer, Checkpoint]:
    """A model for evaluation or chat, in eval mode, its tokenizer, and the checkpoint; arguments as in find."""
    checkpoint = find(stage, tag, step)
    tokenizer = checkpoint.load_tokenizer()
    model = checkpoint.build_model(device, dtype).eval()
    model.cast_weights()
    return model, tokenizer, checkpoint


# ---- writing ----


@contextmanager
def run_lock(stage: str, tag: str, dist: Dist) -> Iterator[None]:
    """Reserves the tag for this run until the block ends. UserError if another run uses it."""
    folder = tag_dir(stage, tag)
    if not dist.is_main:
        yield
        return
    problem = f"another run works on {folder}: wait for it, or give this one a --model-tag"
    with exclusive_lock(base_dir() / "locks" / f"{folder.parent.name}-{tag}", problem):
        complete_swap(stage, tag)
        yield


# A new run under the tag of an earlier one writes to provisional names until its first checkpoint is complete. Only
# then the earlier run is renamed (d12 → d12.1, and its logs likewise) and the new one takes its name. So a run that
# fails before its first checkpoint leaves the earlier one as it was.


def provisional(path: Path) -> Path:
    """Where a new run keeps a folder or file while an earlier run still has the name."""
    return path.with_name(f".{path.name}.new")


def log_files(stage: str, tag: str) -> list[Path]:
    """The files with JSON lines that a run may have: one in each folder of the report."""
    folders = [path for path in report_dir().glob("*") if path.is_dir()]
    return [folder / f"{STAGES[stage][1]}-{tag}.jsonl" for folder in folders]


def set_aside(stage: str, tag: str) -> Path:
    """Renames the earlier run of a tag and gives its name to the new run; returns the earlier run's folder."""
    folder = tag_dir(stage, tag)
    aside = folder.rename(folder.with_name(f"{tag}.{_last_number(folder) + 1}"))
    complete_swap(stage, tag)
    return aside


def complete_swap(stage: str, tag: str) -> None:
    """The second half of set_aside. If a kill interrupts it, the next run completes it. Does nothing if all is done."""
    folder = tag_dir(stage, tag)
    if folder.exists() or not provisional(folder).exists():
        return
    for file in log_files(stage, tag):
        if file.exists() and provisional(file).exists():
            file.rename(file.with_name(f"{file.stem}.{_last_number(folder)}{file.suffix}"))
        if provisional(file).exists():
            provisional(file).rename(file)
    provisional(folder).rename(folder)  # last: while it exists, the swap is not complete


def _last_number(folder: Path) -> int:
    """The highest N of the folders d12.N beside d12; 0 if there is none."""
    siblings = [path for path in folder.parent.glob("*") if path.stem == folder.name]
    return max((int(path.suffix[1:]) for path in siblings if path.suffix[1:].isdecimal()), default=0)


class CheckpointWriter:
    """Saves the checkpoints of one run in a thread. `last_saved` is the path of the newest one, for messages."""

    def __init__(self, stage: str, tag: str, dist: Dist, *, keep_last: int = -1, resumed: Checkpoint | None = None):
        self.stage = stage
        self.tag = tag
        self.path = tag_dir(stage, tag)
        self.dist = dist
        self.keep_last = keep_last  # checkpoints; -1 = all
        self.resumed = resumed
        self.last_saved = str(resumed.path) if resumed else NO_CHECKPOINT
        # True on rank 0 only, the one rank that writes.
        self.replaces_earlier = dist.is_main and not resumed and bool(CheckpointReader(stage, tag).steps())
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: Future[None] | None = None  # the last save, until its success has been checked
        if dist.is_main:
            check_writable(self.path if self.path.exists() else self.path.parent)
        if self.replaces_earlier:  # an attempt that failed may have left files under the provisional names
            shutil.rmtree(provisional(self.path), ignore_errors=True)
            for file in log_files(stage, tag):
                provisional(file).unlink(missing_ok=True)

    def save(self, model: GPT, optimizer: MuonAdamW, state: TrainState, meta: dict[str, Any]) -> None:
        """
        Copies everything to host memory and starts to write it; `wait` reports whether the files were written. All
        ranks have to call it.
        """
        if self.resumed and self.resumed.step == state.step:
            return  # nothing was trained since: this checkpoint exists
        optimizer_state = optimizer.full_state()
        generators = {"rng.cpu": torch.get_rng_state()}
        if self.dist.device.type == "cuda":
            generators["rng.cuda"] = torch.cuda.get_rng_state(self.dist.device)
        of_all_ranks = self.dist.gather((state.data_state.get("streams", [state.data_state]), generators))
        parameters = lora.adapters(model) if "lora" in meta else dict(model.named_parameters())
        weights = gather_weights(parameters, self.dist.rank, self.dist.world_size)
        if not self.dist.is_main:
            return
        if self.pending and not self.pending.done():
            warn0("training waits until the last checkpoint is written: use a larger --save-every or --save-minutes")
        self._failure()  # has been reported, and this checkpoint may succeed
        meta = meta | {
            "format": FORMAT,
            "step": state.step,
            "model_config": asdict(model.config),
            "train_state": state.to_dict(),
        }
        data: dict[str, torch.Tensor] = {}
        for rank, (_, generators) in enumerate(of_all_ranks):
            data |= {f"{rank}.{key}": generator.clone() for key, generator in generators.items()}
        meta["data_states"] = []
        for number, data_state in enumerate(part for parts, _ in of_all_ranks for part in parts):
            tensors = {key: value for key, value in data_state.items() if isinstance(value, torch.Tensor)}
            data |= {f"{number}.{key}": tensor.clone() for key, tensor in tensors.items()}
            meta["data_states"].append({key: data_state[key] for key in data_state if key not in tensors})
        files = {"model": weights, "optimizer": optimizer_state, "data": data}
        self.pending = self.thread.submit(self._write_or_warn, state.step, files, meta)

    def wait(self) -> None:
        """Waits for the last write; raises UserError if it failed."""
        error = self._failure()
        if error:
            problem = describe_error(error)
            raise UserError(f"no checkpoint could be written to {self.path}: {problem}; last one: {self.last_saved}")

    def close(self) -> None:
        """Waits for the last write, which warns if it fails; for runs that end with another error."""
        self._failure()

    def _failure(self) -> BaseException | None:
        """Waits for the last write; returns its error, once."""
        pending, self.pending = self.pending, None
        return pending.exception() if pending else None

    def _write_or_warn(self, step: int, files: dict[str, dict[str, torch.Tensor]], meta: dict[str, Any]) -> None:
        """Writes a checkpoint, if it fits on the disk. Failures are reported at once, and training continues."""
        try:
            needed = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path.parent).free
            if free < needed + META_BYTES:
                problem = f"No space left for {human(needed)}B, {human(free)}B are free"
                raise OSError(errno.ENOSPC, problem, str(self.path))
            self._write(step, files, meta)
        except Exception as error:
            problem = f"the checkpoint of step {step} could not be written ({describe_error(error)})"
            warn0(f"{problem}: training continues, and would resume from {self.last_saved}")
            raise

    def _write(self, step: int, files: dict[str, dict[str, torch.Tensor]], meta: dict[str, Any]) -> None:
        for leftover in self.path.glob(".step_*.tmp"):  # of a save that was killed
            shutil.rmtree(leftover)
        folder = provisional(self.path) if self.replaces_earlier else self.path
        _write_step(step_dir(folder, step), files, meta)
        if self.replaces_earlier:
            aside = set_aside(self.stage, self.tag)
            print(f"the earlier run of the tag {self.tag!r} is now {aside.name!r}", flush=True)
            self.replaces_earlier = False
        self.last_saved = str(step_dir(self.path, step))
        if self.keep_last > 0:
            saved = [other for other in CheckpointReader(self.stage, self.tag).steps() if other <= step]
            for old in saved[: -self.keep_last]:
                _remove_step(step_dir(self.path, old))


def save_weights(
    stage: str, tag: str, step: int, config: GPTConfig, weights: dict[str, torch.Tensor], meta: dict[str, Any]
) -> Path:
    """
    Writes a checkpoint without the state of a run, for a model that was trained elsewhere, and returns its folder. meta
    has at least the tokenizer's fingerprint. UserError if a run uses the tag.
    """
    folder = step_dir(tag_dir(stage, tag), step)
    with run_lock(stage, tag, Dist(torch.device("cpu"))):
        meta = meta | {"format": FORMAT, "step": step, "model_config": asdict(config)}
        _write_step(folder, {"model": weights}, meta)
    return folder


def _write_step(folder: Path, files: dict[str, dict[str, torch.Tensor]], meta: dict[str, Any]) -> None:
    """Writes the folder of a step: the tensors of each safetensors file, state.json and the manifest."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, tensors in files.items():
            save_file(tensors, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(meta, indent=1))
        written = sorted(temporary.iterdir())
        manifest = {file.name: {"bytes": file.stat().st_size, "crc32": _crc32(file)} for file in written}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _remove_step(folder: Path) -> None:
    """Deletes a checkpoint under another name: after a kill, what is left of it is not taken for a checkpoint."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp")), ignore_errors=True)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The content of a safetensors file. UserError if it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is missing or damaged ({error}): use another step, or restore it")


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value
