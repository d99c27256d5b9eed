"""Readouts fitted on one set of embeddings and scored on another, and the training-free baselines of GMAIL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np

from ._checks import check_embeddings, check_labels, check_same_dim, l2_normalize, optional_import


def logistic_probe(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on `test` of a multinomial logistic regression fitted on `train`.

    Settings, fixed in advance and the same for every row of a table: rows L2-normalised, then standardised by the
    mean and deviation of `train` alone (a readout trained on generated images knows no real ones); scikit-learn's
    LogisticRegression with its default C=1 and up to 2,000 iterations. It is deterministic.

    Args:
        train, test: (n, dim) and (m, dim) embeddings.
        train_labels, test_labels: (n,) and (m,) class labels of any dtype.

    Raises:
        ValueError: invalid embeddings (the row is named), labels of one class only or of another length, or a test
            label that training never saw.
        ImportError: scikit-learn is missing.
    """
    train, train_labels, test, test_labels = _check_readout(train, train_labels, test, test_labels)
    linear_model = optional_import("sklearn.linear_model")
    pipeline, preprocessing = optional_import("sklearn.pipeline"), optional_import("sklearn.preprocessing")
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=2000))
    probe.fit(train, train_labels)
    return float((probe.predict(test) == test_labels).mean())


# The strengths of the penalty that `tuned_probe` chooses from, and the share of rows it holds out to choose with.
PENALTIES = np.logspace(-6, 5, 45)
HELD_OUT = 0.2


class TunedProbe(NamedTuple):
    """What `tuned_probe` or `sgd_probe` found; each score is in 0..1."""

    top1: float
    mean_per_class: float
    predicted: np.ndarray  # (m,) labels of the test rows
    chosen: float  # the penalty, or the learning rate of `sgd_probe`
    validation: float  # the score that it was chosen by


def tuned_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    validation: np.ndarray | None = None,
    validation_labels: np.ndarray | None = None,
    per_class: bool = False,
    seed: int = 0,
) -> TunedProbe:
    """Linear probe whose L2 penalty is chosen on validation rows: the protocol of SynCLR's fine-grained benchmarks.

    Multinomial logistic regression by L-BFGS, at most 1,000 iterations, for each of 45 penalties from
    logspace(-6, 5), scikit-learn's `1 / C`. The one with the best validation score (the strongest of equals) is fitted
    once more on train and validation rows together and scored on test rows. Each fit starts from the weights of the
    next stronger penalty. Rows are L2-normalised, because alignment compares directions only, then standardised by
    the rows that the regression is fitted on.

    Source: Tian et al., "Learning Vision from Models Rivals Learning Vision from Data" (SynCLR), 2023, whose released
    evaluation standardises features in the same way but does not normalise them; after Kornblith et al., "Do Better
    ImageNet Models Transfer Better?", CVPR 2019.

    Args:
        train, test: (n, dim) and (m, dim) embeddings.
        train_labels, test_labels: (n,) and (m,) class labels of any dtype.
        validation, validation_labels: (v, dim) embeddings and their (v,) labels. Without them a fifth of `train`,
            stratified by class and drawn with `seed`, is held out.
        per_class: choose the penalty by mean accuracy per class instead of accuracy.

    Raises:
        ValueError: as `logistic_probe`; validation rows without labels; a class with a single row in `train` where
            rows must be held out.
        ImportError: scikit-learn is missing.
    """
    rows = check_splits(train, train_labels, test, test_labels, validation, validation_labels, seed)
    train, train_labels, test, test_labels, validation, validation_labels = rows
    scores, probe = [], None
    for penalty in PENALTIES[::-1]:
        probe = _fit(train, train_labels, penalty, probe)
        scores.append(accuracies(probe.predict(validation), validation_labels)[per_class])
    best = int(np.argmax(scores))
    fitted_on = np.concatenate([train, validation]), np.concatenate([train_labels, validation_labels])
    predicted = _fit(*fitted_on, PENALTIES[::-1][best]).predict(test)
    return TunedProbe(*accuracies(predicted, test_labels), predicted, float(PENALTIES[::-1][best]), scores[best])


def _fit(rows, labels, penalty, warm=None):
    """A pipeline of scaler and regression, which starts from the weights of the pipeline `warm`."""
    linear_model, exceptions = optional_import("sklearn.linear_model"), optional_import("sklearn.exceptions")
    pipeline, preprocessing = optional_import("sklearn.pipeline"), optional_import("sklearn.preprocessing")
    probe = warm or pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=1000, warm_start=True)
    )
    with catch_warnings():  # the weakest penalties rarely converge, and are rarely chosen
        simplefilter("ignore", exceptions.ConvergenceWarning)
        return probe.set_params(logisticregression__C=1 / penalty).fit(rows, labels)


def check_splits(train, train_labels, test, test_labels, validation, validation_labels, seed):
    """The arrays of `tuned_probe`, checked, with unit rows; without validation rows a part of `train` is held out."""
    train, train_labels, test, test_labels = _check_readout(train, train_labels, test, test_labels)
    if validation is not None:
        *_, validation, validation_labels = _check_readout(train, train_labels, validation, validation_labels)
        return train, train_labels, test, test_labels, validation, validation_labels
    classes, counts = np.unique(train_labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"class {classes[counts.argmin()]} has one training row, too few to hold out a part; give validation rows"
        )
    size = max(len(classes), round(HELD_OUT * len(train)))  # a row of each class at least
    train, validation, train_labels, validation_labels = optional_import("sklearn.model_selection").train_test_split(
        train, train_labels, test_size=size, stratify=train_labels, random_state=seed
    )
    return train, train_labels, test, test_labels, validation, validation_labels


