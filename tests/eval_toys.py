"""Random models, local rows and lm-eval tasks over them: what the tests of the evaluation run on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from unittest import mock

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from drllm.evaluation.lm_eval_model import RoutedLM
from tests.search_toys import LETTERS, WORDS, make_model
from train_models import retrofit

EVAL_TASKS = Path(__file__).parents[1] / "eval_tasks"

# Options of several tokens, of one token, and a generation that stops at a string.
TASKS = {
    "toy_choice": """
task: toy_choice
output_type: multiple_choice
doc_to_text: question
doc_to_choice: options
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "toy_label": """
task: toy_label
output_type: multiple_choice
doc_to_text: question
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "toy_stop": """
task: toy_stop
output_type: generate_until
doc_to_text: question
doc_to_target: word
generation_kwargs: {until: ["C"], max_gen_toks: 9, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "toy_rolling": """
task: toy_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list:
  - {metric: word_perplexity}
""",
}


def make_base(folder: Path, stock_model) -> Path:
    """A plain checkpoint whose greedy answers depend on the path; `stock_model` is the fixture."""
    return make_model(folder, stock_model)


def make_routed(base: Path, folder: Path, seed: int = 0) -> Path:
    """A routed checkpoint on `base` whose random routers choose all three actions, differently by prompt."""
    model = retrofit(str(base), dtype=torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in model.model.routers:
            for layer in router.layers:
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.copy_(torch.tensor([-2.0, 3.0, 0.0]))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def make_tasks(folder: Path, count: int = 5, seed: int = 0) -> Path:
    """In `folder`: test rows of the in-domain sets, and the YAML of `TASKS` over rows of their own."""
    choose = random.Random(seed)

    def text(longest: int = 14) -> str:
        return " ".join(choose.choices(WORDS, k=choose.randint(1, longest)))

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    folder.mkdir(parents=True, exist_ok=True)
    for stem in ("arc_easy", "arc_challenge"):
        rows = []
        for _ in range(count):
            labels = LETTERS[: choose.randint(3, 4)]
            choices = {"text": choose.sample(WORDS, len(labels)), "label": labels}
            rows.append({"question": text(), "choices": choices, "answerKey": choose.choice(labels)})
        write(f"{stem}_test.jsonl", rows)
    levels = [1 + number % 5 for number in range(5 * count)]
    write(
        "dart_math_test.jsonl",
        [{"query": text(), "gt_ans": str(choose.randrange(6)), "query_metadata": {"level": n}} for n in levels],
    )
    rows = [
        {
            "question": text(),
            "options": [text(4) for _ in range(choose.randint(2, 5))],
            "gold": choose.randrange(2),
            "word": choose.choice(WORDS),
        }
        for _ in range(count)
    ]
    write("rows.jsonl", rows)
    for name, yaml in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {folder / 'rows.jsonl'}}}\ntest_split: train\n"
        (folder / f"{name}.yaml").write_text(yaml + source)
    return folder


def evaluate(lm, folder: Path, tasks: list[str], **options) -> dict:
    """lm-eval's results of `lm` (a model object) on tasks of `folder` and of `eval_tasks/`."""
    manager = TaskManager(
        include_path=[str(EVAL_TASKS), str(folder)], include_defaults=False, metadata={"data_dir": str(folder)}
    )
    # lm-eval records the machine with each result and asks pip for it, which takes longer than these tests.
    with mock.patch("lm_eval.evaluator.add_env_info"):
        return simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def routed_lm(checkpoint: Path, batch_size: int | str = 1, **arguments) -> RoutedLM:
    """The model under test on the CPU, in fp32."""
    return RoutedLM(str(checkpoint), dtype="float32", device="cpu", batch_size=batch_size, **arguments)


def stock_lm(checkpoint: Path, batch_size: int = 1) -> HFLM:
    """lm-eval's own model on the CPU, in fp32."""
    return HFLM(str(checkpoint), dtype="float32", device="cpu", batch_size=batch_size)


class HookCounter:
    """Counts the rows that run through each block of a model, and the calls."""

    def __init__(self, model):
        self.rows = self.calls = 0
        for layer in model.model.layers:
            layer.register_forward_hook(self._count)

    def _count(self, module, inputs, output):
        self.rows += inputs[0].shape[0]
        self.calls += 1


def metrics(results: dict) -> dict[str, dict]:
    """Metrics by task and group, without the labels that lm-eval adds."""
    return {
        task: {name: value for name, value in found.items() if isinstance(value, float)}
        for task, found in results["results"].items()
    }


def responses(results: dict) -> dict[str, list]:
    """Raw responses by task, in the order of the documents."""
    return {
        task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in results["samples"].items()
    }


def make_run(folder, name, correct, blocks, paths=("1111",), base_model=None):
    """A run of eval.sh on disk: `correct` and `blocks` are task -> values by document."""
    run = folder / name
    (run / "samples").mkdir(parents=True)
    queries = []
    for task, values in correct.items():
        samples = [{"doc_id": n, "filter": "none", "acc": value} for n, value in enumerate(values)]
        (run / "samples" / f"{task}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        queries += [
            {"task": task, "doc_id": n, "blocks": count, "passes": 1, "paths": list(paths)}
            for n, count in enumerate(blocks[task])
        ]
    (run / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    results = {
        task: {"acc,none": sum(values) / len(values), "acc_stderr,none": 0.25} for task, values in correct.items()
    }
    samples = {task: {"effective": len(values)} for task, values in correct.items()}
    routing = {"num_blocks": 4, "num_windows": 8, "routing_control": -0.5, "base_model_name": base_model}
    config = {"routing": routing, "model_dtype": "torch.float32", "model_fingerprint": "f"}
    (run / "results.json").write_text(json.dumps({"results": results, "config": config, "n-samples": samples}))
    (run / "run.json").write_text(json.dumps({"run": {"limit": None, "tasks": ",".join(correct)}}))
    (folder / "command.txt").write_text("./eval.sh checkpoint\n")
    return run
