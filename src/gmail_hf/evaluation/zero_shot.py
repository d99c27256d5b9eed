"""Zero-shot classification with prompt ensembles (the paper's Table 4)."""

from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..digits.scenes import COLOR_NAMES, DIGIT_NAMES, caption_of
from ..metrics import class_embeddings, zero_shot_accuracy, zero_shot_ranks
from .embedding import image_embeds, text_embeds
from .measure import Measured, Settings, interval
from .sources import Source

CLASS = "{c}"  # in a template


def evaluate_zero_shot(model: Any, processor: Any, source: Source, settings: Settings) -> Measured:
    """
    Accuracy of the class whose prompts lie nearest to an image.

    Args:
        model ([`GmailCLIPModel`] or `CLIPModel`), processor: in evaluation mode, on its device.
        source: of classes, with their names and templates beside them; or of digits scenes, whose left and right
            digits are told apart by all the captions that name them there.
        settings: see [`Settings`].

    Returns:
        `top1` and `mean_per_class`, of digits the mean of left and right.

    Raises:
        ValueError: no classes, a template without a place for the class, a label that is no class, an image that is
            unreadable or whose embedding is not finite.
    """
    labels: list[list[int]] = []  # one list an image, one label a question

    def images():
        for row in source.read():
            labels.append([int(row["cls"])] if source.layout == "classes" else [int(digit) for digit in row["digits"]])
            yield row[source.image_column]

    prompts = class_prompts(source) if source.layout == "classes" else digit_prompts()
    questions = [_class_embeds(model, processor, classes, settings) for classes in prompts]
    embeds = image_embeds(model, processor, images(), settings.modality, settings, source.name)
    answers = np.array(labels)  # (images, questions)
    for number, classes in enumerate(questions):
        wrong = np.flatnonzero((answers[:, number] < 0) | (answers[:, number] >= len(classes)))
        if len(wrong):
            raise ValueError(
                f"Image {wrong[0]} of '{source.name}' is of class {answers[wrong[0], number]}, but there are "
                f"{len(classes)} classes."
            )
    scores = [zero_shot_accuracy(embeds, classes, answers[:, i]) for i, classes in enumerate(questions)]
    hits = [zero_shot_ranks(embeds, classes, answers[:, i]) == 1 for i, classes in enumerate(questions)]
    return Measured(
        scores={name: float(np.mean([score[name] for score in scores])) for name in scores[0]},
        intervals={"top1": interval(np.mean(hits, axis=0), settings)},
        counts={"images": len(embeds), "classes": len(questions[0]), "prompts a class": len(prompts[0][0])},
    )


def class_prompts(source: Source) -> list[list[list[str]]]:
    """Prompts of each class, of the one question that a benchmark of classes asks."""
    names, templates = source.lines("classnames.txt"), source.lines("zeroshot_classification_templates.txt")
    without = [template for template in templates if CLASS not in template]
    if without:
        raise ValueError(f"'{source.name}' has templates without {CLASS} for the class: {without}.")
    return [[[template.replace(CLASS, name) for template in templates] for name in names]]


def digit_prompts() -> list[list[list[str]]]:
    """Prompts of each digit on the left, and of each on the right: with all colors and neighbours."""
    colors = [[left, right] for left in COLOR_NAMES for right in COLOR_NAMES if left != right]
    digits = range(len(DIGIT_NAMES))
    left = [[caption_of([digit, other], pair) for other in digits for pair in colors] for digit in digits]
    right = [[caption_of([other, digit], pair) for other in digits for pair in colors] for digit in digits]
    return [left, right]


def _class_embeds(model: Any, processor: Any, prompts: list[list[str]], settings: Settings) -> np.ndarray:
    """One embedding a class, `(classes, dim)`; so many classes at a time as fill a batch."""
    count = max(1, settings.batch_size // len(prompts[0]))
    embeds = []
    starts = range(0, len(prompts), count)
    for start in tqdm(starts, desc="Classes", unit="batch", disable=not settings.progress):
        classes = prompts[start : start + count]
        texts = [prompt for written in classes for prompt in written]
        flat = text_embeds(model, processor, texts, settings, None)
        embeds.append(class_embeddings(flat.reshape(len(classes), len(classes[0]), -1)))
    return np.concatenate(embeds)
