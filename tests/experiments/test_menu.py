"""A menu of paths: chosen by what it covers, its chooser, its exports, and the client of docs/serving.md."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drllm.checkpoints import load_routed
from drllm.provenance import ROOT
from drllm.rollouts.engine import RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine
from experiments import menu
from extensions.baselines.outcomes import Outcome
from tests import search_toys
from tests.eval_toys import make_routed, make_tasks


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_model):
    """(base, routed checkpoint, data with train and test questions)."""
    folder = tmp_path_factory.mktemp("menu")
    base = search_toys.make_model(folder / "model", stock_model)
    data = search_toys.make_data(folder / "data", 16, seed=5)
    make_tasks(data, 12)
    return base, make_routed(base, folder / "routed"), data


def run(toy, folder, *more):
    base, routed, data = toy
    arguments = f"--model {base} --data_dir {data} --dataset arc_easy --batch_size 4 --train_questions 8 --beam 3"
    arguments += f" --rounds 1 --sizes 1,2,4 --work_dir {folder}/work --output {folder}/menu.json"
    return menu.main([*arguments.split(), "--checkpoint", f"as published={routed}", *more])


@pytest.mark.parametrize("reward", ["likelihood", "generation"])
def test_the_report_and_a_second_run_that_answers_nothing(toy, tmp_path, monkeypatch, reward):
    assert run(toy, tmp_path, "--reward", reward) == 0
    result = json.loads((tmp_path / "menu.json").read_text())
    assert (result["training_questions"], result["test_questions"]) == (8, 12)
    assert 13 < result["candidates"] <= 16, "the default path, 12 edits and 3 pairs of 3"
    rows = result["menus"]
    assert [len(row["paths"]) for row in rows] == [1, 2, 4]
    assert all(row["paths"] == rows[2]["paths"][: len(row["paths"])] for row in rows)
    for name in ("training_coverage", "coverage"):
        assert [row[name] for row in rows] == sorted(row[name] for row in rows)
    assert all(row["accuracy"] <= row["coverage"] for row in rows)
    assert rows[0]["accuracy"] == rows[0]["coverage"]
    if reward == "generation":
        assert rows[0]["wrong_coverage"] is None
    else:
        assert 0 < rows[0]["wrong_coverage"] <= rows[1]["wrong_coverage"] <= rows[2]["wrong_coverage"] <= 1
    single = f"best single path: {rows[0]['paths'][0] or 'default'}"
    assert list(result["methods"]) == ["base", single, "as published"]
    assert result["methods"]["base"]["blocks"] == 6
    assert result["methods"]["base"]["against_base"]["points"] == 0
    assert result["advice"] in (tmp_path / "menu.md").read_text()

    def nothing(*_arguments, **_options):
        raise AssertionError("scored again")

    for engine in (LikelihoodEngine, RolloutEngine):
        monkeypatch.setattr(engine, "_run", nothing)
    assert run(toy, tmp_path, "--reward", reward) == 0
    again = json.loads((tmp_path / "menu.json").read_text())
    assert again["menus"] == result["menus"]


def test_given_paths_are_the_candidates(toy, tmp_path, capsys):
    assert run(toy, tmp_path, "--paths", "skip 1; skip 1, repeat 4") == 0
    result = json.loads((tmp_path / "menu.json").read_text())
    assert result["candidates"] == 3
    assert set(result["menus"][-1]["paths"]) < {"", "skip 1", "skip 1, repeat 4"}
    assert run(toy, tmp_path, "--paths", "skip 60") == 2
    assert "--paths: the model has only 6 blocks, from 0 on; there is no block 60" in capsys.readouterr().err


def outcome(*right: int, value: float = 0.0) -> Outcome:
    return Outcome([float(each) for each in right], [0.0] * len(right), [each + value for each in right])


def test_each_path_adds_what_the_others_lack():
    best, similar, other, useless = (2, 1), (1, 2), (0, 1), (1, 0)
    scored = {
        useless: outcome(0, 0, 0, 0),
        similar: outcome(1, 1, 0, 0),
        best: outcome(1, 1, 1, 0),
        other: outcome(0, 0, 0, 1),
    }
    assert menu.choose(scored, 2) == [best, other]
    assert menu.choose(scored, 9)[:2] == [best, other]
    assert len(menu.choose(scored, 9)) == 4
    assert menu.coverage([scored[similar], scored[other]]) == 0.75


def test_coverage_by_luck_is_that_of_wrong_options():
    prompts = [SimpleNamespace(rows=range(4), gold=0), SimpleNamespace(rows=range(3), gold=2)]
    assert menu.wrong_coverage(prompts, [[0, 2], [1, 2], [2, 0]]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert menu.wrong_coverage(prompts, [[0, 2]]) == 0


def test_ties_go_to_the_higher_reward_then_to_fewer_blocks():
    long, short, sure = (2, 1), (0, 1), (1, 2)
    assert menu.choose({long: outcome(1, 0), short: outcome(1, 0)}, 1) == [short]
    assert menu.choose({short: outcome(1, 0), sure: outcome(1, 0, value=0.1)}, 1) == [sure]


def test_candidates_are_the_edits_and_pairs_of_the_best():
    class Bench:
        num_blocks = 3

        def training_outcomes(self, paths, title):
            return {
                path: outcome(1, value=10 * (path[0] == 2) + 5 * (path[2] == 0) - abs(path[1] - 1)) for path in paths
            }

    single = list(menu.candidates(Bench(), 0, 2))
    assert sorted(single) == sorted([(1, 1, 1), (0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)])
    assert set(menu.candidates(Bench(), 1, 2)) - set(single) == {(2, 1, 0)}


def prompts_of(rows):
    return [SimpleNamespace(input_ids=tuple(row)) for row in rows]


def test_the_chooser_follows_the_tokens_where_they_tell_and_else_takes_the_best_path():
    draw = np.random.default_rng(0)
    ids = draw.integers(2, 50, size=(200, 6))
    ids[:, 0] = draw.integers(0, 2, size=200)  # the token that decides
    counts = menu.token_counts(prompts_of(ids), 60)
    assert counts.shape == (200, 60)
    assert np.allclose((counts**2).sum(axis=1), 1)
    told = np.stack([ids[:, 0] == 0, ids[:, 0] == 1], axis=1).astype(float)
    weights, bias = menu.fit_chooser(counts, told)
    assert ((counts @ weights.T + bias).argmax(axis=1) == ids[:, 0]).mean() > 0.95
    untold = (draw.random((200, 2)) < [0.4, 0.7]).astype(float)
    weights, bias = menu.fit_chooser(counts, untold)
    assert (counts @ weights.T + bias).argmax(axis=1).mean() > 0.95
    weights, bias = menu.fit_chooser(counts, untold[:, :1])
    assert (weights.shape, bias.shape) == ((1, 60), (1,))


def test_the_advice_is_the_single_path_unless_a_chooser_is_surely_better():
    def row(count, low, of_base=1):
        return {"paths": ["skip 1"] * count, "against_single": {"low": low}, "against_base": {"low": of_base}}

    assert menu.advice([row(1, 0), row(2, -1)]).endswith("serve that path alone: skip 1.")
    assert menu.advice([row(1, 0, -1), row(2, -1)]).endswith("skip 1. Nor does it beat the base by one.")
    assert (
        menu.advice([row(1, 0), row(2, -1), row(4, 0.1)])
        == "The choosers of 4 paths beat the best single path, skip 1."
    )


@pytest.fixture(scope="module")
def exported(toy, tmp_path_factory):
    """A menu of three paths, with a chooser that was trained on questions."""
    folder = tmp_path_factory.mktemp("exported")
    assert run(toy, folder, "--export_dir", str(folder / "menu"), "--export_size", "3") == 0
    return folder / "menu"


def test_exported_paths_are_those_of_the_menu(toy, exported):
    written = json.loads((exported / "menu.json").read_text())
    paths = json.loads((exported.parent / "menu.json").read_text())["menus"][2]["paths"]
    assert written["edits"] == paths[:3]
    routed = load_routed(str(toy[0]), torch.float32, None, {}).eval()
    prompt = torch.arange(1, 9)[None]
    for name, edits in zip(written["models"], written["edits"], strict=True):
        indices = menu.Source(str(toy[0])).layer_indices(edits)
        stock = AutoModelForCausalLM.from_pretrained(exported / name)
        torch.testing.assert_close(stock(prompt).logits, routed(prompt, layer_indices=indices).logits)


def test_the_client_of_the_documentation(exported):
    """It asks the server of the path that the chooser takes."""
    chooser = load_file(exported / "chooser.safetensors")
    assert chooser["bias"].shape == (3,)
    # The answers of a random model depend on nothing that a chooser could learn.
    chooser["weights"] = torch.randn(chooser["weights"].shape, generator=torch.Generator().manual_seed(0))
    save_file(chooser, exported / "chooser.safetensors")
    models = json.loads((exported / "menu.json").read_text())["models"]
    tokenizer = AutoTokenizer.from_pretrained(exported / models[0])
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"text": f"from {self.server.server_port}"}]}).encode())

        def log_message(self, *_):
            pass

    servers = [HTTPServer(("127.0.0.1", 0), Server) for _ in models]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.S)
    (code,) = [block for block in blocks if "class Menu" in block]
    assert len(code.splitlines()) <= 40
    names: dict = {}
    exec(compile(code, "serving.md", "exec"), names)
    client = names["Menu"](exported, [f"http://127.0.0.1:{server.server_port}" for server in servers])
    chosen = set()
    for number in range(30):
        text = f"w{number} w{(7 * number) % 40} Answer:"
        counts = torch.bincount(
            torch.tensor(tokenizer(text)["input_ids"]), minlength=chooser["weights"].shape[1]
        ).float()
        place = int((chooser["weights"] @ counts / counts.norm() + chooser["bias"]).argmax())
        assert client.complete(text) == (models[place], f"from {servers[place].server_port}")
        path, body = asked[-1]
        assert (path, body["model"], body["prompt"]) == ("/v1/completions", models[place], text)
        chosen.add(place)
    assert len(chosen) > 1
    for server in servers:
        server.shutdown()
