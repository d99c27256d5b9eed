"""What goes into every evaluator and comes out of it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image as PILImage

from ..metrics import bootstrap_interval

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Settings:
    """
    How a benchmark is run.

    Args:
        modality (`str`): the branch that its images, photographs, go through.
        batch_size (`int`): images, or texts, a forward pass.
        seed (`int`): of bootstrap intervals, of the folds of separability and of the t-SNE.
        num_beams (`int`): beams of the search for a caption.
        probe (`str`, *optional*): a key of [`evaluation.probe.PROBES`], to fit a probe with; none by default, or
            `logistic` for a model without text.
        train_modality (`str`, *optional*): the branch that training images of a probe go through; default `modality`.
        word_vectors (`str`, *optional*): the file of word vectors that WMD takes, see [`metrics.caption_metrics`].
        progress (`bool`): show progress bars.
        clip_scorer ([`LoadedModel`], *optional*): the CLIP whose embeddings give CLIPScore and RefCLIPScore.
    """

    modality: str = "real"
    batch_size: int = 64
    seed: int = 0
    num_beams: int = 5
    word_vectors: str | None = None
    progress: bool = False
    probe: str | None = None
    train_modality: str | None = None
    clip_scorer: Any = None


@dataclass
class Example:
    """Images and what is written about them, for the report; `right` says whether an answer is correct."""

    images: list[PILImage.Image]
    text: str
    reference: str | None = None
    right: bool | None = None


@dataclass
class Measured:
    """
    What an evaluator found.

    Args:
        scores (`dict`): by name; None for a score that cannot be computed here.
        counts (`dict`): what was scored, by kind.
        intervals (`dict`): of the scores that are means over items, the lower and upper end of their 95 % bootstrap
            interval.
        missing (`dict`): of the scores that are None, what to do about it.
        predictions (`list[dict]`): one line an item, of evaluators that generate text.
        examples (`list[Example]`): a few items.
        figures (`dict[str, bytes]`): PNG files by title.
    """

    scores: dict[str, float | None]
    counts: dict[str, int]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    figures: dict[str, bytes] = field(default_factory=dict)


def interval(values: np.ndarray, settings: Settings) -> tuple[float, float]:
    """The bootstrap interval of the mean of `(n,)` values, one an item."""
    return tuple(map(float, bootstrap_interval(np.asarray(values, float), CONFIDENCE, settings.seed)))


def recall_intervals(ranks: np.ndarray, prefix: str, settings: Settings) -> dict[str, tuple[float, float]]:
    """Intervals of recall at 1, 5 and 10 of `(n,)` ranks."""
    return {f"{prefix}_R@{k}": interval(ranks <= k, settings) for k in (1, 5, 10)}
