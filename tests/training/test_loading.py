"""Pairs from every kind of source, and the refusals before a run."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from gmail_hf.training.checks import check_pairs
from gmail_hf.training.data import PAIR_COLUMNS
from gmail_hf.training.loading import check_free_disk, load_pairs

NUM_PAIRS = 6


@pytest.fixture
def rows() -> dict[str, list]:
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2 * NUM_PAIRS)]
    return {
        "real_image": images[:NUM_PAIRS],
        "generated_image": images[NUM_PAIRS:],
        "caption": [f"scene {i % 3}" for i in range(NUM_PAIRS)],
        "image_id": [f"id-{i}" for i in range(NUM_PAIRS)],
    }


@pytest.fixture
def pairs(rows) -> Dataset:
    features = Features(real_image=Image(), generated_image=Image(), caption=Value("string"), image_id=Value("string"))
    return Dataset.from_dict(rows, features=features)


def pixels(dataset: Dataset, column: str) -> np.ndarray:
    return np.stack([np.asarray(image) for image in dataset[column]])


def assert_same(loaded: Dataset, pairs: Dataset) -> None:
    check_pairs(loaded)
    for column in ("real_image", "generated_image"):
        np.testing.assert_array_equal(pixels(loaded, column), pixels(pairs, column))
    assert loaded["caption"][:] == pairs["caption"][:]
    assert loaded["image_id"][:] == pairs["image_id"][:]


@pytest.mark.parametrize("kind", ["file", "glob", "folder"])
def test_parquet(kind, pairs, tmp_path):
    pairs.select(range(4)).to_parquet(tmp_path / "a.parquet")
    pairs.select(range(4, 6)).to_parquet(tmp_path / "b.parquet")
    if kind == "file":
        assert_same(load_pairs(str(tmp_path / "a.parquet")), pairs.select(range(4)))
    else:
        assert_same(load_pairs(str(tmp_path / "*.parquet") if kind == "glob" else str(tmp_path)), pairs)


def test_parquet_folder_with_splits(pairs, tmp_path):
    """As a snapshot of a data set on the Hub: the test rows must not be trained on."""
    (tmp_path / "data").mkdir()
    pairs.select(range(4)).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    pairs.select(range(4, 6)).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert_same(load_pairs(str(tmp_path), "train"), pairs.select(range(4)))
    assert_same(load_pairs(str(tmp_path), "test"), pairs.select(range(4, 6)))


def test_folder_saved_by_datasets(pairs, tmp_path):
    pairs.save_to_disk(tmp_path / "one")
    assert_same(load_pairs(str(tmp_path / "one")), pairs)
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        load_pairs(str(tmp_path / "one"), "test")


def test_folder_of_splits_saved_by_datasets(pairs, tmp_path):
    from datasets import DatasetDict

    DatasetDict(train=pairs, test=pairs.select([0])).save_to_disk(tmp_path / "splits")
    assert len(load_pairs(str(tmp_path / "splits"), "test")) == 1
    with pytest.raises(ValueError, match="no split 'dev'.*'train', 'test'"):
        load_pairs(str(tmp_path / "splits"), "dev")


def test_imagefolder(rows, pairs, tmp_path):
    lines = []
    for index in range(NUM_PAIRS):
        line = {"caption": rows["caption"][index], "image_id": rows["image_id"][index]}
        for column in ("real_image", "generated_image"):
            line[f"{column}_file_name"] = f"{column}-{index}.png"
            rows[column][index].save(tmp_path / line[f"{column}_file_name"])
        lines.append(json.dumps(line))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert_same(load_pairs(str(tmp_path)), pairs)


def test_columns_are_renamed_and_samples_cut(pairs, tmp_path):
    renamed = pairs.rename_columns({"caption": "text", "real_image": "photo"})
    # A column of the right name that is not the one asked for must not survive.
    renamed.add_column("caption", ["other"] * NUM_PAIRS).to_parquet(tmp_path / "a.parquet")
    loaded = load_pairs(str(tmp_path / "a.parquet"), columns={"caption": "text", "real_image": "photo"}, max_samples=2)
    assert_same(loaded.select_columns(list(PAIR_COLUMNS)), pairs.select(range(2)))


def test_columns_can_be_swapped(pairs, tmp_path):
    pairs.to_parquet(tmp_path / "a.parquet")
    swapped = load_pairs(
        str(tmp_path / "a.parquet"), columns={"real_image": "generated_image", "generated_image": "real_image"}
    )
    np.testing.assert_array_equal(pixels(swapped, "real_image"), pixels(pairs, "generated_image"))


def test_unknown_column_names_those_there(pairs, tmp_path):
    pairs.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column\(s\) \['text'\]; it has \['real_image'"):
        load_pairs(str(tmp_path / "a.parquet"), columns={"caption": "text"})


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "a/b/c"])
def test_path_without_data(name):
    with pytest.raises(FileNotFoundError, match="No data set at"):
        load_pairs(name)


def test_full_disk_is_told_before(tmp_path):
    check_free_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(OSError, match="needs .* GB, but only .* GB are free"):
        check_free_disk(tmp_path / "not" / "yet", 10**18)
