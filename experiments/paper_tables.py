"""The paper's Tables 2 to 6, and the numbers of its text, with our numbers beside the paper's.

    python -m experiments.paper_tables results/            # everything below it -> results/tables/

Reads the folders of eval.sh, with the manifests of their labels, and the JSON of experiments/ablations.py. Writes
table2.md to table6.md, and the same tables for LaTeX, with paper / ours / difference in every cell, and text.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from drllm.errors import UserError, main_guard
from drllm.files import check_output_folder
from drllm.paper.tables import write_paper_tables
from drllm.paper.text_numbers import write_text_table


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Writes the tables and prints them."""
    parser = argparse.ArgumentParser(prog="python -m experiments.paper_tables", description=__doc__.split("\n")[0])
    parser.add_argument(
        "results", type=Path, nargs="?", default=Path("results"), help="folder of results (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="folder of the tables (default: tables/ below the results)")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        raise UserError(f"{args.results} does not exist; eval.sh writes results")
    output = args.output or args.results / "tables"
    check_output_folder(output, "--output")
    for path in write_paper_tables(args.results, output):
        print(path.read_text())
        print(f"wrote {path} and {path.with_suffix('.tex')}\n")
    if path := write_text_table(args.results, output):
        print(f"{path.read_text()}\nwrote {path}")


if __name__ == "__main__":
    raise SystemExit(main())
