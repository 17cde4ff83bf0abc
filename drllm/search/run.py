"""A run of the search: all processes search until the label folder is complete."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import PartialState

from drllm.errors import UserError
from drllm.manifests import MANIFEST, Manifest, begin
from drllm.processes import from_main
from drllm.rollouts.rewards import AnyPrompt
from drllm.search.pool import SearchPool
from drllm.search.progress import Progress, finish
from drllm.search.report import Display
from drllm.search.selection import Selection, Stage


def search_labels(
    folder: Path,
    manifest: Manifest,
    selection: Selection,
    prompts: Mapping[str, AnyPrompt],
    new_pool: Callable[..., SearchPool],
    state: PartialState,
) -> Manifest | None:
    """Searches until all labels are found or no question is left, and writes them to `folder`.

    A stopped run is resumed from the folder's progress files. Every process of the run calls this.

    Args:
        folder: the label folder, shared by all processes.
        manifest: what identifies the run; a folder of another run is refused.
        selection: the questions, and which labels to keep.
        prompts: question id -> prompt.
        new_pool: makes what runs the searches of this process, from its callbacks `is_wanted` and `after_round`.
        state: the processes.

    Returns:
        The completed manifest on the main process, None on the others.

    Raises:
        UserError: the folder belongs to another run, is not shared, or the disk is full.
        KeyboardInterrupt: on Ctrl-C; its message says what is kept.
    """
    if state.is_main_process:
        manifest = begin(folder, manifest)
    state.wait_for_everyone()
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} is not shared by all machines; choose an --output_dir on a shared file system")
    progress = Progress(folder, state.process_index, selection)
    progress.update()
    progress.open()
    num_simulations = manifest.arguments["num_simulations"]
    display = Display(progress, state.num_processes, state.is_main_process, num_simulations)
    pool = new_pool(is_wanted=selection.is_wanted_as, after_round=display.after_round)
    try:
        with display.bar:
            while not (stage := _next_stage(selection, state)).is_last:
                remaining = selection.remaining(state.process_index, state.num_processes, stage.searched)
                for searched in pool.search(prompts[question.id] for question in remaining):
                    progress.append(searched)
                progress.sync()
                state.wait_for_everyone()
                progress.update()
                display.show()
        progress.close()
        completed = finish(folder, manifest, progress) if state.is_main_process else None
        state.wait_for_everyone()
        return completed
    except KeyboardInterrupt:
        if not state.is_main_process:  # one message is enough
            raise SystemExit(130) from None
        kept = f"at least {len(selection.records)} finished questions are kept in {folder}"
        raise KeyboardInterrupt(f"{kept}; run the same command to resume") from None
    finally:
        with contextlib.suppress(UserError):  # an earlier error is the one to report
            progress.close()


def _next_stage(selection: Selection, state: PartialState) -> Stage:
    # The main process decides for all: on a network disk the others may not see all records yet.
    stage = from_main(state, selection.next_stage)
    selection.quotas = stage.quotas
    return stage
