"""Language models of a few thousand weights, of the two families whose details differ most, and captioners on them."""

import torch
from tiny import make_model, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gmail_hf.captioners import ClipCapForConditionalGeneration, ClipCapProcessor

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


def make_captioner(gmail_folder, text_folder, **fields) -> ClipCapForConditionalGeneration:
    torch.manual_seed(0)
    fields = {"prefix_length": 3, "mapping_num_layers": 2, "mapping_num_heads": 2, "mapping_clip_length": 4, **fields}
    return ClipCapForConditionalGeneration.from_vision_text_pretrained(gmail_folder, text_folder, **fields)


def make_captioner_processor(image_processor) -> ClipCapProcessor:
    return ClipCapProcessor(image_processor, make_tokenizer())
