import numpy as np
import pytest

from gmail_hf.metrics import expected_calibration_error


def test_of_a_hand_worked_set():
    # Two bins. Below 0.5: mean probability 0.2, 1 of 4 happened. From 0.5 on: mean 0.9, both happened.
    probabilities, happened = [0.1, 0.1, 0.3, 0.3, 0.8, 1.0], [False, False, False, True, True, True]
    assert expected_calibration_error(probabilities, happened, bins=2) == pytest.approx((4 * 0.05 + 2 * 0.1) / 6)
    assert expected_calibration_error(probabilities, happened, bins=1) == pytest.approx(abs(2.6 / 6 - 3 / 6))
    assert expected_calibration_error([1.0, 0.0], [True, False]) == 0
    assert expected_calibration_error([1.0, 0.0], [False, True]) == 1


def test_probabilities_that_are_frequencies_are_calibrated():
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(size=100_000)
    happened = rng.uniform(size=100_000) < probabilities
    assert expected_calibration_error(probabilities, happened) < 0.01
    assert expected_calibration_error(probabilities**2, happened) > 0.1


@pytest.mark.parametrize(
    ("probabilities", "outcomes"),
    [([], []), ([0.5], [True, False]), ([[0.5]], [[True]]), ([1.1], [True]), ([np.nan], [True])],
)
def test_mistakes(probabilities, outcomes):
    with pytest.raises(ValueError, match="probabilities"):
        expected_calibration_error(probabilities, outcomes)
