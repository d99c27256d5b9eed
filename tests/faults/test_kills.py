"""Generation and training, killed at random moments, end with the bytes of a run that was never killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipeline import command_line, make_pipeline

KILLS = Path(__file__).parent / "kills.py"
TRAINING = {
    "model": "digits",
    "per_device_train_batch_size": 16,
    "max_steps": 4,
    "save_steps": 1,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}
GENERATION = {"dataset": "digits", "num_captions": 32, "shard_size": 8, "batch_size": 4, "num_inference_steps": 1}


def killed(command: str, kills: int, folder: Path, options: dict) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(KILLS), command, str(kills), "0", str(folder), *command_line(options)],
        env={**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(command, counts)
    assert counts["killed"] == kills and counts["finished"] >= 1
    return counts


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_generation(kills, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    counts = killed("generate", kills, tmp_path, GENERATION | {"generator": tmp_path / "pipeline"})
    assert counts["resumed"] == kills


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_training(kills, pairs_file, tmp_path):
    counts = killed("train", kills, tmp_path, TRAINING | {"dataset": pairs_file})
    assert counts["resumed"] + counts["started_again"] == kills
