"""Prepared pairs give the model the very tensors that the originals give."""

import os

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tiny import IMAGE_SIZE, make_pairs
from transformers import Siglip2ImageProcessorPil

from gmail_hf.commands.bundled import synthesize
from gmail_hf.commands.prepare import main
from gmail_hf.generation.prepare import prepare_pairs
from gmail_hf.training.data import GmailCollator, undecoded
from gmail_hf.training.loading import load_pairs


@pytest.fixture
def photographs() -> Dataset:
    """Pairs of JPEGs of every shape."""
    rng = np.random.default_rng(0)
    shapes = [(40, 60), (64, 33), (16, 16), (17, 90)]
    images = [PILImage.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    features = Features(real_image=Image(), generated_image=Image(), caption=Value("string"), image_id=Value("int64"))
    columns = {
        "real_image": images,
        "generated_image": images[::-1],
        "caption": ["a", "b", "a", "b"],
        "image_id": [0, 1, 2, 3],
    }
    return Dataset.from_dict(columns, features=features)


def test_same_tensors(photographs, processor, tmp_path):
    prepared = prepare_pairs(photographs, processor, tmp_path / "prepared")
    collate = GmailCollator(processor)
    ours, theirs = collate(list(load_pairs(str(tmp_path / "prepared")))), collate(list(photographs))
    assert prepared.cache_files and prepared[1]["real_image"].size == (IMAGE_SIZE, IMAGE_SIZE)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [{"bad_real": (4,)}, {"bad_generated": (1,)}])
def test_unreadable_images_stay_unreadable(bad, processor, tmp_path):
    pairs = make_pairs(6, **bad)
    prepared = prepare_pairs(pairs, processor, tmp_path / "prepared")
    batch = GmailCollator(processor)(list(undecoded(prepared)))
    assert batch["skipped_pairs"] == 1


@pytest.fixture
def source(photographs, tmp_path) -> Dataset:
    """The photographs in a folder that also holds the result of a user's `map`."""
    photographs.save_to_disk(tmp_path / "source")
    source = Dataset.load_from_disk(tmp_path / "source")
    source.map(lambda rows: {"length": [len(caption) for caption in rows["caption"]]}, batched=True)
    assert len(list((tmp_path / "source").glob("cache-*.arrow"))) == 1
    return source


@pytest.mark.parametrize("num_proc", [None, 2])
def test_nothing_is_left_and_nothing_of_others_deleted(num_proc, source, processor, tmp_path):
    before = sorted(os.listdir(tmp_path / "source"))
    prepared = prepare_pairs(source, processor, tmp_path / "made" / "prepared", num_proc)
    assert sorted(os.listdir(tmp_path / "source")) == before
    assert os.listdir(tmp_path / "made") == ["prepared"]
    assert not list((tmp_path / "made" / "prepared").glob("cache-*"))
    assert len(prepared) == 4 and prepared[3]["generated_image"].size == (IMAGE_SIZE, IMAGE_SIZE)


def test_an_error_leaves_nothing(source, processor, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    before = sorted(os.listdir(tmp_path / "source"))
    monkeypatch.setattr("gmail_hf.generation.prepare._prepared", broken)
    with pytest.raises(RuntimeError, match="broken"):
        prepare_pairs(source, processor, tmp_path / "made" / "prepared")
    assert sorted(os.listdir(tmp_path / "source")) == before
    assert os.listdir(tmp_path / "made") == []


def test_refusals(processor, tmp_path, monkeypatch):
    (tmp_path / "prepared").mkdir()
    with pytest.raises(FileExistsError, match="already exists"):
        prepare_pairs(make_pairs(2), processor, tmp_path / "prepared")
    monkeypatch.setattr("gmail_hf.training.loading.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="needs .* GB, but only"):
        prepare_pairs(make_pairs(2), processor, tmp_path / "other")


def test_patches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="returns patches .* Train on the data set as it is"):
        prepare_pairs(make_pairs(2), Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


@pytest.mark.integration
def test_generate_prepare_train(make_args, tmp_path):
    """From captions to a trained model, through the shards and through the prepared pairs: the same weights."""
    from gmail_hf import GmailCLIPModel
    from gmail_hf.commands import train

    folder = synthesize(make_args(num_captions=32))
    prepared = tmp_path / "prepared"
    main(["--dataset", str(folder.path), "--model", "digits", "--output_dir", str(prepared)])
    weights = []
    for source in (folder.path, prepared):
        output_dir = tmp_path / f"model-{source.name}"
        options = ["--per_device_train_batch_size=16", "--max_steps=2", "--dataloader_pin_memory=False"]
        options += ["--model", "digits"]
        train.main(["--dataset", str(source), "--output_dir", str(output_dir), "--report_to=none", *options])
        weights.append(GmailCLIPModel.from_pretrained(output_dir).state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=0)
