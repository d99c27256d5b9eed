"""Fit the detector of generated images that `modality="auto"` needs."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..branches.detector import Detector, check_frozen_real
from ..metrics import expected_calibration_error
from ..metrics._checks import optional_import
from ..metrics.readout import standardized_regression
from ..models.attached import AttachedTower
from ..models.base import GmailModel
from .data import undecoded
from .decoding import digest_of
from .embeddings import cached_embeds, embeds_array

MIN_PAIRS = 20
# Shares of the pairs: for the regression, for its calibration; the rest measures both.
FITTED, CALIBRATED = 0.6, 0.2


def fit_detector(
    model: GmailModel,
    processor: Any,
    pairs: Dataset,
    generated_modality: str = "gen",
    max_pairs: int = 10_000,
    batch_size: int = 64,
    on_bad_image: str = "skip",
    seed: int = 0,
    barrier: Callable[[], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """
    Fit a detector of generated images and put it into the model, which then takes `modality="auto"`.

    It is a logistic regression on the embeddings of both images of each pair by the frozen `real` branch, so it is
    the same before and after training. 60% of the pairs fit the regression, 20% calibrate it (Platt scaling), 20%
    measure it. `save_pretrained` and `save_adapters` store it.

    Args:
        model ([`GmailCLIPModel`], [`GmailSiglipModel`], [`GmailDinov2Model`], ...): a model that embeds images.
        processor: its processor.
        pairs (`datasets.Dataset`): with the columns `real_image` and `generated_image`. One pair per generated image
            is used; with `image_id`, also one pair per real image.
        generated_modality (`str`): the branch that images taken for generated will go through.
        max_pairs (`int`): use at most this many, drawn at random.
        batch_size (`int`): images per forward pass.
        on_bad_image (`str`): `"skip"` leaves pairs with an unreadable image out, `"error"` raises.
        seed (`int`): of the choice of pairs and of the three parts.
        barrier, rank, world_size: as in [`cached_embeds`], for a distributed run.

    Returns:
        Scores on the last fifth, of equally many real and generated images: `accuracy`, `real_accuracy`,
        `generated_accuracy` (shares of images with a probability on the right side of 0.5),
        `expected_calibration_error` and `brier_score` (mean squared error of the probability), and `images`.

    Raises:
        TypeError: a vision-language model, or its tower.
        ValueError: the model trains its `real` branch; unknown modality, or `"real"`; a missing column; fewer than 20
            readable pairs with different images.
        ImportError: scikit-learn is missing.
    """
    if not isinstance(model, GmailModel) or isinstance(model, AttachedTower):
        raise TypeError(
            f"A detector needs a model that embeds images, such as GmailCLIPModel, not {type(model).__name__}: for a "
            "vision-language model, detect with such a model and pass the list of modalities."
        )
    check_frozen_real(model.config)
    model.tower.check_modalities([generated_modality])
    if generated_modality == "real":
        raise ValueError("Generated images go through `real` too: there is nothing to detect.")
    missing = {"real_image", "generated_image"} - set(pairs.column_names)
    if missing:
        raise ValueError(f"The pairs have no column(s) {sorted(missing)}; they have {pairs.column_names}.")
    optional_import("sklearn")

    rng = np.random.default_rng(seed)
    rows = np.arange(len(pairs))
    if "image_id" in pairs.column_names:
        rows = np.sort(np.unique(np.array(pairs["image_id"][:]), return_index=True)[1])
    if len(rows) > max_pairs:
        rows = np.sort(rng.permutation(rows)[:max_pairs])
    chosen = undecoded(pairs if len(rows) == len(pairs) else pairs.select(rows))
    rows = _different_images(chosen["generated_image"])  # a copy in another part would measure what was fitted
    chosen = chosen if len(rows) == len(chosen) else chosen.select(rows)
    generated, real = (
        embeds_array(
            cached_embeds(
                chosen,
                column,
                model,
                processor,
                "real",
                batch_size=batch_size,
                on_bad_image=on_bad_image,
                barrier=barrier,
                rank=rank,
                world_size=world_size,
            )
        )
        for column in ("generated_image", "real_image")
    )
    readable = np.isfinite(generated[:, 0]) & np.isfinite(real[:, 0])
    if readable.sum() < MIN_PAIRS:
        raise ValueError(
            f"{readable.sum()} pairs with different images on both sides can be read; a detector needs {MIN_PAIRS}."
        )
    model.detector = detector_of(generated[readable], real[readable], generated_modality, seed)
    return model.detector.scores


def _different_images(cells: Iterable[Any]) -> list[int]:
    """The first row of each image file. A file that cannot be read counts as different from all others."""
    first: dict[Any, int] = {}
    for row, cell in enumerate(cells):
        first.setdefault(digest_of(cell) or row, row)
    return list(first.values())


def detector_of(generated: np.ndarray, real: np.ndarray, modality: str = "gen", seed: int = 0) -> Detector:
    """
    The detector of pairs of embeddings by `real`, each `(pairs, dim)`; rows of one index fall into one part.
    """
    frozen, calibration = optional_import("sklearn.frozen"), optional_import("sklearn.calibration")
    ends = [round(FITTED * len(real)), round((FITTED + CALIBRATED) * len(real))]
    parts = np.split(np.random.default_rng(seed).permutation(len(real)), ends)
    fit, calibrate, test = ((np.concatenate([generated[part], real[part]]), _is_generated(part)) for part in parts)
    probe = standardized_regression(max_iter=2000).fit(*fit)
    # All folds of a frozen estimator predict the same. The default of 5 would need 5 pairs.
    calibrated = calibration.CalibratedClassifierCV(frozen.FrozenEstimator(probe), method="sigmoid", cv=2)
    calibrated.fit(*calibrate)
    # The scaler, the regression and Platt's 1 / (1 + exp(a * logit + b)) are one linear map.
    scaler, regression = probe[0], probe[1]
    platt = calibrated.calibrated_classifiers_[0].calibrators[0]
    weight = regression.coef_[0] / scaler.scale_
    bias = regression.intercept_[0] - weight @ scaler.mean_
    weight, bias = (
        torch.tensor(values, dtype=torch.float32) for values in (-platt.a_ * weight, -platt.a_ * bias - platt.b_)
    )
    detector = Detector(weight, bias, modality)
    embeds, is_generated = test
    scores = _scores(detector(torch.from_numpy(embeds)).double().numpy(), is_generated)
    return Detector(weight, bias, modality, scores)


def _is_generated(part: np.ndarray) -> np.ndarray:
    return np.repeat([True, False], len(part))


def _scores(probabilities: np.ndarray, is_generated: np.ndarray) -> dict[str, float]:
    right = (probabilities >= 0.5) == is_generated
    return {
        "accuracy": float(right.mean()),
        "real_accuracy": float(right[~is_generated].mean()),
        "generated_accuracy": float(right[is_generated].mean()),
        "expected_calibration_error": expected_calibration_error(probabilities, is_generated),
        "brier_score": float(np.mean((probabilities - is_generated) ** 2)),
        "images": len(right),
    }
