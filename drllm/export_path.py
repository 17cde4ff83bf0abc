"""Writes one path as a stock Hugging Face checkpoint, for engines that do not know routers (docs/serving.md).

    python -m drllm.export_path MODEL_OR_CHECKPOINT --path "skip 19; repeat 17" --output_dir FOLDER

Of a routed checkpoint the base weights are taken. A repeated block is written twice. With `--format mergekit` the
folder gets mergekit's passthrough configuration instead, and no weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from drllm.arguments import add_shared
from drllm.errors import main_guard
from drllm.stock_checkpoint import Source, export_checkpoint, export_mergekit


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m drllm.export_path", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub name of a base model or a routed checkpoint")
    parser.add_argument("--path", required=True, help='edits of the default path, e.g. "skip 10-13; repeat 17"')
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for what is written")
    parser.add_argument(
        "--format",
        choices=("checkpoint", "mergekit"),
        default="checkpoint",
        help="what is written (default: %(default)s)",
    )
    add_shared(parser, "revision")
    parser.add_argument("--max_shard_size", default="5GB", help="size of one file of weights (default: %(default)s)")
    args = parser.parse_args(argv)
    source = Source(args.model, args.revision)
    if args.format == "mergekit":
        print(export_mergekit(source, args.path, args.output_dir))
    else:
        print(export_checkpoint(source, args.path, args.output_dir, args.max_shard_size))


if __name__ == "__main__":
    raise SystemExit(main())
