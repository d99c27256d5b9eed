"""PNG plots: embeddings before and after alignment, and a contact sheet of pairs."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ._checks import check_pairs, l2_normalize, optional_import
from .paired import paired_cosine, separability

if TYPE_CHECKING:
    from PIL.Image import Image

# Okabe & Ito's blue and vermillion, which colour-blind readers can distinguish.
REAL_COLOR, GENERATED_COLOR = "#0072B2", "#D55E00"
INK, FAINT = "#222222", "#8a8a8a"


def plot_embeddings(
    path: str | os.PathLike,
    real: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    max_points: int = 500,
    num_lines: int = 12,
    seed: int = 0,
) -> None:
    """Draw held-out pairs before and after alignment in two panels.

    Both panels share one t-SNE, so each real image has the same position in both and only generated images move.
    Lines connect the images of some pairs. The titles give paired cosine and separability of all n pairs.

    Args:
        path: PNG file to write.
        real: (n, dim) f_r(x_r).
        before: (n, dim) f_r(x_g); row i shares its caption with row i of `real`.
        after: (n, dim) f_g(x_g).
        max_points: number of pairs to draw, sampled if there are more. t-SNE takes minutes beyond a few thousand.
        num_lines: number of pairs connected by a line.
        seed: seed of the sampled pairs, t-SNE and the separability folds.

    Raises:
        ValueError: invalid embeddings (the error gives the row), or fewer than 10 pairs.
        ImportError: scikit-learn or matplotlib is missing.
    """
    real, before, after = l2_normalize(real, "real"), l2_normalize(before, "before"), l2_normalize(after, "after")
    check_pairs(before, real, "before and real")
    check_pairs(after, real, "after and real")
    if len(real) < 10:
        raise ValueError(f"got {len(real)} pairs; the plot needs at least 10")
    manifold, figure_module = optional_import("sklearn.manifold"), optional_import("matplotlib.figure")

    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(real))[:max_points]
    count = len(chosen)
    tsne = manifold.TSNE(perplexity=min(30, count / 2), init="pca", metric="cosine", random_state=seed)
    points = tsne.fit_transform(np.concatenate([real[chosen], before[chosen], after[chosen]]))
    real_points, *generated_points = np.split(points, 3)
    joined = rng.permutation(count)[:num_lines]

    figure = figure_module.Figure(figsize=(12, 6.4), dpi=160, facecolor="white")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = ("Before: generated taken for real", "After: generated through its own branch")
    marks = (r"$f_r(x_g)$", r"$f_g(x_g)$")
    for ax, title, mark, embeds, generated in zip(axes, titles, marks, (before, after), generated_points, strict=True):
        shared = {"s": 20, "linewidths": 0.5, "edgecolors": "white", "alpha": 0.85}
        ax.scatter(*real_points.T, color=REAL_COLOR, marker="o", label=r"real, $f_r(x_r)$", zorder=2, **shared)
        ax.scatter(*generated.T, color=GENERATED_COLOR, marker="^", label=f"generated, {mark}", zorder=3, **shared)
        for index in joined:
            ends = np.stack([real_points[index], generated[index]])
            ax.plot(*ends.T, color=INK, linewidth=1.0, zorder=4)
            for end, color, marker in zip(ends, (REAL_COLOR, GENERATED_COLOR), "o^", strict=True):
                ax.scatter(*end, s=40, color=color, marker=marker, edgecolors=INK, linewidths=1.0, zorder=5)
        ax.set_title(title, fontsize=14, fontweight="bold", color=INK, loc="left", pad=26)
        ax.text(
            0,
            1.02,
            f"paired cosine {paired_cosine(embeds, real):.2f}    "
            f"separability {separability(embeds, real, seed=seed):.0%} (chance 50%)",
            transform=ax.transAxes,
            fontsize=11,
            color=INK,
        )
        ax.set(xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set_color("#d0d0d0")
        ax.legend(loc="lower right", fontsize=10, frameon=True, framealpha=0.9, edgecolor="#d0d0d0", markerscale=1.6)
    figure.text(
        0.5,
        0.015,
        f"One t-SNE of {count} held-out pairs for both panels; lines connect the two images of a caption.",
        ha="center",
        fontsize=10,
        color=FAINT,
    )
    figure.tight_layout(rect=(0, 0.035, 1, 1), w_pad=2)
    figure.savefig(path, format="png")


def plot_pairs(
    path: str | os.PathLike,
    real: Sequence[Image],
    generated: Sequence[Image] | Sequence[Sequence[Image]],
    captions: Sequence[str],
    columns: int = 4,
) -> None:
    """Draw a contact sheet: each real image next to the images generated from its caption, with the caption below.

    Args:
        path: PNG file to write.
        real: PIL images. All are drawn, so pass at most about two dozen.
        generated: the image generated from each caption, or a list of several (the paper's Figure 2 shows five).
        captions: one per real image.
        columns: number of real images per row.

    Raises:
        ValueError: no pairs, lists of different lengths, or different numbers of generated images per real image.
        ImportError: matplotlib is missing.
    """
    if not len(real) or not len(real) == len(generated) == len(captions):
        raise ValueError(
            f"real, generated and captions must have the same length and not be empty, "
            f"got {len(real)}, {len(generated)} and {len(captions)}"
        )
    figure_module = optional_import("matplotlib.figure")
    cells = [
        [first, *(others if isinstance(others, (list, tuple)) else [others])]
        for first, others in zip(real, generated, strict=True)
    ]
    count = len(cells[0])
    if any(len(cell) != count for cell in cells):
        raise ValueError(
            f"generated must have the same number of images per real image, got {[len(cell) - 1 for cell in cells]}"
        )
    columns = min(columns, len(real))
    rows = -(-len(real) // columns)
    # In inches: a cell has square images in one row and two lines of caption.
    cell_width, cell_height, header = 0.2 + 1.45 * count, 1.92, 0.45
    width, height = cell_width * columns, cell_height * rows + header
    figure = figure_module.Figure(figsize=(width, height), dpi=160, facecolor="white")
    for index, (images, caption) in enumerate(zip(cells, captions, strict=True)):
        left = cell_width * (index % columns)
        bottom = cell_height * (rows - 1 - index // columns)
        for place, image in enumerate(images):
            color = GENERATED_COLOR if place else REAL_COLOR
            x, y, side = left + 0.12 + 1.45 * place, bottom + 0.47, 1.4
            ax = figure.add_axes((x / width, y / height, side / width, side / height))
            ax.imshow(image.convert("RGB"), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(color=color, linewidth=2.5)
        text = textwrap.fill(textwrap.shorten(caption, 40 * count, placeholder=" …"), 21 * count)
        where = (left + 0.095 + 0.725 * count) / width, (bottom + 0.41) / height
        figure.text(*where, text, ha="center", va="top", fontsize=9, color=INK)
    for x, word, color in ((0.12, "real", REAL_COLOR), (1.57, "generated", GENERATED_COLOR)):
        where = x / width, 1 - 0.5 * header / height
        figure.text(*where, word, color=color, fontsize=13, fontweight="bold", va="center")
    figure.savefig(path, format="png")
