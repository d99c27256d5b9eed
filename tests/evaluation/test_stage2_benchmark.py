"""The stage 2 benchmark: its arithmetic by hand, runs that are not run again, and the maps of its baselines."""

import json
import sys

import datasets
import numpy as np
import pytest
from tiny import make_model, make_pairs, make_processor

from gmail_hf.embeddings import cached_embeds, embeds_array
from gmail_hf.evaluation import mean_shift


@pytest.fixture
def stage2(monkeypatch):
    import stage2

    monkeypatch.setattr(stage2.subprocess, "run", lambda command, **kwargs: commands.append(command))
    commands = stage2.commands = []
    return stage2


def test_gap_closed_beside_each_headline_score(stage2):
    rows = [
        {"row": stage2.GENERATED, "accuracy": 0.5, "CIDEr": None, "other": 1.0},
        {"row": "GMAIL", "accuracy": 0.8, "CIDEr": None, "other": 2.0},
        {"row": stage2.REAL, "accuracy": 0.9, "CIDEr": None, "other": 3.0},
    ]
    gaps = stage2.with_gaps(rows, ("accuracy", "CIDEr"))
    assert [row["accuracy_gap_closed"] for row in gaps] == pytest.approx([0.0, 0.75, 1.0])
    assert [row["CIDEr_gap_closed"] for row in gaps] == [None] * 3 and "other_gap_closed" not in gaps[0]
    table = stage2.to_markdown(gaps, gaps, ("accuracy", "CIDEr"))
    assert "| accuracy | gap closed | CIDEr | gap closed | other |" in table
    assert "| GMAIL | 0.800 ± 0.800 | 0.750 ± 0.750 | – | – | 2.000 ± 2.000 |" in table


def test_finished_runs_are_not_run_again(stage2, tmp_path):
    args = stage2.parse_args(["--work_dir", str(tmp_path), "--split", "validation"])
    runs = stage2.Runs.__new__(stage2.Runs)
    runs.args, runs.seed, runs.folder, runs.pairs = args, 3, tmp_path, tmp_path / "pairs"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "eval_results.json").write_text(json.dumps({"score": 0.5}))
    assert runs.run("old", "train_gmail.py") == (tmp_path / "old", {"score": 0.5}) and not stage2.commands
    with pytest.raises(FileNotFoundError):  # the run of this test writes nothing
        runs.run("new", "train_clipcap.py", "--modality", "real", training_free="coral")
    (command,) = stage2.commands
    assert command[0] == sys.executable and command[1].endswith("_training_free.py") and command[2] == "coral"
    assert command[4].endswith("train_clipcap.py") and command[command.index("--seed") + 1] == "3"
    assert command[command.index("--dataset_name") + 1] == str(tmp_path / "pairs")


def test_training_free_map_moves_generated_embeddings_only(clip_folder):
    from _training_free import mapped

    model, processor, pairs = make_model(clip_folder), make_processor(), make_pairs(12)
    cached = mapped("mean_shift", pairs)
    generated, real = (
        embeds_array(cached_embeds(pairs, f"{side}_image", model, processor)) for side in ("generated", "real")
    )
    assert np.array_equal(embeds_array(cached(pairs, "real_image", model, processor)), real)
    moved = cached(pairs.select(range(4)), "generated_image", model, processor)
    assert isinstance(moved, datasets.Dataset) and moved.column_names == ["image_embeds"]
    np.testing.assert_allclose(embeds_array(moved), mean_shift(generated, real)(generated[:4]), atol=1e-6)
    assert not np.allclose(embeds_array(moved), generated[:4])
