"""ClipCap (Mokady et al., 2021) as a transformers model: trained through `gen`, served through `real`."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration_clipcap import ClipCapConfig
from .data import CaptionCollator, caption_embeds, captioned_embeds, check_captions, group_references
from .modeling_clipcap import ClipCapForConditionalGeneration
from .processing_clipcap import ClipCapProcessor
from .trainer import ClipCapTrainer

AutoConfig.register("gmail_clipcap", ClipCapConfig)
AutoModelForImageTextToText.register(ClipCapConfig, ClipCapForConditionalGeneration)
AutoProcessor.register(ClipCapConfig, ClipCapProcessor)

__all__ = [
    "CaptionCollator",
    "ClipCapConfig",
    "ClipCapForConditionalGeneration",
    "ClipCapProcessor",
    "ClipCapTrainer",
    "caption_embeds",
    "captioned_embeds",
    "check_captions",
    "group_references",
]
