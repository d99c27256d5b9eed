"""Optimal pairing against brute force."""

import builtins
from itertools import permutations

import numpy as np
import pytest

from gmail_hf.training.pairing import optimal_pairing


def unit_rows(count, seed, dim=5):
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def total(gen, real, rows, partners):
    return float(sum(gen[row] @ real[partner] for row, partner in zip(rows, partners, strict=True)))


@pytest.mark.parametrize("seed", range(5))
def test_equals_brute_force_within_each_caption(seed):
    gen, real = unit_rows(13, seed), unit_rows(13, seed + 100)
    captions = np.random.default_rng(seed).choice(["a", "b", "c"], 13).tolist()
    partners = optimal_pairing(gen, real, captions)
    assert sorted(partners) == list(range(13)) and partners.dtype == np.int64
    for caption in set(captions):
        rows = [row for row in range(13) if captions[row] == caption]
        assert {captions[partner] for partner in partners[rows]} == {caption}
        best = max(total(gen, real, rows, order) for order in permutations(rows))
        assert total(gen, real, rows, partners[rows]) == pytest.approx(best, abs=1e-5)


def test_captions_of_their_own_keep_their_pairs():
    gen, real = unit_rows(6, 0), unit_rows(6, 1)
    assert optimal_pairing(gen, real, list("abcdef")).tolist() == list(range(6))


def test_finds_a_hidden_permutation():
    real = unit_rows(40, 0, dim=16)
    order = np.random.default_rng(1).permutation(40)
    assert optimal_pairing(real[order], real, ["same"] * 40).tolist() == order.tolist()


def test_large_groups_are_split():
    gen, real = unit_rows(50, 0), unit_rows(50, 1)
    captions = ["a"] * 30 + ["b"] * 20
    whole = optimal_pairing(gen, real, captions)
    split = optimal_pairing(gen, real, captions, max_group=8)
    assert sorted(split) == list(range(50)) and (split[:30] < 30).all()
    own = total(gen, real, range(50), range(50))
    assert own < total(gen, real, range(50), split) < total(gen, real, range(50), whole)
    assert np.array_equal(split, optimal_pairing(gen, real, captions, max_group=8))
    assert not np.array_equal(split, optimal_pairing(gen, real, captions, max_group=8, seed=1))


@pytest.mark.parametrize("name", ["gen_embeds", "real_embeds"])
def test_row_that_is_not_finite_is_named(name):
    embeds = {"gen_embeds": unit_rows(4, 0), "real_embeds": unit_rows(4, 1)}
    embeds[name][2, 1] = np.nan
    with pytest.raises(ValueError, match=f"`{name}` row 2"):
        optimal_pairing(**embeds, captions=["a"] * 4)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="4 generated and 3 real.*4 captions"):
        optimal_pairing(unit_rows(4, 0), unit_rows(3, 1), ["a"] * 4)


def test_missing_scipy_names_the_remedy(monkeypatch):
    original = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r"gmail-hf\[evaluation\]"):
        optimal_pairing(unit_rows(2, 0), unit_rows(2, 1), ["a", "a"])
