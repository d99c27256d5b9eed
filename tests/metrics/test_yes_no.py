"""POPE: answers read as its own script reads them, and its scores by hand."""

import numpy as np
import pytest
from PIL import Image

from gmail_hf.metrics import parse_choice, parse_yes_no, pope_item, yes_no_scores
from gmail_hf.metrics.answers import POPE_INSTRUCTION

PICTURE = Image.new("RGB", (2, 2))
YES, NO = 0, 1


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        ("Yes", YES),
        ("No", NO),
        ("no.", NO),
        ("No, there is no dog.", NO),
        ("Yes. There is not only a dog.", YES),  # the first sentence
        ("There is not a dog in the image.", NO),
        ("There is a dog, not a cat", NO),  # the rule does not see what is negated
        ("Nothing of the kind", YES),  # words alone
        ("NO", YES),  # not among the three words
        ("I cannot tell", YES),
        ("", YES),
        ("\nNo\n", NO),
    ],
)
def test_answers(answer, meaning):
    assert parse_yes_no(answer) == parse_choice(answer, ["yes", "no"], "pope") == meaning


def test_scores_by_hand():
    """Of 5 objects that are there 3 are seen; of 5 that are not, 1 is: 3 of 4 that are claimed are there."""
    answers = [YES] * 5 + [NO] * 5
    says = np.array([YES, YES, YES, NO, NO, YES, NO, NO, NO, NO])
    assert yes_no_scores(says, answers) == {
        "accuracy": pytest.approx(7 / 10),
        "precision": pytest.approx(3 / 4),
        "recall": pytest.approx(3 / 5),
        "F1": pytest.approx(2 / 3),  # 2 (3/4) (3/5) / (27/20)
        "yes_ratio": pytest.approx(4 / 10),
    }
    always = {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "F1": pytest.approx(2 / 3), "yes_ratio": 1.0}
    assert yes_no_scores([YES] * 10, answers) == always
    never = {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "F1": 0.0, "yes_ratio": 0.0}
    assert yes_no_scores([NO] * 10, answers) == never


@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        ([], [], "0 predictions and 0 answers"),
        ([YES], [YES, NO], "1 predictions and 2 answers"),
        (["yes"], [YES], "predictions must be 0 for yes or 1 for no, got 'yes'"),
        ([YES], [2], "answers must be 0 for yes or 1 for no, got 2"),
        ([None], [YES], "predictions must be 0 .* got None"),
    ],
)
def test_mistakes_are_named(predictions, answers, message):
    with pytest.raises(ValueError, match=message):
        yes_no_scores(predictions, answers)


def test_rows():
    row = {"question_id": "7", "question": "Is there a dog in the image?", "answer": "no", "image_source": "COCO_1"}
    row |= {"image": PICTURE, "category": "popular"}
    item = pope_item(row)
    assert item.images == [PICTURE] and item.choices == ["yes", "no"] and item.answer == NO and item.rules == "pope"
    text = {"type": "text", "text": f"Is there a dog in the image?\n{POPE_INSTRUCTION}"}
    assert item.messages == [{"role": "user", "content": [{"type": "image"}, text]}]
    assert item.group == {"category": "popular"}
    assert pope_item({**row, "answer": "Yes"}).answer == YES
    with pytest.raises(ValueError, match="the answer must be 'yes' or 'no', got 'maybe'"):
        pope_item({**row, "answer": "maybe"})
    with pytest.raises(ValueError, match=r"a row of POPE lacks the column\(s\) \['category'\]"):
        pope_item({name: value for name, value in row.items() if name != "category"})