def accuracies(predicted, labels):
    """Accuracy and mean accuracy per class that occurs."""
    hits = predicted == labels
    return float(hits.mean()), float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


def nearest_centroid(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on `test` when each embedding takes the class whose mean `train` embedding is nearest by cosine.

    The readout that a CLIP user knows as class prototypes: it has no weights to fit, so it sees a shift of the whole
    set that a linear probe may undo. Arguments and errors as in `logistic_probe`.
    """
    train, train_labels, test, test_labels = _check_readout(train, train_labels, test, test_labels)
    classes, code = np.unique(train_labels, return_inverse=True)
    centroids = np.stack([train[code == k].mean(axis=0) for k in range(len(classes))])  # (classes, dim)
    nearest = (test @ l2_normalize(centroids, "class centroids").T).argmax(axis=1)
    return float((classes[nearest] == test_labels).mean())


def _check_readout(train, train_labels, test, test_labels):
    train, test = l2_normalize(train, "train embeddings"), l2_normalize(test, "test embeddings")
    check_same_dim(train, test, "train and test embeddings")
    train_labels = check_labels(train_labels, len(train), "train_labels")
    test_labels = check_labels(test_labels, len(test), "test_labels")
    unseen = np.setdiff1d(test_labels, train_labels)
    if len(unseen):
        raise ValueError(f"test_labels hold {unseen[0]}, which train_labels never do; train on every class you test")
    return train, train_labels, test, test_labels


@dataclass(frozen=True)
class AffineMap:
    """x -> (x - source_mean) @ weight + target_mean, fitted on training embeddings and applied to any."""

    source_mean: np.ndarray  # (dim,)
    weight: np.ndarray  # (dim, dim)
    target_mean: np.ndarray  # (dim,)

    def __call__(self, embeds: np.ndarray) -> np.ndarray:
        """(n, dim) -> (n, dim), float64, of any length."""
        embeds = check_embeddings(embeds, "embeds")
        if embeds.shape[1] != len(self.source_mean):
            raise ValueError(f"embeds have dimension {embeds.shape[1]}, the map was fitted on {len(self.source_mean)}")
        return (embeds - self.source_mean) @ self.weight + self.target_mean


def mean_shift(source: np.ndarray, target: np.ndarray) -> AffineMap:
    """Move the mean of `source` (n, dim) onto the mean of `target` (m, dim): the least that could close a gap.

    Fit it on training embeddings only: f_r(x_g) as source, f_r(x_r) as target. Needs no pairs.
    """
    source, target = check_embeddings(source, "source"), check_embeddings(target, "target")
    check_same_dim(source, target, "source and target")
    return AffineMap(source.mean(axis=0), np.eye(source.shape[1]), target.mean(axis=0))


def coral(source: np.ndarray, target: np.ndarray, shrinkage: float = 0.01) -> AffineMap:
    """Match mean and covariance of `source` (n, dim) to those of `target` (m, dim); needs no pairs.

    CORAL (Sun, Feng & Saenko, "Return of Frustratingly Easy Domain Adaptation", AAAI 2016): whiten with the source
    covariance, colour with the target's. There the identity is added to both covariances of features of unit
    variance; embeddings have far less variance, so here `shrinkage` times the mean variance of each set is added to
    its diagonal. The mean is matched as well.

    Raises:
        ValueError: invalid embeddings, fewer than two rows, shrinkage <= 0, or a set without any variance.
    """
    source, target = check_embeddings(source, "source"), check_embeddings(target, "target")
    check_same_dim(source, target, "source and target")
    if shrinkage <= 0:
        raise ValueError(f"shrinkage must be positive, got {shrinkage}: a covariance of few rows cannot be inverted")
    whiten = _power(source, "source", shrinkage, -0.5)
    colour = _power(target, "target", shrinkage, 0.5)
    return AffineMap(source.mean(axis=0), whiten @ colour, target.mean(axis=0))


def _power(embeds: np.ndarray, name: str, shrinkage: float, exponent: float) -> np.ndarray:
    """A power of the shrunk covariance, (dim, dim)."""
    if len(embeds) < 2 or not embeds.var(axis=0).any():
        raise ValueError(f"{name} has no variance ({len(embeds)} rows); CORAL needs at least two different embeddings")
    covariance = np.cov(embeds, rowvar=False).reshape(embeds.shape[1], embeds.shape[1])
    covariance += shrinkage * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * values**exponent) @ vectors.T


class GapClosed(NamedTuple):
    """`value` is nan exactly when `reason` says why."""

    value: float
    reason: str


def gap_closed(aligned: float, generated: float, real: float, min_gap: float = 0.01) -> GapClosed:
    """The share of the generated-to-real gap that alignment closed: (aligned - generated) / (real - generated).

    The reading of the paper's Table 9: 0 is no better than taking generated images for real ones, 1 is as good as
    training on real images; it may be negative (alignment hurt) or above 1.

    Args:
        aligned, generated, real: scores on the same real test images, in one unit, higher better, of a model trained
            on f_g(x_g), f_r(x_g) and f_r(x_r).
        min_gap: in the unit of the scores; below it there is no gap to speak of and the ratio would be noise.

    Returns:
        GapClosed(value, reason); value is nan with a reason when real - generated is under `min_gap`.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    for name, score in (("aligned", aligned), ("generated", generated), ("real", real)):
        if not np.isfinite(score):
            raise ValueError(f"{name} is {score}; give the score of a model that was evaluated")
    gap = real - generated
    if gap <= 0:
        return GapClosed(float("nan"), f"no gap: training on generated scored {generated:.4f}, on real {real:.4f}")
    if gap < min_gap:
        return GapClosed(float("nan"), f"the gap of {gap:.4f} is below {min_gap:g}, too small to divide by")
    return GapClosed((aligned - generated) / gap, "")
