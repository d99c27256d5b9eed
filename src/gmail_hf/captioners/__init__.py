"""ClipCap (Mokady et al., 2021) as a transformers model: trained through `gen`, served through `real`."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .clipcap_trainer import ClipCapTrainer
from .collator import CaptionCollator, caption_embeds, captioned_embeds, check_captions, group_references
from .configuration_clipcap import ClipCapConfig
from .modeling_clipcap import ClipCapForConditionalGeneration
from .processing_clipcap import ClipCapProcessor

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
