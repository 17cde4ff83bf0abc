"""train.py: its arguments, and one clear sentence for whatever is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import train
from drllm.provenance import fingerprint

ROOT = Path(__file__).parents[1]
LAYERS = 6  # of the fixture `stock_checkpoint`


@pytest.fixture(scope="module")
def base(stock_checkpoint) -> str:
    """A small model with a tokenizer."""
    folder = stock_checkpoint("llama")
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {f"w{i}": 3 + i for i in range(40)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def data(base, tmp_path) -> Path:
    """A folder of 20 labels."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(20):
        path = [1, 0 if i % 2 else 1, 1, 1, 2 if i % 3 else 1, 1]
        words = f"w{i} w{2 * i} w3 w4"
        rows.append(
            {
                "question": words,
                "optimal_layer_config": path,
                "answer": "A",
                "set": "arc_easy" if i < 15 else "squadv2",
                "question_id": f"q{i}",
                "kind": "shorter",
                "prompt": words,
                "base_correct": True,
                "path_correct": True,
                "base_response": "A",
                "path_response": "A",
                "simulations": 50,
                "inferences": 50,
                "good_paths": [path],
            }
        )
    write_rows(folder, rows)
    manifest = {
        "format": 1,
        "model": base,
        "revision": None,
        "model_fingerprint": fingerprint(LlamaForCausalLM.from_pretrained(base)),
        "num_layers": LAYERS,
        "dtype": "float32",
        "chat_template": False,
        "arguments": {"budget": 2.0},
        "seed": 0,
        "labels": 20,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]


def change_manifest(folder: Path, **fields) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def failing(data, tmp_path, capsys):
    """Runs train.py, which must fail with exit status 2 and one line; returns the line."""

    def fail(*arguments: str) -> str:
        status = train.main(["--data", str(data), "--output_dir", str(tmp_path / "checkpoints"), *arguments])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert status == 2
        assert len(errors) == 1
        assert not (tmp_path / "checkpoints" / "drllm" / "training.json").exists()
        return errors[0]

    return fail


def test_the_command_as_published(data, tmp_path):
    command = [sys.executable, "train.py", "--data", str(data), "--output_dir", str(tmp_path), "--run_name", "run"]
    command += ["--num_epochs", "2", "--learning_rate", "1e-3", "--weight_decay", "0.01", "--warmup_steps", "2"]
    command += ["--gradient_accumulation", "16", "--num_windows", "8", "--with_squad", "--report_to", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "labels: 20 paths of 20 questions" in done.stdout
    assert f"wrote {tmp_path / 'run'}" in done.stdout
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line]
    assert {line.partition(":")[0] for line in lines} <= {"features"}, "no warnings, no progress bars of libraries"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert model(torch.tensor([[5, 6, 7]])).paths.shape == (1, LAYERS)


def test_optional_sets_are_off_by_default(data, tmp_path, capsys):
    arguments = ["--data", str(data), "--output_dir", str(tmp_path), "--num_epochs", "1"]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    assert "leaving out 5 rows of squadv2; --with_squad uses them" in out
    assert "labels: 15 paths of 15 questions" in out
    assert "the warm-up of 500 steps is longer than the run of 1 steps" in out


def test_no_labels(failing, tmp_path):
    assert "nowhere/manifest.json does not exist" in failing("--data", str(tmp_path / "nowhere"))


def test_an_empty_label_file(failing, data):
    write_rows(data, [])
    assert "labels.jsonl is empty" in failing()


def test_a_label_file_cut_off(failing, data):
    path = data / "labels.jsonl"
    path.write_text(path.read_text()[:-30])
    assert "labels.jsonl:20: not valid JSON" in failing()


def test_label_rows_missing(failing, data):
    write_rows(data, read_rows(data)[:-1])
    assert "has 19 rows, the manifest says 20" in failing()


def test_a_path_that_is_none(failing, data):
    rows = read_rows(data)
    rows[3]["optimal_layer_config"] = [1, 3, 1, 1, 1, 1]
    write_rows(data, rows)
    assert "labels.jsonl:4" in failing()


def test_labels_of_another_layer_count(failing, data):
    rows = [row | {"optimal_layer_config": [1] * 5, "good_paths": []} for row in read_rows(data)]
    write_rows(data, rows)
    change_manifest(data, num_layers=5)
    message = failing()
    assert "were made with another model" in message
    assert "a path over 5 layers, the model has 6" in message


def test_labels_of_another_model(failing, data):
    change_manifest(data, model_fingerprint="0123456789abcdef")
    assert "their weights have the fingerprint 0123456789abcdef, those of" in failing()


def test_labels_in_another_dtype(failing):
    assert "--dtype bfloat16 differs from that of the labels, float32" in failing("--dtype", "bfloat16")


def test_an_unknown_dtype(failing):
    assert "unknown dtype 'int3'" in failing("--dtype", "int3")


def test_a_missing_model(failing, tmp_path):
    message = failing("--model_id", str(tmp_path / "nowhere"))
    assert "cannot load the" in message
    assert "nowhere" in message


def test_a_loss_that_is_no_number(failing):
    message = failing("--learning_rate", "1e30", "--warmup_steps", "0")
    assert "the loss became" in message
    assert "lower --learning_rate (now 1e+30)" in message


def test_another_run_of_the_same_name(failing, tmp_path, capsys, data):
    arguments = ["--data", str(data), "--output_dir", str(tmp_path), "--num_epochs", "1"]
    assert train.main(arguments) == 0
    assert train.main(arguments) == 0
    assert "is already trained" in capsys.readouterr().out
    assert train.main([*arguments, "--seed", "1"]) == 2
    assert "holds another run (seed 0 there, 1 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--loss", "hinge"], ["--teacher_forcing", "perhaps"], ["--num_epochs", "many"], ["--nothing"]]
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in train.RouterTrainingConfig.__dataclass_fields__:
        assert f"--{name}" in text


@pytest.mark.slow
def test_two_processes_share_the_features_and_train_to_the_same_weights(data, tmp_path):
    # 16 examples to train on: a last batch that is short would be filled up with repeated examples.
    arguments = ["--data", str(data), "--output_dir", str(tmp_path), "--num_epochs", "3", "--warmup_steps", "2"]
    arguments += ["--with_squad", "--eval_fraction", "0.2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "train.py", *arguments, "--run_name", "two", "--features_dir", str(tmp_path / "features")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("labels: 20 paths of 20 questions") == 1
    assert train.main([*arguments, "--run_name", "one"]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5, msg=name)
    records = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")]
    assert (
        records[0]["base_model_passes"]["block_applications"] == records[1]["base_model_passes"]["block_applications"]
    )
