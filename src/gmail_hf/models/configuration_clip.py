"""Configurations of models with branches on CLIP: CLIP's own fields and those of the branches."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPVisionConfig
from transformers.configuration_utils import SubConfigSpec

from ..branches.configuration import ADAPTER_FIELDS, AdapterFields

NOT_SETTINGS = ("model_type", "architectures", "transformers_version")


def plain_values(config: Any) -> dict[str, Any]:
    """The fields of a base's configuration, without those of branches and of the file."""
    drop = {*ADAPTER_FIELDS, "text_lora", "base_model_name_or_path", "base_model_revision", *NOT_SETTINGS}
    values = {key: value for key, value in config.to_dict().items() if key not in drop}
    if "vision_config" in values:
        values["vision_config"] = plain_values(config.vision_config)
    return values


class ImageTextFields:
    """What configurations of image-text models with branches share; see [`GmailConfig`]."""

    base_config_class: type

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.share_fields()

    def share_fields(self) -> None:
        """Copy the adapter fields and the dimension into `vision_config`, where a tower on its own reads them."""
        for field in ADAPTER_FIELDS:
            setattr(self.vision_config, field, getattr(self, field))
        if hasattr(self, "projection_dim"):
            self.vision_config.projection_dim = self.projection_dim

    @classmethod
    def own_fields(cls) -> list[str]:
        """The fields that the base's configuration does not have."""
        return sorted(cls.__dataclass_fields__.keys() - cls.base_config_class.__dataclass_fields__.keys())

    @classmethod
    def from_base_config(cls, config: Any, **fields: Any):
        """The configuration of `config`'s model with branches; `fields` are those of [`GmailConfig`]."""
        return cls(**plain_values(config), **fields)

    def plain(self) -> Any:
        """The base's configuration."""
        return self.base_config_class(**plain_values(self))


@strict
class GmailVisionConfig(AdapterFields, CLIPVisionConfig):
    """Configuration of a [`GmailVisionModel`]: a `CLIPVisionConfig` and the adapter fields of [`GmailConfig`]."""

    model_type = "gmail_clip_vision_model"
    base_config_key = "vision_config"

    def plain(self) -> CLIPVisionConfig:
        """The base's configuration."""
        return CLIPVisionConfig(**plain_values(self))


@strict
class GmailConfig(ImageTextFields, AdapterFields, CLIPConfig):
    """
    Configuration of a [`GmailCLIPModel`]: a `CLIPConfig` and the fields below.

    Args:
        lora_rank, lora_alpha, lora_dropout, lora_targets, modalities, trainable_modalities, default_modality, head:
            see [`AdapterFields`].
        text_lora (`bool`, defaults to `False`): whether the text encoder gets a LoRA adapter, named `text`.
        base_model_name_or_path (`str`, *optional*): the CLIP that the shared weights come from.
        base_model_revision (`str`, *optional*): its commit, where it came from the Hub.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: a field is out of range.
        ValueError: a field is unknown and named like one of these.
    """

    model_type = "gmail_clip"
    base_config_class = CLIPConfig
    sub_configs_defaults = {
        **CLIPConfig.sub_configs_defaults,
        "vision_config": SubConfigSpec(config_class=GmailVisionConfig),
    }

    vision_config: dict | GmailVisionConfig | None = None
    text_lora: bool = False
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    @classmethod
    def from_clip_config(cls, config: CLIPConfig, **fields: Any) -> "GmailConfig":
        """The same as `from_base_config`."""
        return cls.from_base_config(config, **fields)
