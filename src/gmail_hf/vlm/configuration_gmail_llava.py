"""Configuration of a LLaVA whose vision tower has GMAIL's branches."""

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig
from transformers.configuration_utils import SubConfigSpec

from ..models.configuration_clip import GmailVisionConfig


@strict
class GmailLlavaConfig(LlavaConfig):
    """
    Configuration of a [`GmailLlavaForConditionalGeneration`]: a `LlavaConfig` whose `vision_config` is a
    [`GmailVisionConfig`].
    """

    model_type = "gmail_llava"
    sub_configs_defaults = {
        **LlavaConfig.sub_configs_defaults,
        "vision_config": SubConfigSpec(config_class=GmailVisionConfig),
    }

    @classmethod
    def from_llava_config(cls, config: LlavaConfig, vision_config: GmailVisionConfig) -> "GmailLlavaConfig":
        """The configuration of a LLaVA from its `config` and the `vision_config` of a tower with branches."""
        values = config.to_dict()
        for key in ("model_type", "architectures", "transformers_version"):
            values.pop(key, None)
        return cls(**{**values, "vision_config": vision_config})
