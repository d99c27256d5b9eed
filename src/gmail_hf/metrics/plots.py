"""PNG plots: embeddings before and after alignment, and a contact sheet of pairs."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ._checks import check_pairs, l2_normalize, optional_import
from .paired import paired_cosine, separability

# Okabe & Ito's blue and vermillion, which colour-blind readers can distinguish.
REAL_COLOR, GENERATED_COLOR = "#0072B2", "#D55E00"
INK, FAINT = "#222222", "#8a8a8a"
# Of a contact sheet, in pixels: side of an image, space between images, width of a letter, height of a line of text.
SIDE, GAP, LETTER, LINE = 224, 8, 8, 20


def plot_embeddings(
    path: str | os.PathLike,
    real: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    max_points: int = 500,
    num_lines: int = 12,
    seed: int = 0,
    image_ids: np.ndarray | None = None,
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
        image_ids: (n,) ids of the real images, see `separability`.

    Raises:
        ValueError: invalid embeddings (the error gives the row), fewer than 10 pairs, or fewer than 5 real images.
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
            f"separability {separability(embeds, real, seed, image_ids=image_ids):.0%} (chance 50%)",
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
    real: Sequence[Image.Image] | None,
    generated: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None,
    captions: Sequence[str],
    columns: int = 4,
) -> None:
    """Draw a contact sheet: each real image next to the images generated from its caption, with the caption below.

    Real images have a blue frame, generated images an orange one. Images smaller than 224 pixels are shown pixelated.

    Args:
        path: PNG file to write.
        real: PIL images, one per caption. None if there are none. All are drawn, so pass at most about two dozen.
        generated: the image generated from each caption, or a list of several (the paper's Figure 2 shows five). None
            if there are none.
        captions: texts of one or two lines. Each line may take two lines of the sheet.
        columns: number of captions per row.

    Raises:
        ValueError: no captions, another number of real or generated images, or columns below 1.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    kinds = [("real", real, REAL_COLOR), ("generated", generated, GENERATED_COLOR)]
    kinds = [kind for kind in kinds if kind[1] is not None]
    counts = {name: len(images) for name, images, _ in kinds}
    if not kinds or not len(captions) or set(counts.values()) != {len(captions)}:
        raise ValueError(
            f"real, generated and captions must have the same length and not be empty, got {counts} and "
            f"{len(captions)} captions"
        )
    groups: list[list[tuple[Image.Image, str]]] = [[] for _ in captions]
    for _, images, color in kinds:
        for group, found in zip(groups, images, strict=True):
            group += [(image, color) for image in (found if isinstance(found, (list, tuple)) else [found])]
    width = max(map(len, groups)) * (SIDE + GAP) + 2 * GAP
    texts = [
        [
            line
            for part in caption.split("\n")[:2]
            for line in textwrap.wrap(part, width // LETTER, max_lines=2, placeholder=" …")
        ]
        for caption in captions
    ]
    height = SIDE + max(map(len, texts)) * LINE + 3 * GAP
    columns = min(columns, len(groups))
    rows = -(-len(groups) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + LINE + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for place, (name, _, color) in enumerate(kinds):
        draw.text((GAP + place * (SIDE + GAP), GAP), name, color, font)
    for index, (group, lines) in enumerate(zip(groups, texts, strict=True)):
        left, top = GAP + index % columns * width, LINE + 2 * GAP + index // columns * height
        draw.text((left, top + SIDE + GAP // 2), "\n".join(lines), INK, font)
        for place, (image, color) in enumerate(group):
            corner = left + place * (SIDE + GAP), top
            resample = Image.Resampling.NEAREST if max(image.size) < SIDE else Image.Resampling.BICUBIC
            sheet.paste(image.convert("RGB").resize((SIDE, SIDE), resample), corner)
            draw.rectangle((*corner, corner[0] + SIDE - 1, corner[1] + SIDE - 1), outline=color, width=4)
    sheet.save(path, format="PNG")
