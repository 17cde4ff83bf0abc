"""Processes that meet, or wait in vain."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import datetime, os, time
from drllm import processes
from drllm.errors import main_guard

@main_guard
def main():
    processes.MEETING = datetime.timedelta(seconds=float(os.environ["MEETING"]))
    state = processes.process_state(datetime.timedelta(days=30))
    if state.process_index == 1:
        time.sleep(12)
    state.wait_for_everyone()
    state.destroy_process_group()

raise SystemExit(main())
"""


def start(rank: int, meeting: int, port: int) -> subprocess.Popen:
    """One of two processes, as torchrun starts them."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MEETING": str(meeting)}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment = os.environ | address | place | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, **pipes)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_launcher_was_killed_does_not_wait_for_days(rank, port):
    process = start(rank, meeting=2, port=port)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "error: the processes did not meet within" in errors
    assert "start all of them again" in errors


@pytest.mark.slow
def test_processes_that_have_met_wait_longer_than_for_the_meeting(port):
    processes = [start(rank, meeting=8, port=port) for rank in (0, 1)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
