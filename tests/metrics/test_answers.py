import datasets
import numpy as np
import pytest
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from gmail_hf.metrics.answers import (
    INSTRUCTION,
    MMMU_DISCIPLINES,
    mmmu_item,
    multiple_choice_accuracy,
    multiple_choice_items,
    multiple_choice_messages,
    parse_choice,
    scienceqa_item,
)
from gmail_hf.vlm.chat import LLAMA3_CHAT_TEMPLATE, with_images

ANIMALS = ["a cat", "a black cat", "Bears", "D"]
IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1),
        (" B\n", 1),
        ("B. Because it is black.", 1),
        ("B\nThe fur is black. The answer is C.", 1),  # as "B. The fur ..."
        ("The fur is black. The answer is B.", 1),
        ("The answer is B", 1),
        ("The answer is A? No. The answer is B.", 1),  # with a full stop before without
        ("The answer is A. No, the answer is B.", 0),  # the first
        ("The answer is Bears", 1),  # LLaVA's rule reads the letter of a word
        ("The answer is D.", 3),
        ("The answer is E. Or: The answer is B.", None),  # there is no E, but it was answered
        ("E", None),
        ("b", None),
        ("the answer is B.", None),
        ("The answer is (B).", None),
        ("(B)", None),
        ("B.", None),
        ("B) a black cat", None),
        ("A cat", None),
        ("Answer: B", None),
        ("AB", None),
        ("a black cat", None),
        ("", None),
    ],
)
def test_scienceqa_answers(answer, choice):
    assert parse_choice(answer, ANIMALS, "scienceqa") == choice


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1),
        (" B.\n", 1),
        ("'B'", 1),
        ("B.!", None),  # the marks are dropped in one order, once each
        ("(B)", 1),
        ("(B) a black cat", 1),
        ("Not (A) or (C), but (B), like all of C", 1),  # brackets before bare letters
        ("(A), then (C); (A) again", 0),  # the last mention
        ("A or C or A or B", 1),
        ("A cat sits there", 0),  # the article, at the beginning
        ("I see a cat and it is B I think", 1),
        ("A cat: the answer is D", 3),
        ("B, since it is black", None),  # no space after the letter, and too short for texts of choices
        ("b", None),
        ("the answer is (b)", None),
        ("E", None),
        ("AB", None),
        ("bears", None),  # not more than five words
        ("These two are, I am quite sure, BEARS", 2),
        ("First bears, and then there is a cat", 0),
        ("It is surely a black cat, not another", 1),
        ("I cannot see what it is", None),
        ("", None),
    ],
)
def test_mmmu_answers(answer, choice):
    assert parse_choice(answer, ANIMALS) == choice
    assert parse_choice(answer, ANIMALS, "mmmu") == choice


def test_choices_that_hold_others():
    """MMMU's rule: the later start counts, even where it lies within a longer choice."""
    assert parse_choice("I think that this is a black cat", ["black cat", "cat"]) == 1
    assert parse_choice("one two three four five six", ["", "seven"]) is None


def test_more_choices_than_five():
    choices = [f"choice {number}" for number in range(7)]
    assert parse_choice("The answer is G.", choices, "scienceqa") == parse_choice("(G)", choices, "mmmu") == 6


@pytest.mark.parametrize("choices", [["one"], "cat", list(map(str, range(27)))])
def test_unfit_choices(choices):
    for function in (lambda: parse_choice("A", choices), lambda: multiple_choice_messages("?", choices)):
        with pytest.raises(ValueError, match="list of 2 to 26 texts"):
            function()


def test_unknown_rules():
    with pytest.raises(ValueError, match="'scienceqa', 'mmmu' or 'pope'"):
        parse_choice("A", ANIMALS, "llava")


def test_messages():
    messages = multiple_choice_messages("Which is it?", ["a cat", "a dog"], context="Two animals.")
    expected = f"Context: Two animals.\nWhich is it?\n(A) a cat\n(B) a dog\n{INSTRUCTION}"
    assert messages == [{"role": "user", "content": [IMAGE, text(expected)]}]
    plain = multiple_choice_messages("Which?", ["x", "y"], num_images=0, instruction="Answer.")
    assert plain[0]["content"] == [text("Which?\n(A) x\n(B) y\nAnswer.")]


