"""The benchmark script on a paired data set by path, tiny: what it writes, and its arithmetic over seeds."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import ImageFilter

from gmail_hf.digits import clip_path, load_digits
from gmail_hf.metrics import aggregate

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "digits_alignment.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("digits_alignment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs whose "generated" image is the real one blurred, and real test images, as parquet files."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = load_digits("train", 260).map(
        lambda row: {
            "generated_image": row["real_image"].filter(ImageFilter.GaussianBlur(1.5)),
            "left": row["digits"][0],
            "right": row["digits"][1],
        }
    )
    pairs.to_parquet(folder / "pairs.parquet")
    test = load_digits("validation", 120).map(lambda row: {"left": row["digits"][0], "right": row["digits"][1]})
    test.rename_column("real_image", "image").to_parquet(folder / "real.parquet")
    return folder


@pytest.mark.integration
def test_any_paired_data_set_by_path(benchmark, files, tmp_path):
    arguments = (
        f"--name blurred --pairs {files}/pairs.parquet --real_test {files}/real.parquet --label_column left right"
    )
    arguments += f" --model_name_or_path {clip_path()} --output_dir {tmp_path} --seeds 0 1"
    arguments += " --num_pairs 96 --num_heldout 32 --num_unseen 160 --max_steps 2 --batch_size 64"
    variants = ["GMAIL, recipe robust", "GMAIL, optimal pairing"]
    result = benchmark.main([*arguments.split(), "--variants", *variants])
    assert [row["row"] for row in result["mean"]][3:-1] == variants
    for i, row in enumerate(result["mean"]):
        one, other = (result["seeds"][seed][i]["logistic_probe"] for seed in (0, 1))
        assert row["logistic_probe"] == pytest.approx((one + other) / 2)
        assert result["standard_deviation"][i]["logistic_probe"] == pytest.approx(abs(one - other) / 2**0.5)
        assert row["logistic_probe_unseen"] > 0.1
    saved = json.loads((tmp_path / "blurred.json").read_text())
    assert saved["mean"] == result["mean"]
    assert saved["environment"]["packages"]["torch"]
    assert "GMAIL, optimal pairing | " in (tmp_path / "blurred.md").read_text()


def test_settings_are_not_chosen_on_the_images_of_the_table(benchmark):
    labels = ["a", "a", "b", "a", "b", "b", "a"]
    assert benchmark.half(labels, "validation") == [0, 2, 3, 5]
    assert benchmark.half(labels, "test") == [1, 4, 6]


def test_a_number_that_one_seed_lacks_has_no_mean(benchmark):
    tables = [
        [{"row": "a", "score": 1.0, "gap": None, "gap_note": "no gap"}],
        [{"row": "a", "score": 3.0, "gap": 0.5}],
    ]
    mean, spread = aggregate(tables)
    assert mean == [{"row": "a", "score": 2.0, "gap": None}]
    assert spread[0]["score"] == pytest.approx(2**0.5)


def test_asking_for_more_pairs_than_there_are_is_refused(benchmark, files, tmp_path):
    with pytest.raises(ValueError, match="has 260 pairs"):
        benchmark.main(
            [
                "--pairs",
                f"{files}/pairs.parquet",
                "--real_test",
                f"{files}/real.parquet",
                "--output_dir",
                str(tmp_path),
            ]
            + ["--model_name_or_path", clip_path(), "--seeds", "0"]
        )
    with pytest.raises(SystemExit):
        benchmark.parse_args(["--pairs", "somewhere.parquet"])
