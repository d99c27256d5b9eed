"""
GMAIL (Mo & Yun, ICML 2025) for the Hugging Face ecosystem: generated images as a separate modality.

Public names load on first use, so importing the package is fast. The models are still registered with transformers'
Auto classes.
"""

import importlib
from typing import Any

from .registration import register_on_demand
from .version import __version__ as __version__

PUBLIC_NAMES = {
    "captioners": [
        "ClipCapConfig",
        "ClipCapForConditionalGeneration",
        "ClipCapProcessor",
        "IFCapConfig",
        "IFCapForConditionalGeneration",
    ],
    "models.attached": ["AttachedBranches", "attach_branches", "from_vlm", "load_branches", "save_branches"],
    "models.auto": ["from_base"],
    "models.auto_modality": ["AutoModalityOutput", "DetectedModality"],
    "models.base": ["GmailOutput"],
    "models.clip": ["GmailCLIPModel", "GmailVisionModel", "GmailVisionModelWithProjection"],
    "models.configuration_clip": ["GmailConfig", "GmailVisionConfig"],
    "models.longclip": ["convert_longclip"],
    "models.metaclip": ["GmailMetaClip2Config", "GmailMetaClip2Model"],
    "models.siglip": ["GmailSiglip2Config", "GmailSiglip2Model", "GmailSiglipConfig", "GmailSiglipModel"],
    "models.stretching": ["stretch_positions"],
    "models.synclr": ["convert_synclr"],
    "models.vision": [
        "GmailDINOv3ViTConfig",
        "GmailDINOv3ViTModel",
        "GmailDinov2Config",
        "GmailDinov2Model",
        "GmailDinov2WithRegistersConfig",
        "GmailDinov2WithRegistersModel",
        "GmailViTConfig",
        "GmailViTModel",
    ],
    "training.columns": ["pair_by_caption"],
    "training.arguments": ["GmailTrainingArguments"],
    "training.decoding": ["decode_image"],
    "training.detector": ["fit_detector"],
    "training.embeddings": ["embed_images", "embed_texts"],
    "training.losses": [
        "GmailLossConfig",
        "alignment_loss",
        "consistency_loss",
        "contrastive_loss",
        "token_alignment_loss",
    ],
    "training.distributions": [
        "energy_distance_loss",
        "sliced_wasserstein_loss",
        "token_sliced_wasserstein_loss",
    ],
    "training.trainer": ["GmailTrainer"],
    "vlm": ["GmailLlavaConfig", "GmailLlavaForConditionalGeneration"],
}
_MODULE_OF = {name: module for module, names in PUBLIC_NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_on_demand()
