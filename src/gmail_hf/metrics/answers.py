"""Questions about images with choices, ScienceQA, MMMU and POPE: prompts, answers read from text, accuracy.

Apart from any model: rows of the data sets become messages for any chat template, and what the model writes becomes
the index of a choice by the rules of each benchmark's own evaluation.
"""

from __future__ import annotations

import ast
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from numbers import Integral
from typing import Any, Literal

import numpy as np

from .yes_no import CHOICES, parse_yes_no

Rules = Literal["scienceqa", "mmmu", "pope"]
# What both benchmarks' own prompts for LLaVA end with.
INSTRUCTION = "Answer with the option's letter from the given choices directly."
IMAGE_MARK = re.compile(r"<image (\d+)>")
SCIENCEQA_COLUMNS = ("image", "question", "choices", "answer", "hint", "subject", "grade")
# Letters that LLaVA looks for, however few choices there are.
SCIENCEQA_LETTERS = 5
MMMU_COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
MMMU_IMAGES = 7
MMMU_DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
POPE_COLUMNS = ("image", "question", "answer", "category")
# What LLaVA's own prompt for POPE ends with.
POPE_INSTRUCTION = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class MultipleChoiceItem:
    """A question to a model.

    Args:
        images: as the row holds them, one for each image item of `messages`, in that order; empty for a question
            without an image.
        messages: one user turn, see `multiple_choice_messages`.
        choices: texts of the choices.
        answer: index of the right one.
        group: the class of the question by kind of class, such as {"discipline": "Business"}.
        rules: of `parse_choice`.
    """

    images: list[Any]
    messages: list[dict[str, Any]]
    choices: list[str]
    answer: int
    group: dict[str, str]
    rules: Rules


def multiple_choice_messages(
    question: str,
    choices: Sequence[str],
    context: str | None = None,
    num_images: int = 1,
    instruction: str = INSTRUCTION,
) -> list[dict[str, Any]]:
    """A question with lettered choices, (A) to (Z), as one user turn in the format of transformers' chat templates.

    Args:
        question: it and the choices may hold marks `<image 1>`, as MMMU's do, which become image items in place.
        choices: two or more texts.
        context: what precedes the question, if anything.
        num_images: how many images there are. Those without a mark come first, so the images to pass are these and
            then one for each mark, in the order of the text.
        instruction: what follows the choices.

    Raises:
        ValueError: fewer than two choices or more than 26, or a mark of an image that is not there.
    """
    return _messages(_prompt(question, choices, context, instruction), num_images)


def _prompt(question: str, choices: Sequence[str], context: str | None = None, instruction: str = INSTRUCTION) -> str:
    lines = [f"({letter}) {choice}" for letter, choice in zip(_letters(choices), choices, strict=True)]
    return "\n".join([*([f"Context: {context}"] if context else []), question, *lines, instruction])


def _letters(choices: Sequence[str]) -> str:
    if isinstance(choices, str) or not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise ValueError(f"choices must be a list of 2 to {len(string.ascii_uppercase)} texts, got {choices!r}")
    return string.ascii_uppercase[: len(choices)]


def _messages(prompt: str, num_images: int) -> list[dict[str, Any]]:
    first = len(_image_order(prompt, num_images)) - len(IMAGE_MARK.findall(prompt))
    content = [{"type": "image"} for _ in range(first)]
    for index, part in enumerate(IMAGE_MARK.split(prompt)):  # texts and, between them, numbers of images
        if index % 2:
            content.append({"type": "image"})
        elif part:
            content.append({"type": "text", "text": part})
    return [{"role": "user", "content": content}]


def _image_order(prompt: str, num_images: int) -> list[int]:
    """Numbers of the images, from 1 on, in the order in which the content of the message has them."""
    marked = [int(number) for number in IMAGE_MARK.findall(prompt)]
    absent = [number for number in marked if not 1 <= number <= num_images]
    if absent:
        raise ValueError(f"the text marks <image {absent[0]}>, and there are {num_images} images")
    return [number for number in range(1, num_images + 1) if number not in marked] + marked


