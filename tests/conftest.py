"""Fixtures of the tests: a tiny CLIP, pairs of tiny images; no network, nothing outside the temporary folder."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Here and in the processes that tests start: equal sums need equal threads, and these models are too small for more.
os.environ["OMP_NUM_THREADS"] = "1"

import datasets  # noqa: E402
import pytest  # noqa: E402
from tiny import make_clip, make_model, make_pairs, make_processor  # noqa: E402

from gmail_hf import GmailTrainer, GmailTrainingArguments  # noqa: E402


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


@pytest.fixture
def arguments(tmp_path):
    def build(**fields):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return GmailTrainingArguments(**{**defaults, **fields})

    return build


@pytest.fixture
def train(clip_folder, arguments):
    def run(train_dataset=None, model=None, resume=None, trainer=None, **fields):
        model = model or make_model(clip_folder)
        pairs = make_pairs(20) if train_dataset is None else train_dataset
        trainer = (trainer or GmailTrainer)(
            model=model, args=arguments(**fields), train_dataset=pairs, processing_class=make_processor()
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run
