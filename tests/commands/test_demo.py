"""The demo from end to end at reduced size: what it writes, and that what it saved comes back the same."""

import json

import datasets
import pytest
from PIL import Image

from gmail_hf.commands import demo
from gmail_hf.metrics.train_on_generated import CORAL, GENERATED, MEAN_SHIFT, REAL

pytestmark = pytest.mark.integration

ARGUMENTS = "--num_pairs 128 --num_unseen 100 --num_heldout 24 --num_test 300 --max_steps 4 --batch_size 64 --seed 1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        results = demo.main(["--output_dir", str(folder / "nested"), *ARGUMENTS.split()])
    return folder / "nested", results


def test_the_table_has_every_row_and_column(run):
    folder, results = run
    assert [row["row"] for row in results["rows"]] == [
        GENERATED,
        MEAN_SHIFT,
        CORAL,
        "GMAIL (Eq. 1)",
        "GMAIL, recipe robust",
        REAL,
    ]
    for row in results["rows"]:
        for readout in ("logistic_probe", "nearest_centroid", "logistic_probe_unseen", "nearest_centroid_unseen"):
            assert 0 <= row[readout] <= 1
            assert row[f"{readout}_gap_closed"] is not None or row[f"{readout}_note"]
        compared = [row[key] for key in ("paired_cosine", "gen_to_real_R@1", "centroid_distance", "separability")]
        assert compared == [None] * 4 if row["row"] == REAL else None not in compared
    assert all(-1 <= gap <= 1 for gap in results["before_alignment"].values())
    assert json.loads((folder / "results.json").read_text()) == results
    text = (folder / "results.md").read_text()
    assert all(f"| {row['row']} |" in text for row in results["rows"])


def test_saved_adapters_come_back_through_peft_and_pipeline(run):
    _, results = run
    assert results["reload"]["peft_max_difference"] < 1e-5
    assert results["reload"]["pipeline_max_difference"] < 1e-5


def test_training_changed_the_gen_branch(run):
    rows = {row["row"]: row for row in run[1]["rows"]}
    cosines = {rows[name]["paired_cosine"] for name in (GENERATED, "GMAIL (Eq. 1)", "GMAIL, recipe robust")}
    assert len(cosines) == 3


def test_everything_promised_is_on_disk(run):
    folder, _ = run
    for name in ("embeddings.png", "pairs.png"):
        assert Image.open(folder / name).width > 1000
    for name in ("model.safetensors", "config.json", "gen/adapter_model.safetensors", "real/adapter_config.json"):
        assert (folder / "model" / name).exists()
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_captions_that_occur_twice():
    assert demo.scenes_of_one_caption(["a", "b", "a", "c", "c", "a"]) == ([0, 3], [2, 4])


def test_more_heldout_pairs_than_test_scenes_is_refused():
    with pytest.raises(ValueError, match="must not be larger"):
        demo.main(["--num_heldout", "11", "--num_test", "10"])
