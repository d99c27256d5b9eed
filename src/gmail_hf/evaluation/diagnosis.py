"""Measures the gap between generated and real images and its cost, and recommends whether to try alignment."""

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..metrics import (
    PairEmbeddings,
    centroid_distance,
    cmmd,
    coral,
    density_coverage,
    energy_distance,
    mean_shift,
    separability,
    train_on_generated,
)
from ..metrics.train_on_generated import CORAL, GENERATED, MEAN_SHIFT, READOUTS, REAL
from ..training.columns import is_missing, rows_by_caption
from ..training.data import BadImageError, caption_ids, decode_image, undecoded
from ..training.decoding import digest_of
from ..training.embeddings import cached_embeds, embed_images, embeds_array
from .report import render, thumbnail

AFTER = "gen branch"
REAL_IMAGES = "other real images"  # the reference: one half of the real images against the other
MIN_PAIRS = 20
NEIGHBOURS = 5
CLASS_LIKE = 5  # real images that share the caption of the median pair
SMALL_GAP = 0.01  # gaps in accuracy up to this are not worth closing
SEPARABLE = 0.1  # excess over the separability of real images; with less, our data had no gap
ENOUGH = 0.9  # share of a gap; if a baseline closes it, training adds little
BATCH = 256  # default batch size of training
EXAMPLES, SHOWN_NEIGHBOURS = 6, 3
KINDS = {
    "class-like": "Captions are class-like: {share:.0f} real images share the caption of a typical pair, so the two "
    "images of a pair have little in common except their caption. Match distributions, not pairs.",
    "instance-like": "Captions are instance-like: few real images share a caption, so the two images of a pair show "
    "the same content. Keep the pairs.",
}
# Rows of the report: title and explanation of each score.
SCORES = {
    "logistic_probe": ("logistic probe", "accuracy on real images of a linear classifier trained on this column"),
    "nearest_centroid": ("nearest centroid", "the same for a classifier by the nearest class mean"),
    "separability": ("separability", "accuracy of a linear classifier of generated and real; 0.5 is chance"),
    "paired_cosine": ("paired cosine", "cosine of a generated image and its real partner; 1 is equal"),
    "gen_to_real_R@1": ("generated to real R@1", "how often the nearest real image has the same caption"),
    "centroid_distance": ("centroid distance", "distance between the two means; 0 to 2"),
    "energy_distance": ("energy distance", "distribution gap, the loss of recipe robust over all captions; 0 is none"),
    "cmmd": ("CMMD", "distribution gap in this model's embeddings; only compare values of this table"),
    "coverage": ("coverage", "share of real images with a generated one among their 5 nearest; 0.97 is full"),
    "density": ("density", "how typical generated images are of real ones; 1 is as typical as real images"),
}


