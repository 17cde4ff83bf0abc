"""The table of benchmarks/latency.py from its timings."""

from __future__ import annotations

import itertools
import statistics

from benchmarks.latency_runs import MEASURES, Case, Measured, Timing
from benchmarks.pairs import Pairs

PARTS = {"first": "first", "token": "tokens", "total": "total"}  # name in a row -> field of `Timing`
PAPER = {"stock_total_s": 34.49, "routed_total_s": 29.21, "router_s": 0.27}  # 1,000 new tokens

COLUMNS = [
    ("threads", "threads", "d"),
    ("batch_size", "batch", "d"),
    ("skips", "skip", "d"),
    ("repeats", "rep", "d"),
    ("rows", "rows", "s"),
    ("stock_first_s", "TTFT s", ".4f"),
    ("stock_token_s", "TPOT s", ".5f"),
    ("stock_total_s", "total s", ".3f"),
    ("first_ratio", "TTFT x", ".3f"),
    ("token_ratio", "TPOT x", ".3f"),
    ("total_ratio", "total x", ".3f"),
    ("total_paired", "total paired", ".3f"),
    ("layers_saved", "layers saved", ".1%"),
    ("saved_over_layers", "saved/layers", ".2f"),
    ("decode_saved", "decode saved", ".1%"),
    ("decode_saved_over_blocks", "saved/blocks", ".2f"),
    ("bound_on_decode_saved", "bound", ".1%"),
    ("router_share", "router", ".3%"),
    ("cache_ratio", "KV x", ".3f"),
    ("peak_ratio", "peak x", ".3f"),
    ("router_total_ratio", "routed total x", ".3f"),
    ("static_first_ratio", "static TTFT x", ".3f"),
    ("static_token_ratio", "static TPOT x", ".3f"),
    ("static_total_ratio", "static total x", ".3f"),
    ("static_first_paired", "static TTFT paired", ".3f"),
    ("static_token_paired", "static TPOT paired", ".3f"),
    ("stock_again_first_ratio", "again TTFT x", ".3f"),
    ("stock_again_token_ratio", "again TPOT x", ".3f"),
    ("stock_again_total_ratio", "again total x", ".3f"),
    ("stock_again_first_paired", "again TTFT paired", ".3f"),
    ("stock_again_token_paired", "again TPOT paired", ".3f"),
    ("compiled_token_ratio", "compiled TPOT x", ".3f"),
    ("compiled_whole_token_ratio", "compiled whole TPOT x", ".3f"),
    ("stock_compiled_token_ratio", "stock compiled TPOT x", ".3f"),
]


def passes(timings: list[Timing], field: str) -> list[float]:
    """One value per round; for `tokens` one per token of all rounds."""
    values = [getattr(timing, field) for timing in timings]
    return list(itertools.chain(*values)) if field == "tokens" else values


def median(timings: list[Timing], field: str) -> float:
    """The median of `passes`."""
    return statistics.median(passes(timings, field))


