"""Settings and results that all evaluators share."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image as PILImage

from ..metrics import bootstrap_interval

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Settings:
    """
    Settings of a benchmark run.

    Args:
        modality (`str`): the branch for the benchmark's images, which are photographs, or `"auto"`.
        batch_size (`int`): images or texts per forward pass.
        seed (`int`): seed of bootstrap intervals, the folds of separability and t-SNE.
        num_beams (`int`): number of beams for generating a caption.
        probe (`str`, *optional*): the probe to fit, a key of [`evaluation.probe.PROBES`]. Defaults to none, or to
            `logistic` for a model without text.
        train_modality (`str`, *optional*): the branch for the training images of a probe. Defaults to `modality`.
        word_vectors (`str`, *optional*): file of word vectors for WMD, see [`metrics.caption_metrics`].
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
    """Images and the model's text about them, for the report. `right` is whether an answer is correct."""

    images: list[PILImage.Image]
    text: str
    reference: str | None = None
    right: bool | None = None


@dataclass
class Measured:
    """
    Result of an evaluator.

    Args:
        scores (`dict`): scores by name. None if a score cannot be computed on this machine.
        counts (`dict`): number of scored items by kind.
        intervals (`dict`): lower and upper end of the 95 % bootstrap interval, for scores that are means over items.
        missing (`dict`): remedies for the scores that are None.
        predictions (`list[dict]`): one line per item, for evaluators that generate text.
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
    """Bootstrap interval of the mean of `(n,)` values, one per item."""
    return tuple(map(float, bootstrap_interval(np.asarray(values, float), CONFIDENCE, settings.seed)))


def recall_intervals(ranks: np.ndarray, prefix: str, settings: Settings) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of recall at 1, 5 and 10 from `(n,)` ranks."""
    return {f"{prefix}_R@{k}": interval(ranks <= k, settings) for k in (1, 5, 10)}
