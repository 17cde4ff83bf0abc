"""Bad input of the GGUF converter is one sentence, and nothing is written."""

import pytest

from drllm.gguf_checkpoint import main, sha256_of


@pytest.mark.parametrize(
    ("content", "extra", "sentence"),
    [
        (None, [], "does not exist; name a .gguf file"),
        (b"not a model", ["--sha256", "00"], "has the SHA-256 digest"),
        (b"not a model", ["--dtype", "int3"], "unknown dtype"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch, content, extra, sentence):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as if the reader were installed
    source = tmp_path / "model.gguf"
    if content is not None:
        source.write_bytes(content)
    assert main([str(source), "--output_dir", str(tmp_path / "model"), *extra]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_missing_reader_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert main([str(tmp_path / "model.gguf"), "--output_dir", str(tmp_path / "model")]) == 2
    assert "pip install -r requirements-llm.txt" in capsys.readouterr().err


def test_the_digest_is_that_of_the_content(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
