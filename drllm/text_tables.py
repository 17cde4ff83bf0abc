"""Tables as text: cells, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from drllm.evaluation.results import Estimate

NOT_RUN = "not run"
EMPTY = "–"

# (header, rows): cells as text, the first one of each row its name.
Table = tuple[list[str], list[list[str]]]


def with_error(estimate: Estimate | None, scale: float = 1, digits: int = 2, signed: bool = False) -> str:
    """A mean and its standard error, e.g. "74.50 ± 1.21"; "not run" for None.

    Args:
        estimate: the mean, with or without an error.
        scale: factor of both, 100 for percent.
        digits: decimals of both.
        signed: whether positive means carry a plus sign.
    """
    if estimate is None:
        return NOT_RUN
    error = "" if estimate.stderr is None else f" ± {scale * estimate.stderr:.{digits}f}"
    return f"{scale * estimate.mean:{'+' if signed else ''}.{digits}f}{error}"


def percent(estimate: Estimate | None, signed: bool = False) -> str:
    """`with_error` of a share in percent."""
    return with_error(estimate, 100, signed=signed)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded so that it reads well as plain text."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


_LATEX = {"%": "\\%", "_": "\\_", "#": "\\#", "&": "\\&", "±": "$\\pm$", "Δ": "$\\Delta$", "–": "--"}


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for LaTeX (booktabs)."""

    def line(row: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(letter, letter) for letter in cell) for cell in row) + " \\\\"

    columns = "l" + "r" * (len(header) - 1)
    body = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", line(header), "\\midrule", *map(line, rows)]
    return "\n".join([*body, "\\bottomrule", "\\end{tabular}", ""])
