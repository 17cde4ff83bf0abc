"""A plain Hugging Face checkpoint from a GGUF file of a Llama, Qwen2 or Qwen3 model.

    python -m drllm.gguf_checkpoint MODEL.gguf --output_dir models/NAME [--sha256 DIGEST]

The weights are de-quantised once; what is written loads everywhere a checkpoint of the Hub does. Needs the package
`gguf` (requirements-llm.txt). A finished folder is kept; a stopped run leaves nothing behind but a .partial folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from drllm.arguments import add_shared
from drllm.errors import UserError, main_guard
from drllm.files import check_output_folder, disk_errors, write_json
from drllm.provenance import dtype_name, parse_dtype

SOURCE = "gguf.json"  # beside the checkpoint: which file it was made from


def sha256_of(path: Path) -> str:
    """The SHA-256 digest of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(source: Path, output_dir: Path, sha256: str | None, dtype: torch.dtype) -> None:
    """Writes the checkpoint.

    Args:
        source: the GGUF file.
        output_dir: created; there only when it is complete.
        sha256: digest that the file must have; None accepts any file.
        dtype: dtype of the de-quantised weights.

    Raises:
        UserError: no such file, another digest, a damaged file or an architecture that transformers cannot read, a
            missing package, a full disk.
    """
    if not source.is_file():
        raise UserError(f"{source} does not exist; name a .gguf file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is not installed; run pip install -r requirements-llm.txt")
    digest = sha256_of(source)
    if sha256 is not None and digest != sha256:
        raise UserError(f"{source} has the SHA-256 digest {digest}, not {sha256}; download it again")
    partial = output_dir.with_name(output_dir.name + ".partial")
    with tqdm(total=3, desc="converting", unit="step") as progress:
        try:
            model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)
            progress.update()
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            progress.update()
        except Exception as error:  # the reader raises whatever it stumbles over
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot read {source} ({type(error).__name__}: {reason}); is it a whole GGUF file?"
            ) from error
        # save_pretrained refuses a model that still counts as quantised.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        with disk_errors(output_dir):
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            write_json(partial / SOURCE, {"file": source.name, "sha256": digest, "dtype": dtype_name(dtype)})
            partial.rename(output_dir)
        progress.update()


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m drllm.gguf_checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="a .gguf file")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--sha256", help="digest that the file must have")
    add_shared(parser, "dtype", "float32")
    args = parser.parse_args(argv)
    dtype = parse_dtype(args.dtype)
    check_output_folder(args.output_dir, "--output_dir")
    if (args.output_dir / SOURCE).is_file():
        print(f"{args.output_dir} is complete already")
        return
    if args.output_dir.exists():
        raise UserError(f"{args.output_dir} exists and was not written by this program; name another --output_dir")
    convert(args.source, args.output_dir, args.sha256, dtype)
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    raise SystemExit(main())
