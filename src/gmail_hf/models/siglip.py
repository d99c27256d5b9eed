"""
Branches on SigLIP (Zhai et al., 2023) and SigLIP 2 (Tschannen et al., 2025).

The pooled embedding is computed by `vision_model.head`, attention pooling. Each branch has a copy of it unless
`head="shared"`. There are no projections. Captions are padded to the context length, as in SigLIP's training.
"""

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)
from transformers.configuration_utils import SubConfigSpec

from ..branches.configuration import AdapterFields
from .base import GmailModel
from .checkpoints import GmailCheckpoints
from .configuration import ImageTextFields


@strict
class GmailSiglipVisionConfig(AdapterFields, SiglipVisionConfig):
    """A `SiglipVisionConfig` with the adapter fields of [`GmailSiglipConfig`]."""

    model_type = "gmail_siglip_vision_model"


@strict
class GmailSiglipConfig(ImageTextFields, SiglipConfig):
    """Configuration of a [`GmailSiglipModel`]: a `SiglipConfig` and the fields of [`ImageTextFields`]."""

    model_type = "gmail_siglip"
    base_config_class = SiglipConfig
    sub_configs_defaults = {
        **SiglipConfig.sub_configs_defaults,
        "vision_config": SubConfigSpec(config_class=GmailSiglipVisionConfig),
    }


@strict
class GmailSiglip2VisionConfig(AdapterFields, Siglip2VisionConfig):
    """A `Siglip2VisionConfig` with the adapter fields of [`GmailSiglip2Config`]."""

    model_type = "gmail_siglip2_vision_model"


@strict
class GmailSiglip2Config(ImageTextFields, Siglip2Config):
    """Configuration of a [`GmailSiglip2Model`]: a `Siglip2Config` and the fields of [`ImageTextFields`]."""

    model_type = "gmail_siglip2"
    base_config_class = Siglip2Config
    sub_configs_defaults = {
        **Siglip2Config.sub_configs_defaults,
        "vision_config": SubConfigSpec(config_class=GmailSiglip2VisionConfig),
    }


class _Siglip(GmailModel, GmailCheckpoints):
    head_name = "vision_model.head"

    @property
    def embed_dim(self) -> int:
        """The dimension of embeddings: SigLIP has no projection."""
        return self.config.vision_config.hidden_size


class GmailSiglipModel(_Siglip, SiglipModel):
    """
    A SigLIP, or a SigLIP 2 with a fixed image size, with one image branch for real and one for generated images.

    Create one from a pretrained SigLIP with `from_base`, and load a trained one with `from_pretrained`.

    Args:
        config ([`GmailSiglipConfig`]): the model's configuration. The weights are initialised at random.
    """

    config: GmailSiglipConfig
    base_class = SiglipModel


class GmailSiglip2Model(_Siglip, Siglip2Model):
    """
    A SigLIP 2 of any resolution (NaFlex), with the branches of [`GmailSiglipModel`].

    Images are patches `(images, patches, 3 * patch_size**2)` with `pixel_attention_mask` `(images, patches)` and
    `spatial_shapes` `(images, 2)`, as returned by its processor.
    """

    config: GmailSiglip2Config
    base_class = Siglip2Model


for config, model in ((GmailSiglipConfig, GmailSiglipModel), (GmailSiglip2Config, GmailSiglip2Model)):
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForZeroShotImageClassification.register(config, model)
