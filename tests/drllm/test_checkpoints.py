"""Small checkpoints: routers alone, joined with the right base and with no other."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drllm.checkpoints import (
    checkpoint_info,
    join_routers,
    load_routed,
    load_routed_checkpoint,
    load_tokenizer,
)
from drllm.errors import UserError
from drllm.evaluation.protocol import uses_chat_template
from drllm.provenance import fingerprint
from drllm.router_checkpoint import main
from drllm.saving import extract_routers, save_routers
from drllm.training.trainer import RouterTrainingConfig, train_routers
from tests.bad_input.hostile import hostile_checkpoint
from train_models import RouterBlock, retrofit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tiny_labels, tmp_path_factory) -> Path:
    """A full checkpoint of train.py, with its small one in routers/."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = RouterTrainingConfig(
        data=(str(tiny_labels),), output_dir=str(folder), num_epochs=1, num_windows=4, router_width=16
    )
    train_routers(config)
    return config.checkpoint


def logits_of(model) -> torch.Tensor:
    return model(torch.tensor([[5, 6, 7, 8, 9, 10]]), output_router_logits=True).router_logits


def test_joined_equals_the_full_checkpoint(checkpoint, tiny_base):
    full = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    joined = join_routers(checkpoint / "routers")  # the base is the one the small checkpoint names
    weights = joined.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in full.state_dict().items())
    assert torch.equal(logits_of(joined), logits_of(full))
    for name in ("num_windows", "trained_num_windows", "router_width", "base_model_name", "base_model_fingerprint"):
        assert getattr(joined.config, name) == getattr(full.config, name)
    assert joined.config.num_windows == 4
    assert joined.config.base_model_name == str(tiny_base)


def test_join_command_writes_what_train_writes(checkpoint, tiny_base, tmp_path, capsys):
    output = tmp_path / "joined"
    assert main(["join", str(checkpoint / "routers"), "--base", str(tiny_base), "--output_dir", str(output)]) == 0
    assert f"wrote {output}" in capsys.readouterr().out
    ours, theirs = load_file(output / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert (output / "tokenizer.json").exists()
    assert json.loads((output / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())


def test_extract_command_makes_the_small_checkpoint_again(checkpoint, tmp_path):
    assert main(["extract", str(checkpoint), "--output_dir", str(tmp_path)]) == 0
    for name in ("router_config.json", "README.md"):
        assert (tmp_path / name).read_text() == (checkpoint / "routers" / name).read_text()
    ours, theirs = (load_file(folder / "routers.safetensors") for folder in (tmp_path, checkpoint / "routers"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_chat_template_of_the_labels_outlives_extract_and_join(checkpoint, tmp_path):
    """eval.sh asks the checkpoint that it is given."""
    full, small, joined = (tmp_path / name for name in ("full", "small", "joined"))
    shutil.copytree(checkpoint, full)
    for chat in (True, False):
        manifest = json.loads((checkpoint / "labels_manifest.json").read_text()) | {"chat_template": chat}
        (full / "labels_manifest.json").write_text(json.dumps(manifest))
        assert main(["extract", str(full), "--output_dir", str(small)]) == 0
        assert main(["join", str(small), "--output_dir", str(joined)]) == 0
        for folder in (full, joined):
            assert json.loads((folder / "labels_manifest.json").read_text()) == manifest
            assert uses_chat_template("auto", folder) == chat


def test_only_routers_are_in_it(checkpoint):
    weights = load_file(checkpoint / "routers" / "routers.safetensors")
    assert sorted(weights) == sorted(
        f"{layer}.layers.{k}.{kind}" for layer in range(5) for k in (0, 2) for kind in ("weight", "bias")
    )


def test_size_of_the_papers_routers():
    # Llama-3.2-3B: 28 blocks of width 3072, in bf16.
    router = RouterBlock(3072).to(torch.bfloat16)
    size = 28 * sum(p.numel() * p.element_size() for p in router.parameters())
    assert size == pytest.approx(22e6, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 6}, "its num_hidden_layers is 6, the routers need 5"),
        ({"hidden": 16}, "its hidden_size is 16, the routers need 32"),
        ({"seed": 1}, r"its weights have the fingerprint \w+, the routers were trained on \w+"),
    ],
)
def test_a_wrong_base_is_refused(changes, message, checkpoint, base_maker, tmp_path, capsys):
    wrong = base_maker(tmp_path / "wrong", **changes)
    with pytest.raises(UserError, match=message):
        join_routers(checkpoint / "routers", base=str(wrong))
    command = ["join", str(checkpoint / "routers"), "--base", str(wrong), "--output_dir", str(tmp_path / "joined")]
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {wrong} is not the base of the routers in")
    assert not (tmp_path / "joined").exists()


def test_a_base_with_one_changed_weight_is_refused(checkpoint, tiny_base, tmp_path):
    copy = tmp_path / "copy"
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] += 1
    model.save_pretrained(copy)
    with pytest.raises(UserError, match="is not the base"):
        join_routers(checkpoint / "routers", base=str(copy))


