"""The paper's figures, and those of the comparisons and benchmarks, from everything in a folder of results.

    python -m experiments.paper_figures results/

Figures over base models go to results/figures/: figure1.png (accuracy against layers), figure4a_figure10.png and
figure4bc.png (usage of layers), figure9.png (labels). Each folder of eval.sh gets its own in its figures/. What a
program of experiments/ or benchmarks/ wrote as NAME.json is drawn beside it as NAME.png: figure5.png, sweep.png
(Figure 6), figure7_curves.png and figure8_curves.png (Figures 7 and 8), other ablations, compared methods, latency.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from drllm.errors import UserError, main_guard
from drllm.files import check_output_folder
from drllm.paper.experiment_figures import draw_experiment
from drllm.paper.figures import draw_comparison, draw_over_models
from drllm.paper.result_files import experiment_files, find_evaluations, reading_result


def draw_all(results: Path, output: Path) -> list[Path]:
    """Draws all figures that the files below `results` allow; those over base models go to `output`.

    Raises:
        UserError: a file of results is damaged.
    """
    evaluations = find_evaluations(results)
    drawn = draw_over_models(evaluations, output)
    for evaluated in evaluations:
        drawn += draw_comparison(evaluated.folder, evaluated.folder / "figures")
    for path, content in experiment_files(results):
        with reading_result(path):
            drawn += draw_experiment(content, path.with_suffix(".png"))
    return drawn


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Draws the figures and prints their paths."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results", type=Path, nargs="?", default=Path("results"), help="folder of results (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the figures over base models; default: figures/ below the results"
    )
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        raise UserError(f"{args.results} does not exist; eval.sh writes results")
    output = args.output or args.results / "figures"
    check_output_folder(output, "--output")
    drawn = draw_all(args.results, output)
    if not drawn:
        raise UserError(f"nothing below {args.results} has a figure: no folder of eval.sh, no JSON of experiments/")
    for path in drawn:
        print(path)


if __name__ == "__main__":
    raise SystemExit(main())
