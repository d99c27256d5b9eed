"""Zero-shot classification with prompt ensembles (the paper's Table 4)."""

from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..metrics import class_embeddings, zero_shot_accuracy, zero_shot_ranks
from .embedding import image_embeds, text_embeds
from .measure import Measured, Settings, interval
from .registry import ZeroShotQuestions
from .sources import Source

CLASS = "{c}"  # in a template


def evaluate_zero_shot(model: Any, processor: Any, source: Source, settings: Settings) -> Measured:
    """
    Classify images by the nearest class, where each class is an ensemble of prompts.

    Args:
        model, processor: a [`GmailCLIPModel`] or `CLIPModel` and its processor, in evaluation mode, on its device.
        source: data with `questions`, or with the layout `classes`, whose class names and templates make one question.
        settings: see [`Settings`].

    Returns:
        `top1` and `mean_per_class`, each averaged over the questions.

    Raises:
        ValueError: there are no classes, a template has no {c} for the class, a label is not the number of a class, or
            an image is unreadable or has an embedding that is not finite.
    """
    asked = source.questions or class_question(source)
    labels: list[np.ndarray] = []  # for each image, (questions,)

    def images():
        for row in source.read():
            labels.append(np.atleast_1d(row[asked.column]).astype(int))
            yield row[source.image_column]

    questions = [_class_embeds(model, processor, classes, settings) for classes in asked.prompts]
    embeds = image_embeds(model, processor, images(), settings.modality, settings, source.name)
    answers = np.array(labels)  # (images, questions)
    for number, classes in enumerate(questions):
        check_classes(answers[:, number], len(classes), source)
    scores = [zero_shot_accuracy(embeds, classes, answers[:, i]) for i, classes in enumerate(questions)]
    hits = [zero_shot_ranks(embeds, classes, answers[:, i]) == 1 for i, classes in enumerate(questions)]
    return Measured(
        scores={name: float(np.mean([score[name] for score in scores])) for name in scores[0]},
        intervals={"top1": interval(np.mean(hits, axis=0), settings)},
        counts={"images": len(embeds), "classes": len(questions[0]), "prompts per class": len(asked.prompts[0][0])},
    )


def check_classes(labels: np.ndarray, count: int, source: Source) -> None:
    """
    Raises:
        ValueError: one of the `(images,)` labels is not in 0..count - 1.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        raise ValueError(
            f"Image {wrong[0]} of '{source.name}' has class {labels[wrong[0]]}, but there are {count} classes."
        )


def class_question(source: Source) -> ZeroShotQuestions:
    """Return the question of a benchmark with the layout `classes`."""
    names, templates = source.lines("classnames.txt"), source.lines("zeroshot_classification_templates.txt")
    without = [template for template in templates if CLASS not in template]
    if without:
        raise ValueError(f"'{source.name}' has templates without {CLASS}, the place of the class: {without}.")
    return ZeroShotQuestions("cls", [[[template.replace(CLASS, name) for template in templates] for name in names]])


def _class_embeds(model: Any, processor: Any, prompts: list[list[str]], settings: Settings) -> np.ndarray:
    """Compute one embedding per class, `(classes, dim)`. A batch has as many complete classes as fit."""
    count = max(1, settings.batch_size // len(prompts[0]))
    embeds = []
    starts = range(0, len(prompts), count)
    for start in tqdm(starts, desc="Classes", unit="batch", disable=not settings.progress):
        classes = prompts[start : start + count]
        texts = [prompt for written in classes for prompt in written]
        flat = text_embeds(model, processor, texts, settings, None)
        embeds.append(class_embeddings(flat.reshape(len(classes), len(classes[0]), -1)))
    return np.concatenate(embeds)
