"""Exported paths in llama.cpp: the tokens of transformers, and tokens per second beside the base model.

    python benchmarks/exported_paths.py --model out/llm/model --path "skip 19" --path "skip 10-13" \
        --output results/serving/llama_cpp.json

Each path is written by `drllm.stock_checkpoint` and made a float32 GGUF file by llama.cpp's own converter. Greedy
tokens are compared with those of the path in transformers, in float32. Then path and base decode in turn with the same
number of threads (`benchmarks/pairs.py`). Needs requirements-serving.txt and the converter (`make test-serving`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pairs import LEAST_PAIRS, run_pairs
from data_models import load_path_model
from drllm.arguments import add_shared, check_ranges
from drllm.checkpoints import load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file, check_output_folder
from drllm.loading import loading
from drllm.provenance import command_line, write_result
from drllm.questions.likelihood import likelihood_text
from drllm.questions.sets import load_questions
from drllm.stock_checkpoint import Source, export_checkpoint
from drllm.text_tables import markdown

FLOAT32 = 0  # ggml's number of the type; llama.cpp's default for keys and values is float16
CONTEXT = 1024  # tokens
CONVERTER = Path("out/llama.cpp/convert_hf_to_gguf.py")


def gguf_of(source: Source, edits: str, folder: Path, converter: Path) -> Path:
    """The GGUF file of a path, made at most once.

    Args:
        folder: keeps exported checkpoints and GGUF files, by path.
        converter: convert_hf_to_gguf.py of llama.cpp.

    Raises:
        UserError: see `export_checkpoint`; the converter fails.
    """
    name = edits.replace(" ", "-").replace(",", "").replace(";", "") or "base"
    checkpoint, file, partial = folder / name, folder / f"{name}.gguf", folder / f"{name}.partial.gguf"
    if file.exists():
        return file
    if not checkpoint.exists():
        export_checkpoint(source, edits, checkpoint)
    command = [sys.executable, converter, checkpoint, "--outfile", partial, "--outtype", "f32"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise UserError(f"{converter} failed on {checkpoint}: {finished.stderr.strip().splitlines()[-1]}")
    return partial.rename(file)


class Engine:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, threads: int) -> None:
        from llama_cpp import Llama

        # Read, not mapped: mapped files differ in speed by how they lie in the page cache.
        settings = {"use_mmap": False, "n_threads": threads, "n_threads_batch": threads}
        self._model = Llama(str(file), n_ctx=CONTEXT, type_k=FLOAT32, type_v=FLOAT32, verbose=False, **settings)

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The next `new_tokens` tokens; end-of-sequence tokens do not end them."""
        self._model.reset()
        return list(islice(self._model.generate(prompt, temp=0.0), new_tokens))

    def seconds_per_token(self, prompt: Sequence[int], new_tokens: int) -> float:
        """Seconds per token of decoding, without the prefill and the first token."""
        self._model.reset()
        tokens = self._model.generate(prompt, temp=0.0)
        next(tokens)
        start = time.perf_counter()
        count = len(list(islice(tokens, new_tokens)))
        return (time.perf_counter() - start) / count


