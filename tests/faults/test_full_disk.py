"""A disk that fills up: the error says so, nothing half-written is used, and the same command continues later."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny import assert_equal, make_model, make_pairs, weights
from tiny_pipeline import make_pipeline

from gmail_hf.commands.bundled import synthesize
from gmail_hf.generation import SynthesisArguments
from gmail_hf.generation.prepare import prepare_pairs
from gmail_hf.training.embeddings import cached_embeds, embeds_array
from gmail_hf.training.resuming import checkpoints, damage


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A disk of 4 MB, and the checks before a run switched off: another process fills the disk after them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no small disk can be mounted: {error}")
    if done.returncode:
        pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
    for module in ("generation.engines", "generation.prepare"):
        monkeypatch.setattr(f"gmail_hf.{module}.check_free_disk", lambda *_: None)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes."""
    filler = disk / "filler"
    with open(filler, "wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - left))
    return filler


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_generation(disk, pairs_file, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    options = {"dataset": pairs_file, "generator": str(tmp_path / "pipeline"), "num_inference_steps": 1}
    options |= {"num_captions": 24, "shard_size": 4}
    whole = synthesize(SynthesisArguments(output_dir=str(tmp_path / "whole"), **options))
    shard = max(path.stat().st_size for path in (whole.path / "data").iterdir())
    sheet = (whole.path / "samples.png").stat().st_size
    filler = fill(disk, sheet + 3 * shard)  # and the manifest needs some room
    args = SynthesisArguments(output_dir=str(disk / "out"), **options)
    full = "No space left on device.*finished shards are complete: free disk space and run the same command"
    with pytest.raises(OSError, match=full):
        synthesize(args)
    found, expected = files(disk / "out" / "data"), files(whole.path / "data")
    assert 0 < len(found) < 6 and all(expected[name] == content for name, content in found.items())
    filler.unlink()
    synthesize(args)
    assert files(disk / "out" / "data") == expected


def test_embeddings(disk, clip_folder, processor, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", disk / "cache")
    pairs, model = make_pairs(100), make_model(clip_folder)
    filler = fill(disk, 8192)
    with pytest.raises(OSError, match=r"00000.arrow' could not be written \(No space left on device\)"):
        cached_embeds(pairs, "real_image", model, processor)
    assert not list(disk.rglob("*.arrow")) and not list(disk.rglob("*.part"))
    filler.unlink()
    assert embeds_array(cached_embeds(pairs, "real_image", model, processor)).shape == (100, 24)


def test_preparation(disk, processor):
    pairs = make_pairs(100)
    filler = fill(disk, 100_000)
    with pytest.raises(OSError, match="No space left on device"):
        prepare_pairs(pairs, processor, disk / "prepared")
    assert os.listdir(disk) == ["filler"]
    filler.unlink()
    assert len(prepare_pairs(pairs, processor, disk / "prepared")) == 100
    assert os.listdir(disk) == ["prepared"]


def test_training(disk, train, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(**settings)
    size = sum(len(content) for content in files(tmp_path / "run" / "checkpoint-2").values())
    filler = fill(disk, int(1.8 * size))
    with pytest.raises(Exception, match="No space left|write|enforce fail"):
        train(output_dir=str(disk / "run"), **settings)
    assert [damage(path) for path in checkpoints(disk / "run")] == [None, "it was not written completely"]
    filler.unlink()
    assert_equal(weights(train(output_dir=str(disk / "run"), resume=True, **settings)), weights(whole))
