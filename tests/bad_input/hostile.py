"""Checkpoints, adapters of the Auto classes and pickles that leave a mark when their code runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CODE = """
from pathlib import Path
Path({mark!r}).touch()
"""


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def hostile_checkpoint(source: Path, folder: Path, mark: Path) -> Path:
    """A copy of a checkpoint, routed or plain, in which every Python file and every entry of auto_map leaves a mark."""
    shutil.copytree(source, folder)
    code = CODE.format(mark=str(mark))
    for path in folder.glob("*.py"):
        path.write_text(code + path.read_text())
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(model, **kwargs):\n    return None\n")
    (folder / "hostile.py").write_text(code + "class Hostile:\n    pass\n")
    config = json.loads((folder / "config.json").read_text())
    if "auto_map" not in config:
        names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        config["auto_map"] = dict.fromkeys(names, "hostile.Hostile")
        (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "hostile.Hostile"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder
