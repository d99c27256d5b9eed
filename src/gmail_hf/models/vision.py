"""
Branches on vision-only encoders: DINOv2, DINOv3, ViT.

They have no text encoder and no module that computes a pooled embedding: the embedding is the class token after the
last layer norm, and the branches differ only by LoRA.
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)

from ..branches.tower import BranchedTower, Modality, reject_unknown
from .auto_modality import is_auto
from .base import ONLY_PAIRS, GmailModel, takes_pairs
from .checkpoints import GmailCheckpoints
from .configuration import BranchFields


@dataclass(kw_only=True)
class VisionFields(BranchFields):
    """The fields of a vision-only model with branches. `head` is `"shared"`, because there is no head to copy."""

    head: str = "shared"

    def validate_head(self) -> None:
        if self.head != "shared":
            raise ValueError("A vision-only model has no head to copy for a branch: use `head='shared'`.")


class GmailVisionOnly(GmailModel, BranchedTower, GmailCheckpoints):
    """Mixin for a vision-only model, which is its own tower."""

    head_name = None
    tower_name = ""
    modality, using = BranchedTower.modality, BranchedTower.using

    @property
    def prefix_tokens(self) -> int:
        """The class token and the registers."""
        return 1 + getattr(self.config, "num_register_tokens", 0)

    @property
    def embed_dim(self) -> int:
        """The dimension of embeddings."""
        return self.config.hidden_size

    def forward(self, *args: Any, modality: Modality | None = None, **kwargs: Any) -> Any:
        """
        Encode images, each through the branch of its modality, or embed a batch of pairs; arguments as in
        [`GmailModel.forward`].

        Returns:
            The base's output, or [`GmailOutput`] for pairs.
        """
        if not takes_pairs(kwargs):
            return BranchedTower.forward(self, *args, modality=modality, **kwargs)
        if args or modality is not None or kwargs.pop("pixel_values", None) is not None:
            raise ValueError(ONLY_PAIRS)
        reject_unknown(
            f"{type(self).__name__}.forward()", frozenset(), kwargs.keys() & {"input_ids", "attention_mask"}
        )
        return self._embed_pairs(**kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, modality: Modality | None = None, **kwargs: Any) -> Any:
        """
        The base's output with a `pooler_output` `(batch, hidden)`: the class token, or the mean of the patch tokens if
        there is no class token. Arguments as in `forward`, and `modality="auto"` as in
        [`~GmailCLIPModel.get_image_features`].
        """
        if is_auto(modality):
            return self.auto_features(pixel_values, **kwargs)
        outputs = self(pixel_values, modality=modality, **kwargs)
        tokens = outputs.last_hidden_state
        outputs.pooler_output = tokens[:, 0] if self.prefix_tokens else tokens.mean(dim=1)
        return outputs


@strict
class GmailDinov2Config(VisionFields, Dinov2Config):
    """Configuration of a [`GmailDinov2Model`]."""

    model_type = "gmail_dinov2"
    base_config_class = Dinov2Config


class GmailDinov2Model(GmailVisionOnly, Dinov2Model):
    """A DINOv2 (Oquab et al., 2023) with branches."""

    config: GmailDinov2Config
    base_class = Dinov2Model


@strict
class GmailDinov2WithRegistersConfig(VisionFields, Dinov2WithRegistersConfig):
    """Configuration of a [`GmailDinov2WithRegistersModel`]."""

    model_type = "gmail_dinov2_with_registers"
    base_config_class = Dinov2WithRegistersConfig


class GmailDinov2WithRegistersModel(GmailVisionOnly, Dinov2WithRegistersModel):
    """A DINOv2 with registers (Darcet et al., 2023) and branches."""

    config: GmailDinov2WithRegistersConfig
    base_class = Dinov2WithRegistersModel


@strict
class GmailDINOv3ViTConfig(VisionFields, DINOv3ViTConfig):
    """Configuration of a [`GmailDINOv3ViTModel`]."""

    model_type = "gmail_dinov3_vit"
    base_config_class = DINOv3ViTConfig


class GmailDINOv3ViTModel(GmailVisionOnly, DINOv3ViTModel):
    """A DINOv3 (Siméoni et al., 2025) with branches."""

    config: GmailDINOv3ViTConfig
    base_class = DINOv3ViTModel


@strict
class GmailViTConfig(VisionFields, ViTConfig):
    """Configuration of a [`GmailViTModel`]."""

    model_type = "gmail_vit"
    base_config_class = ViTConfig


class GmailViTModel(GmailVisionOnly, ViTModel):
    """A ViT (Dosovitskiy et al., 2021) without its pooler, with branches."""

    config: GmailViTConfig
    base_class = ViTModel
    base_kwargs = {"add_pooling_layer": False}


for model in (GmailDinov2Model, GmailDinov2WithRegistersModel, GmailDINOv3ViTModel, GmailViTModel):
    AutoConfig.register(model.config_class.model_type, model.config_class)
    AutoModel.register(model.config_class, model)
