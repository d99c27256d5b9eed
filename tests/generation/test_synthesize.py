"""One uninterrupted process, two ranks, a killed and resumed run: the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny_pipeline import SCRIPT, command_line

from gmail_hf.commands import generate
from gmail_hf.commands.bundled import make_job, synthesize
from gmail_hf.generation import SynthesisArguments, engines, pipelines
from gmail_hf.generation.sampler import row_seed
from gmail_hf.training.checks import check_pairs
from gmail_hf.training.loading import load_pairs

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder, "data").iterdir())}


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """Made by one process without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    synthesize(SynthesisArguments(output_dir=str(folder), **options))
    return folder


def test_shards_are_a_data_set_of_pairs(whole):
    assert list(shards(whole)) == [f"train-{shard:05d}-of-00006.parquet" for shard in range(6)]
    pairs = datasets.load_dataset("parquet", data_files=str(whole / "data" / "*.parquet"), split="train")
    assert datasets.load_dataset(str(whole), split="train")["caption_id"][:] == pairs["caption_id"][:]
    check_pairs(pairs)
    row = pairs[17]
    assert (row["caption_id"], row["image_id"]) == ("digits-train-000017-0", "digits-train-000017")
    assert row["seed"] == row_seed(0, row["caption_id"], 0)
    assert (row["num_inference_steps"], row["guidance_scale"], row["height"]) == (2, 7.5, 16)
    assert (row["scheduler"], row["dtype"], row["batch_size"]) == ("DDIMScheduler", "float32", 8)
    assert row["real_image"].size == (32, 32) and row["generated_image"].size == (16, 16)
    assert (whole / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_images_are_the_pipelines_own(whole, pipeline_folder):
    """A shard holds what a bare call of the pipeline gives for the same captions and seeds."""
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(1)
    rows = load_pairs(str(whole)).select(range(8, 16))
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    generators = [torch.Generator().manual_seed(seed) for seed in rows["seed"]]
    images = pipeline(rows["caption"][:], num_inference_steps=2, generator=generators).images
    for ours, theirs in zip(rows["generated_image"], images, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_nothing_to_do(whole, options, caplog, monkeypatch):
    before = shards(whole)
    monkeypatch.setattr(pipelines.Generator, "load", lambda *_: pytest.fail("a model was loaded"))
    generate.main(command_line(options, output_dir=whole))
    assert "Nothing to do: all 6 shards are in" in caplog.text
    assert shards(whole) == before


@pytest.mark.integration
def test_killed_and_resumed_equals_uninterrupted(whole, make_args, options, tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), *command_line(options, output_dir=folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("data/*.parquet"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {name: (folder / "data" / name).stat().st_mtime_ns for name in shards(folder) if name.endswith("parquet")}
    assert 2 <= len(kept) < 6, process.stderr.read()
    leftover = folder / "data" / ".train-00005-of-00006.parquet.0123456789abcdef.part"  # as a kill may leave it
    leftover.write_bytes(b"half a shard")
    assert len(load_pairs(str(folder))) == datasets.load_dataset(str(folder), split="train").num_rows == 16 * len(kept)
    synthesize(make_args())
    assert shards(folder) == shards(whole)
    assert all((folder / "data" / name).stat().st_mtime_ns == mtime for name, mtime in kept.items())


@pytest.mark.integration
def test_two_ranks_equal_one_process(whole, options, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(
        [sys.executable, *command, *command_line(options, output_dir=tmp_path / "out")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "out") == shards(whole)


def test_parts_of_an_array_equal_one_process(whole, make_args, tmp_path):
    for part in ("4:9", "0:2", "2:4"):
        synthesize(make_args(shard_range=part))
    assert shards(tmp_path / "out") == shards(whole)


def test_shard_of_another_process_is_waited_for(make_args, monkeypatch):
    """A shard that another process holds is left to it; once that one dies, it is made here."""
    job = make_job(make_args(num_captions=16))
    job.open()
    lock = job.folder.lock(0)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(job.folder.finished())
        lock.release()

    monkeypatch.setattr(engines.time, "sleep", sleep)
    synthesize(make_args(num_captions=16))
    assert waits == [set()] and job.folder.finished() == {0}


@pytest.mark.slow
def test_ray_equals_one_process(whole, make_args, tmp_path):
    pytest.importorskip("ray")
    synthesize(make_args(ray_workers=2))
    assert shards(tmp_path / "out") == shards(whole)
