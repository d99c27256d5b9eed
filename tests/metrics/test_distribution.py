import numpy as np
import pytest
import torch

from gmail_hf import energy_distance_loss
from gmail_hf.metrics import cmmd, density_coverage, energy_distance


def test_cmmd_of_a_hand_worked_set():
    # Opposite vectors, 2 apart: k(x, x) = 1, k(x, y) = exp(-4 / 200).
    assert cmmd(np.array([[2.0, 0.0]]), np.array([[-1.0, 0.0]])) == pytest.approx(1000 * (2 - 2 * np.exp(-0.02)))
    # Kernel 1 within generated; within real and between, half of the pairs are 2^0.5 apart.
    half = (1 + np.exp(-0.01)) / 2
    assert cmmd(np.array([[1.0, 0.0]]), np.eye(2)) == pytest.approx(1000 * (1 + half - 2 * half))


def test_energy_distance_of_a_hand_worked_set():
    # One image a side, 2 apart: there are no distances within.
    assert energy_distance(np.array([[2.0, 0.0]]), np.array([[-1.0, 0.0]])) == pytest.approx(4)
    # Real images 2^0.5 apart, generated images equal to one of them.
    assert energy_distance(np.array([[1.0, 0.0], [1.0, 0.0]]), np.eye(2)) == pytest.approx(2 * 2**0.5 / 2 - 2**0.5)


def test_density_and_coverage_of_a_hand_worked_set():
    # On the circle at 0, 10, 30 and 90 degrees; balls to the nearest real neighbour: 10, 10, 20 and 60 degrees wide.
    real, generated = (
        np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
        for angles in ([0, 10, 30, 90], [5, 40, 200])
    )
    # 5 is in the balls of 0 and 10; 40 in those of 30 and 90; 200 in none.
    assert density_coverage(generated, real, k=1) == pytest.approx((4 / 3, 1.0))
    assert density_coverage(generated[:1], real, k=1) == pytest.approx((2.0, 0.5))


def test_against_direct_implementations(monkeypatch):
    monkeypatch.setattr("gmail_hf.metrics._checks.BLOCK", 7)
    rng = np.random.default_rng(0)
    generated, real = rng.normal(0.2, 1, (25, 6)), rng.normal(0, 1, (31, 6))
    one, two = (array / np.linalg.norm(array, axis=1, keepdims=True) for array in (generated, real))

    def kernel(first, second):
        return np.mean([[np.exp(-np.sum((x - y) ** 2) / 200) for y in second] for x in first])

    assert cmmd(generated, real) == pytest.approx(1000 * (kernel(one, one) + kernel(two, two) - 2 * kernel(one, two)))
    loss = energy_distance_loss(torch.from_numpy(one), torch.from_numpy(two)).item()
    assert energy_distance(generated, real) == pytest.approx(loss)
    radii = [sorted(np.linalg.norm(two - center, axis=1))[5] for center in two]
    inside = np.array([[np.linalg.norm(x - two[i]) < radii[i] for x in one] for i in range(len(two))])
    assert density_coverage(generated, real) == pytest.approx((inside.sum() / (5 * 25), inside.any(axis=1).mean()))


def test_what_equal_distributions_give():
    first, second = np.random.default_rng(0).normal(size=(2, 1500, 8))
    density, coverage = density_coverage(first, second)
    assert density == pytest.approx(1, abs=0.05) and coverage == pytest.approx(1 - 2**-5, abs=0.01)
    assert cmmd(first, second) < 0.02 < 1 < cmmd(first + 1, second)


def test_errors():
    with pytest.raises(ValueError, match="less than the number of real images, 5, got 5"):
        density_coverage(np.eye(5), np.eye(5))
    with pytest.raises(ValueError, match="have dimensions"):
        cmmd(np.eye(2), np.eye(3))
