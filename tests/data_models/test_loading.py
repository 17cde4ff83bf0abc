"""The list of families."""

import re
from pathlib import Path

from data_models import path_model_class
from train_models import FAMILIES, routed_classes

ROOT = Path(__file__).parents[2]


def test_the_families_stand_in_one_list():
    for model_type, family in FAMILIES.items():
        assert path_model_class(model_type).__name__ == f"Path{family}ForCausalLM"
        assert [c.__name__ for c in routed_classes(model_type)] == [
            f"Routed{family}Config",
            f"Routed{family}ForCausalLM",
        ]
    for folder in ("train_models", "data_models"):
        files = {file.stem.removeprefix("modeling_") for file in (ROOT / folder).glob("modeling_*.py")}
        assert files == set(FAMILIES)
        listing = re.compile(r"llama.*qwen2.*qwen3", re.IGNORECASE)
        code = [file.name for file in (ROOT / folder).glob("*.py") if listing.search(_without_docstrings(file))]
        assert code == (["__init__.py"] if folder == "train_models" else []), folder


def _without_docstrings(file: Path) -> str:
    return re.sub(r'""".*?"""', "", file.read_text(), flags=re.DOTALL)
