"""Checks shared by every function here: a bad number is refused where it enters, with the row and the remedy."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

MIN_NORM = 1e-12


def optional_import(module: str) -> ModuleType:
    """Import a module of the `evaluation` extra at the moment it is needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is missing; install it with `pip install "gmail-hf[evaluation]"`') from error


def check_embeddings(array: np.ndarray, name: str) -> np.ndarray:
    """Return `array` as float64 of shape (n, dim), or raise a ValueError that names the offending row."""
    array = np.asarray(array)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (n, dim), got {array.shape}; stack one embedding a row")
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise ValueError(f"{name} is empty (shape {array.shape}); embed at least one image")
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise ValueError(f"{name} must hold real numbers, got dtype {array.dtype}")
    array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} has NaN or infinite values in {len(bad)} row(s), the first is row {bad[0]}; "
            "look at that image, or embed in float32 if a half-precision model overflowed"
        )
    return array


def check_same_dim(first: np.ndarray, second: np.ndarray, names: str) -> None:
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names} differ in dimension: {first.shape[1]} and {second.shape[1]}; embed both with the same model"
        )


def check_pairs(first: np.ndarray, second: np.ndarray, names: str) -> None:
    if len(first) != len(second):
        raise ValueError(f"{names} must pair row by row, got {len(first)} and {len(second)} rows")
    check_same_dim(first, second, names)


def check_labels(labels: np.ndarray, n: int, name: str) -> np.ndarray:
    """Return `labels` as an (n,) array with at least two classes, or raise a ValueError."""
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one label for each embedding, got {labels.shape}")
    if len(np.unique(labels)) < 2:
        raise ValueError(f"{name} are all {labels[0]}; a readout needs two classes or more")
    return labels


def l2_normalize(array: np.ndarray, name: str) -> np.ndarray:
    """Rows of length one, float64; a zero row has no direction and raises a ValueError."""
    array = check_embeddings(array, name)
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    zero = np.flatnonzero(norms[:, 0] < MIN_NORM)
    if len(zero):
        raise ValueError(
            f"{name} has {len(zero)} all-zero row(s), the first is row {zero[0]}; cosine similarity is undefined there"
        )
    return array / norms
