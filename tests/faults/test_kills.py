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
GENERATION = {"num_captions": 32, "shard_size": 8, "batch_size": 4, "num_inference_steps": 1}


@pytest.mark.integration
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_runs_end_like_others(kills, pairs_file, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    generation = command_line(GENERATION, dataset=pairs_file, generator=tmp_path / "pipeline")
    commands = json.dumps({"generate": generation, "train": command_line(TRAINING, dataset=pairs_file)})
    done = subprocess.run(
        [sys.executable, str(KILLS), str(kills), "0", str(tmp_path), commands],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for command, counts in json.loads(done.stdout.splitlines()[-1]).items():
        print(command, counts)
        assert counts["killed"] == counts["resumed"] + counts["started_again"] == kills and counts["finished"] >= 1
