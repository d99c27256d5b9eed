"""Language models of a few thousand weights, of the two families whose details differ most, and captioners on them."""

import numpy as np
import torch
from tiny import make_model, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gmail_hf.captioners import (
    CaptionBank,
    ClipCapForConditionalGeneration,
    ClipCapProcessor,
    IFCapForConditionalGeneration,
    listed_words,
)

TOKENS = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513}
# Tied weights, absolute positions and dropout; untied weights and rotary positions.
TEXT_CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=96, **TOKENS),
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False,
        max_position_embeddings=96, **TOKENS
    ),
}  # fmt: skip


def save_text_model(name: str, folder) -> None:
    """A random language model with its tokenizer."""
    torch.manual_seed(0)
    text_model = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[name](TEXT_CONFIGS[name])
    with torch.no_grad():  # larger than at initialisation, so that predictions differ
        for parameter in text_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    text_model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_gmail_model(clip_folder, folder) -> None:
    """A two-branch CLIP whose branches differ, with its processor."""
    make_model(clip_folder).save_pretrained(folder)


SMALL = {"prefix_length": 3, "mapping_num_layers": 2, "mapping_num_heads": 2, "mapping_clip_length": 4}


def make_captioner(gmail_folder, text_folder, **fields) -> ClipCapForConditionalGeneration:
    torch.manual_seed(0)
    return ClipCapForConditionalGeneration.from_vision_text_pretrained(
        gmail_folder, text_folder, **{**SMALL, **fields}
    )


CAPTIONS = (
    "a cat",
    "two dogs",
    "a red car",
    "a dog and a cat",
    "a cat in a car",
    "the dog",
    "nothing",
    "a cat sleeps",
)


def make_bank(dim: int = 24) -> CaptionBank:
    """Captions at random places."""
    embeds = np.random.default_rng(0).normal(size=(len(CAPTIONS), dim))
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    return CaptionBank.build(CAPTIONS, embeds, listed_words(["cat", "dog", "car"]), make_tokenizer())


def make_ifcap(gmail_folder, text_folder, bank=None, **fields) -> IFCapForConditionalGeneration:
    torch.manual_seed(0)
    fields = {"num_retrieved": 2, "num_entity_captions": 4, "entity_threshold": 0, **SMALL, **fields}
    model = IFCapForConditionalGeneration.from_vision_text_pretrained(gmail_folder, text_folder, **fields)
    model.set_caption_bank(bank or make_bank())
    return model


def make_captioner_processor(image_processor) -> ClipCapProcessor:
    return ClipCapProcessor(image_processor, make_tokenizer())