def diagnose(
    model: Any,
    processor: Any,
    pairs: Dataset,
    label_column: str | None = None,
    max_samples: int = 2000,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Measure the gap between generated and real images in the embeddings of a model.

    At most one pair per real image and per generated image is used. Baselines and readouts are fitted on one half of
    these pairs. The other half is measured.

    Args:
        model ([`GmailCLIPModel`] or another model with branches): fresh branches measure the base model. If there is a
            `gen` branch that differs from `real`, it is measured as well.
        processor: its processor.
        pairs: pairs with the columns of [`training.data.PAIR_COLUMNS`].
        label_column: column with the class of each pair, or with a list of classes for several tasks. Without it there
            are no readouts.
        max_samples: number of pairs to embed, drawn at random.
        batch_size: images per forward pass.
        seed: seed of the drawn pairs, the halves and the folds of separability.

    Returns:
        `rows`, one per way to use generated images, with the scores of [`metrics.train_on_generated`], `cmmd`,
        `coverage`, `density` and `energy_distance`; `captions`: statistics of shared captions; `cosines` of real
        images; `examples` by their rows in `pairs`; `counts`; `advice`: sentences; `recipe`: options of
        `gmail-hf train`, or None.

    Raises:
        ValueError: fewer than 20 readable pairs with different real and generated images, an unknown label column, or
            a pair without a label.
        ImportError: scikit-learn is missing.
    """
    captions, image_ids = caption_ids(pairs["caption"][:]), np.array(pairs["image_id"][:])
    shared = describe_captions(captions, image_ids)
    labels = _labels(pairs, label_column) if label_column else {}
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pairs))
    rows = order[np.unique(image_ids[order], return_index=True)[1]]  # one random pair per real image
    rows = np.sort(rng.permutation(rows)[:max_samples])
    # A generated image that serves several real ones would be in both halves, and known to the classifiers.
    cells = undecoded(pairs.select(rows).select_columns(["generated_image"]))
    digests = [digest_of(row["generated_image"]) for row in cells]
    rows = rows[np.sort(np.unique(digests, return_index=True)[1])]
    images = undecoded(pairs.select(rows))
    embeds = {
        name: embeds_array(cached_embeds(images, column, model, processor, branch, batch_size))
        for name, column, branch in _ways(model, processor, images)
    }
    readable = np.isfinite([array[:, 0] for array in embeds.values()]).all(axis=0)
    if readable.sum() < MIN_PAIRS:
        raise ValueError(
            f"Only {readable.sum()} pairs with different real and different generated images can be read; at least "
            f"{MIN_PAIRS} are needed."
        )
    rows, embeds = rows[readable], {name: array[readable] for name, array in embeds.items()}
    real, generated = embeds.pop("real"), embeds.pop("generated")
    fit, held = np.split(rng.permutation(len(rows)), [len(rows) // 2])
    ids = np.array(captions)[rows]

    labels = {task: values[rows] for task, values in labels.items()}
    tested = held[[all(values[row] in values[fit] for values in labels.values()) for row in held]]
    if not len(tested):
        raise ValueError(
            f"No class of '{label_column}' is in both halves of the pairs: each class needs several pairs."
        )
    table = train_on_generated(
        PairEmbeddings(generated[fit], real[fit], {name: array[fit] for name, array in embeds.items()}),
        {task: values[fit] for task, values in labels.items()},
        PairEmbeddings(generated[held], real[held], {name: array[held] for name, array in embeds.items()}, ids[held]),
        real[tested],
        {task: values[tested] for task, values in labels.items()},
        seed,
    )
    sets = {
        GENERATED: generated[held],
        MEAN_SHIFT: mean_shift(generated[fit], real[fit])(generated[held]),
        CORAL: coral(generated[fit], real[fit])(generated[held]),
        **{name: array[held] for name, array in embeds.items()},
        REAL: real[fit],
    }
    for row in table:
        row |= _distances(sets[row["row"]], real[held])
    table[-1] |= {
        "row": REAL_IMAGES,
        "separability": separability(real[fit], real[held], seed),
        "centroid_distance": centroid_distance(real[fit], real[held]),
    }
    advice, recipe = advise(table, shared, len(tested))
    return {
        "counts": {"pairs": len(pairs), "pairs embedded": len(rows), "pairs measured": len(held)},
        "captions": shared,
        "cosines": _cosines_of_real(real[held], ids[held]),
        "rows": table,
        "examples": _examples(generated[held], real[held], rows[held]),
        "advice": advice,
        "recipe": recipe,
    }


def describe_captions(captions: Sequence[Any], image_ids: Sequence[Any]) -> dict[str, Any]:
    """
    Count the real images that share a caption, and derive the `kind` of captions.

    Args:
        captions: caption, or caption id, of each pair.
        image_ids: id of each pair's real image.
    """
    groups = rows_by_caption(captions)
    counts = {caption: len(set(np.asarray(image_ids)[rows])) for caption, rows in groups.items()}
    share = float(np.median([counts[caption] for caption in captions]))
    kind = "class-like" if share >= CLASS_LIKE else "instance-like"
    return {"kind": kind, "captions": len(groups), "real_images_of_the_median_pairs_caption": share}


def advise(rows: list[dict], captions: dict[str, Any], test_images: int) -> tuple[list[str], list[str] | None]:
    """
    Return a recommendation in sentences, and the options of the recommended training or None.

    Args:
        rows, captions: as returned by [`diagnose`].
        test_images: number of test images of the accuracies. A gap below their standard error is treated as noise.
    """
    by_name = {row["row"]: row for row in rows}
    before, after, real = by_name[GENERATED], by_name.get(AFTER), by_name[REAL_IMAGES]
    advice = [
        f"A linear classifier separates generated from real images with an accuracy of {before['separability']:.2f}; "
        f"two sets of real images give {real['separability']:.2f}."
    ]
    gaps = {name: real[name] - before[name] for name in READOUTS if name in before}
    noise = {name: max(SMALL_GAP, np.sqrt(real[name] * (1 - real[name]) / test_images)) for name in gaps}
    open_gaps = {name: gap for name, gap in gaps.items() if gap > noise[name]}

    def closed(row: dict) -> float:
        return min((row[name] - before[name]) / gap for name, gap in open_gaps.items())

    if gaps:
        scores = " and ".join(
            f"{before[name]:.3f} instead of {real[name]:.3f} ({name.replace('_', ' ')})" for name in gaps
        )
        advice.append(f"A classifier trained on generated images reaches {scores} on real images.")
    if not open_gaps and max(gaps.values(), default=0) > SMALL_GAP:
        noisy = f"The gap is within the noise of {test_images} test images"
        return [*advice, f"{noisy}: diagnose more pairs before you decide (--max_samples, another split)."], None
    has_gap = bool(open_gaps) if gaps else before["separability"] - real["separability"] > SEPARABLE
    if not has_gap:
        what = "no gap worth closing" if gaps else "almost no gap in these embeddings"
        return [*advice, f"There is {what}: do not align, train on the generated images without changes."], None
    if not gaps:
        advice.append("The cost of the gap is unknown without labels: pass a column of classes with --label_column.")
    best = max((MEAN_SHIFT, CORAL), key=lambda name: closed(by_name[name])) if gaps else None
    if best:
        share = max(closed(by_name[best]), 0)
        advice.append(f"Without training, {best} closes {share:.0%} of the gap (for the readout that it helps least).")
    if after:
        if gaps:
            verdict, rival = f"The gen branch closes {closed(after):.0%} of the gap", max(closed(by_name[best]), 0)
            good, but = closed(after) > rival, f"no more than {best}" if rival else "which does not help"
        else:
            distances = after["energy_distance"], before["energy_distance"]
            verdict = "The energy distance of the gen branch is {:.3f}, and {:.3f} before alignment".format(*distances)
            good, but = distances[0] < distances[1], "which does not help"
        if good:
            advice.append(f"{verdict}: use generated images through gen and photographs through real.")
            return advice, None
        advice.append(f"{verdict}, {but}. Train with recipe robust, or for more steps.")
    elif best and closed(by_name[best]) >= ENOUGH:
        return [*advice, f"Try {best} first (gmail_hf.metrics); training can add little."], None
    else:
        advice.append("Alignment is worth trying. Then diagnose the trained model on pairs that it never saw.")
    cover = max(row["coverage"] for row in rows if row is not real)
    if cover < real["coverage"] / 2:
        advice.append(
            f"Generated images cover at most {cover:.0%} of the real ones; more varied images may help more."
        )
    advice.append(KINDS[captions["kind"]].format(share=captions["real_images_of_the_median_pairs_caption"]))
    recipe = ["--recipe", "robust"]
    if captions["kind"] == "class-like":
        recipe += ["--pairing", "none"]
        if captions["captions"] > BATCH // 8:  # otherwise each batch has several images of a caption anyway
            recipe += ["--images_per_caption", "8"]
    return advice, recipe


def diagnosis_html(result: dict[str, Any], pairs: Dataset) -> str:
    """
    Write the diagnosis as a self-contained page.

    Args:
        result: result of [`diagnose`] with `model`, `dataset`, `split`, `settings`, `environment` and `command` (a
            list of words or None).
        pairs: the diagnosed pairs, for the pictures.
    """
    images = undecoded(pairs)

    def picture(row: int, column: str) -> dict[str, Any]:
        return thumbnail(images[row][column])

    scores = {name: texts for name, texts in SCORES.items() if name in result["rows"][0]}
    return render(
        "diagnosis.html.jinja", {"command": shlex.join}, result=result, scores=scores, picture=picture, pairs=images
    )


def _ways(model: Any, processor: Any, images: Dataset) -> list[tuple[str, str, str]]:
    """Return name, column and branch of each set to embed. `gen` is included if it differs from `real`."""
    ways = [("real", "real_image", "real"), ("generated", "generated_image", "real")]
    if "gen" not in model.config.modalities:
        return ways
    cells = (row["generated_image"] for row in images)
    for cell in cells:
        try:
            probe = [decode_image(cell)]
        except BadImageError:
            continue
        both = [embed_images(model, processor, probe, branch) for branch in ("real", "gen")]
        return ways if np.allclose(*both, atol=1e-4) else [*ways, (AFTER, "generated_image", "gen")]
    return ways


def _labels(pairs: Dataset, column: str) -> dict[str, np.ndarray]:
    """Return the classes of each task."""
    if column not in pairs.column_names:
        raise ValueError(f"The pairs have no label column '{column}'; they have {pairs.column_names}.")
    values = undecoded(pairs)[column][:]
    for row, value in enumerate(values):
        if is_missing(value):
            raise ValueError(f"Row {row} has no '{column}'. Remove rows without labels, or leave out --label_column.")
    lengths = {len(value) if isinstance(value, list) else None for value in values}
    values = np.array(values) if len(lengths) == 1 else None
    if values is None or values.ndim > 2 or values.dtype.kind == "O":
        raise ValueError(
            f"Column '{column}' does not hold classes: each row needs a number, a text or a list of them, and all "
            "lists need the same length."
        )
    return {column: values} if values.ndim == 1 else {f"{column} {i}": task for i, task in enumerate(values.T)}


def _distances(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    density, coverage = density_coverage(generated, real, NEIGHBOURS)
    distances = {"energy_distance": energy_distance(generated, real), "cmmd": cmmd(generated, real)}
    return distances | {"coverage": coverage, "density": density}


def _cosines_of_real(real: np.ndarray, captions: np.ndarray) -> dict[str, float | None]:
    """Mean cosine of two real images with different captions, and with the same caption."""
    similarity, same = real @ real.T, captions[:, None] == captions
    other = ~np.eye(len(real), dtype=bool)
    masks = {"real_images_of_different_captions": ~same, "real_images_of_one_caption": same & other}
    return {name: float(similarity[mask].mean()) if mask.any() else None for name, mask in masks.items()}


def _examples(generated: np.ndarray, real: np.ndarray, rows: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """Return the most and least typical generated images by their mean cosine to the nearest real images."""
    top = torch.from_numpy(generated @ real.T).topk(NEIGHBOURS, dim=1)
    cosines, nearest = top.values.numpy(), top.indices.numpy()
    order = np.argsort(-cosines.mean(axis=1), kind="stable")
    return {
        title: [
            {
                "row": int(rows[i]),
                "typicality": float(cosines[i].mean()),
                "nearest_real_rows": [int(rows[j]) for j in nearest[i, :SHOWN_NEIGHBOURS]],
            }
            for i in chosen
        ]
        for title, chosen in (("most typical", order[:EXAMPLES]), ("least typical", order[::-1][:EXAMPLES]))
    }
