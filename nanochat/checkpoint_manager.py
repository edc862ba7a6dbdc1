"""
Checkpoints that are whole or not there.

One folder per stage and tag, in it one folder per step:

    base_checkpoints/d12/step_001000/
        model.safetensors        weights, float32
        optimizer.safetensors    whole tensors by parameter name, whatever the number of ranks
        data.safetensors         each rank's position in the data, packing buffer and random generators
        state.json               format version, model configuration, loop state, flags, tokenizer fingerprint
        manifest.json            size and CRC-32 of each file

The folder is written under a temporary name, flushed to the disk and renamed: a crash, a full disk or a kill leaves the
checkpoint before it as the newest. Writing happens in a thread; training waits only for the copy to host memory.

Older checkpoints that people have, model_<step>.pt and meta_<step>.json, are read too.
"""

import itertools
import json
import re
import shutil
import sys
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file

from nanochat import legacy
from nanochat.common import UserError, atomic_path, base_dir
from nanochat.distributed import Dist
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import MuonAdamW
from nanochat.tokenizer import Tokenizer
from nanochat.train import Hook, Stopped, TrainState

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "data.safetensors", "state.json")
STAGES = {  # folder, and the script that fills it
    "base": ("base_checkpoints", "base_train"),
    "mid": ("mid_checkpoints", "mid_train"),
    "sft": ("chatsft_checkpoints", "chat_sft"),
    "rl": ("chatrl_checkpoints", "chat_rl"),
}


UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what damaged JSON can lead to


@dataclass(frozen=True)
class Checkpoint:
    """One saved step: its folder (or the .pt file of an older one) and what state.json says."""

    path: Path
    step: int
    meta: dict[str, Any]

    @property
    def config(self) -> GPTConfig:
        try:
            return legacy.model_config(self.meta["model_config"])
        except TypeError as error:
            raise UserError(f"{self.path} has an unsupported model configuration: {error}") from error

    @property
    def tag(self) -> str:
        return self.path.parent.name

    def weights(self) -> dict[str, torch.Tensor]:
        if self.path.suffix == ".pt":
            return legacy.read_weights(self.path)
        return load_file(self.path / "model.safetensors")

    def build_model(self, device: torch.device, dtype: torch.dtype) -> GPT:
        """The model on the device. UserError naming missing and surplus parameters if they do not match the config."""
        model = GPT(self.config, device, dtype)
        weights = self.weights()
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        missing, surplus = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
        if missing or surplus:
            raise UserError(
                f"{self.path}: the weights do not fit the model configuration: missing {missing}, surplus {surplus}"
            )
        wrong = [n for n in expected if tuple(weights[n].shape) != expected[n]]
        if wrong:
            raise UserError(f"{self.path}: {wrong[0]} is {tuple(weights[wrong[0]].shape)}, not {expected[wrong[0]]}")
        model.load_state_dict({name: weight.float() for name, weight in weights.items()})
        return model

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """UserError unless the model was trained with this tokenizer."""
        theirs = self.meta.get("tokenizer")
        if tokenizer.vocab_size != self.config.vocab_size or theirs not in (None, tokenizer.fingerprint):
            kept = base_dir() / "tokenizer" / f"tokenizer.{theirs}.json"
            remedy = f"rename {kept} to tokenizer.json" if kept.exists() else f"put its own into {kept.parent}"
            raise UserError(
                f"{self.path} was trained with another tokenizer (vocabulary {self.config.vocab_size}, here "
                f"{tokenizer.vocab_size}): {remedy}, or train a new model"
            )

    def check_resumable(self, tokenizer: Tokenizer, config: GPTConfig, dtype: torch.dtype) -> None:
        """UserError unless a run with this tokenizer and model, computing in this dtype, can go on from here."""
        if self.path.suffix == ".pt":
            raise UserError(f"{self.path} holds weights only: it can be fine-tuned or chatted with, not resumed")
        self.check_tokenizer(tokenizer)
        if self.config != config:
            raise UserError(f"{self.path} is another model, {self.config}: give its flags, or another --model-tag")
        begun = self.meta.get("dtype", str(dtype))
        if begun != str(dtype):
            name = begun.removeprefix("torch.")
            raise UserError(f"the run was begun in {name}, here it would go on in {dtype}: set NANOCHAT_DTYPE={name}")

    def restore_optimizer(self, optimizer: MuonAdamW) -> bool:
        """Loads the optimizer's state; False if none was saved (older checkpoints)."""
        file = self.path / "optimizer.safetensors"
        if not file.exists():
            return False
        optimizer.load_full_state(load_file(file))
        return True

    def restore_run(self, optimizer: MuonAdamW, dist: Dist) -> tuple[TrainState, list[dict[str, Any]]]:
        """For --resume: optimizer, random generators, loop state; and the data states of all ranks that saved."""
        if not self.restore_optimizer(optimizer):
            raise UserError(f"{self.path} holds weights only: it can be fine-tuned or chatted with, not resumed")
        tensors = load_file(self.path / "data.safetensors")
        ranks: list[dict[str, Any]] = [dict(state) for state in self.meta["data_states"]]
        for name, tensor in tensors.items():
            owner, key = name.split(".", 1)
            ranks[int(owner)][key] = tensor
        for i, data_state in enumerate(ranks):
            generators = {key: data_state.pop(key) for key in [k for k in data_state if k.startswith("rng.")]}
            if i == dist.rank:
                _set_generators(generators, dist.device)
        return TrainState(**self.meta["train_state"], data_state=ranks[min(dist.rank, len(ranks) - 1)]), ranks


