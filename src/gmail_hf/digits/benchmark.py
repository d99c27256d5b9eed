"""The benchmark of digits scenes, for the runner of [`gmail_hf.evaluation`]."""

from collections.abc import Iterator
from typing import Any

from ..evaluation.registry import ALIGNMENT, CAPTIONING, RETRIEVAL, ZERO_SHOT, Benchmark, ZeroShotQuestions
from ..training.data import undecoded
from .generate import load_pairs
from .scenes import COLOR_NAMES, DIGIT_NAMES, caption_of


def _test_pairs(limit: int | None) -> Iterator[dict[str, Any]]:
    return iter(undecoded(load_pairs("test", limit)))


def digit_prompts() -> list[list[list[str]]]:
    """Return prompts per left digit, and per right digit: captions with all colors and all other digits."""
    colors = [[left, right] for left in COLOR_NAMES for right in COLOR_NAMES if left != right]
    digits = range(len(DIGIT_NAMES))
    left = [[caption_of([digit, other], pair) for other in digits for pair in colors] for digit in digits]
    right = [[caption_of([other, digit], pair) for other in digits for pair in colors] for digit in digits]
    return [left, right]


BENCHMARK = Benchmark(
    "digits",
    "Digits scenes",
    (RETRIEVAL, ZERO_SHOT, CAPTIONING, ALIGNMENT),
    layout="pairs",
    dataset="digits",
    split="test",
    paper=None,
    source="bundled with gmail-hf",
    rows=_test_pairs,
    questions=ZeroShotQuestions("digits", digit_prompts()),
)
