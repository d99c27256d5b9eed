"""`from_base`, which chooses the class for a pretrained model."""

import os
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..publishing.hub import hub_kwargs
from .clip import GmailCLIPModel
from .metaclip import GmailMetaClip2Model
from .siglip import GmailSiglip2Model, GmailSiglipModel
from .vision import GmailDinov2Model, GmailDinov2WithRegistersModel, GmailDINOv3ViTModel, GmailViTModel

MODELS = (
    GmailCLIPModel,
    GmailMetaClip2Model,
    GmailSiglipModel,
    GmailSiglip2Model,
    GmailDinov2Model,
    GmailDinov2WithRegistersModel,
    GmailDINOv3ViTModel,
    GmailViTModel,
)


def from_base(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """
    Add fresh branches to a pretrained model, with the class for its architecture.

    Args:
        pretrained_model_name_or_path: a Hub id or folder of a CLIP, MetaCLIP 2, SigLIP, SigLIP 2, DINOv2, DINOv3 or
            ViT.
        kwargs: as in [`~GmailCLIPModel.from_base`].

    Raises:
        ValueError: there is no class for this architecture, or as in `from_base`. Weights are downloaded only after
            these checks.
    """
    values, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs(kwargs))
    kind = values.get("model_type")
    classes = {model.base_class.config_class.model_type: model for model in MODELS}
    if kind in {model.config_class.model_type for model in MODELS}:
        raise ValueError(f"'{pretrained_model_name_or_path}' already has branches: load it with `AutoModel`.")
    if kind not in classes:
        raise ValueError(
            f"'{pretrained_model_name_or_path}' is of type '{kind}', for which there is no class; there are classes "
            f"for {sorted(classes)}. `gmail_hf.attach_branches` works on any loaded model with a vision tower."
        )
    return classes[kind].from_base(pretrained_model_name_or_path, **kwargs)
