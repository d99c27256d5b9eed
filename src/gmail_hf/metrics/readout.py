"""Readouts fitted on one set of embeddings and scored on another, and baselines that need no alignment training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np

from ._checks import check_embeddings, check_labels, check_same_dim, l2_normalize, optional_import


def logistic_probe(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on `test` of a multinomial logistic regression fitted on `train`.

    The settings are fixed and the same for every row of a table. Rows are L2-normalised, then standardised with the
    mean and deviation of `train` only, because a readout trained on generated images sees no real ones. The regression
    is scikit-learn's LogisticRegression with C=1 and up to 2,000 iterations. The result is deterministic.

    Args:
        train, test: (n, dim) and (m, dim) embeddings.
        train_labels, test_labels: (n,) and (m,) class labels of any dtype.

    Raises:
        ValueError: invalid embeddings (the error gives the row), labels of the wrong length or of a single class, or a
            test label that does not occur in training.
        ImportError: scikit-learn is missing.
    """
    train, train_labels, test, test_labels = _check_readout(train, train_labels, test, test_labels)
    probe = standardized_regression(max_iter=2000).fit(train, train_labels)
    return float((probe.predict(test) == test_labels).mean())


def standardized_regression(**options: Any) -> Any:
    """Return an unfitted pipeline of scikit-learn's StandardScaler and LogisticRegression with `options`."""
    linear_model = optional_import("sklearn.linear_model")
    pipeline, preprocessing = optional_import("sklearn.pipeline"), optional_import("sklearn.preprocessing")
    return pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(**options))


# The penalties that `tuned_probe` chooses from, and the share of rows held out to choose.
PENALTIES = np.logspace(-6, 5, 45)
HELD_OUT = 0.2


class TunedProbe(NamedTuple):
    """Result of `tuned_probe` or `sgd_probe`. Each score is in 0..1."""

    top1: float
    mean_per_class: float
    predicted: np.ndarray  # (m,) labels of the test rows
    chosen: float  # the penalty, or the learning rate of `sgd_probe`
    validation: float  # the validation score of the chosen value


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

    A multinomial logistic regression is fitted by L-BFGS (at most 1,000 iterations) for each of 45 penalties, the
    values of scikit-learn's `1 / C` from logspace(-6, 5). The penalty with the best validation score (the strongest in
    a tie) is fitted once more on the train and validation rows and scored on the test rows. Each fit starts from the
    weights of the next stronger penalty. Rows are L2-normalised, because alignment only compares directions, then
    standardised with the rows that the regression is fitted on.

    Source: Tian et al., "Learning Vision from Models Rivals Learning Vision from Data" (SynCLR), 2023, after Kornblith
    et al., "Do Better ImageNet Models Transfer Better?", CVPR 2019. SynCLR's released evaluation standardises features
    in the same way but does not normalise them.

    Args:
        train, test: (n, dim) and (m, dim) embeddings.
        train_labels, test_labels: (n,) and (m,) class labels of any dtype.
        validation, validation_labels: (v, dim) embeddings and their (v,) labels. Without them, a fifth of `train` is
            held out, stratified by class and drawn with `seed`.
        per_class: choose the penalty by mean accuracy per class instead of accuracy.

    Raises:
        ValueError: as `logistic_probe`; validation rows without labels; or a class with a single row in `train` if
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
    """Fit a regression with this penalty, starting from the weights of `warm` if given."""
    probe = warm or standardized_regression(max_iter=1000, warm_start=True)
    with catch_warnings():  # the weakest penalties rarely converge, and are rarely chosen
        simplefilter("ignore", optional_import("sklearn.exceptions").ConvergenceWarning)
        return probe.set_params(logisticregression__C=1 / penalty).fit(rows, labels)


def check_splits(train, train_labels, test, test_labels, validation, validation_labels, seed):
    """Check and normalise the arrays of `tuned_probe`. Without validation rows, hold out part of `train`."""
    train, train_labels, test, test_labels = _check_readout(train, train_labels, test, test_labels)
    if validation is not None:
        *_, validation, validation_labels = _check_readout(train, train_labels, validation, validation_labels)
        return train, train_labels, test, test_labels, validation, validation_labels
    classes, counts = np.unique(train_labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"class {classes[counts.argmin()]} has only one training row, so none can be held out; pass validation"
        )
    size = max(len(classes), round(HELD_OUT * len(train)))  # at least one row of each class
    train, validation, train_labels, validation_labels = optional_import("sklearn.model_selection").train_test_split(
        train, train_labels, test_size=size, stratify=train_labels, random_state=seed
    )
    return train, train_labels, test, test_labels, validation, validation_labels


def accuracies(predicted, labels):
    """Return the accuracy, and the mean accuracy of the classes that occur."""
    hits = predicted == labels
    return float(hits.mean()), float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


