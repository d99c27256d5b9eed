"""Input checks shared by the metrics. Errors give the row and the remedy."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

MIN_NORM = 1e-12
# Rows and columns of one block of similarities: 4 MiB in float32, whatever the sizes of the sets.
BLOCK = 1024


def optional_import(module: str) -> ModuleType:
    """Import a module of the `evaluation` extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is missing; install it with `pip install "gmail-hf[evaluation]"`') from error


def blocks(rows: Any) -> Iterator[Any]:
    """Consecutive parts of an array with up to `BLOCK` rows each."""
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))


def check_matrix(array: np.ndarray, name: str) -> np.ndarray:
    """Return `array` unchanged if it is a non-empty (n, dim) array of real numbers; otherwise raise a ValueError."""
    array = np.asarray(array)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (n, dim), got {array.shape}; stack one embedding per row")
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise ValueError(f"{name} is empty (shape {array.shape}); embed at least one image")
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise ValueError(f"{name} must contain real numbers, got dtype {array.dtype}")
    return array


def check_finite(finite: np.ndarray, name: str) -> None:
    """Raise a ValueError with the first row where `finite`, (n,) bools, is False."""
    bad = np.flatnonzero(~finite)
    if len(bad):
        raise ValueError(
            f"{name} has NaN or infinite values in {len(bad)} row(s), first in row {bad[0]}; "
            "check that image, or embed in float32 if a half-precision model overflowed"
        )


def check_embeddings(array: np.ndarray, name: str) -> np.ndarray:
    """Return `array` as float64 of shape (n, dim), or raise a ValueError with the first invalid row."""
    array = check_matrix(array, name).astype(np.float64)
    check_finite(np.isfinite(array).all(axis=1), name)
    return array


def check_same_dim(first: np.ndarray, second: np.ndarray, names: str) -> None:
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names} have dimensions {first.shape[1]} and {second.shape[1]}; embed both with the same model"
        )


def check_pairs(first: np.ndarray, second: np.ndarray, names: str) -> None:
    if len(first) != len(second):
        raise ValueError(f"{names} must have the same number of rows, got {len(first)} and {len(second)}")
    check_same_dim(first, second, names)


def check_labels(labels: np.ndarray, n: int, name: str) -> np.ndarray:
    """Return `labels` as an (n,) array, or raise a ValueError."""
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one label per embedding, got {labels.shape}")
    return labels


class UnitRows:
    """Embeddings whose rows are L2-normalised when they are read, which avoids a second copy of all rows.

    `rows[index]` returns float64 rows, (len(index), dim).

    Args:
        array: (n, dim) embeddings of any real dtype.
        name: name of the array in errors.

    Raises:
        ValueError: `array` is not a non-empty matrix of real numbers, or a row is all zeros or not finite.
    """

    def __init__(self, array: np.ndarray, name: str) -> None:
        self.array = check_matrix(array, name)
        norms = [np.linalg.norm(block.astype(np.float64), axis=1) for block in blocks(self.array)]
        self.norms = np.concatenate(norms)  # (n,)
        check_finite(np.isfinite(self.norms), name)
        zero = np.flatnonzero(self.norms < MIN_NORM)
        if len(zero):
            raise ValueError(
                f"{name} has {len(zero)} all-zero row(s), first row {zero[0]}; their cosine similarity is undefined"
            )

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self.array[index] / self.norms[index, None]

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, int]:
        return self.array.shape


def l2_normalize(array: np.ndarray, name: str) -> np.ndarray:
    """Return the L2-normalised rows in float64. An all-zero row raises a ValueError."""
    return UnitRows(array, name)[:]
