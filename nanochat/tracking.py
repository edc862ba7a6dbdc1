"""
Experiment trackers for --run: wandb, trackio and mlflow behind one small class.

    tracker = Tracker("mlflow", run="first", group="base_train-d12", run_id="5f3a…", config=config, resumed=False)
    tracker.log(10, {"train/loss": 3.2})
    tracker.finish({"val/bpb": 0.9})

The metrics file is the record of a run, and a tracker is a copy of it: a tracker that fails is given up with one line,
and training continues. Metrics are sent from a thread, so that training does not wait for a network either.

`run_id` is saved in the checkpoints (run.py), and a resumed run continues under the same id in every tracker.
"""

import os
import queue
import re
import threading
import time
from importlib.util import find_spec
from typing import Any, Protocol

from nanochat.common import UserError, base_dir

PROJECT = "nanochat"
PACKAGES = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow-skinny sqlalchemy alembic"}  # what pip installs
INIT_SECONDS = 30  # for wandb's server to respond at the start
FINISH_SECONDS = 120  # at the end of a run, for what has not been sent yet
MLFLOW_PARAMS_PER_CALL = 100  # limits of its REST API
MLFLOW_VALUE_LENGTH = 5000


def check_tracker(name: str, run: str) -> None:
    """UserError unless a run with these flags --tracker and --run can be tracked; "" for both = no tracker."""
    if name and name not in BACKENDS:
        raise UserError(f"--tracker {name}: use one of {', '.join(BACKENDS)}")
    if name and not run:
        raise UserError(f"--tracker {name} needs a name for the run: add --run NAME")
    if run:
        name = name or "wandb"
        if find_spec(name) is None:
            raise UserError(f"--run logs to {name}, which is not installed: pip install {PACKAGES[name]}")


class Backend(Protocol):
    """What Tracker needs of a package. The methods may raise anything."""

    def __init__(self, *, run: str, group: str, run_id: str, config: dict[str, Any], resumed: bool) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self, numbers: dict[str, Any]) -> None: ...


class Tracker:
    """Sends the metrics of one run to a tracker. Never raises: the first failure prints a line and ends tracking."""

    def __init__(self, name: str, *, run: str, group: str, run_id: str, config: dict[str, Any], resumed: bool) -> None:
        """run_id: 8 or more letters and digits, the same when the run is resumed. config: saved with the run."""
        self.name = name
        self.calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self.failed = False
        try:
            self.backend: Backend = BACKENDS[name](run=run, group=group, run_id=run_id, config=config, resumed=resumed)
        except Exception as error:  # noqa: BLE001  no failure of a tracker may end a training run
            self._give_up(error)
        self.thread = threading.Thread(target=self._send, name=name, daemon=True)
        self.thread.start()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs the metrics that are numbers."""
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        if not self.failed:
            self.calls.put(("log", (step, numbers)))

    def finish(self, numbers: dict[str, Any]) -> None:
        """Ends the run with its final numbers and waits until everything is sent, for up to FINISH_SECONDS."""
        self.calls.put(("finish", (numbers,)))
        self.calls.put(None)
        self.thread.join(FINISH_SECONDS)
        if self.thread.is_alive():
            self._give_up(TimeoutError(f"it did not take everything within {FINISH_SECONDS} s"))

    def _send(self) -> None:
        while (call := self.calls.get()) and not self.failed:
            method, arguments = call
            try:
                getattr(self.backend, method)(*arguments)
            except Exception as error:  # noqa: BLE001  as above
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"{self.name} failed ({problem}): this run is not tracked any more, but its metrics file is", flush=True)


class Wandb:
    """https://docs.wandb.ai. Without an account or network it logs offline, for a later `wandb sync`."""

    def __init__(self, *, run: str, group: str, run_id: str, config: dict[str, Any], resumed: bool) -> None:
        import wandb

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_SECONDS))  # otherwise it waits for the network forever
        options: Any = {"project": PROJECT, "name": run, "group": group, "config": config, "dir": str(base_dir())}
        options |= {"id": run_id, "resume": "allow" if resumed else None}
        options["settings"] = wandb.Settings(init_timeout=INIT_SECONDS)
        try:
            self.run = wandb.init(**options)
        except wandb.errors.Error as error:
            problem = " ".join(str(error).split())[:200]
            print(f"wandb is not reachable ({problem}); logging offline, upload later with `wandb sync`", flush=True)
            wandb.teardown()  # otherwise the failed start still holds the id
            self.run = wandb.init(**options, mode="offline")
        # The server has the steps between the checkpoint and the interruption. They are repeated exactly, and wandb
        # would print a warning for each.
        self.first_step = self.run.step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self.first_step:
            self.run.log(metrics, step=step)

    def finish(self, numbers: dict[str, Any]) -> None:
        self.run.summary.update(numbers)
        self.run.finish()


class Trackio:
    """https://huggingface.co/docs/trackio: local, shown by `trackio show`; $TRACKIO_SPACE_ID = on a Space."""

    def __init__(self, *, run: str, group: str, run_id: str, config: dict[str, Any], resumed: bool) -> None:
        import trackio

        # Runs are found by their name. Stages share the one given by the user, so it is not enough.
        name = f"{run}-{run_id}"
        resume = "allow" if resumed else "never"
        self.run = trackio.init(PROJECT, name=name, group=group, config=config, resume=resume, embed=False)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def finish(self, numbers: dict[str, Any]) -> None:
        self.run.log({f"final/{name}": value for name, value in numbers.items()})
        self.run.finish()


class Mlflow:
    """https://mlflow.org: on the server $MLFLOW_TRACKING_URI, by default in a database file in the base folder."""

    def __init__(self, *, run: str, group: str, run_id: str, config: dict[str, Any], resumed: bool) -> None:
        # The defaults, 120 s and 7 retries, would delay the start by minutes if the server does not answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{base_dir().resolve()}/mlflow.db"
        print(f"mlflow: logging to {uri}; `mlflow ui --backend-store-uri {uri}` shows a local one", flush=True)
        self.mlflow = mlflow
        self.client = mlflow.MlflowClient(uri)
        experiment = self.client.get_experiment_by_name(PROJECT)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(PROJECT)
        # mlflow chooses the ids of its runs, so that a resumed one is found by a tag.
        found = self.client.search_runs([experiment_id], f"tags.run_id = '{run_id}'") if resumed else []
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {"run_id": run_id, "group": group}
            self.id = self.client.create_run(experiment_id, run_name=run, tags=tags).info.run_id
            self._log_config(config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        points = [self.mlflow.entities.Metric(_mlflow_name(name), value, now, step) for name, value in metrics.items()]
        self.client.log_batch(self.id, metrics=points)

    def finish(self, numbers: dict[str, Any]) -> None:
        for name, value in numbers.items():
            self.client.set_tag(self.id, f"final.{_mlflow_name(name)}", str(value)[:MLFLOW_VALUE_LENGTH])
        self.client.set_terminated(self.id)

    def _log_config(self, config: dict[str, Any]) -> None:
        params = [
            self.mlflow.entities.Param(_mlflow_name(name), str(value)[:MLFLOW_VALUE_LENGTH])
            for name, value in flatten(config).items()
        ]
        for start in range(0, len(params), MLFLOW_PARAMS_PER_CALL):
            self.client.log_batch(self.id, params=params[start : start + MLFLOW_PARAMS_PER_CALL])


BACKENDS: dict[str, type[Backend]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> flatten({"flags": {"depth": 12}, "dtype": "bfloat16"})
    {'flags.depth': 12, 'dtype': 'bfloat16'}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)  # names such as pass@8 are not allowed
