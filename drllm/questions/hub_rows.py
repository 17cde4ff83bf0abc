"""Rows of data sets on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from drllm.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def hub_rows(
    path: str, configs: Sequence[str | None], split: str, columns: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where a row stands, row) of some configurations of a data set.

    Args:
        path, configs, split: names on the Hub; None is the default configuration.
        columns: read only these, as far as they are there, and of equal rows the first one; empty: whole rows, all.

    Raises:
        UserError: the data set cannot be had.
    """
    import datasets

    for config in configs:
        name = f"{path} ({config or 'default'}, {split})"
        try:
            dataset = datasets.load_dataset(path, config, split=split)
        except Exception as error:
            raise UserError(
                f"could not load {name} from the Hugging Face Hub ({type(error).__name__}: {str(error)[:200]}); "
                "check the connection, or pass --data_dir with local files of the same schema"
            ) from error
        if columns:
            dataset = dataset.select_columns([column for column in columns if column in dataset.column_names])
            # `datasets` keeps the result on disk, so one process computes it once, for all others and later runs.
            dataset = dataset.with_format("arrow").map(distinct, batched=True, batch_size=None).with_format(None)
        for number, row in enumerate(dataset):
            yield f"{name}, {'distinct ' * bool(columns)}row {number}", row


def distinct(table: pa.Table) -> pa.Table:
    """The first of equal rows, in the order of the table.

    The DART pool repeats 7,495 questions in 1.6 million rows; read one by one they take minutes.
    """
    import pyarrow as pa

    flat = table.flatten()  # columns of records cannot be grouped by
    numbered = flat.append_column("place", pa.array(range(table.num_rows)))
    groups = numbered.group_by(flat.column_names, use_threads=False).aggregate([("place", "min")])
    return table.take(groups["place_min"].sort())
