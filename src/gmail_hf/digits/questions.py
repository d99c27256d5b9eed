"""Questions and answers about a digits scene, as chat messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from .scenes import DIGIT_NAMES, caption_of

QUESTIONS = {
    "left_digit": "Which digit is on the left?",
    "right_digit": "Which digit is on the right?",
    "left_color": "Which color is the left digit?",
    "right_color": "Which color is the right digit?",
    "caption": "Describe the image.",
}


def scene_answers(row: Mapping[str, Any]) -> dict[str, str]:
    """
    Return the answer to each of `QUESTIONS`.

    Args:
        row: row of a data set of digits scenes, with `digits` (two ints) and `colors` (two strings), the left one
            first.

    Returns:
        For "a red three and a green seven": `three`, `seven`, `red`, `green` and that caption.
    """
    (left_digit, right_digit), (left_color, right_color) = row["digits"], row["colors"]
    return {
        "left_digit": DIGIT_NAMES[left_digit],
        "right_digit": DIGIT_NAMES[right_digit],
        "left_color": left_color,
        "right_color": right_color,
        "caption": caption_of(row["digits"], row["colors"]),
    }


def scene_messages(row: Mapping[str, Any], questions: Sequence[str] = tuple(QUESTIONS)) -> list[dict[str, Any]]:
    """
    Return a conversation about the scene in the format of transformers' chat templates, with the image in the first
    user turn.

    Args:
        row: as in [`scene_answers`].
        questions: keys of `QUESTIONS` in the order to ask.

    Returns:
        Alternating user and assistant turns. The content of each is a list of items `{"type": "image"}` and
        `{"type": "text", "text": ...}`.
    """
    answers = scene_answers(row)
    messages = []
    for question in questions:
        items = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*items, {"type": "text", "text": QUESTIONS[question]}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[question]}]})
    return messages