def parse_choice(text: str, choices: Sequence[str], rules: Rules = "mmmu") -> int | None:
    """The choice that an answer names, by the rules of the benchmark's own evaluation, in this order.

    `scienceqa`, as LLaVA's `eval_science_qa` reads it: the answer is a letter alone; it begins with "B. " (or "B" and
    a new line); it says "The answer is B." or else "The answer is B", the first such place counting. The rule takes
    a letter even where it begins a word: "The answer is Bears" is B.

    `mmmu`, as MMMU's `eval_utils`: letters in brackets, "(B)"; letters between spaces, "B"; in an answer of more than
    five words, the text of a choice in any case. Of several, the last one counts. Punctuation around the answer is
    dropped.

    Letters are upper case. Where MMMU's script guesses a choice at random, nothing was answered here, and None counts
    as wrong: accuracy is lower than the script's by about the share of such answers over the number of choices, and
    no luck is in it.

    `pope`: see `parse_yes_no`; the choices are "yes" and "no".

    Args:
        text: what the model wrote; white space around it does not count.
        choices: texts of the choices.
        rules: the benchmark.

    Returns:
        The index of the choice, or None for an answer that names none, or a letter beyond the choices.

    Raises:
        ValueError: unknown rules, or fewer than two choices or more than 26.
    """
    letters = _letters(choices)
    if rules == "pope":
        return parse_yes_no(text)
    if rules == "scienceqa":
        letter = _scienceqa_letter(text.strip().replace("\n", ". "), len(choices))
        return letters.index(letter) if letter and letter in letters else None
    if rules != "mmmu":
        raise ValueError(f"rules must be 'scienceqa', 'mmmu' or 'pope', not {rules!r}")
    text = text.strip()
    for mark in ",.!?;:'":  # in this order, each once, so that "B.!" keeps its dot
        text = text.strip(mark)
    text = f" {text} "
    wanted = [(text, [f"({letter})" for letter in letters]), (text, [f" {letter} " for letter in letters])]
    if len(text.split()) > 5:
        wanted.append((text.lower(), [choice.lower() for choice in choices]))
    for where, names in wanted:
        last = [where.rfind(name) if name else -1 for name in names]
        if max(last) >= 0:
            return last.index(max(last))
    return None


def _scienceqa_letter(text: str, num_choices: int) -> str | None:
    letters = string.ascii_uppercase[: max(SCIENCEQA_LETTERS, num_choices)]
    patterns = (rf"([{letters}])$", rf"([{letters}])\. ", rf".*?The answer is ([{letters}])\.")
    for pattern in (*patterns, rf".*?The answer is ([{letters}])"):
        if match := re.match(pattern, text):
            return match[1]
    return None


def multiple_choice_accuracy(
    predictions: Sequence[int | None], answers: Sequence[int], groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """Share of questions answered right; None counts as wrong.

    Args:
        predictions: (n,) indices of choices, see `parse_choice`.
        answers: (n,) indices of the right ones.
        groups: (n,) the class of each question, such as MMMU's disciplines.

    Returns:
        {"accuracy", "unparsed": share of None}, each in 0..1, and where groups are given "groups", the accuracy of
        each, and "macro", their mean. Benchmarks publish "accuracy", in which large groups weigh more.

    Raises:
        ValueError: nothing to score, lists of unequal length, or something other than an index (the row is named).
    """
    if not len(answers):
        raise ValueError("no answers to score")
    for name, values in {"predictions": predictions, **({} if groups is None else {"groups": groups})}.items():
        if len(values) != len(answers):
            raise ValueError(f"{len(values)} {name}, but {len(answers)} answers")
    for name, values in (("predictions", [p for p in predictions if p is not None]), ("answers", answers)):
        bad = [value for value in values if not isinstance(value, Integral) or isinstance(value, bool) or value < 0]
        if bad:
            raise ValueError(f"{name} must be indices of choices, got {bad[0]!r}; see `parse_choice`")
    hits = np.array([prediction == answer for prediction, answer in zip(predictions, answers, strict=True)])
    scores: dict[str, Any] = {
        "accuracy": float(hits.mean()),
        "unparsed": sum(prediction is None for prediction in predictions) / len(answers),
    }
    if groups is not None:
        members = {group: [member == group for member in groups] for group in sorted(set(groups))}
        scores["groups"] = {group: float(hits[mask].mean()) for group, mask in members.items()}
        scores["macro"] = float(np.mean(list(scores["groups"].values())))
    return scores


def scienceqa_item(row: Mapping[str, Any]) -> MultipleChoiceItem:
    """A row of `derek-thomas/ScienceQA` (Lu et al., 2022); the lecture is no part of the prompt, as in LLaVA's.

    Its groups are `subject` (natural, social or language science), `context` (text and image, image, text, none) and
    `grade` (1-6, 7-12), the classes of the benchmark's tables, where TXT is all with text and IMG all with an image.

    Raises:
        ValueError: a column is missing, or the answer is none of the choices.
    """
    _check_columns(row, SCIENCEQA_COLUMNS, "ScienceQA")
    images = [row["image"]] if _is_image(row["image"]) else []
    choices, hint = [str(choice) for choice in row["choices"]], (row["hint"] or "").strip()
    context = " and ".join([*(["text"] if hint else []), *(["image"] if images else [])]) or "none"
    grade = int(str(row["grade"]).removeprefix("grade"))
    return MultipleChoiceItem(
        images=images,
        messages=multiple_choice_messages(row["question"], choices, hint, len(images)),
        choices=choices,
        answer=_check_answer(int(row["answer"]), choices),
        group={"subject": row["subject"], "context": context, "grade": "1-6" if grade <= 6 else "7-12"},
        rules="scienceqa",
    )


def mmmu_item(row: Mapping[str, Any]) -> MultipleChoiceItem | None:
    """A row of `MMMU/MMMU` (Yue et al., 2024), or None for an open question, which has no choices.

    Its groups are `discipline` and `subject`, which the row's id names.

    Raises:
        ValueError: a column is missing; an answer that is withheld, as in the split `test`; a subject that MMMU has
            not; images that do not fit the marks in the text.
    """
    _check_columns(row, MMMU_COLUMNS, "MMMU")
    if row["question_type"] == "open":
        return None
    subject = "_".join(row["id"].split("_")[1:-1])  # of validation_Art_Theory_12
    discipline = next((name for name, subjects in MMMU_DISCIPLINES.items() if subject in subjects.split()), None)
    if discipline is None:
        raise ValueError(f"question {row['id']} is of no subject of MMMU's; ids look like validation_Accounting_1")
    try:
        options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]
        choices = [str(option) for option in options]
        positions = {letter: index for index, letter in enumerate(_letters(choices))}
        prompt = _prompt(row["question"], choices)
        cells = [row.get(f"image_{number}") for number in range(1, MMMU_IMAGES + 1)]
        images = list(takewhile(_is_image, cells))
        return MultipleChoiceItem(
            images=[images[number - 1] for number in _image_order(prompt, len(images))],
            messages=_messages(prompt, len(images)),
            choices=choices,
            answer=_check_answer(positions.get(row["answer"], -1), choices),
            group={"discipline": discipline, "subject": subject},
            rules="mmmu",
        )
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"question {row['id']}: {error}") from error


