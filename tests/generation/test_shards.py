"""The folder of shards: refusals, locks, and a disk that fills up."""

import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from gmail_hf.commands.bundled import make_job, synthesize
from gmail_hf.generation import shards
from gmail_hf.generation.engines import ShardWorker
from gmail_hf.training.checks import check_pairs
from gmail_hf.training.loading import load_pairs


def test_other_settings_are_refused_with_the_difference(make_args):
    folder = synthesize(make_args(num_captions=16))
    before = sorted(os.listdir(folder.path / "data"))
    with pytest.raises(FileExistsError) as error:
        synthesize(make_args(num_captions=16, seed=1, scheduler="PNDMScheduler"))
    assert "seed: 0 -> 1" in str(error.value)
    assert "scheduler: 'DDIMScheduler' -> 'PNDMScheduler'" in str(error.value)
    assert "num_inference_steps" not in str(error.value)
    with pytest.raises(FileExistsError, match="num_captions: 16 -> 32"):
        synthesize(make_args(num_captions=32))
    assert sorted(os.listdir(folder.path / "data")) == before


def test_where_and_who_are_no_settings(make_args):
    synthesize(make_args(num_captions=16))
    again = make_args(num_captions=16, shard_range="0:1", captions_license="mit")
    assert len(synthesize(again).finished()) == 1


def test_files_without_a_manifest_are_refused(make_args, tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "mine.parquet").touch()
    with pytest.raises(FileExistsError, match="files without a manifest.json"):
        synthesize(make_args())


def test_a_file_in_place_of_the_folder_is_named(make_args, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match=r"out' is not a folder that can be written to .*Choose another"):
        make_job(make_args()).open()


def test_fingerprint_is_of_the_settings(make_args):
    folders = [synthesize(make_args(num_captions=16, output_dir=make_args().output_dir + str(i))) for i in range(2)]
    manifests = [json.loads((folder.path / "manifest.json").read_text()) for folder in folders]
    assert manifests[0] == manifests[1] and len(manifests[0]["fingerprint"]) == 32


def test_a_shard_has_one_maker(tmp_path):
    folder = shards.ShardFolder(tmp_path, 10, 5)
    folder.open({"shard_size": 5})
    lock = folder.lock(0)
    assert folder.lock(0) is None and folder.lock(1) is not None
    lock.release()
    assert folder.lock(0) is not None


def test_a_shard_that_another_process_has_finished_is_left_alone(make_args):
    """It was listed as pending before the lock was taken."""
    job = make_job(make_args(num_captions=16))
    job.open()
    job.folder.shard_path(0).write_bytes(b"finished")
    assert not ShardWorker(job, pipeline=object())(0)
    assert job.folder.shard_path(0).read_bytes() == b"finished"


def test_other_precision_is_refused(make_args):
    make_job(make_args(num_captions=16, dtype="float32")).open()
    with pytest.raises(FileExistsError, match="dtype: 'float32' -> 'bfloat16'"):
        make_job(make_args(num_captions=16, dtype="bfloat16")).open()


def test_manifest_names_each_finished_shard(make_args, monkeypatch):
    """It does so before the shard has its name, so that a kill between both leaves none without a digest."""
    job, listed = make_job(make_args(num_captions=32)), []
    job.open()
    write_file = shards.write_file

    def recorded(path, content):
        manifest = shards.read_manifest(job.folder.path)
        listed.append((path.name, sorted(manifest["shards"]), job.folder.finished()))
        write_file(path, content)

    monkeypatch.setattr(shards, "write_file", recorded)
    job.folder.write(1, pa.table({"a": [1]}))
    name = job.folder.shard_path(1).name
    assert listed == [("manifest.json", [], set()), (name, [name], set())]
    assert job.folder.check(digests=True) == 1


def test_disk_full_before_the_start(make_args, monkeypatch):
    monkeypatch.setattr("gmail_hf.training.loading.shutil.disk_usage", lambda _: _Usage())
    with pytest.raises(OSError, match="needs .* GB, but only"):
        synthesize(make_args())


class _Usage:
    free = 1000


def test_disk_full_in_the_middle(make_args, monkeypatch):
    """The third shard does not fit; what is there stays, and the run goes on when there is room."""
    written = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 8:  # the manifest, twice the manifest and a shard, the contact sheet, the manifest, and now
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("gmail_hf.files.os.fsync", full)
        with pytest.raises(OSError, match=r"train-00002.*No space left.*finished shards are complete") as error:
            synthesize(make_args())
    assert error.value.errno == errno.ENOSPC
    data = Path(make_args().output_dir, "data")
    assert sorted(os.listdir(data)) == [f"train-{shard:05d}-of-00006.parquet" for shard in range(2)]
    assert len(synthesize(make_args()).finished()) == 6


def test_without_real_images_training_says_what_is_missing(make_args):
    folder = synthesize(make_args(num_captions=16, real_images="drop"))
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['real_image'\]"):
        check_pairs(load_pairs(str(folder.path)))


def test_finished_is_one_listing(tmp_path):
    folder = shards.ShardFolder(tmp_path, 10, 2)
    assert folder.finished() == set()
    folder.open({})
    for shard in (1, 4):
        folder.write(shard, pa.table({"a": [1]}))
    (tmp_path / "data" / ".train-00000-of-00005.parquet.0.part").touch()
    assert folder.finished() == {1, 4} and list(folder.rows(4)) == [8, 9]