class CheckpointDir:
    """The checkpoints of one stage and tag."""

    def __init__(self, stage: str, tag: str, dist: Dist | None = None, keep_last: int = -1):
        if not tag or Path(tag).name != tag or tag.startswith("."):
            raise UserError(f"--model-tag {tag!r} must be a plain folder name")
        self.tag, self.path = tag, stage_dir(stage) / tag
        self.dist, self.keep_last = dist or Dist(torch.device("cpu")), keep_last
        self.resumed: Checkpoint | None = None
        self.good = "no checkpoint"  # this run's newest, in words
        self.writer: threading.Thread | None = None
        self.error: Exception | None = None
        self.lock_file: IO[str] | None = None

    def lock(self) -> None:
        """One run at a time works under a tag. UserError if another one does; held until this one is over."""
        if not self.dist.is_main:
            return
        import fcntl  # not on Windows

        file = self.path.parent.parent / "locks" / f"{self.path.parent.name}-{self.tag}"
        file.parent.mkdir(parents=True, exist_ok=True)
        self.lock_file = file.open("w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run works on {self.path}: wait for it, or give this one a --model-tag") from None

    def save(self, model: GPT, optimizer: MuonAdamW, state: TrainState, meta: dict[str, Any]) -> None:
        """Collective. Returns once everything is copied to host memory; `wait` says whether it reached the disk."""
        if self.resumed and self.resumed.step == state.step:
            return  # nothing was trained since: it is there
        optimizer_state = optimizer.full_state()
        numbers = {k: v for k, v in state.data_state.items() if not isinstance(v, torch.Tensor)}
        tensors = {k: v for k, v in state.data_state.items() if isinstance(v, torch.Tensor)}
        everyone = self.dist.gather((numbers, tensors | _generators(self.dist.device)))
        if not self.dist.is_main:
            return
        self._join()
        if self.error:
            message = f"warning: the last checkpoint could not be written ({self.error}); trying again"
            print(message, file=sys.stderr, flush=True)
        meta = meta | {
            "format": FORMAT,
            "step": state.step,
            "model_config": model.config.to_dict(),
            "train_state": state.to_dict(),
            "data_states": [numbers for numbers, _ in everyone],
        }
        files = {
            "model": {name: p.detach().to("cpu", copy=True).contiguous() for name, p in model.named_parameters()},
            "optimizer": optimizer_state,
            "data": {f"{rank}.{key}": t.clone() for rank, (_, ts) in enumerate(everyone) for key, t in ts.items()},
        }
        self.writer = threading.Thread(target=self._write, args=(state.step, files, meta))
        self.writer.start()

    def save_hook(self, every: int, model: GPT, optimizer: MuonAdamW, meta: dict[str, Any]) -> Hook:
        """Saves every so many updates, at the end, and when a signal ends the run."""

        def run(state: TrainState) -> dict[str, float]:
            self.save(model, optimizer, state, meta)
            return {}

        return Hook(max(every, 0), run, when_stopped=True)

    def __enter__(self) -> "CheckpointDir":
        """A run begins: checkpoints of another run under this tag are kept, but never taken for this one's."""
        if self.dist.is_main and not self.resumed and self.steps():
            number = next(i for i in itertools.count(1) if not self.path.with_name(f"{self.tag}.{i}").exists())
            aside = self.path.rename(self.path.with_name(f"{self.tag}.{number}"))
            print(f"the tag {self.tag!r} held an earlier run: it is now {aside.name!r}", flush=True)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """A run is over when its last checkpoint is on the disk, or that it is not has been said."""
        if kind is None or issubclass(kind, Stopped):
            self.wait()
        self._join()
        if self.lock_file:
            self.lock_file.close()
        if self.error:
            print(f"warning: no checkpoint could be written to {self.path}: {self.error}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Until the last save is on the disk. UserError if it could not be written."""
        self._join()
        if self.error:
            raise UserError(f"no checkpoint could be written to {self.path}: {self.error}; last good: {self.good}")

    def load_newest(self) -> Checkpoint | None:
        """For --resume: the newest intact checkpoint; None, and a word about it, where nothing was saved yet."""
        if self.steps():
            self.resumed = self.load()
            self.good = str(self.resumed.path)
        else:
            self.dist.print0(f"nothing to resume in {self.path}: starting from the beginning")
        return self.resumed

    def load(self, step: int = -1) -> Checkpoint:
        """The newest intact checkpoint, or that of a step. UserError if there is none."""
        steps = self.steps()
        have = f"it has {', '.join(map(str, steps)) or 'none'}"
        if step >= 0 and step not in steps:
            raise UserError(f"{self.path} has no checkpoint of step {step}: {have}")
        for candidate in [step] if step >= 0 else reversed(steps):
            checkpoint = self._open(candidate)
            if isinstance(checkpoint, Checkpoint):
                return checkpoint
            if step >= 0:
                raise UserError(f"{checkpoint}; choose another step of {self.path}: {have}")
            if self.dist.is_main:
                print(f"warning: {checkpoint}: falling back to the checkpoint before it", file=sys.stderr, flush=True)
        raise UserError(f"no intact checkpoint in {self.path}: remove that folder and train again, without --resume")

    def steps(self) -> list[int]:
        """Steps saved, complete as far as the names tell, in order."""
        folders = (p.parent.name[5:] for p in self.path.glob("step_*/manifest.json"))
        ours = {int(number) for number in folders if number.isdigit()}
        return sorted(ours | legacy.checkpoint_steps(self.path))

    def _join(self) -> None:
        if self.writer:
            self.writer.join()
            self.writer = None

    def _write(self, step: int, files: dict[str, dict[str, torch.Tensor]], meta: dict[str, Any]) -> None:
        try:
            for leftover in self.path.glob(".step_*.tmp"):  # of a save that was killed
                shutil.rmtree(leftover)
            target = self.path / f"step_{step:06d}"
            with atomic_path(target) as folder:
                folder.mkdir()
                for name, tensors in files.items():
                    save_file(tensors, folder / f"{name}.safetensors")
                (folder / "state.json").write_text(json.dumps(meta, indent=1))
                manifest = {f.name: {"bytes": f.stat().st_size, "crc32": _crc32(f)} for f in sorted(folder.iterdir())}
                (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
            self.error, self.good = None, str(target)
            if self.keep_last > 0:
                for old in [s for s in self.steps() if s < step][: -self.keep_last + 1 or None]:
                    shutil.rmtree(self.path / f"step_{old:06d}", ignore_errors=True)
        except Exception as error:  # noqa: BLE001  whatever it is must reach the training thread
            self.error = error

    def _open(self, step: int) -> Checkpoint | str:
        """The checkpoint if its files are what the manifest says; else what is wrong, in words."""
        path = self.path / f"step_{step:06d}"
        if not path.exists():
            try:
                model_file, meta = legacy.read_checkpoint(self.path, step)
            except ValueError as error:
                return str(error)
            return Checkpoint(model_file, step, meta)
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            for name in FILES:
                file, expected = path / name, manifest[name]
                if file.stat().st_size != expected["bytes"] or _crc32(file) != expected["crc32"]:
                    return f"{file} is corrupt"
            meta = json.loads((path / "state.json").read_text())
        except UNREADABLE as error:
            return f"{path} is not readable ({type(error).__name__}: {error})"
        if meta["format"] != FORMAT:
            raise UserError(f"{path} has format {meta['format']}, this nanochat reads {FORMAT}: use the one it is from")
        return Checkpoint(path, step, meta)


def stage_dir(stage: str) -> Path:
    if stage not in STAGES:
        raise UserError(f"unknown stage {stage!r}: use {', '.join(STAGES)}")
    return base_dir() / STAGES[stage][0]


def find(stage: str, tag: str = "", step: int = -1) -> Checkpoint:
    """A stage's checkpoint: of the tag, by default the one written last; of the step, by default the newest intact."""
    tags = sorted(p.name for p in stage_dir(stage).glob("*") if CheckpointDir(stage, p.name).steps())
    if not tags:
        raise UserError(f"no checkpoint in {stage_dir(stage)}: train one with python -m scripts.{STAGES[stage][1]}")
    if tag and tag not in tags:
        raise UserError(f"no {stage} checkpoint with tag {tag!r}: there are {', '.join(tags)}")
    directory = CheckpointDir(stage, tag or max(tags, key=lambda t: _last_written(stage_dir(stage) / t)))
    return directory.load(step)


def at(path: str) -> Checkpoint:
    """The checkpoint that a run noted as `path`, found again if the base folder has moved since. UserError if gone."""
    folder, tag, name = Path(path).parts[-3:]
    stage = next(stage for stage, (place, _) in STAGES.items() if place == folder)
    return find(stage, tag, int(re.findall(r"\d+", name)[0]))


def load_model(
    stage: str, tag: str, step: int, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, Checkpoint]:
    """A model to evaluate or chat with, in eval mode, checked against the tokenizer; arguments as in find."""
    checkpoint = find(stage, tag, step)
    checkpoint.check_tokenizer(tokenizer)
    model = checkpoint.build_model(device, dtype).eval()
    model.cast_weights()
    return model, checkpoint


def _last_written(path: Path) -> float:
    return max(p.stat().st_mtime for p in [*path.glob("step_*/manifest.json"), *path.glob("model_*.pt")])


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generators(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in states:
        torch.cuda.set_rng_state(states["rng.cuda"], device)
