"""Fixtures of the tests: a tiny CLIP, pairs of tiny images; no network, nothing outside the temporary folder."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Here and in the processes that tests start: equal sums need equal threads, and these models are too small for more.
os.environ["OMP_NUM_THREADS"] = "1"

import datasets  # noqa: E402
import pytest  # noqa: E402
from tiny import make_clip, make_model, make_pairs, make_processor  # noqa: E402


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    """Cached embeddings of one test must not serve another."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with its processor, saved."""
    folder = tmp_path_factory.mktemp("clip")
    make_clip().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture
def clip():
    return make_clip()


@pytest.fixture
def model(clip_folder):
    """Adapters as after training, so that branches differ."""
    return make_model(clip_folder)


@pytest.fixture
def pairs():
    return make_pairs(12)
