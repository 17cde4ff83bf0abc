"""Runs that stopped: which run a folder holds, and where it can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from drllm.errors import UserError
from drllm.files import disk_errors, is_whole, read_json, write_whole
from drllm.labels import Example
from drllm.processes import from_main
from drllm.training.config import RouterTrainingConfig
from drllm.training.data import TrainingLabels

RECORD, RUN, LOCK = "training.json", "run.json", "lock"
# Fields that do not change the trained weights.
_NOT_IDENTITY = (
    "data",
    "run_name",
    "output_dir",
    "features_dir",
    "feature_batch_size",
    "logging_steps",
    "report_to",
    "overwrite",
)


def run_identity(
    config: RouterTrainingConfig, labels: TrainingLabels, examples: Sequence[Example], dtype: str, processes: int
) -> dict[str, Any]:
    """What the result of a run depends on: two runs of equal identity end with equal weights."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.question, example.token_ids, example.path]).encode())
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_IDENTITY}
    # With a manifest the fingerprint identifies the model, under whatever name.
    model = labels.manifest and labels.manifest.model_fingerprint
    settings["model_id"] = None if model else config.model_id
    settings["dtype"] = dtype
    return settings | {
        "model": model,
        "labels": digest.hexdigest()[:16],
        "processes": processes,
    }


@contextlib.contextmanager
def locked(folder: Path, state: PartialState) -> Iterator[None]:
    """Keeps other trainings out of `folder` inside the context; the lock of a killed process is released.

    Raises:
        UserError: another training is running in it.
    """
    file = None

    def acquire() -> str | None:
        nonlocal file
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"another training is running in {folder.parent}; wait for it, or pass another --run_name"
        except OSError:
            return None  # a file system without locks
        return None

    try:
        if (problem := from_main(state, acquire)) is not None:
            raise UserError(problem)
        yield
    finally:
        if file is not None:
            file.close()


def finished_run(config: RouterTrainingConfig, identity: dict[str, Any], say: Callable[[str], None]) -> dict | None:
    """The record of an equal run that ended here, None when there is none.

    Raises:
        UserError: another run ended here, or its record is damaged.
    """
    path = config.checkpoint / RECORD
    if config.overwrite or not path.exists():
        return None
    fix = "pass another --run_name, or --overwrite"
    record = read_json(path, fix)
    if not isinstance(record.get("identity"), dict):
        raise UserError(f"{path}: no valid field 'identity'; {fix}")
    if record["identity"] == identity:
        say(f"{config.checkpoint} is already trained, nothing to do (--overwrite trains it again)")
        return record
    raise UserError(f"{config.checkpoint} holds another run ({_differences(record['identity'], identity)}); {fix}")


def prepare_folder(
    config: RouterTrainingConfig,
    identity: dict[str, Any],
    trainer_dir: Path,
    state: PartialState,
    say: Callable[[str], None],
) -> Path | None:
    """Makes `trainer_dir` ready for this run.

    Returns:
        The last complete checkpoint of an equal run that stopped, None to start from the beginning.

    Raises:
        UserError: the folder holds another unfinished run.
    """
    path = trainer_dir / RUN
    fix = "pass another --run_name, or --overwrite"
    previous = read_json(path, fix) if path.exists() and not config.overwrite else None
    if previous is not None and previous != identity:
        raise UserError(
            f"{config.checkpoint} holds another, unfinished run ({_differences(previous, identity)}); {fix}"
        )
    last = None
    if previous is not None:
        complete = [d for d in _trainer_checkpoints(trainer_dir) if is_complete_checkpoint(d, identity["processes"])]
        last = complete[-1] if complete else None
    # All processes read before the first one tidies up.
    state.wait_for_everyone()
    if state.is_main_process:
        with disk_errors(trainer_dir):
            for directory in _trainer_checkpoints(trainer_dir):
                if last is None or _step_of(directory) > _step_of(last):
                    shutil.rmtree(directory)
            if last is None:
                (config.checkpoint / RECORD).unlink(missing_ok=True)
            trainer_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(identity, indent=2) + "\n")
        if last is not None:
            say(f"training: resuming {config.checkpoint} from step {_step_of(last)}")
    state.wait_for_everyone()
    return last


def is_complete_checkpoint(directory: Path, processes: int = 1) -> bool:
    """Whether a checkpoint of the Trainer is complete, with the states of all processes."""
    states = list(directory.glob("rng_state*.pth"))
    archives = [directory / "optimizer.pt", directory / "scheduler.pt", *states]
    if len(states) != processes or not all(zipfile.is_zipfile(path) for path in archives):
        return False
    try:
        read_json(directory / "trainer_state.json", "")
    except UserError:
        return False
    return is_whole(directory / "model.safetensors")


def _differences(previous: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = [name for name in wanted if previous.get(name) != wanted[name]]
    return ", ".join(f"{name} {previous.get(name)} there, {wanted[name]} here" for name in names)


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("checkpoint-"))


def _trainer_checkpoints(trainer_dir: Path) -> list[Path]:
    directories = [d for d in trainer_dir.glob("checkpoint-*") if d.name.removeprefix("checkpoint-").isdigit()]
    return sorted(directories, key=_step_of)
