"""Atomic writes, the JSON reader, and checks of output paths."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file

from drllm import files
from drllm.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, {"old": 1})

    def parts():
        yield b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"no space left to write .*file.json"):
        files.write_whole(path, parts())
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_tensors_are_written_completely(tmp_path):
    files.write_tensors(tmp_path / "t.safetensors", {"a": torch.arange(3)}, {"key": "x"})
    assert files.is_whole(tmp_path / "t.safetensors")
    assert torch.equal(load_file(tmp_path / "t.safetensors")["a"], torch.arange(3))
    (tmp_path / "t.safetensors").write_bytes((tmp_path / "t.safetensors").read_bytes()[:-4])
    assert not files.is_whole(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_is_one_sentence(error, tmp_path):
    message = r"no space left to write .* finished work is kept: free some space"
    with pytest.raises(UserError, match=message), files.disk_errors(tmp_path / "x"):
        raise error


def test_other_runtime_errors_are_defects():
    with pytest.raises(RuntimeError, match="a defect"), files.disk_errors("x"):
        raise RuntimeError("a defect")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; fix it"),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", r"expected an object, found \[1, 2\]; fix it"),
        (b'"' + b"x" * 100 + b'"', 'expected an object, found "x{59}'),
    ],
)
def test_damaged_json(content, message, tmp_path):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        files.read_json(path, "fix it")
    assert str(path) in str(caught.value)


def test_json_that_is_a_folder_or_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read"):
        files.read_json(tmp_path, "fix it")
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "file" / "x.json", "fix it")


def test_output_paths(tmp_path):
    (tmp_path / "file").write_text("")
    files.check_output_folder(tmp_path, "--output_dir")
    files.check_output_folder(tmp_path / "a" / "b", "--output_dir")
    files.check_output_file(tmp_path / "file", "--output")
    files.check_output_file(tmp_path / "a" / "b.json", "--output")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # nothing is created
    with pytest.raises(UserError, match=r"--output_dir .*file is a file; pass a folder"):
        files.check_output_folder(tmp_path / "file", "--output_dir")
    with pytest.raises(UserError, match=r"--output_dir .*a/b is below the file .*file; pass a folder"):
        files.check_output_folder(tmp_path / "file" / "a" / "b", "--output_dir")
    with pytest.raises(UserError, match=r"--output .* is a folder; pass a file"):
        files.check_output_file(tmp_path, "--output")
    with pytest.raises(UserError, match="is a file; pass a folder"):
        files.check_output_file(tmp_path / "file" / "b.json", "--output")


def test_an_output_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission to write in"):
        files.check_output_folder(tmp_path / "a", "--output_dir")