def pope_item(row: Mapping[str, Any]) -> MultipleChoiceItem:
    """A row of `lmms-lab/POPE` (Li et al., 2023), a question such as "Is there a dog in the image?".

    Its group is `category`, how the objects that are not in the image were chosen: random, popular or adversarial.

    Raises:
        ValueError: a column is missing, or the answer is neither yes nor no.
    """
    _check_columns(row, POPE_COLUMNS, "POPE")
    answer = str(row["answer"]).strip().lower()
    if answer not in CHOICES:
        raise ValueError(f"the answer is 'yes' or 'no', not {row['answer']!r}")
    images = [row["image"]] if _is_image(row["image"]) else []
    return MultipleChoiceItem(
        images=images,
        messages=_messages(f"{row['question'].strip()}\n{POPE_INSTRUCTION}", len(images)),
        choices=list(CHOICES),
        answer=CHOICES.index(answer),
        group={"category": str(row["category"])},
        rules="pope",
    )


def multiple_choice_items(
    rows: Iterable[Mapping[str, Any]], to_item: Callable[[Mapping[str, Any]], MultipleChoiceItem | None]
) -> tuple[list[MultipleChoiceItem], dict[str, int]]:
    """The questions with an image and choices, and how many rows were left out: {"open": n, "without image": n}.

    Args:
        rows: of the data set; images may be undecoded.
        to_item: `scienceqa_item`, `mmmu_item` or `pope_item`.

    Raises:
        ValueError: a row does not fit; its number is named.
    """
    items, skipped = [], Counter({"open": 0, "without image": 0})
    for number, row in enumerate(rows):
        try:
            item = to_item(row)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if item is not None and item.images:
            items.append(item)
        else:
            skipped["open" if item is None else "without image"] += 1
    return items, dict(skipped)


def _check_columns(row: Mapping[str, Any], columns: Sequence[str], name: str) -> None:
    missing = [column for column in columns if column not in row]
    if missing:
        raise ValueError(f"a row of {name} lacks the column(s) {missing}; it has {list(row)}")


def _is_image(cell: Any) -> bool:
    """Whether an image cell is filled; an undecoded one may be a dict of Nones."""
    return cell is not None and not (isinstance(cell, dict) and all(value is None for value in cell.values()))


def _check_answer(answer: int, choices: Sequence[str]) -> int:
    if not 0 <= answer < len(choices):
        raise ValueError(f"the answer is none of the {len(choices)} choices; take a split whose answers are published")
    return answer