def paired(timings: list[Timing], stock: list[Timing], field: str) -> float:
    """The median of the ratios of passes that ran next to each other: on a CPU the least noisy of the figures."""
    pairs = zip(passes(timings, field), passes(stock, field), strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def noise_of(timings: dict[str, list[Timing]], load: float | None) -> dict[str, list[str]]:
    """For each run the reasons why its ratio to the stock model is unusable, from the totals of the rounds."""
    stock = tuple(timing.total for timing in timings["stock"])
    return {
        name: Pairs(stock, tuple(timing.total for timing in rounds), load).problems()
        for name, rounds in timings.items()
        if name != "stock"
    }


def report(case: Case, measured: Measured, num_blocks: int) -> dict:
    """The row of the table, and every timing that it comes from."""
    timings, peaks = measured.timings, measured.peak_bytes
    stock = timings["stock"]
    layers_saved = 1 - statistics.mean(sum(path) for path in case.paths) / num_blocks
    block_share = 1 - statistics.median(measured.without_blocks) / median(stock, "tokens")
    unused = 1 - len({block for path in case.paths for block, visits in enumerate(path) if visits}) / num_blocks
    row = {
        "batch_size": case.batch_size,
        "skips": case.skips,
        "repeats": case.repeats,
        "rows": case.rows,
        **{f"stock_{part}_s": median(stock, field) for part, field in PARTS.items()},
        "stock_cache_bytes": stock[0].cache_bytes,
        "stock_peak_bytes": peaks["stock"],
        "blocks_share_of_token": block_share,
        "layers_saved": layers_saved,
        "bound_on_decode_saved": unused * block_share,
    }
    if "path" in timings:
        row |= _of_path(timings, layers_saved, block_share)
        row["peak_ratio"] = peaks["path"] / peaks["stock"] if peaks["stock"] else None
    if "router" in timings:
        row["routed_total_s"] = median(timings["router"], "total")
        row["router_s"] = statistics.median(measured.in_routers)
        row["router_share"] = row["router_s"] / row["routed_total_s"]
    for name in MEASURES[1:]:
        for part, field in PARTS.items():
            is_timed = name in timings
            row[f"{name}_{part}_ratio"] = median(timings[name], field) / median(stock, field) if is_timed else None
            row[f"{name}_{part}_paired"] = paired(timings[name], stock, field) if is_timed else None
    row["timings"] = {name: [timing.summary() for timing in rounds] for name, rounds in timings.items()}
    return row | {"seconds_without_blocks": measured.without_blocks, "seconds_in_routers": measured.in_routers}


def _of_path(timings: dict[str, list[Timing]], layers_saved: float, block_share: float) -> dict:
    """The part of a row about the given path."""
    path, stock = timings["path"], timings["stock"]
    ratios = {part: median(path, field) / median(stock, field) for part, field in PARTS.items()}
    row = {f"{part}_ratio": ratio for part, ratio in ratios.items()}
    row["total_paired"] = paired(path, stock, "total")
    row["decode_saved"] = 1 - ratios["token"]
    row["cache_ratio"] = median(path, "cache_bytes") / median(stock, "cache_bytes")
    if layers_saved:
        row["saved_over_layers"] = (1 - ratios["total"]) / layers_saved
        row["decode_saved_over_blocks"] = (1 - ratios["token"]) / (layers_saved * block_share)
    return row


def print_table(rows: list[dict]) -> None:
    """Prints the columns that at least one row fills."""
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    print("| " + " | ".join(title for _, title, _ in columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = ("" if row.get(key) is None else format(row[key], form) for key, _, form in columns)
        print("| " + " | ".join(cells) + " |")


def print_noise(rows: list[dict]) -> None:
    """Prints every ratio that noise makes unusable."""
    for row in rows:
        for name, problems in row["problems"].items():
            if problems:
                case = f"{row['threads']} threads, batch {row['batch_size']}, {row['skips']} skipped, {row['rows']}"
                print(f"UNUSABLE: {name} over stock at {case}: {'; '.join(problems)}")


def print_grouping(rows: list[dict]) -> None:
    """Prints what mixed paths save in decoding beside their bound, and what grouping rows of like paths gains."""
    by_case: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        case = (row["threads"], row["batch_size"], row["skips"], row["repeats"])
        by_case.setdefault(case, {})[row["rows"]] = row
    for (threads, batch_size, skips, repeats), kinds in by_case.items():
        if "mixed" in kinds and "decode_saved" in kinds["mixed"]:
            parts = [
                f"{kind} {row['decode_saved']:.1%} (bound {row['bound_on_decode_saved']:.1%})"
                for kind, row in kinds.items()
                if "decode_saved" in row
            ]
            case = f"{threads} threads, batch {batch_size}, {skips} skipped, {repeats} repeated"
            print(f"decoding saved at {case}: {', '.join(parts)}")


def print_beside_paper(rows: list[dict], new_tokens: int) -> None:
    """Prints seconds of the stock model, the routed model and its routers beside the paper's, at batch size 1."""
    for row in rows:
        if row["batch_size"] == 1 and "router_s" in row:
            seconds = {key: row[key] for key in ("stock_total_s", "routed_total_s", "router_s")}
            case = f"{row['threads']} threads, {row['skips']} skipped"
            for source, values, tokens in ((f"here, {case}", seconds, new_tokens), ("paper", PAPER, 1000)):
                ratio = values["routed_total_s"] / values["stock_total_s"]
                print(
                    f"{source}, {tokens:,} tokens: stock {values['stock_total_s']:.2f} s, routed "
                    f"{values['routed_total_s']:.2f} s (x {ratio:.3f}), of which routers {values['router_s']:.3f} s"
                )
