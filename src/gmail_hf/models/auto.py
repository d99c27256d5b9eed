"""The bases that have a class here, and the choice among them."""

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
    Put fresh branches on a pretrained model, in the class for its architecture.

    Args:
        pretrained_model_name_or_path: a Hub id or folder of a CLIP, MetaCLIP 2, SigLIP, SigLIP 2, DINOv2, DINOv3 or
            ViT.
        kwargs: as of [`~GmailCLIPModel.from_base`].

    Raises:
        ValueError: no class for this architecture, or as in `from_base`. Weights are downloaded only after the checks.
    """
    values, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs(kwargs))
    kind = values.get("model_type")
    classes = {model.base_class.config_class.model_type: model for model in MODELS}
    if kind in {model.config_class.model_type for model in MODELS}:
        raise ValueError(f"'{pretrained_model_name_or_path}' has branches already: load it with `AutoModel`.")
    if kind not in classes:
        raise ValueError(
            f"'{pretrained_model_name_or_path}' is of type '{kind}', which has no class with branches; those that "
            f"have are {sorted(classes)}. `gmail_hf.attach_branches` works on any loaded model with a vision tower."
        )
    return classes[kind].from_base(pretrained_model_name_or_path, **kwargs)
