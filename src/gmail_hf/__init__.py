"""GMAIL (Mo & Yun, ICML 2025) for the Hugging Face ecosystem: generated images as a modality of their own."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPProcessor,
    CLIPTokenizer,
)

from .captioning import ClipCapConfig, ClipCapForConditionalGeneration, ClipCapProcessor
from .configuration_gmail import GmailConfig, GmailVisionConfig
from .embeddings import embed_images
from .llava import GmailLlavaConfig, GmailLlavaForConditionalGeneration
from .losses import GmailLossConfig, alignment_loss, consistency_loss, contrastive_loss, token_alignment_loss
from .modeling_gmail import GmailCLIPModel, GmailOutput
from .towers import GmailVisionModel, GmailVisionModelWithProjection
from .trainer import GmailTrainer, GmailTrainingArguments
from .version import __version__ as __version__

AutoConfig.register("gmail_clip", GmailConfig)
AutoConfig.register("gmail_clip_vision_model", GmailVisionConfig)
AutoModel.register(GmailConfig, GmailCLIPModel)
AutoModel.register(GmailVisionConfig, GmailVisionModel)
AutoModelForZeroShotImageClassification.register(GmailConfig, GmailCLIPModel)
AutoProcessor.register(GmailConfig, CLIPProcessor)
AutoTokenizer.register(GmailConfig, CLIPTokenizer)

__all__ = [
    "ClipCapConfig",
    "ClipCapForConditionalGeneration",
    "ClipCapProcessor",
    "GmailCLIPModel",
    "GmailConfig",
    "GmailLlavaConfig",
    "GmailLlavaForConditionalGeneration",
    "GmailLossConfig",
    "GmailOutput",
    "GmailTrainer",
    "GmailTrainingArguments",
    "GmailVisionConfig",
    "GmailVisionModel",
    "GmailVisionModelWithProjection",
    "alignment_loss",
    "consistency_loss",
    "contrastive_loss",
    "embed_images",
    "token_alignment_loss",
]
