"""Pairs in a file, for commands."""

import pytest
from tiny import make_pairs


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    make_pairs(48).to_parquet(path)
    return str(path)
