"""The shipped language model: its tokenizer, its chats, what it knows of scenes in words, and how it was trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from train_llama import (
    IGNORED,
    all_scenes,
    answer_accuracy,
    draw_texts,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from gmail_hf.digits import llama_path
from gmail_hf.digits.questions import QUESTIONS, scene_answers, scene_messages
from gmail_hf.digits.scenes import COLOR_NAMES, DIGIT_NAMES

SCENE = {"digits": [3, 7], "colors": ["red", "green"]}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(llama_path())


@pytest.fixture(scope="module")
def llama():
    model, loading = AutoModelForCausalLM.from_pretrained(llama_path(), output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    return model.eval()


def test_answers():
    assert scene_answers(SCENE) == {
        "left_digit": "three",
        "right_digit": "seven",
        "left_color": "red",
        "right_color": "green",
        "caption": "a red three and a green seven",
    }


def test_messages():
    first, answer, second, _ = scene_messages(SCENE, ["right_color", "caption"])
    question = {"type": "text", "text": "Which color is the right digit?"}
    assert first == {"role": "user", "content": [{"type": "image"}, question]}
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": "green"}]}
    assert second == {"role": "user", "content": [{"type": "text", "text": "Describe the image."}]}
    assert len(scene_messages(SCENE)) == 2 * len(QUESTIONS)


def test_the_folder_is_small_and_holds_no_pickle():
    files = list(Path(llama_path()).iterdir())
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors", ".md", ".jinja"}


def test_it_loads_in_float32_and_fits_its_tokenizer(llama, tokenizer):
    assert type(llama) is LlamaForCausalLM and llama.dtype == torch.float32
    assert llama.config.vocab_size == len(tokenizer)
    assert llama.config.bos_token_id == tokenizer.bos_token_id
    assert llama.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer.pad_token_id == llama.config.pad_token_id


def test_every_word_is_one_token_and_any_text_is_tokenised(tokenizer):
    words = [*DIGIT_NAMES, *COLOR_NAMES]
    for text in [*words, *(f" {word}" for word in [*words, "a", "and"])]:
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1
    caption = scene_answers(SCENE)["caption"]
    assert len(tokenizer(caption).input_ids) == 8  # seven words after the beginning of text
    text = "Zürich: 漢字, 7 threefold!\n\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_chats_have_llama3s_format(tokenizer):
    chat = [{"role": "user", "content": "Describe the image."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nDescribe the image.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_held_out_scenes():
    trained, held_out = all_scenes(held_out=False), all_scenes(held_out=True)
    assert (len(trained), len(held_out)) == (2_700, 300)
    assert not any(scene in trained for scene in held_out)


def test_it_answers_questions_about_held_out_scenes_in_words(llama, tokenizer):
    accuracy = answer_accuracy(llama, tokenizer)
    assert accuracy.keys() == QUESTIONS.keys() and min(accuracy.values()) > 0.98


def test_it_was_trained_on_answers_and_captions_alone(tokenizer):
    batch = draw_texts([SCENE], tokenizer, 8, 2, np.random.default_rng(0))
    labelled = [ids[labels != IGNORED] for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert tokenizer.decode(labelled[0]) == "<|begin_of_text|>a red three and a green seven<|end_of_text|>"
    answers = set(scene_answers(SCENE).values())
    for ids in labelled[1:]:
        first, second, rest = tokenizer.decode(ids).split("<|eot_id|>")
        assert {first, second} <= answers and not rest
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
