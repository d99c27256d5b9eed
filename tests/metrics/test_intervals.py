import numpy as np
import pytest

from gmail_hf.metrics import bootstrap_interval


def test_it_is_the_percentiles_of_resampled_means():
    values = np.random.default_rng(0).exponential(size=60)
    low, high = bootstrap_interval(values, 0.9, num_resamples=20_000)
    rng = np.random.default_rng(1)
    means = values[rng.integers(0, 60, (20_000, 60))].mean(axis=1)
    np.testing.assert_allclose([low, high], np.quantile(means, [0.05, 0.95]), atol=0.01)
    assert low < values.mean() < high


def test_it_covers_the_true_mean_as_often_as_it_says():
    hits = np.random.default_rng(2).random((400, 200)) < 0.3
    intervals = [bootstrap_interval(row, 0.9, num_resamples=300) for row in hits]
    assert 0.85 < np.mean([low <= 0.3 <= high for low, high in intervals]) < 0.95


def test_it_is_seeded_and_independent_of_batches(monkeypatch):
    hits = np.random.default_rng(3).random(500) < 0.7
    assert bootstrap_interval(hits, seed=4) == bootstrap_interval(hits, seed=4)
    assert len({bootstrap_interval(hits, seed=seed) for seed in range(5)}) > 1
    one_batch = bootstrap_interval(hits)
    monkeypatch.setattr("gmail_hf.metrics.intervals.BATCH_VALUES", 500 * 7)
    assert bootstrap_interval(hits) == one_batch


def test_equal_values_are_a_point():
    assert bootstrap_interval(np.ones(5, dtype=bool)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "non-empty vector"),
        (lambda: bootstrap_interval(np.ones((2, 2))), "non-empty vector"),
        (lambda: bootstrap_interval([1.0, np.nan]), "first at item 1"),
        (lambda: bootstrap_interval([0, 1], 95), "between 0 and 1"),
        (lambda: bootstrap_interval([0, 1], num_resamples=0), "at least 1"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()
