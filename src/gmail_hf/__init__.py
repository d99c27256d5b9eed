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

from .captioners import ClipCapConfig, ClipCapForConditionalGeneration, ClipCapProcessor
from .models.base import GmailOutput
from .models.clip import GmailCLIPModel, GmailVisionModel, GmailVisionModelWithProjection
from .models.configuration_clip import GmailConfig, GmailVisionConfig
from .training.arguments import GmailTrainingArguments
from .training.embeddings import embed_images
from .training.losses import GmailLossConfig, alignment_loss, consistency_loss, contrastive_loss, token_alignment_loss
from .training.trainer import GmailTrainer
from .version import __version__ as __version__
from .vlm import GmailLlavaConfig, GmailLlavaForConditionalGeneration

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
