"""Configurations of models with branches on CLIP."""

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPVisionConfig
from transformers.configuration_utils import SubConfigSpec

from ..branches.configuration import AdapterFields
from .configuration import ImageTextFields, plain_values


@strict
class GmailVisionConfig(AdapterFields, CLIPVisionConfig):
    """Configuration of a [`GmailVisionModel`]: a `CLIPVisionConfig` and the adapter fields of [`GmailConfig`]."""

    model_type = "gmail_clip_vision_model"
    base_config_key = "vision_config"

    def plain(self) -> CLIPVisionConfig:
        """The base's configuration."""
        return CLIPVisionConfig(**plain_values(self))


@strict
class GmailConfig(ImageTextFields, CLIPConfig):
    """
    Configuration of a [`GmailCLIPModel`]: a `CLIPConfig` and the fields below.

    Args:
        lora_rank, lora_alpha, lora_dropout, lora_targets, modalities, trainable_modalities, default_modality, head:
            see [`AdapterFields`].
        text_lora (`bool`, defaults to `False`): whether the text encoder gets a LoRA adapter, named `text`.
        base_model_name_or_path (`str`, *optional*): the CLIP from which the shared weights come.
        base_model_revision (`str`, *optional*): its commit, if it comes from the Hub.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: a field is out of range.
        ValueError: an unknown field looks like one of these.
    """

    model_type = "gmail_clip"
    base_config_class = CLIPConfig
    sub_configs_defaults = {
        **CLIPConfig.sub_configs_defaults,
        "vision_config": SubConfigSpec(config_class=GmailVisionConfig),
    }

    vision_config: dict | GmailVisionConfig | None = None