def measure(arguments: argparse.Namespace) -> dict:
    """Everything that the JSON holds but its provenance."""
    source = Source(arguments.model)
    questions = load_questions("arc_easy", "test", arguments.data_dir)[: arguments.prompts]
    tokenizer = load_tokenizer(arguments.model)
    prompts = [tokenizer(likelihood_text(question)[0])["input_ids"] for question in questions]
    with loading(arguments.model, "model"):
        followed = load_path_model(arguments.model, dtype=torch.float32)
    files = {edits: gguf_of(source, edits, arguments.work_dir, arguments.converter) for edits in ["", *arguments.path]}

    def seconds(edits: str) -> float:
        # Loaded anew for every run: how weights lie in memory (large pages or small) matters as much as two blocks.
        return Engine(files[edits], arguments.threads).seconds_per_token(prompts[0], arguments.new_tokens)

    rows = []
    for edits in files:  # first, while the machine is quiet
        sides = [functools.partial(seconds, side) for side in ("", edits)]
        times = run_pairs(*sides, arguments.pairs, edits or "base")
        blocks = len(source.layer_indices(edits))
        rows.append(
            {
                "path": edits,
                "blocks": blocks,
                "blocks_ratio": source.config["num_hidden_layers"] / blocks,
                "file_bytes": files[edits].stat().st_size,
                "tokens_per_second": 1 / statistics.median(times.ours),
                "tokens_per_second_of_base": 1 / statistics.median(times.reference),
                "speed": times.record(),
            }
        )
    for row, (edits, file) in zip(tqdm(rows, desc="tokens", unit="path"), files.items(), strict=True):
        engine = Engine(file, arguments.threads)
        settings = {"layer_indices": source.layer_indices(edits), "max_new_tokens": arguments.new_tokens}
        row["prompts_with_equal_tokens"] = sum(
            _greedy(followed, prompt, **settings) == engine.greedy(prompt, arguments.new_tokens) for prompt in prompts
        )
    return {
        "prompts": len(prompts),
        "new_tokens": arguments.new_tokens,
        "engine_threads": arguments.threads,
        "rows": rows,
    }


def _greedy(model, prompt: Sequence[int], **settings) -> list[int]:
    """The tokens of transformers; end-of-sequence tokens do not end them."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, **settings)
    return output[0, len(prompt) :].tolist()


def table(result: dict) -> str:
    """One row per path, as Markdown."""
    header = [
        "path",
        "blocks",
        "prompts with equal tokens",
        "tokens/s",
        "tokens/s of the base",
        "ratio",
        "ratio of blocks",
    ]
    cells = []
    for row in result["rows"]:
        problems = f" unusable: {'; '.join(row['speed']['problems'])}" if row["speed"]["problems"] else ""
        speeds = [f"{row[name]:.2f}" for name in ("tokens_per_second", "tokens_per_second_of_base")]
        ratios = [f"{row['speed']['ratio']:.3f}{problems}", f"{row['blocks_ratio']:.3f}"]
        equal = f"{row['prompts_with_equal_tokens']} of {result['prompts']}"
        cells.append([row["path"] or "base", str(row["blocks"]), equal, *speeds, *ratios])
    return markdown(
        [*header, "GGUF, MB"],
        [[*cell, f"{row['file_bytes'] / 1e6:.1f}"] for cell, row in zip(cells, result["rows"], strict=True)],
    )


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Measures, prints, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_shared(parser, "model", required=True)
    add("--path", action="append", default=[], help='path beside the base, e.g. "skip 19"; repeatable')
    add_shared(parser, "data_dir", says="the Hub")
    add("--prompts", type=int, default=20, help="test questions of ARC-Easy that are prompts (default: %(default)s)")
    add("--new_tokens", type=int, default=32, help="tokens per prompt (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads of llama.cpp (default: %(default)s)")
    add("--pairs", type=int, default=LEAST_PAIRS, help="runs of each side, in turn (default: %(default)s)")
    add("--converter", type=Path, default=CONVERTER, help="convert_hf_to_gguf.py of llama.cpp (default: %(default)s)")
    add_shared(parser, "work_dir", Path("out/llama_cpp"))
    add_shared(parser, "output", required=True)
    arguments = parser.parse_args(argv)
    some = (1, math.inf)
    check_ranges(arguments, prompts=some, new_tokens=(1, CONTEXT // 2), threads=some, pairs=some)
    check_output_file(arguments.output, "--output")
    check_output_folder(arguments.work_dir, "--work_dir")
    if importlib.util.find_spec("llama_cpp") is None or not arguments.converter.is_file():
        raise UserError(
            f"llama_cpp or {arguments.converter} is not installed; run make test-serving, which builds both"
        )
    start = time.perf_counter()
    result = measure(arguments)
    about = {"command": command_line("python benchmarks/exported_paths.py", argv), "seed": None}
    write_result(arguments.output, result, **about, seconds=time.perf_counter() - start, table=table(result))


if __name__ == "__main__":
    raise SystemExit(main())
