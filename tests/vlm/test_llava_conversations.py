"""Conversations of a data set: which rows become which, and what is told before training, by row and column."""

import pytest
from datasets import Dataset, Features, Image, List, Value
from tiny import png
from tiny_llava import VICUNA_TEMPLATE, make_llava_processor, make_tokenizer

from gmail_hf.vlm import Conversations, LlavaCollator

TURNS = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
]
TEXTS = [
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
]
MODALITIES = ["real", "gen"]


@pytest.fixture(scope="module")
def processor():
    return make_llava_processor(
        make_tokenizer(["<s>", "</s>", "<image>", "<pad>"], pad_token="<pad>"), VICUNA_TEMPLATE
    )


def captions(*values, images=None, **columns) -> Dataset:
    images = images or [png(i) for i in range(len(values))]
    kind = List(Image()) if any(isinstance(cell, list) for cell in images) else Image()
    features = {"image": kind, "caption": Value("string")} | dict.fromkeys(columns, Value("string"))
    return Dataset.from_dict({"image": images, "caption": list(values), **columns}, features=Features(features))


def chats(*values, images=None) -> Dataset:
    rows = captions(*[None] * len(values), images=images).remove_columns("caption")
    return rows.add_column("messages", list(values))


def test_captions_answer_the_question(processor):
    dataset = Conversations(captions("A cat", "A dog", modality=["gen", None]), "image", question="Which?")
    dataset.check(processor, MODALITIES)
    batch = LlavaCollator(processor, "real")([dataset[0], dataset[1]])
    assert batch["modality"] == ["gen", "real"]
    text = processor.tokenizer.decode(batch["input_ids"][1])
    assert "Which? ASSISTANT: A dog</s>" in text


def test_lists_of_images_stay_unread_until_they_are_named(processor):
    rows = chats(TEXTS, [TURNS[0], *TURNS], images=[[], [png(0), png(1, truncated=True)]])
    dataset = Conversations(rows, "image")
    dataset.check(processor, MODALITIES)
    batch = LlavaCollator(processor)([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape[0] == 2
    assert (batch["labels"][0] != -100).any() and (batch["labels"][1] == -100).all()


def test_an_empty_cell_is_missing_where_an_image_is_shown(processor):
    dataset = Conversations(chats(TEXTS, TURNS, TURNS, images=[None, None, png(0)]), "image")
    dataset.check(processor, MODALITIES)
    assert [len(dataset[i]["images"]) for i in range(3)] == [0, 1, 1]
    batch = LlavaCollator(processor)([dataset[i] for i in range(3)])
    assert [(labels != -100).any().item() for labels in batch["labels"]] == [True, False, True]


def asked(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (captions("A", "B", None), "row 2, column 'caption': it holds NoneType, not text; remove the row"),
        (captions("A", "an <image> of B"), "row 1, column 'caption': it contains '<image>'.*remove it"),
        (captions("A", "B", images=[[png(0)], []]), r"row 1, column 'caption': it refers to 1 image.*the row has 0"),
        (captions("A", modality=["fake"]), "row 0, column 'modality': unknown modality 'fake'.*'real', 'gen'"),
        (captions("A", "B", images=[png(i, truncated=True) for i in range(2)]), "of 2 sampled rows.*'image'"),
        (chats(TURNS, TURNS[:1]), r"row 1, column 'messages': it needs an assistant's turn.*\['user'\]"),
        (chats(TURNS, TURNS[1:]), r"row 1, column 'messages': .*answers another turn.*\['assistant'\]"),
        (chats(TURNS, []), "row 1, column 'messages': .*not a list of turns"),
        (chats(TEXTS), r"row 0, column 'messages': it refers to 0 image\(s\).*the row has 1"),
        (chats(asked("<image>"), asked("<image> or <image>")), r"row 1.*refers to 2 image\(s\)"),
        (chats([{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "A"}]), "'human' and 'gpt'"),
        (chats([{"role": None, "content": "A"}]), "row 0.*a turn needs 'role' and 'content'"),
        (chats([{"role": "user", "content": None}]), "row 0.*the content of a turn must be text or a list of items"),
        (chats([{**TURNS[0], "content": [{"type": "text", "text": None}]}]), "row 0.*must be a text or an image"),
        (chats([{**TURNS[0], "content": [{"type": "video", "text": "A"}]}]), "row 0.*must be a text or an image"),
    ],
)
def test_rows_that_cannot_be_learned_are_named(processor, rows, message):
    with pytest.raises(ValueError, match=f"(?s)Split 'train'.*{message}"):
        Conversations(rows, "image", "Split 'train'").check(processor, MODALITIES)


def test_a_path_without_an_image_is_named(processor):
    rows = captions("A").remove_columns("image").add_column("image", ["a.png"])
    with pytest.raises(ValueError, match="of 1 sampled rows.*a.png cannot be read"):
        Conversations(rows, "image").check(processor, MODALITIES)


def test_question_with_an_image_token(processor):
    with pytest.raises(ValueError, match="question contains '<image>'.*remove it"):
        Conversations(captions("A"), "image", question="<image>\nWhat?").check(processor, MODALITIES)
