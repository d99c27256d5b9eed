"""Checkpoints of a tiny LLaVA, Llama and GMAIL CLIP, made once."""

import pytest
import torch
from tiny import make_clip, make_model, make_processor
from tiny_llava import make_tokenizer, save_llama, save_llava
from transformers import AutoProcessor, LlavaForConditionalGeneration

from gmail_hf.vlm import LLAMA3_CHAT_TEMPLATE, GmailLlavaForConditionalGeneration


@pytest.fixture(scope="session")
def gmail_folder(clip_folder, tmp_path_factory) -> str:
    """A trained GMAIL CLIP on the tiny CLIP."""
    folder = tmp_path_factory.mktemp("gmail")
    make_model(clip_folder).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory) -> str:
    """A plain LLaVA on the vision tower of that CLIP."""
    return save_llava(tmp_path_factory.mktemp("llava"), make_clip())


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> str:
    """A Llama with a chat template of its own, without image and padding tokens."""
    tokenizer = make_tokenizer(chat_template=LLAMA3_CHAT_TEMPLATE)
    return save_llama(tmp_path_factory.mktemp("llama"), tokenizer)


@pytest.fixture
def plain(llava_folder) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(llava_folder).eval()


@pytest.fixture
def llava(llava_folder, gmail_folder) -> GmailLlavaForConditionalGeneration:
    torch.manual_seed(0)
    return GmailLlavaForConditionalGeneration.from_llava(llava_folder, gmail=gmail_folder)


@pytest.fixture(scope="session")
def llava_processor(llava_folder):
    return AutoProcessor.from_pretrained(llava_folder)
