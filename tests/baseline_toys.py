"""A bench with given training questions, for tests of what baselines learn from them."""

from pathlib import Path
from types import SimpleNamespace

from drllm.provenance import fingerprint

NO_PROGRESS = Path("/nowhere/progress")  # of a training that is too short to be kept


def toy_bench(routed, questions, folder=None):
    """What a baseline reads of a `Bench` when it is fitted."""
    return SimpleNamespace(
        routed=routed,
        training=questions,
        num_blocks=routed.config.num_hidden_layers,
        key={"model_fingerprint": fingerprint(routed)},
        folder=folder,
        batch_size=16,
    )
