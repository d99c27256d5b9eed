"""Linear probes on frozen embeddings (SynCLR's rows of the paper's Table 4)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import sgd_probe, tuned_probe
from .embedding import image_embeds
from .measure import Measured, Settings, interval
from .own_data import CLASS_NAMES
from .registry import Benchmark
from .sources import Source, open_source
from .zero_shot import check_classes

PROBES = {"logistic": tuned_probe, "sgd": sgd_probe}
DEFAULT_PROBE = "logistic"
TRAIN, VALIDATION = "train", ("validation", "val", "valid")


def evaluate_probe(model: Any, processor: Any, source: Source, settings: Settings) -> Measured:
    """
    Fit a linear classifier on embeddings of training images and evaluate its accuracy.

    Args:
        model, processor: a [`GmailModel`] or its base, and its processor, in evaluation mode, on its device. It
            needs no text.
        source: data with the layout `classes` and with `train`, see [`open_training`].
        settings: see [`Settings`]. Images of the test split go through `modality`, those of the training and
            validation splits through `train_modality`.

    Returns:
        `top1` and `mean_per_class`. The classifier is [`metrics.tuned_probe`], SynCLR's protocol, or
        [`metrics.sgd_probe`]. `source.per_class` selects which of the two scores chooses its hyperparameter.

    Raises:
        ValueError: a label is not the number of a class, a class has no training image, or an image is unreadable or
            has an embedding that is not finite.
    """
    count, trained = len(source.lines(CLASS_NAMES)), settings.train_modality or settings.modality

    def read(found: Source, modality: str) -> tuple[np.ndarray, np.ndarray]:
        labels: list[int] = []

        def images():
            for row in found.read():
                labels.append(int(row["cls"]))
                yield row[found.image_column]

        embeds = image_embeds(model, processor, images(), modality, settings, f"{found.name}, {found.split}")
        check_classes(np.array(labels), count, found)
        return embeds, np.array(labels)

    train, (test, labels) = read(source.train, trained), read(source, settings.modality)
    validation = read(source.validation, trained) if source.validation else (None, None)
    name = settings.probe or DEFAULT_PROBE
    options = {"device": model.device} if name == "sgd" else {}
    found = PROBES[name](*train, test, labels, *validation, per_class=source.per_class, seed=settings.seed, **options)
    return Measured(
        scores={"top1": found.top1, "mean_per_class": found.mean_per_class},
        intervals={"top1": interval(found.predicted == labels, settings)},
        counts={
            "images": len(test),
            "classes": count,
            "training images": len(train[0]),
            "validation images": len(validation[0]) if source.validation else 0,
        },
    )


def open_training(benchmark: Benchmark, source: Source, dataset: str | None = None) -> Source:
    """
    Add the training and validation images of a probe to a benchmark's data.

    Args:
        benchmark: a benchmark with the layout `classes`.
        source: its test split.
        dataset: data set of the training images, such as generated ones, as in [`open_source`]. Defaults to the split
            `train` of the test split's data set.

    Returns:
        `source` with `train`, and with `validation` if there is a split `validation`, `val` or `valid`.

    Raises:
        ValueError: there are no training images separate from the test split, or their classes differ.
        FileNotFoundError, ConnectionError: as [`open_source`].
    """
    place = dataset or source.name
    other = Path(place).resolve() != Path(source.name).resolve()
    try:
        train = open_source(replace(benchmark, split=TRAIN), place, any_split=other)
        if not other:  # splits with these names share no images
            open_source(benchmark, place, any_split=False)
    except ValueError as error:
        if other:
            raise
        raise ValueError(
            f"A probe needs training images that are separate from the scored images: {error} Pass them with "
            f"--train_dataset {benchmark.name}=DATASET."
        ) from error
    names, validation = source.lines(CLASS_NAMES), _validation(benchmark, place, train.split)
    for kind, found in {"training": train, "validation": validation}.items():
        there = names if found is None else found.lines(CLASS_NAMES)
        if names != there:
            differing = sorted(set(names) ^ set(there)) or names
            raise ValueError(
                f"The {kind} images in '{place}' and '{source.name}' have different classes, or a different order of "
                f"classes: {differing[:5]}. Use the same class names for both, or list all of them in {CLASS_NAMES}."
            )
    return replace(source, train=train, validation=validation)


def _validation(benchmark: Benchmark, place: str, trained: str) -> Source | None:
    """Return the first split in `VALIDATION` that exists, other than `trained`, the split of the training images."""
    for split in (split for split in VALIDATION if split != trained):
        try:
            return open_source(replace(benchmark, split=split), place, any_split=False)
        except ValueError:  # no such split
            continue
    return None
