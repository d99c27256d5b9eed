"""What the commands push names no folder of the machine that they run on. Faster tests are in hub/ and generation/."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import HubServer

FOLDER = "SECRETUSER"  # below which everything is
FILES = {
    "models": {"run": "model.safetensors", "whole": "gen/adapter_config.json", "saved": "config.json"},
    "shards": {"pairs": "data/train-00000-of-00001.parquet"},
    "captioners": {"caption": "model.safetensors", "vlm": "model.safetensors"},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FILES)
def test_no_path_of_this_machine_is_pushed(what, tmp_path):
    folder = tmp_path / FOLDER
    folder.mkdir()
    with HubServer() as hub:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("pushes.py")), str(folder), what],
            env={**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    pushed = {
        (repo, name): hub.contents[oid]
        for (_, repo), commits in hub.commits.items()
        for files in commits
        for name, oid in files.items()
    }
    assert all((f"org/{repo}", name) in pushed for repo, name in FILES[what].items())
    assert not [key for key, content in pushed.items() if FOLDER.encode() in content]
    assert not [name for _, name in pushed if name.startswith(("runs", "checkpoint", "_", ".")) or ".part" in name]
