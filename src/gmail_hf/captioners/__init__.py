"""ClipCap and IFCap as models of transformers, trained through `gen` and served through `real`."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .bank import CaptionBank
from .caption_trainer import CaptionTrainer
from .collator import (
    CaptionCollator,
    caption_embeds,
    captioned_embeds,
    check_captions,
    group_references,
    with_caption_rows,
)
from .configuration_captioner import CaptionerConfig
from .configuration_clipcap import ClipCapConfig
from .configuration_ifcap import IFCapConfig
from .entities import listed_words, nltk_nouns
from .modeling_captioner import Captioner
from .modeling_clipcap import ClipCapForConditionalGeneration
from .modeling_ifcap import IFCapForConditionalGeneration
from .processing_clipcap import ClipCapProcessor

CAPTIONERS = {"clipcap": ClipCapForConditionalGeneration, "ifcap": IFCapForConditionalGeneration}

for model in CAPTIONERS.values():
    AutoConfig.register(model.config_class.model_type, model.config_class)
    AutoModelForImageTextToText.register(model.config_class, model)
    AutoProcessor.register(model.config_class, ClipCapProcessor)

__all__ = [
    "CAPTIONERS",
    "CaptionBank",
    "CaptionCollator",
    "CaptionTrainer",
    "Captioner",
    "CaptionerConfig",
    "ClipCapConfig",
    "ClipCapForConditionalGeneration",
    "ClipCapProcessor",
    "IFCapConfig",
    "IFCapForConditionalGeneration",
    "caption_embeds",
    "captioned_embeds",
    "check_captions",
    "group_references",
    "listed_words",
    "nltk_nouns",
    "with_caption_rows",
]