def test_image_marks_become_images_in_place():
    question = "<image 2> is right of <image 1>. Which is it?"
    messages = multiple_choice_messages(question, ["<image 3>", "none", "<image 1>"], num_images=4, instruction="!")
    assert messages[0]["content"] == [
        IMAGE,  # the fourth, which has no mark
        IMAGE,
        text(" is right of "),
        IMAGE,
        text(". Which is it?\n(A) "),
        IMAGE,
        text("\n(B) none\n(C) "),
        IMAGE,
        text("\n!"),
    ]
    rendered, _ = render_jinja_template([messages], chat_template=with_images(LLAMA3_CHAT_TEMPLATE), bos_token="")
    assert rendered[0].count("<image>") == 5
    for number in (0, 2):
        with pytest.raises(ValueError, match=rf"has the mark <image {number}>, but there are only 1 images"):
            multiple_choice_messages(f"<image {number}>?", ["x", "y"])


def test_accuracy_by_hand():
    predictions, answers = [0, 1, None, 3, 2], np.array([0, 1, 2, 0, 2], dtype=np.int8)
    assert multiple_choice_accuracy(predictions, answers) == {"accuracy": 3 / 5, "unparsed": 1 / 5}
    scores = multiple_choice_accuracy(
        predictions, answers, groups=["Science", "Business", "Science", "Art", "Science"]
    )
    assert scores == {
        "accuracy": 3 / 5,
        "unparsed": 1 / 5,
        "groups": {"Art": 0.0, "Business": 1.0, "Science": pytest.approx(2 / 3)},
        "macro": pytest.approx((0 + 1 + 2 / 3) / 3),
    }
    assert multiple_choice_accuracy([None], [0], ["x"]) == {
        "accuracy": 0.0,
        "unparsed": 1.0,
        "groups": {"x": 0.0},
        "macro": 0.0,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "answers are empty"),
        (([0], [0, 1]), "1 predictions, but 2 answers"),
        (([0, 1], [0, 1], ["x"]), "1 groups, but 2 answers"),
        ((["A"], [0]), "predictions must be indices of choices, got 'A'"),
        (([-1], [0]), "predictions must be indices of choices, got -1"),
        (([0], ["A"]), "answers must be indices of choices, got 'A'"),
        (([0], [None]), "answers must be indices of choices, got None"),
    ],
)
def test_accuracy_names_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        multiple_choice_accuracy(*arguments)


def scienceqa_row(**changes):
    row = {
        "image": Image.new("RGB", (4, 4), "red"),
        "question": "Which is it?",
        "choices": ["a cat", "a dog"],
        "answer": 1,
        "hint": "Two animals.",
        "task": "closed choice",
        "grade": "grade6",
        "subject": "natural science",
        "topic": "biology",
        "category": "Animals",
        "skill": "Tell animals apart",
        "lecture": "It is a dog.",
        "solution": "It is a dog.",
    }
    return {**row, **changes}


def test_scienceqa_rows():
    row = scienceqa_row()
    item = scienceqa_item(row)
    assert item.images == [row["image"]] and item.choices == ["a cat", "a dog"] and item.answer == 1
    assert item.messages == multiple_choice_messages("Which is it?", ["a cat", "a dog"], "Two animals.")
    assert item.group == {"subject": "natural science", "context": "text and image", "grade": "1-6"}
    assert item.rules == "scienceqa"
    seventh = scienceqa_item(scienceqa_row(grade="grade12", hint=" "))
    assert seventh.group["grade"] == "7-12" and seventh.group["context"] == "image"
    assert seventh.messages == multiple_choice_messages("Which is it?", ["a cat", "a dog"])
    for hint, context in (("Two animals.", "text"), (None, "none")):
        blind = scienceqa_item(scienceqa_row(image=None, hint=hint))
        assert blind.images == [] and blind.group["context"] == context
        assert [part["type"] for part in blind.messages[0]["content"]] == ["text"]


