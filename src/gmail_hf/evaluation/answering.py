"""Text generation with image-text-to-text models: captioners such as ClipCap, and chat models."""

from typing import Any

import torch
from PIL import Image as PILImage

from ..branches.configuration import AdapterFields
from ..models.vision_language import BranchedVLM
from ..vlm.processing import lacks_bos


def chats(processor: Any) -> bool:
    """Whether a processor has a chat template. A captioner's processor only takes images."""
    return bool(getattr(processor, "chat_template", None))


def has_branches(model: Any) -> bool:
    """Whether an image-text-to-text model embeds images with GMAIL's branches."""
    return isinstance(model, BranchedVLM) or isinstance(getattr(model.config, "vision_config", None), AdapterFields)


@torch.no_grad()
def write(
    model: Any,
    processor: Any,
    images: list[list[PILImage.Image]],
    conversations: list[list[dict]] | None,
    modality: str,
    **kwargs: Any,
) -> list[str]:
    """
    Generate a text for each row.

    Args:
        model: any model of `AutoModelForImageTextToText`, in evaluation mode.
        processor: its processor.
        images: the images of each row.
        conversations: each row's messages for a chat model, with an item `{"type": "image"}` per image, in order. None
            for a captioner.
        modality: the branch for the images, if the model has branches.
        kwargs: keywords of `generate`.

    Returns:
        The generated texts without special tokens and surrounding spaces.
    """
    branch = {"modality": modality} if has_branches(model) else {}
    if conversations is None:
        inputs = processor(images=[image for row in images for image in row], return_tensors="pt")
    else:
        prompts = [
            processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
        inputs = processor(
            images=images if any(images) else None,
            text=prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=lacks_bos(processor, prompts[0]),
            return_tensors="pt",
        )
    inputs = inputs.to(model.device, model.dtype)
    tokens = model.generate(**inputs, **branch, **kwargs)
    if conversations is not None:
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
