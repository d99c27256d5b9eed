"""Branches on MetaCLIP 2 (Chuang et al., 2025): CLIP's architecture with another text encoder."""

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    MetaClip2Config,
    MetaClip2Model,
    MetaClip2VisionConfig,
)
from transformers.configuration_utils import SubConfigSpec

from ..branches.configuration import AdapterFields
from .base import GmailModel
from .checkpoints import GmailCheckpoints
from .configuration import ImageTextFields


@strict
class GmailMetaClip2VisionConfig(AdapterFields, MetaClip2VisionConfig):
    """A `MetaClip2VisionConfig` with the adapter fields of [`GmailMetaClip2Config`]."""

    model_type = "gmail_metaclip_2_vision_model"


@strict
class GmailMetaClip2Config(ImageTextFields, MetaClip2Config):
    """Configuration of a [`GmailMetaClip2Model`]: a `MetaClip2Config` and the fields of [`ImageTextFields`]."""

    model_type = "gmail_metaclip_2"
    base_config_class = MetaClip2Config
    sub_configs_defaults = {
        **MetaClip2Config.sub_configs_defaults,
        "vision_config": SubConfigSpec(config_class=GmailMetaClip2VisionConfig),
    }


class GmailMetaClip2Model(GmailModel, GmailCheckpoints, MetaClip2Model):
    """
    A MetaCLIP 2 with the branches of [`GmailCLIPModel`].

    Args:
        config ([`GmailMetaClip2Config`]): the model's configuration. The weights are initialised at random.
    """

    config: GmailMetaClip2Config
    base_class = MetaClip2Model
    head_name = "visual_projection"
    prefix_tokens = 1


AutoConfig.register("gmail_metaclip_2", GmailMetaClip2Config)
AutoModel.register(GmailMetaClip2Config, GmailMetaClip2Model)
AutoModelForZeroShotImageClassification.register(GmailMetaClip2Config, GmailMetaClip2Model)
