"""Runs transformers' own model tests, from its source distribution on PyPI, on the stock classes and on ours.

usage: python tests/train_models/compat/stock_suite.py [--work_dir DIR] [--families llama qwen2 qwen3] [-n PROCESSES]

Prints the counts of each family and every failure that is not a documented refusal (train_models/README.md lists them);
the exit status is 1 when there is one. The generation and export suites are not in the distribution.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[3]

# How the sentences of documented refusals begin: a failure with one of them asks for what the method cannot give.
REFUSALS = ("ValueError: output_attentions is not offered",)

# Modules that the distribution lacks and test_modeling_common.py imports.
STUBS = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}

TESTS = """
import unittest

from transformers import {family}Config, {family}ForCausalLM, {family}Model
from train_models import Routed{family}Config, Routed{family}ForCausalLM, Routed{family}Model

from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

SIZES = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
SIZES |= dict(intermediate_size=37, max_position_embeddings=512, head_dim=16, pad_token_id=0, bos_token_id=1)


class Tester:
    batch_size, seq_length, is_training = 13, 7, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 2, 32
    fields = dict()

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        return self.config_class(**SIZES, eos_token_id=2, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = dict(input_ids=ids_tensor(shape, 99), attention_mask=random_attention_mask(shape))
        return self.get_config(), inputs


class Stock(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    config_class, all_model_classes = {family}Config, ({family}Model, {family}ForCausalLM)

    def setUp(self):
        self.model_tester = Tester(self.config_class)

    def test_config(self):
        ConfigTester(self, config_class=self.config_class, hidden_size=32).run_common_tests()


class Ours(Stock):
    config_class, all_model_classes = Routed{family}Config, (Routed{family}Model, Routed{family}ForCausalLM)
    test_all_params_have_gradient = False  # the loss on labels trains no router

    def setUp(self):
        super().setUp()
        # The inputs are not seeded, and on one in ten both of the two blocks are skipped by random routers. Then no
        # scaling of positions changes the output, which these tests require.
        if "rope_scaling" in self._testMethodName:
            self.model_tester.fields = dict(is_static_routing=True)

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        # The stock test replaces what is recomputed by the last run of the block, so each block must run once. Paths
        # are in test_gradient_checkpointing_gives_the_same_gradients_along_paths.
        self.model_tester.fields = dict(is_static_routing=True)
        super().check_training_gradient_checkpointing(*args, **kwargs)
"""


def unpacked_suite(folder: Path, release: str) -> Path:
    """The package `stock_tests` below `folder`: the test modules of the release and what they lack."""
    package = folder / "stock_tests"
    if not (package / "test_modeling_common.py").exists():
        requirement = f"transformers=={release}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, "--dest", str(folder), requirement], check=True)
        package.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"transformers-{release}.tar.gz") as archive:
            for member in archive:
                name = member.name.partition("/tests/")[2]
                if member.isfile() and name.startswith("test_") and name.endswith(".py"):
                    (package / name).write_bytes(archive.extractfile(member).read())
    if not (folder / "parameterized").exists():  # the one package that the suite needs beside those of this project
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "parameterized"]
        subprocess.run(pip, check=True)
    for name, content in STUBS.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(content)
    return package


def outcomes(report: Path) -> dict[str, dict[str, set[str]]]:
    """{"Stock" or "Ours": {test: {"passed", "skipped" and first lines of failures, its own and its subtests'}}}."""
    results: dict[str, dict[str, set[str]]] = {"Stock": {}, "Ours": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        which = case.get("classname").rpartition(".")[2]
        problems = [child.get("message", "failed") for child in case if child.tag in ("failure", "error")]
        if which not in results:
            raise SystemExit(f"the suite did not start, see {report.with_suffix('.log')}: {problems}")
        lines = {(problem.splitlines() or ["failed"])[0] for problem in problems}
        outcome = lines or {"skipped" if case.find("skipped") is not None else "passed"}
        results[which].setdefault(case.get("name"), set()).update(outcome)
    return results


def summary(tests: dict[str, set[str]], refusals: tuple[str, ...]) -> tuple[str, dict[str, list[str]]]:
    """(one line of counts, {test: failures that begin like none of `refusals`})."""
    failures = {test: seen - {"passed", "skipped"} for test, seen in tests.items()}
    others = {test: sorted(f for f in seen if not f.startswith(refusals)) for test, seen in failures.items()}
    others = {test: seen for test, seen in others.items() if seen}
    failed = sum(bool(seen) for seen in failures.values())
    passed = sum("passed" in seen and not failures[test] for test, seen in tests.items())
    skipped = len(tests) - passed - failed
    counts = (
        f"{passed} passed, {skipped} skipped, {failed - len(others)} documented refusals, {len(others)} other failures"
    )
    return counts, others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, help="keep the suite here (default: a temporary folder)")
    parser.add_argument("--families", nargs="+", default=["llama", "qwen2", "qwen3"])
    parser.add_argument("-n", "--processes", type=int, default=0)
    parser.add_argument("-k", "--select", default="", help="run only tests that match, as in pytest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.work_dir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        package = unpacked_suite(folder, transformers.__version__)
        unexpected = 0
        for name in arguments.families:
            family = name.capitalize()
            file = package / f"test_{name}.py"
            file.write_text(TESTS.format(family=family))
            report = folder / f"{name}.xml"
            options = ["-q", "-n", str(arguments.processes), "-p", "no:cacheprovider", f"--junitxml={report}"]
            options += ["--rootdir", str(folder), "--import-mode=prepend", "-k", arguments.select, "--tb=short"]
            command = [sys.executable, "-m", "pytest", "-c", "/dev/null", *options, str(file)]
            environment = {"PYTHONPATH": f"{ROOT}:{folder}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            log = folder / f"{name}.log"
            with log.open("w") as output:
                subprocess.run(["env", *(f"{k}={v}" for k, v in environment.items()), *command], stdout=output)
            results = outcomes(report)
            for which, tests in results.items():
                counts, others = summary(tests, REFUSALS if which == "Ours" else ())
                print(f"{name} {which}: {counts}", flush=True)
                for test, failures in others.items():
                    print(f"    {test}: {failures[0][:200]}")
                unexpected += len(others) if which == "Ours" else 0
    print(f"failures that are not documented refusals: {unexpected}")
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
