"""The protocol of this project's tables: train on generated images, test on real ones.

All rows train on embeddings of the same pairs and are scored on the same f_r(held-out real). The alignment columns
are computed on a second, held-out set of pairs. Nothing is fitted on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ._checks import check_pairs, l2_normalize
from .paired import alignment_metrics, separability
from .readout import AffineMap, coral, gap_closed, logistic_probe, mean_shift, nearest_centroid

GENERATED, MEAN_SHIFT, CORAL, REAL = "generated taken for real", "mean shift", "CORAL", "real (upper bound)"
READOUTS = {"logistic_probe": logistic_probe, "nearest_centroid": nearest_centroid}
ALIGNMENT = ("paired_cosine", "gen_to_real_R@1", "centroid_distance", "separability")
Row = dict[str, str | float | None]


@dataclass
class PairEmbeddings:
    """Embeddings of n pairs, all (n, dim). They are L2-normalised here.

    Attributes:
        generated: f_r(x_g), the generated images through the real branch.
        real: f_r(x_r).
        aligned: row name -> f_g(x_g) of an aligned model.
        caption_ids, image_ids: (n,) ids or None; see `alignment_metrics` and `separability`.
    """

    generated: np.ndarray
    real: np.ndarray
    aligned: Mapping[str, np.ndarray] = field(default_factory=dict)
    caption_ids: np.ndarray | None = None
    image_ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.generated, self.real = l2_normalize(self.generated, "generated"), l2_normalize(self.real, "real")
        check_pairs(self.generated, self.real, "generated and real")
        self.aligned = {name: l2_normalize(embeds, name) for name, embeds in self.aligned.items()}
        for name, embeds in self.aligned.items():
            check_pairs(embeds, self.real, f"{name} and real")


def train_on_generated(
    train: PairEmbeddings,
    labels: Mapping[str, np.ndarray],
    heldout: PairEmbeddings,
    test_real: np.ndarray,
    test_labels: Mapping[str, np.ndarray],
    seed: int = 0,
    unseen: PairEmbeddings | None = None,
    unseen_labels: Mapping[str, np.ndarray] | None = None,
) -> list[Row]:
    """Compare ways to train on generated images by the accuracy on real ones.

    Args:
        train: the training pairs. Readouts and the baselines (mean shift, CORAL) are fitted on these only.
        labels: task name -> (n,) labels of the training pairs. Scores are averaged over the tasks. Without tasks there
            are no readouts.
        heldout: pairs that were never trained on, with the same names in `aligned`.
        test_real: (m, dim) f_r(held-out real images).
        test_labels: task name -> (m,) labels.
        seed: seed of the folds of `separability`.
        unseen: pairs that the alignment never saw, with the same names in `aligned`. Readouts are also fitted on
            these, which shows the effect of alignment on images generated later. The baselines are fitted on `train`.
        unseen_labels: task name -> labels of the unseen pairs.

    Returns:
        One dict per row, in the order: generated taken for real, mean shift, CORAL, each aligned model, real (upper
        bound). Keys: row; logistic_probe and nearest_centroid (accuracy on test_real); the two with the suffix
        `_gap_closed` (None with the reason under `_note` if there is no gap to close); the same keys with `_unseen`
        after the readout's name for readouts fitted on `unseen`; paired_cosine, gen_to_real_R@1, centroid_distance
        and separability on the held-out pairs (None for the upper bound).

    Raises:
        ValueError: invalid embeddings or labels, or tasks or aligned models that differ between the splits.
        ImportError: scikit-learn is missing.
    """
    if set(labels) != set(test_labels):
        raise ValueError(
            f"labels and test_labels must have the same tasks, got {sorted(labels)} and {sorted(test_labels)}"
        )
    if unseen is not None and set(unseen_labels or {}) != set(test_labels):
        raise ValueError(f"unseen_labels must have the tasks {sorted(test_labels)}, got {sorted(unseen_labels or {})}")
    for name, pairs in (("heldout", heldout), ("unseen", unseen)):
        if pairs is not None and set(train.aligned) != set(pairs.aligned):
            raise ValueError(
                f"train and {name} must have the same aligned models, got {sorted(train.aligned)} and "
                f"{sorted(pairs.aligned)}"
            )
    baselines = {MEAN_SHIFT: mean_shift(train.generated, train.real), CORAL: coral(train.generated, train.real)}
    compared = _rows_of(heldout, baselines)
    fits = {"": (_rows_of(train, baselines), labels)} if labels else {}
    if unseen is not None:
        fits["_unseen"] = (_rows_of(unseen, baselines), unseen_labels)

    rows: list[Row] = []
    for name in compared:
        row: Row = {"row": name}
        for suffix, (fitted_on, fitted_labels) in fits.items():
            for readout, score in READOUTS.items():
                scores = [
                    score(fitted_on[name], fitted_labels[task], test_real, test_labels[task]) for task in test_labels
                ]
                row[f"{readout}{suffix}"] = float(np.mean(scores))
        row |= _alignment(None if name == REAL else compared[name], heldout, seed)
        rows.append(row)
    by_name = {row["row"]: row for row in rows}
    for row in rows:
        for readout in (f"{readout}{suffix}" for suffix in fits for readout in READOUTS):
            gap = gap_closed(row[readout], by_name[GENERATED][readout], by_name[REAL][readout])
            row[f"{readout}_gap_closed"] = None if math.isnan(gap.value) else gap.value
            if gap.reason:
                row[f"{readout}_note"] = gap.reason
    return rows


def _rows_of(pairs: PairEmbeddings, baselines: Mapping[str, AffineMap]) -> dict[str, np.ndarray]:
    """The embeddings of every row of the table."""
    moved = {name: move(pairs.generated) for name, move in baselines.items()}
    return {GENERATED: pairs.generated, **moved, **pairs.aligned, REAL: pairs.real}


def _alignment(embeds: np.ndarray | None, heldout: PairEmbeddings, seed: int) -> Row:
    if embeds is None:
        return dict.fromkeys(ALIGNMENT)
    metrics = alignment_metrics(embeds, heldout.real, heldout.caption_ids, heldout.image_ids)
    metrics["separability"] = separability(embeds, heldout.real, seed, image_ids=heldout.image_ids)
    return {name: metrics[name] for name in ALIGNMENT}


def aggregate(tables: list[list[Row]]) -> tuple[list[Row], list[Row]]:
    """Mean and standard deviation over seeds of each cell.

    Args:
        tables: one table per seed, with the same rows and keys. All keys but `row` and those ending in `_note` hold
            numbers.

    Returns:
        Two tables: means, and standard deviations (ddof=1; 0 for a single seed). None where a seed has no number.
    """
    means, spreads = [], []
    for rows in zip(*tables, strict=True):
        mean, spread = {"row": rows[0]["row"]}, {"row": rows[0]["row"]}
        for key in rows[0]:
            if key == "row" or key.endswith("_note"):
                continue
            values = [row[key] for row in rows]
            known = None not in values
            mean[key] = float(np.mean(values)) if known else None
            spread[key] = float(np.std(values, ddof=1)) if known and len(values) > 1 else 0.0
        means.append(mean)
        spreads.append(spread)
    return means, spreads


def to_markdown(rows: list[Row], spread: list[Row] | None = None) -> str:
    """Write the rows as a Markdown table. `spread`, such as standard deviations of the same keys, follows a ±."""
    columns = {
        "logistic_probe": "logistic probe",
        "logistic_probe_gap_closed": "gap closed",
        "nearest_centroid": "nearest centroid",
        "nearest_centroid_gap_closed": "gap closed",
        "logistic_probe_unseen": "probe, unseen",
        "logistic_probe_unseen_gap_closed": "gap closed",
        "nearest_centroid_unseen": "centroid, unseen",
        "nearest_centroid_unseen_gap_closed": "gap closed",
        "paired_cosine": "paired cosine",
        "gen_to_real_R@1": "gen→real R@1",
        "centroid_distance": "centroid distance",
        "separability": "separability",
        "energy_distance": "energy distance",
        "cmmd": "CMMD",
        "coverage": "coverage",
        "density": "density",
    }
    columns = {key: title for key, title in columns.items() if key in rows[0]}
    lines = ["| trained on | " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * len(columns)]
    for i, row in enumerate(rows):
        cells = [_cell(row[key], spread[i][key] if spread else None) for key in columns]
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    notes = {f"{columns[key]}: {row[f'{key}_note']}" for row in rows for key in columns if row.get(f"{key}_note")}
    return "\n".join(lines + [""] * bool(notes) + sorted(notes)) + "\n"


def _cell(value: float | None, spread: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"
