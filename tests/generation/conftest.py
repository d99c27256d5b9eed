"""A tiny pipeline on disk, and the options of a run of six shards."""

import pytest
import torch
from tiny_pipeline import make_pipeline

from gmail_hf.generation import SynthesisArguments


@pytest.fixture(autouse=True)
def threads():
    """Generation on a CPU sets one thread; other tests should not run under it."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def options(pipeline_folder) -> dict:
    """96 captions, 6 shards of two batches each."""
    return {
        "dataset": "digits",
        "generator": pipeline_folder,
        "num_captions": 96,
        "shard_size": 16,
        "batch_size": 8,
        "num_inference_steps": 2,
    }


@pytest.fixture
def make_args(options, tmp_path):
    """Arguments of a small run: the options, changed as asked."""

    def make(**changes) -> SynthesisArguments:
        return SynthesisArguments(**{"output_dir": str(tmp_path / "out"), **options, **changes})

    return make
