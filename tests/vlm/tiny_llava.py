"""A Llama and a LLaVA of a few thousand weights around the tiny CLIP, with their tokenizer and processors."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import IMAGE_SIZE, make_processor, picture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gmail_hf.vlm import LLAMA3_CHAT_TEMPLATE, with_images

LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PATCHES = (IMAGE_SIZE // 8) ** 2
# The shape of LLaVA-1.5's own template: roles in capitals, no token that ends a turn.
VICUNA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer(special_tokens=LLAMA3_TOKENS, chat_template=None, **named) -> PreTrainedTokenizerFast:
    """Each byte a token, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special_tokens)
    bos = special_tokens[0]  # put first, as Llama's tokenizers do
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    named = {"bos_token": special_tokens[0], "eos_token": special_tokens[1], **named}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **named)


def llama_config(**fields) -> LlamaConfig:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 256 + len(LLAMA3_TOKENS), "bos_token_id": 256, "eos_token_id": 257}
    return LlamaConfig(**{**shape, **ids, **fields})


def save_llama(folder: Path, tokenizer=None, **fields) -> str:
    torch.manual_seed(2)
    # The initial weights are too small to tell images apart.
    LlamaForCausalLM(llama_config(initializer_range=0.2, **fields)).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def save_llava(folder: Path, clip, **vision) -> str:
    """A plain LLaVA on `clip`'s vision tower, with its processor."""
    torch.manual_seed(3)
    tokenizer = make_tokenizer([*LLAMA3_TOKENS, "<image>", "<pad>"], pad_token="<pad>")
    text_config = llama_config(vocab_size=len(tokenizer), initializer_range=0.2)
    vision_config = {**clip.config.vision_config.to_dict(), "model_type": "clip_vision_model"}
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
    )
    model = LlavaForConditionalGeneration(config)
    tower = clip.vision_model.state_dict()
    model.model.vision_tower.load_state_dict(tower)
    model.save_pretrained(folder)
    make_llava_processor(tokenizer).save_pretrained(folder)
    return str(folder)


def make_llava_processor(tokenizer, template: str = LLAMA3_CHAT_TEMPLATE) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=make_processor().image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=with_images(template),
    )


def rename_weights(folder: Path, rename) -> None:
    path = Path(folder, "model.safetensors")
    save_file({rename(name): weight for name, weight in load_file(path).items()}, path, {"format": "pt"})


def question(images: int = 1, text: str = "What?") -> list[dict]:
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]


def inputs(processor, images=(1, 1), seed: int = 0, **kwargs):
    """A batch of questions, each about so many pictures; rows of different lengths are padded on the left."""
    texts = [
        processor.apply_chat_template(question(count, "What?" * (1 + row)), tokenize=False, add_generation_prompt=True)
        for row, count in enumerate(images)
    ]
    pictures = [picture(seed + i) for i in range(sum(images))]
    return processor(
        images=pictures,
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
        **kwargs,
    )