def nearest_centroid(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on `test` if each embedding is assigned to the class with the nearest mean `train` embedding by cosine.

    CLIP users know this readout as class prototypes. It fits no weights, so it is sensitive to a shift of all
    embeddings that a linear probe may undo. Arguments and errors are as in `logistic_probe`.
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
    if len(np.unique(train_labels)) < 2:
        raise ValueError(f"train_labels are all {train_labels[0]}; a readout needs at least two classes")
    test_labels = check_labels(test_labels, len(test), "test_labels")
    unseen = np.setdiff1d(test_labels, train_labels)
    if len(unseen):
        raise ValueError(f"test_labels contain {unseen[0]}, train_labels do not; train on every class that is tested")
    return train, train_labels, test, test_labels


@dataclass(frozen=True)
class AffineMap:
    """The map x -> (x - source_mean) @ weight + target_mean, fitted on training embeddings."""

    source_mean: np.ndarray  # (dim,)
    weight: np.ndarray  # (dim, dim)
    target_mean: np.ndarray  # (dim,)

    def __call__(self, embeds: np.ndarray) -> np.ndarray:
        """Map (n, dim) embeddings to (n, dim) float64, not normalised."""
        embeds = check_embeddings(embeds, "embeds")
        if embeds.shape[1] != len(self.source_mean):
            raise ValueError(
                f"embeds have dimension {embeds.shape[1]}, but the map was fitted on dimension {len(self.source_mean)}"
            )
        return (embeds - self.source_mean) @ self.weight + self.target_mean


def mean_shift(source: np.ndarray, target: np.ndarray) -> AffineMap:
    """Move the mean of `source` (n, dim) onto the mean of `target` (m, dim): the simplest baseline.

    Fit it on training embeddings only: f_r(x_g) as source, f_r(x_r) as target. It needs no pairs.
    """
    source, target = check_embeddings(source, "source"), check_embeddings(target, "target")
    check_same_dim(source, target, "source and target")
    return AffineMap(source.mean(axis=0), np.eye(source.shape[1]), target.mean(axis=0))


def coral(source: np.ndarray, target: np.ndarray, shrinkage: float = 0.01) -> AffineMap:
    """Match mean and covariance of `source` (n, dim) to those of `target` (m, dim). It needs no pairs.

    CORAL (Sun, Feng & Saenko, "Return of Frustratingly Easy Domain Adaptation", AAAI 2016) whitens with the source
    covariance and colours with the target covariance. It adds the identity to both covariances, for features of unit
    variance. Embeddings have far less variance, so here `shrinkage` times the mean variance of each set is added to
    the diagonal. The mean is matched as well.

    Raises:
        ValueError: invalid embeddings, fewer than two rows, shrinkage <= 0, or a set without variance.
    """
    source, target = check_embeddings(source, "source"), check_embeddings(target, "target")
    check_same_dim(source, target, "source and target")
    if shrinkage <= 0:
        raise ValueError(
            f"shrinkage must be positive, got {shrinkage}; without it, a covariance of few rows cannot be inverted"
        )
    whiten = _power(source, "source", shrinkage, -0.5)
    colour = _power(target, "target", shrinkage, 0.5)
    return AffineMap(source.mean(axis=0), whiten @ colour, target.mean(axis=0))


def _power(embeds: np.ndarray, name: str, shrinkage: float, exponent: float) -> np.ndarray:
    """Return a power of the shrunk covariance, (dim, dim)."""
    if len(embeds) < 2 or not embeds.var(axis=0).any():
        raise ValueError(f"{name} has no variance in {len(embeds)} row(s); CORAL needs at least two different rows")
    covariance = np.cov(embeds, rowvar=False).reshape(embeds.shape[1], embeds.shape[1])
    covariance += shrinkage * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * values**exponent) @ vectors.T


class GapClosed(NamedTuple):
    """`value` is nan if and only if `reason` is not empty."""

    value: float
    reason: str


def gap_closed(aligned: float, generated: float, real: float, min_gap: float = 0.01) -> GapClosed:
    """Share of the generated-to-real gap that alignment closed: (aligned - generated) / (real - generated).

    This is how the paper reads Table 9. 0 is no better than training on generated images through the real branch, 1 is
    as good as training on real images. The value may be negative (alignment hurt) or above 1.

    Args:
        aligned, generated, real: scores on the same real test images, in the same unit, of models trained on f_g(x_g),
            f_r(x_g) and f_r(x_r). Higher is better.
        min_gap: the smallest gap, in the unit of the scores, for which the ratio is not just noise.

    Returns:
        GapClosed(value, reason). The value is nan, with a reason, if real - generated is below `min_gap`.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    for name, score in (("aligned", aligned), ("generated", generated), ("real", real)):
        if not np.isfinite(score):
            raise ValueError(f"{name} is {score}; pass finite scores")
    gap = real - generated
    if gap <= 0:
        return GapClosed(float("nan"), f"no gap: training on generated scored {generated:.4f}, on real {real:.4f}")
    if gap < min_gap:
        return GapClosed(float("nan"), f"the gap of {gap:.4f} is below {min_gap:g}, too small to divide by")
    return GapClosed((aligned - generated) / gap, "")
