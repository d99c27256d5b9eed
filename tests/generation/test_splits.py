"""Two splits in one folder: each with its own shards, settings and record."""

import json
from pathlib import Path

import datasets
import pytest

from gmail_hf.commands.bundled import synthesize
from gmail_hf.generation import pipelines
from gmail_hf.generation.shards import ShardFolder, open_folder
from gmail_hf.training.loading import load_pairs


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What lies in a folder, and when it was written; without the locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def both(make_args):
    """Arguments that make the two splits of one folder."""
    return make_args(num_captions=32), make_args(num_captions=24, split="validation")


@pytest.mark.integration
def test_two_splits_load_as_two(both):
    folder = synthesize(both[0]).path
    train = files(folder)
    synthesize(both[1])
    after = files(folder)
    assert {name: after[name] for name in train} == train
    assert sorted(set(after) - set(train)) == [
        "data/validation-00000-of-00002.parquet",
        "data/validation-00001-of-00002.parquet",
        "manifest-validation.json",
        "samples-validation.png",
    ]
    assert {"data/train-00000-of-00002.parquet", "manifest.json", "samples.png"} < set(train)
    loaded = datasets.load_dataset(str(folder))
    assert loaded.num_rows == {"train": 32, "validation": 24}
    assert loaded["train"][0]["caption_id"] == "digits-train-000000-0"
    assert loaded["validation"][0]["caption_id"] == "digits-validation-000000-0"
    assert load_pairs(str(folder), "validation")["caption_id"][:] == loaded["validation"]["caption_id"][:]


def test_a_split_is_the_same_alone_and_beside_another(both, make_args, tmp_path):
    alone = synthesize(make_args(num_captions=24, split="validation", output_dir=str(tmp_path / "alone"))).path
    synthesize(both[0])
    beside = files(synthesize(both[1]).path)
    assert {name: content for name, (content, _) in files(alone).items()} == {
        name: beside[name][0] for name in files(alone)
    }


def test_resuming_either_does_nothing(both, monkeypatch):
    for args in both:
        folder = synthesize(args).path
    before = files(folder)
    monkeypatch.setattr(pipelines.Generator, "load", lambda *_: pytest.fail("a model was loaded"))
    for args in both:
        assert synthesize(args).finished() == {0, 1}
    assert files(folder) == before


def test_each_split_keeps_its_own_settings(both, make_args):
    for args in both:
        synthesize(args)
    with pytest.raises(FileExistsError, match="'validation' in '.*' was made with other settings") as error:
        synthesize(make_args(num_captions=32, split="validation"))
    assert "num_captions: 24 -> 32" in str(error.value)
    with pytest.raises(FileExistsError, match="seed: 0 -> 1"):
        synthesize(make_args(num_captions=32, seed=1))
    synthesize(make_args(num_captions=16, seed=1, split="test"))
    assert [shards.split for shards, _ in open_folder(make_args().output_dir)] == ["train", "test", "validation"]


def test_an_interrupted_split_is_resumed_alone(both, make_args):
    synthesize(make_args(num_captions=32, shard_range="1:2"))
    folder = synthesize(make_args(num_captions=24, split="validation", shard_range="0:1"))
    assert folder.finished() == {0}
    assert synthesize(both[1]).finished() == {0, 1}
    assert [shards.finished() for shards, _ in open_folder(folder.path)] == [{1}, {0, 1}]


def test_splits_of_other_columns_are_refused(both, make_args):
    synthesize(both[0])
    with pytest.raises(FileExistsError, match="splits need the same columns: pass --real_images keep"):
        synthesize(make_args(num_captions=24, split="validation", real_images="drop"))


def test_shards_without_a_manifest_are_refused(both, tmp_path):
    folder = synthesize(both[0]).path
    (folder / "data" / "validation-00000-of-00002.parquet").touch()
    with pytest.raises(FileExistsError, match="files without a manifest.json"):
        synthesize(both[1])


def test_splits_do_not_wait_for_each_other(tmp_path):
    train, validation = ShardFolder(tmp_path, 10, 5), ShardFolder(tmp_path, 10, 5, "validation")
    for folder in (train, validation):
        folder.open({"shard_size": 5})
    locks = [train.lock(0), validation.lock(0)]
    assert None not in locks and train.lock(0) is None


def test_slices_and_files_without_splits(make_args, tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(json.dumps({"caption": text}) for text in ("a red three", "a green seven")))
    synthesize(make_args(dataset=str(path)))
    folder = synthesize(make_args(dataset=str(path), split="validation")).path
    assert sorted(path.name for path in (folder / "data").iterdir()) == [
        "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]
    assert make_args(split="train[:1000]").split_name == "train"
    assert make_args(split="train.clean[10%:20%]").split_name == "train.clean"
    for wrong in ("train+test", "train-2014", "", "[:10]"):
        with pytest.raises(ValueError, match="`split` must be the name of one split"):
            make_args(split=wrong)