def mmmu_row(**changes):
    row = {
        "id": "validation_Art_Theory_12",
        "question": "How do <image 2> and <image 1> differ?",
        "options": "['<image 3>', 'It\\'s red', \"2\"]",
        "explanation": "",
        **{f"image_{number}": None for number in range(1, 8)},
        "img_type": "['Paintings']",
        "answer": "C",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Art Theory",
    }
    row |= {f"image_{n}": Image.new("RGB", (4, 4), color) for n, color in enumerate(("red", "blue", "white"), 1)}
    return {**row, **changes}


def test_mmmu_rows():
    row = mmmu_row()
    item = mmmu_item(row)
    assert item.images == [row["image_2"], row["image_1"], row["image_3"]]  # in the order of the marks
    assert item.choices == ["<image 3>", "It's red", "2"] and item.answer == 2 and item.rules == "mmmu"
    assert item.messages == multiple_choice_messages(row["question"], item.choices, num_images=3)
    assert item.group == {"discipline": "Art and Design", "subject": "Art_Theory"}
    assert mmmu_item(mmmu_row(question_type="open", options="[]", answer="2.5")) is None
    repeated = mmmu_item(mmmu_row(question="<image 1> and <image 1>?", options=["x", "y"], answer="A"))
    assert repeated.images == [row["image_2"], row["image_3"], row["image_1"], row["image_1"]]
    assert sum(part["type"] == "image" for part in repeated.messages[0]["content"]) == 4
    assert sum(len(subjects.split()) for subjects in MMMU_DISCIPLINES.values()) == 30


def test_rows_of_a_data_set_with_undecoded_images():
    """The same as decoded ones; an image that is not there is a None or a dict of Nones."""
    rows = [scienceqa_row(), scienceqa_row(image=None), scienceqa_row(answer=0)]
    undecoded = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    items, skipped = multiple_choice_items(undecoded, scienceqa_item)
    assert skipped == {"open": 0, "without image": 1}
    assert [item.answer for item in items] == [1, 0] and items[0].images[0]["bytes"]
    assert [item.messages for item in items] == [scienceqa_item(row).messages for row in (rows[0], rows[2])]
    empty = {"bytes": None, "path": None}
    assert scienceqa_item(scienceqa_row(image=empty)).images == []
    items, skipped = multiple_choice_items(
        [mmmu_row(image_4=empty), mmmu_row(question_type="open"), mmmu_row(question_type="open")], mmmu_item
    )
    assert len(items) == 1 and len(items[0].images) == 3 and skipped == {"open": 2, "without image": 0}


@pytest.mark.parametrize(
    ("to_item", "row", "message"),
    [
        (scienceqa_item, {"question": "?"}, r"ScienceQA lacks the column\(s\) \['image', 'choices'.*it has \['quest"),
        (scienceqa_item, scienceqa_row(answer=2), "the answer is not one of the 2 choices"),
        (scienceqa_item, scienceqa_row(choices=["a cat"]), "list of 2 to 26 texts"),
        (mmmu_item, {"id": "x"}, r"MMMU lacks the column\(s\) \['question', 'options'"),
        (mmmu_item, mmmu_row(id="validation_Alchemy_1"), "validation_Alchemy_1 has no subject"),
        (mmmu_item, mmmu_row(answer="?"), "question validation_Art_Theory_12: the answer is not one of .* published"),
        (mmmu_item, mmmu_row(answer=""), "the answer is not one of"),
        (mmmu_item, mmmu_row(answer="D"), "the answer is not one of"),
        (mmmu_item, mmmu_row(options="['a', "), "question validation_Art_Theory_12: "),
        (mmmu_item, mmmu_row(options=None), "question validation_Art_Theory_12: "),
        (mmmu_item, mmmu_row(image_3=None), "has the mark <image 3>, but there are only 2 images"),
        (mmmu_item, mmmu_row(image_2=None), "has the mark <image 2>, but there are only 1 images"),
    ],
)
def test_unfit_rows_are_named(to_item, row, message):
    with pytest.raises(ValueError, match=message):
        to_item(row)
    with pytest.raises(ValueError, match=f"row 0: .*{message}"):
        multiple_choice_items([row], to_item)
