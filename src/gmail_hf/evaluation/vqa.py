"""Multiple-choice and yes-or-no questions about images (the paper's Tables 10 and 15; POPE)."""

from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..metrics.answers import (
    mmmu_item,
    multiple_choice_accuracy,
    multiple_choice_items,
    parse_choice,
    pope_item,
    scienceqa_item,
)
from ..metrics.yes_no import yes_no_scores
from ..vlm.conversations import text_of
from .answering import write
from .measure import Example, Measured, Settings, interval
from .sources import Source, read_image

# By layout: the function that converts rows, and the groups whose scores are reported.
ITEMS = {
    "scienceqa": (scienceqa_item, "subject"),
    "mmmu": (mmmu_item, "discipline"),
    "pope": (pope_item, "category"),
}
MAX_NEW_TOKENS = 32  # the answer is a letter or a word
EXAMPLES = 12


def evaluate_vqa(model: Any, processor: Any, source: Source, settings: Settings) -> Measured:
    """
    Evaluate answers to questions with an image and choices. Open questions and questions without an image are skipped.

    Args:
        model: any chat model of `AutoModelForImageTextToText`, in evaluation mode, on its device. It decodes greedily.
        processor: its processor, with a chat template.
        source: data of ScienceQA, MMMU or POPE.
        settings: see [`Settings`].

    Returns:
        `accuracy` of all questions and of each group, and the share of answers without a choice; for POPE
        [`metrics.yes_no_scores`] of all questions and of each category. Each answer is also a prediction.

    Raises:
        ValueError: no question has an image and choices, an image cannot be read, or a row cannot be converted.
    """
    to_item, kind = ITEMS[source.layout]
    items, skipped = multiple_choice_items(source.read(), to_item)
    if not items:
        raise ValueError(f"'{source.name}' has no question with an image and choices among {skipped}.")
    answers: list[str] = []
    examples: list[Example] = []
    with tqdm(desc="Answers", unit="question", disable=not settings.progress, total=len(items)) as bar:
        for start in range(0, len(items), settings.batch_size):
            batch = items[start : start + settings.batch_size]
            images = [
                [read_image(cell, f"Question {start + i}") for cell in item.images] for i, item in enumerate(batch)
            ]
            answers += write(
                model,
                processor,
                images,
                [item.messages for item in batch],
                settings.modality,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
            )
            examples += [Example(pictures, "") for pictures in images[: EXAMPLES - len(examples)]]
            bar.update(len(batch))
    chosen = [parse_choice(text, item.choices, item.rules) for text, item in zip(answers, items, strict=True)]
    right = [item.answer for item in items]
    scores = (_yes_no if source.layout == "pope" else _accuracy)(chosen, right, [item.group[kind] for item in items])
    lines = []
    for item, text, choice in zip(items, answers, chosen, strict=True):
        facts = {"answer": text, "choice": None if choice is None else item.choices[choice]}
        lines.append(
            {"question": text_of(item.messages[0]), **facts, "right": item.choices[item.answer], **item.group}
        )
    for example, line in zip(examples, lines, strict=False):
        example.text, example.right = line["answer"], line["choice"] == line["right"]
        example.reference = f"{line['question']} Right: {line['right']}"
    return Measured(
        scores=scores,
        intervals={"accuracy": interval(np.equal(chosen, right), settings)},
        counts={"questions": len(items), **{f"left out, {why}": count for why, count in skipped.items()}},
        predictions=lines,
        examples=examples,
    )


def _accuracy(chosen: list[int | None], right: list[int], groups: list[str]) -> dict[str, float]:
    found = multiple_choice_accuracy(chosen, right, groups)
    by_group = {f"accuracy, {group}": score for group, score in found["groups"].items()}
    return {"accuracy": found["accuracy"], **by_group, "unparsed": found["unparsed"]}


def _yes_no(chosen: list[int], right: list[int], groups: list[str]) -> dict[str, float]:
    scores = yes_no_scores(chosen, right)
    for group in sorted(set(groups)):
        rows = [row for row, member in enumerate(groups) if member == group]
        of_group = yes_no_scores([chosen[row] for row in rows], [right[row] for row in rows])
        scores |= {f"{name}, {group}": score for name, score in of_group.items()}
    return scores
