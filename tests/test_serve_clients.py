"""Unmodified clients of OpenAI's, in Python and JavaScript, old and new, against a started server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from tests.serving import Server

CLIENTS = Path(sys.prefix) / "clients"  # where `make test` puts other versions than the installed one


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("clients") / "data")
    yield started
    assert started.stop() == 0


@pytest.mark.parametrize("version", ["2.2.0", "2.54.0", "installed"])
def test_python(server: Server, version: str) -> None:
    """Create, poll, list with paging, download, remix, extend, edit, delete, errors, retries."""
    folder = CLIENTS / f"openai-{version}"
    if version == "installed":
        pytest.importorskip("openai")
    elif not folder.is_dir():
        pytest.skip(f"openai {version} is not in {folder}; `make test` installs it where a package index is reached")
    script = Path(__file__).with_name("openai_client.py")
    environment = os.environ | ({} if version == "installed" else {"PYTHONPATH": str(folder)})
    done = subprocess.run([sys.executable, script, server.url], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert version in ("installed", done.stdout.split()[1].rstrip(":")), done.stdout


@pytest.mark.parametrize("version", ["6.49.0", "7.57.0"])
def test_javascript(server: Server, version: str) -> None:
    """The same verbs, and a keyframe in brackets."""
    folder = CLIENTS / f"openai-js-{version}"
    if shutil.which("node") is None:
        pytest.skip("there is no node; install nodejs and npm, and run `make test`")
    if not (folder / "node_modules/openai").is_dir():
        pytest.skip(f"openai {version} is not in {folder}; `make test` installs it where npm reaches its registry")
    script = Path(__file__).with_name("openai_client.mjs")
    done = subprocess.run(["node", script, server.url], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
