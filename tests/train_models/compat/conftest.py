"""Other releases of transformers, each in a folder of its own beside the installed packages."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement


def pytest_addoption(parser):
    parser.addoption("--releases_dir", type=Path, help="keep the installed releases of transformers in this folder")


def _pip_install(folder: Path, *requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", str(folder), *requirements], check=True)


def _unsatisfied(folder: Path, release: str) -> list[str]:
    """The requirements of the release that the installed packages do not meet, e.g. an older huggingface-hub."""
    unsatisfied = []
    metadata = (folder / f"transformers-{release}.dist-info" / "METADATA").read_text(encoding="utf-8")
    for line in metadata.partition("\n\n")[0].splitlines():
        if not line.startswith("Requires-Dist: "):
            continue
        requirement = Requirement(line.removeprefix("Requires-Dist: "))
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            is_met = requirement.specifier.contains(version(requirement.name))
        except PackageNotFoundError:
            is_met = False
        if not is_met:
            unsatisfied.append(f"{requirement.name}{requirement.specifier}")
    return unsatisfied


@pytest.fixture(scope="session")
def run_under(request, tmp_path_factory):
    """(release, program, *arguments) -> the finished process: `program` in a Python that sees that transformers."""
    releases = request.config.getoption("--releases_dir", default=None) or tmp_path_factory.mktemp("releases")

    def run(release: str, program: Path, *arguments: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if release != distribution("transformers").version:
            folder = Path(releases).resolve() / release
            marker = folder / ".complete"
            if not marker.exists():
                _pip_install(folder, f"transformers=={release}")
                if older := _unsatisfied(folder, release):
                    _pip_install(folder, *older)
                marker.touch()
            environment["PYTHONPATH"] = str(folder)
        environment["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
        environment["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, str(program), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    return run
