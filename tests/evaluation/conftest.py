"""Models of the benchmark tests, saved once, and ways to open data for them."""

from pathlib import Path

import pytest
from benchmark_data import save_clipcap, save_gmail, save_llava

from gmail_hf.commands.bundled import get_benchmark
from gmail_hf.evaluation import load_model, open_source


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, str]:
    root: Path = tmp_path_factory.mktemp("models")
    gmail = save_gmail(root / "gmail")
    return {
        "gmail": gmail,
        "clipcap": save_clipcap(root / "clipcap", gmail),
        "llava": save_llava(root / "llava", gmail),
    }


@pytest.fixture(scope="session")
def loaded(model_folders):
    return {name: load_model(folder) for name, folder in model_folders.items()}


@pytest.fixture
def source():
    """`source("dtd", folder)`: the data there, as that benchmark's."""

    def open_(name, place=None, limit=None):
        return open_source(get_benchmark(name), None if place is None else str(place), limit)

    return open_