@pytest.mark.parametrize("name", ["routers.safetensors", "router_config.json"])
@pytest.mark.parametrize("how", ["missing", "cut off"])
def test_a_damaged_small_checkpoint(name, how, checkpoint, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(checkpoint / "routers", small)
    if how == "missing":
        (small / name).unlink()
    else:
        (small / name).write_bytes((small / name).read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{name}"):
        join_routers(small)


def test_routers_of_another_shape_than_the_config_says(checkpoint, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(checkpoint / "routers", small)
    description = json.loads((small / "router_config.json").read_text())
    description["routers"]["router_width"] = 8
    (small / "router_config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="does not fit"):
        join_routers(small)


def test_what_is_not_a_checkpoint(tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"it has no router_config.json"):
        join_routers(tiny_base)
    with pytest.raises(UserError, match="plain llama checkpoint without routers"):
        extract_routers(str(tiny_base), str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"it has no config.json"):
        extract_routers(str(tmp_path), str(tmp_path / "out"))


def test_a_base_that_is_not_there(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"cannot load the model .*nowhere"):
        join_routers(checkpoint / "routers", base=str(tmp_path / "nowhere"))


def test_the_model_card_is_filled_in(checkpoint, tiny_base):
    card = (checkpoint / "routers" / "README.md").read_text()
    record = json.loads((checkpoint / "training.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| base model | `{tiny_base}` |" in card
    assert f"`{record['base_model']['fingerprint']}`" in card
    assert f"| macro_f1 | {record['metrics']['macro_f1']:.4g} |" in card
    assert "5, of 2 linear layers, width 16, 4 windows" in card
    assert "tested with transformers 5.4 to 5.24." in card
    for placeholder in ("None", "TODO", "{", "More Information"):
        assert placeholder not in card


def test_a_whole_checkpoint_has_a_card_of_its_own(checkpoint, tmp_path):
    card, of_the_routers = ((checkpoint / name).read_text() for name in ("README.md", "routers/README.md"))
    assert "with Dr.LLM routers\n" in card
    assert "not changed.\n" in card
    assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True" in card
    assert "join_routers" not in card
    assert "| macro_f1 |" in card
    for text in (card, of_the_routers):
        assert "vLLM, TGI and llama.cpp do not know routed checkpoints." in text
    assert main(["join", str(checkpoint / "routers"), "--output_dir", str(tmp_path / "joined")]) == 0
    assert "with Dr.LLM routers\n" in (tmp_path / "joined" / "README.md").read_text()


def test_the_card_names_a_hub_base(tiny_base, tmp_path):
    routed = retrofit(str(tiny_base), dtype=torch.bfloat16)
    routed.config.base_model_name, routed.config.base_model_revision = "example-org/example-3b", "abc123"
    save_routers(routed, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: example-org/example-3b\nbase_model_relation: adapter" in card
    assert "`example-org/example-3b` at revision `abc123`" in card
    description = json.loads((tmp_path / "router_config.json").read_text())
    assert description["base_model_revision"] == "abc123"
    assert description["base_model_fingerprint"] == fingerprint(routed)
    assert description["dtype"] == "bfloat16"


def test_push_uploads_the_routers_and_what_describes_them(checkpoint, monkeypatch, capsys):
    calls = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private))

        def upload_folder(self, folder_path, repo_id, allow_patterns):
            calls.append(("upload", folder_path, sorted(allow_patterns)))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert main(["push", str(checkpoint / "routers"), "--repo_id", "someone/routers", "--private"]) == 0
    assert calls == [
        ("create", "someone/routers", True),
        (
            "upload",
            str(checkpoint / "routers"),
            ["README.md", "labels_manifest.json", "router_config.json", "routers.safetensors"],
        ),
    ]
    assert "https://huggingface.co/someone/routers" in capsys.readouterr().out


@pytest.fixture
def hostile(checkpoint, tmp_path):
    """(checkpoint whose Python files leave a mark when they run, the mark)."""
    assert list(checkpoint.glob("*.py"))
    return hostile_checkpoint(checkpoint, tmp_path / "hostile", tmp_path / "mark"), tmp_path / "mark"


def test_reading_a_checkpoint_never_runs_its_code(hostile, tmp_path):
    folder, mark = hostile
    assert checkpoint_info(folder).is_routed
    load_routed_checkpoint(folder).generate(torch.tensor([[5, 6]]), max_new_tokens=1)
    load_tokenizer(str(folder))
    assert main(["extract", str(folder), "--output_dir", str(tmp_path / "small")]) == 0
    assert main(["join", str(folder / "routers"), "--output_dir", str(tmp_path / "joined")]) == 0
    assert not mark.exists()
    # The mark works: a user who passes trust_remote_code runs the code.
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists()


def change_tensor(path: Path, part: str, change) -> str:
    """Changes the first tensor of a safetensors file whose name contains `part`; returns its name."""
    weights = load_file(path)
    name = min(key for key in weights if part in key)
    change(weights, name)
    save_file(weights, path, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["routers", "mlp", "embed_tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(part, value, checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    name = change_tensor(
        copy / "model.safetensors", part, lambda weights, name: weights[name].view(-1)[-1:].fill_(value)
    )
    with pytest.raises(UserError, match=rf"{copy}: the weight {name} holds NaN or infinity"):
        load_routed_checkpoint(copy)


def test_a_base_and_routers_that_are_not_finite(checkpoint, tiny_base, tmp_path):
    base, small = tmp_path / "base", tmp_path / "small"
    shutil.copytree(tiny_base, base)
    shutil.copytree(checkpoint / "routers", small)

    def spoil(weights, name):
        weights[name][..., 0] = float("nan")

    name = change_tensor(base / "model.safetensors", "layers.3.mlp", spoil)
    with pytest.raises(UserError, match=f"the weight {name} holds NaN or infinity"):
        load_routed(str(base), torch.float32, None, {})
    name = change_tensor(small / "routers.safetensors", "4.layers.0.weight", spoil)
    with pytest.raises(UserError, match=f"routers.safetensors: the weight {name} holds NaN or infinity"):
        join_routers(small)


def test_a_checkpoint_that_lacks_weights(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    name = change_tensor(copy / "model.safetensors", "routers", lambda weights, name: weights.pop(name))
    with pytest.raises(UserError, match=f"1 weights are missing or have another shape, the first is {name}"):
        load_routed_checkpoint(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", r"expected an object, found \[\]"),
        ('{"model_type": 3}', "'model_type' is 3, expected text"),
        ('{"model_type": "drllm_mystery"}', "model_type 'mystery' is not supported"),
        ('{"model_type": "llama"}', "plain llama checkpoint without routers"),
        ("{}", "plain unknown checkpoint without routers"),
        ({"hidden_size": "wide"}, "'hidden_size'.*expected int, got str"),
        ({"num_windows": 0}, "num_windows is 0"),
        ({"num_windows": None}, "'num_windows' is null, expected a whole number"),
        ({"num_attention_heads": 0}, "ZeroDivisionError|num_attention_heads"),
        ({"rope_parameters": 7}, "cannot load the checkpoint"),
        ({"dtype": "float99"}, "cannot load the checkpoint"),
        ({"hidden_act": "perhaps"}, "cannot load the checkpoint"),
        ({"hidden_size": 16}, "another shape|cannot load the checkpoint"),
    ],
)
def test_a_damaged_config(content, message, checkpoint, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    if isinstance(content, dict):
        content = json.dumps(json.loads((copy / "config.json").read_text()) | content)
    (copy / "config.json").write_text(content)
    assert main(["extract", str(copy), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"error: (?=.*{copy}).*({message})", error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"base_model_fingerprint": None},
        {"hidden_size": "32"},
        {"num_hidden_layers": None},
        {"dtype": 16},
        {"routers": []},
        {"routers": {"num_windows": 8}},
        {"format": 2},
    ],
)
def test_a_damaged_router_config_names_the_field(change, checkpoint, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(checkpoint / "routers", small)
    path = small / "router_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (field,) = change if change != {"routers": {"num_windows": 8}} else ("router_width",)
    with pytest.raises(UserError, match=rf"router_config\.json.*{field}"):
        join_routers(small)
    description = json.loads((checkpoint / "routers" / "router_config.json").read_text())
    for missing in description:
        path.write_text(json.dumps({name: value for name, value in description.items() if name != missing}))
        with pytest.raises(UserError, match=rf"router_config\.json.*{missing}"):
            join_routers(small)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ("{}", "no field 'metrics'"),
        ({"metrics": {}}, "metrics: no field 'macro_f1'"),
        ({"config": 3}, "'config' is 3, expected an object"),
        ({"questions_per_set": None}, "'questions_per_set' is null, expected an object"),
    ],
)
def test_a_damaged_training_record(content, message, checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    if isinstance(content, dict):
        content = json.dumps(json.loads((copy / "training.json").read_text()) | content)
    (copy / "training.json").write_text(content)
    with pytest.raises(UserError, match=rf"training\.json.*{message}"):
        extract_routers(copy, tmp_path / "out")


def test_output_folders_are_checked_first(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    for command in (["extract", str(tmp_path / "nowhere")], ["join", str(tmp_path / "nowhere")]):
        with pytest.raises(UserError, match="is below the file"):
            main.__wrapped__([*command, "--output_dir", str(tmp_path / "file" / "out")])


def test_a_full_disk_while_a_checkpoint_is_written(checkpoint, tmp_path):
    """In a process of its own, whose files may not grow beyond 8 kB."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
        "from drllm.router_checkpoint import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for arguments in (["extract", str(checkpoint)], ["join", str(checkpoint / "routers")]):
        command = [sys.executable, "-c", code, *arguments, "--output_dir", str(tmp_path / arguments[0])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: no space left to write")
        assert "Traceback" not in done.stderr
        assert not list((tmp_path / arguments[0]).rglob("*.partial"))
