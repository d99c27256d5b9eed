"""Multiple-choice questions about images (ScienceQA, MMMU, POPE): prompts, parsing of answers, accuracy.

No function here loads a model. Rows of the data sets become messages for any chat template. A model's text becomes the
index of a choice by the rules of each benchmark's evaluation script.
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
# The end of LLaVA's prompts for ScienceQA and MMMU.
INSTRUCTION = "Answer with the option's letter from the given choices directly."
IMAGE_MARK = re.compile(r"<image (\d+)>")
SCIENCEQA_COLUMNS = ("image", "question", "choices", "answer", "hint", "subject", "grade")
# LLaVA always searches for these first letters, even if there are fewer choices.
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
# The end of LLaVA's prompt for POPE.
POPE_INSTRUCTION = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class MultipleChoiceItem:
    """A multiple-choice question.

    Args:
        images: image cells of the row, one per image item of `messages`, in that order. Empty for a question without
            an image.
        messages: one user turn, see `multiple_choice_messages`.
        choices: texts of the choices.
        answer: index of the correct choice.
        group: groups of the question by kind, such as {"discipline": "Business"}.
        rules: rules for `parse_choice`.
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
    """Format a question with lettered choices, (A) to (Z), as one user turn for transformers' chat templates.

    Args:
        question: the question. Like the choices, it may contain marks such as `<image 1>` (as in MMMU), which are
            replaced by image items.
        choices: at least two texts.
        context: text before the question, if any.
        num_images: number of images. Images without a mark come first. Pass these images, followed by one image per
            mark in the order of the text.
        instruction: text after the choices.

    Raises:
        ValueError: fewer than two or more than 26 choices, or a mark without an image.
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
    for index, part in enumerate(IMAGE_MARK.split(prompt)):  # texts alternate with numbers of images
        if index % 2:
            content.append({"type": "image"})
        elif part:
            content.append({"type": "text", "text": part})
    return [{"role": "user", "content": content}]


def _image_order(prompt: str, num_images: int) -> list[int]:
    """Return the numbers of the images, starting at 1, in their order in the message."""
    marked = [int(number) for number in IMAGE_MARK.findall(prompt)]
    absent = [number for number in marked if not 1 <= number <= num_images]
    if absent:
        raise ValueError(f"the text has the mark <image {absent[0]}>, but there are only {num_images} images")
    return [number for number in range(1, num_images + 1) if number not in marked] + marked


def parse_choice(text: str, choices: Sequence[str], rules: Rules = "mmmu") -> int | None:
    """Find the choice in an answer by the rules of the benchmark's evaluation script, applied in this order.

    `scienceqa`, as in LLaVA's `eval_science_qa`: the answer is only a letter; it begins with "B. " (or "B" and a new
    line); it contains "The answer is B.", or else "The answer is B". The first match counts. A letter at the start of
    a word also matches: "The answer is Bears" is B.

    `mmmu`, as in MMMU's `eval_utils`: letters in brackets, "(B)"; letters between spaces, "B"; in answers of more than
    five words, the text of a choice in any case. The last match counts. Punctuation around the answer is removed.

    `pope`: see `parse_yes_no`. The choices are "yes" and "no".

    Letters must be upper case. If no choice is found, MMMU's script guesses one at random. Here the result is None,
    which counts as wrong. Accuracy is therefore lower than the script's by about the share of such answers divided by
    the number of choices, and has no random part.

    Args:
        text: the model's text. Surrounding white space is ignored.
        choices: texts of the choices.
        rules: the benchmark.

    Returns:
        The index of the choice, or None if the answer has no choice or a letter that is not among the choices.

    Raises:
        ValueError: unknown rules, or fewer than two or more than 26 choices.
    """
    letters = _letters(choices)
    if rules == "pope":
        return parse_yes_no(text)
    if rules == "scienceqa":
        letter = _scienceqa_letter(text.strip().replace("\n", ". "), len(choices))
        return letters.index(letter) if letter and letter in letters else None
    if rules != "mmmu":
        raise ValueError(f"rules must be 'scienceqa', 'mmmu' or 'pope', got {rules!r}")
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
    """Share of correct answers. None counts as wrong.

    Args:
        predictions: (n,) indices of choices, see `parse_choice`.
        answers: (n,) indices of the correct choices.
        groups: (n,) group of each question, such as MMMU's disciplines.

    Returns:
        {"accuracy", "unparsed": share of None}, each in 0..1. With groups, also "groups", the accuracy of each group,
        and "macro", their mean. Benchmarks publish "accuracy", in which large groups weigh more.

    Raises:
        ValueError: no answers, lists of different lengths, or a value that is not an index.
    """
    if not len(answers):
        raise ValueError("answers are empty; pass at least one answer")
    for name, values in {"predictions": predictions, **({} if groups is None else {"groups": groups})}.items():
        if len(values) != len(answers):
            raise ValueError(f"got {len(values)} {name}, but {len(answers)} answers")
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
    """Convert a row of `derek-thomas/ScienceQA` (Lu et al., 2022). As in LLaVA, the prompt omits the lecture.

    Its groups are those of the benchmark's tables: `subject` (natural, social or language science), `context` (text
    and image, image, text, none) and `grade` (1-6, 7-12). The tables' TXT has all questions with text, IMG all with an
    image.

    Raises:
        ValueError: a column is missing, or the answer is not one of the choices.
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
    """Convert a row of `MMMU/MMMU` (Yue et al., 2024). Return None for an open question, which has no choices.

    Its groups are `discipline` and `subject`, from the row's id.

    Raises:
        ValueError: a column is missing, the answer is withheld (as in the split `test`), the subject is unknown, or
            the images do not match the marks in the text.
    """
    _check_columns(row, MMMU_COLUMNS, "MMMU")
    if row["question_type"] == "open":
        return None
    subject = "_".join(row["id"].split("_")[1:-1])  # Art_Theory for validation_Art_Theory_12
    discipline = next((name for name, subjects in MMMU_DISCIPLINES.items() if subject in subjects.split()), None)
    if discipline is None:
        raise ValueError(f"question {row['id']} has no subject of MMMU; ids must look like validation_Accounting_1")
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
    """Convert a row of `lmms-lab/POPE` (Li et al., 2023), a question such as "Is there a dog in the image?".

    Its group is `category`, the way in which absent objects were chosen: random, popular or adversarial.

    Raises:
        ValueError: a column is missing, or the answer is neither yes nor no.
    """
    _check_columns(row, POPE_COLUMNS, "POPE")
    answer = str(row["answer"]).strip().lower()
    if answer not in CHOICES:
        raise ValueError(f"the answer must be 'yes' or 'no', got {row['answer']!r}")
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
    """Return the questions with an image and choices, and the number of other rows: {"open": n, "without image": n}.

    Args:
        rows: rows of the data set. Images may be undecoded.
        to_item: `scienceqa_item`, `mmmu_item` or `pope_item`.

    Raises:
        ValueError: a row cannot be converted. The message gives its number.
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
    """Whether a cell has an image. An empty undecoded cell may be a dict of Nones."""
    return cell is not None and not (isinstance(cell, dict) and all(value is None for value in cell.values()))


def _check_answer(answer: int, choices: Sequence[str]) -> int:
    if not 0 <= answer < len(choices):
        raise ValueError(f"the answer is not one of the {len(choices)} choices; use a split with published answers")
    return answer
