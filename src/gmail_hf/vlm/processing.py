"""The processor of a LLaVA from a CLIP with branches and a language model, and its check against a model."""

import os
from typing import Any

from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
)

from ..branches.configuration import ATTACHED
from .chat import IMAGE_TOKEN, LLAMA3_CHAT_TEMPLATE, LLAMA3_HEADER_TOKENS, with_images

PAD_TOKEN = "<pad>"


def tower_config(name: str | os.PathLike, revision: str | None = None, **hub: Any) -> PreTrainedConfig:
    """
    The configuration of a CLIP, with or without branches.

    Raises:
        ValueError: the folder or repository has the branches of a vision-language model.
    """
    kind = PreTrainedConfig.get_config_dict(name, revision=revision, **hub)[0].get("model_type", "")
    if kind.startswith(ATTACHED):
        raise ValueError(
            f"'{name}' has the branches of a vision-language model, not a GmailCLIPModel: load them with "
            "`gmail_hf.from_vlm`, and train that model with TRL's SFTTrainer."
        )
    return AutoConfig.from_pretrained(name, revision=revision, **hub)


def build_processor(
    vision_model_name_or_path: str | os.PathLike,
    text_model_name_or_path: str | os.PathLike,
    chat_template: str | None = None,
    vision_revision: str | None = None,
    text_revision: str | None = None,
) -> LlavaProcessor:
    """
    Create a `LlavaProcessor` from a CLIP's image processor and a language model's tokenizer.

    The tokenizer gets an image token and, if it has none, a padding token, and pads on the left. The tokenizer's chat
    template is extended to image items; a chat without images renders as before.

    Args:
        vision_model_name_or_path: a Hub id or folder of a [`GmailCLIPModel`] or CLIP.
        text_model_name_or_path: a Hub id or folder of the language model.
        chat_template (`str`, *optional*): a Jinja template for messages whose content is text. It defaults to the
            tokenizer's own, or to Llama 3's if the tokenizer has its header tokens.
        vision_revision, text_revision (`str`, *optional*): revisions.

    Raises:
        ValueError: there is no chat template for the tokenizer, or the vision model is the branches of a
            vision-language model.
    """
    vision_config = tower_config(vision_model_name_or_path, vision_revision)
    # `generate` needs padding on the left. Collators set their own `padding_side`.
    tokenizer = AutoTokenizer.from_pretrained(text_model_name_or_path, revision=text_revision, padding_side="left")
    if chat_template is None and tokenizer.chat_template:
        chat_template = tokenizer.get_chat_template()
    vocabulary = tokenizer.get_vocab()
    if chat_template is None and all(token in vocabulary for token in LLAMA3_HEADER_TOKENS):
        chat_template = LLAMA3_CHAT_TEMPLATE
    if chat_template is None:
        raise ValueError(
            f"The tokenizer of '{text_model_name_or_path}' has no chat template and no header tokens of Llama 3: pass "
            "`chat_template=`."
        )
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(vision_model_name_or_path, revision=vision_revision),
        tokenizer=tokenizer,
        patch_size=getattr(vision_config, "vision_config", vision_config).patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" removes
        chat_template=with_images(chat_template),
    )


def check_processor(processor: LlavaProcessor, config: LlavaConfig) -> None:
    """
    Check that a processor fits a LLaVA: images of its tower's size, and as many image tokens as patches.

    Raises:
        ValueError: it does not fit; the message has the difference.
    """
    vision_config = config.vision_config
    tokenizer = processor.tokenizer
    if tokenizer.convert_tokens_to_ids(processor.image_token) in (None, tokenizer.unk_token_id):
        raise ValueError(f"The tokenizer has no image token '{processor.image_token}'; see `build_processor`.")
    made = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    size = (made["height"], made["width"]) if "height" in made else (made["shortest_edge"],) * 2
    expected = {
        "image_token_id": (processor.image_token_id, config.image_token_id),
        "patch_size": (processor.patch_size, vision_config.patch_size),
        "vision_feature_select_strategy": (
            processor.vision_feature_select_strategy,
            config.vision_feature_select_strategy,
        ),
        "num_additional_image_tokens": (processor.num_additional_image_tokens, 1),
        "image size": (size, (vision_config.image_size,) * 2),
    }
    for field, (processors, models) in expected.items():
        if processors != models:
            raise ValueError(f"The processor has {field} {processors}, but the model needs {models}.")


def end_of_turn(processor: Any) -> int | None:
    """Id of the special token that ends an assistant's turn in the chat template; None if there is none."""
    turns = [("user", "?"), ("assistant", "!")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    text = processor.apply_chat_template(messages, tokenize=False).rstrip()
    last = processor.tokenizer(text, add_special_tokens=False).input_ids[-1]
    token = processor.tokenizer.added_tokens_decoder.get(last)
    return last if token is not None and token.special else None


def lacks_bos(processor: LlavaProcessor, text: str) -> bool:
    """Whether the tokenizer must add the BOS token to a rendered chat, because the chat template did not."""
    bos_token = processor.tokenizer.bos_token
    return bos_token is None or not text.startswith(bos_token)
