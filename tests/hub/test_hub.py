"""Adapters on the Hub, through the real client over HTTP, against a small server on loopback (see `server.py`)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.server import TOKEN, Hub, serve

ROOT = Path(__file__).parents[2]
# The client's steps; importing it here would bring huggingface_hub up with this process's settings.
_STEPS = next(
    node.value
    for node in ast.parse((ROOT / "tests" / "hub" / "client.py").read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STEPS"
)
STEPS = [ast.unparse(step) for step in _STEPS.elts]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> tuple[dict[str, str | None], Hub]:
    """What became of each of the client's steps, and the Hub afterwards."""
    home = tmp_path_factory.mktemp("home")
    with serve() as (address, hub):
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-m", "tests.hub.client", str(golden / "cases" / "clip_tiny")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), hub


@pytest.mark.parametrize("step", STEPS)
def test_step(step: str, session: tuple[dict[str, str | None], Hub]) -> None:
    failure = session[0][step]
    assert failure is None, failure


def test_weights_went_through_large_file_storage(session: tuple[dict[str, str | None], Hub]) -> None:
    _, hub = session
    weights = hub.repositories["user/adapter"].commits[hub.repositories["user/adapter"].branches["main"]]
    assert weights["adapter_model.safetensors"] in hub.large.values()


def test_every_request_was_one_that_the_server_knows(session: tuple[dict[str, str | None], Hub]) -> None:
    _, hub = session
    assert hub.unknown == []


def test_pushing_needs_the_token(session: tuple[dict[str, str | None], Hub]) -> None:
    _, hub = session
    assert hub.requests
    with serve() as (address, empty):
        done = subprocess.run(
            [sys.executable, "-c", "from huggingface_hub import HfApi; HfApi().create_repo('user/x')"],
            env={**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_wrong", "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
        )
    assert "401" in done.stderr
    assert not empty.repositories
