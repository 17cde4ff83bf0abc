import socket
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from drllm import checkpoints
from drllm.errors import UserError
from drllm.hub import require_hub

NAME = "meta-llama/Llama-3.2-3B-Instruct"


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """Sets where the Hub is; its cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        return unused.getsockname()[1]


@pytest.mark.parametrize("load", [checkpoints.load_config, checkpoints.load_tokenizer, checkpoints.checkpoint_info])
def test_without_a_network_the_authors_names_fail_at_once(endpoint, load):
    endpoint(f"http://localhost:{_free_port()}")
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{NAME}.*cannot be reached.*pass a local folder"):
        load(NAME)
    assert time.monotonic() - started < 5


def test_a_hub_that_does_not_answer_is_given_up_after_the_timeout(endpoint):
    with socket.create_server(("localhost", 0)) as silent:
        endpoint(f"http://localhost:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match="cannot be reached"):
            require_hub(NAME, timeout=0.2)


def test_any_answer_will_do(endpoint):
    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("localhost", 0), Refuses)
    threading.Thread(target=server.handle_request).start()
    endpoint(f"http://localhost:{server.server_port}")
    require_hub(NAME)
    server.server_close()


def test_no_request_where_none_is_needed(endpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *arguments, **options: pytest.fail("a request"))
    require_hub(tmp_path)
    require_hub("not//a/name")
    snapshot = tmp_path / "models--meta-llama--Llama-3.2-3B-Instruct"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("c0ffee")
    (snapshot / "snapshots" / "c0ffee").mkdir(parents=True)
    (snapshot / "snapshots" / "c0ffee" / "config.json").write_text("{}")
    monkeypatch.setattr("drllm.hub.try_to_load_from_cache", _cached_in(tmp_path))
    require_hub(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require_hub("someone/else")


def _cached_in(folder):
    from huggingface_hub import try_to_load_from_cache

    return lambda *arguments, **options: try_to_load_from_cache(*arguments, cache_dir=folder, **options)
