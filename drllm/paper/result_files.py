"""What lies in a folder of results: evaluations, searches and the JSON files of the programs in experiments/."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.evaluation.results import BASE, ROUTER, Run, load_runs
from drllm.files import read_json
from drllm.manifests import CHECKPOINT_MANIFEST, Manifest, read_checkpoint_manifests
from drllm.paper.numbers import paper_models

# Files of eval.sh, which `find_evaluations` reads.
WRITE_AGAIN = "delete it, or run the command that wrote it again"
_FILES_OF_RUNS = {"results.json", "run.json", "labels_manifest.json"}


@dataclass(frozen=True)
class Evaluated:
    """One folder of eval.sh.

    Attributes:
        model: the paper's name of the base model in Table 3; for other base models, the folder's path in the results.
        folder: where the runs are.
        base, routers: the base run, and those of the checkpoints.
    """

    model: str
    folder: Path
    base: Run
    routers: tuple[Run, ...]

    def runs(self, row: str) -> tuple[Run, ...]:
        """The runs whose mean is shown in `row`: "base" or "+ router"."""
        return (self.base,) if row == BASE else self.routers

    @property
    def command(self) -> str | None:
        """The command line of eval.sh."""
        path = self.folder / "command.txt"
        return path.read_text().strip() if path.is_file() else None


def find_evaluations(results: Path) -> list[Evaluated]:
    """All folders of eval.sh below `results`, by path.

    Raises:
        UserError: a folder has a routed run without its base, or a damaged file.
    """
    names = {model["id"]: model["paper"] for model in paper_models()}
    evaluations = []
    for record in sorted(results.rglob(f"{ROUTER}/run.json")):
        folder = record.parent.parent
        base, *others = load_runs(folder)
        routers = tuple(run for run in others if run.name.startswith(ROUTER))
        base_model = routers[0].results["config"]["routing"].get("base_model_name")
        path = folder.relative_to(results) if folder != results else Path(folder.resolve().name)
        evaluations.append(Evaluated(names.get(base_model, str(path)), folder, base, routers))
    return evaluations


def find_searches(evaluations: list[Evaluated]) -> list[Manifest]:
    """The manifests of the labels behind `evaluations`, each search once."""
    searches: dict[str, Manifest] = {}
    for evaluated in evaluations:
        for manifest in read_checkpoint_manifests(evaluated.folder):
            if "table2" in manifest.results:
                table = manifest.results["table2"]
                with reading_result(evaluated.folder / CHECKPOINT_MANIFEST):  # everything that is read of it later
                    search_command(manifest)
                    for row in table:
                        sum(value for name, value in row.items() if name != "set") + len(row["set"])
                identity = [manifest.model_fingerprint, manifest.arguments, manifest.seed, table]
                searches.setdefault(json.dumps(identity), manifest)
    return list(searches.values())


def search_command(manifest: Manifest) -> str | None:
    """The command that repeats the search of a labels' manifest, None for manifests without arguments."""
    if not manifest.arguments:
        return None
    options = dict(manifest.arguments)
    options["dataset"] = ",".join(options["dataset"])
    options |= {"revision": manifest.revision, "data_dir": manifest.data_dir or None, "seed": manifest.seed}
    options |= {"dtype": manifest.dtype or None, "chat_template": "on" if manifest.chat_template else "off"}
    command = ["python", manifest.program, "--model", manifest.model]
    for name, value in options.items():
        if isinstance(value, dict):  # a number per set
            value = ",".join(f"{key}={number}" for key, number in value.items())
        if value is True:
            command.append(f"--{name}")
        elif value is not None and value is not False:
            command += [f"--{name}", str(value)]
    return shlex.join(command)


@contextlib.contextmanager
def reading_result(path: Path) -> Iterator[None]:
    """Turns a missing field, or one of another type, in the JSON object of `path` into one sentence.

    Raises:
        UserError: in place of the error that reading the field causes.
    """
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, StopIteration) as error:
        problem = f"no field {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: a field is missing or damaged ({problem}); {WRITE_AGAIN}") from error


def experiment_files(results: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(path, content) of the other JSON objects below `results`, by path; checkpoints are left out.

    Raises:
        UserError: a file is damaged.
    """
    for path in sorted(results.rglob("*.json")):
        if path.name in _FILES_OF_RUNS or (path.parent / "config.json").is_file():
            continue
        content = read_json(path, WRITE_AGAIN, object)
        if isinstance(content, dict):
            yield path, content
