"""What the configurations of all bases share: the fields of the branches, and conversion from and to the base's."""

from dataclasses import dataclass
from typing import Any

from ..branches.configuration import ADAPTER_FIELDS, AdapterFields

NOT_SETTINGS = ("model_type", "architectures", "transformers_version")


@dataclass(kw_only=True)
class BranchFields(AdapterFields):
    """
    The fields that a model with branches adds to its base's configuration.

    Args:
        base_model_name_or_path (`str`, *optional*): the model from which the shared weights come.
        base_model_revision (`str`, *optional*): its commit, if it comes from the Hub.
    """

    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    @classmethod
    def own_fields(cls) -> list[str]:
        """The fields that the base's configuration does not have."""
        return sorted(cls.__dataclass_fields__.keys() - cls.base_config_class.__dataclass_fields__.keys())

    @classmethod
    def from_base_config(cls, config: Any, **fields: Any):
        """The configuration of a model with branches from its base's `config` and the `fields` of the branches."""
        return cls(**plain_values(config), **fields)

    def plain(self) -> Any:
        """The base's configuration."""
        return self.base_config_class(**plain_values(self))

    def share_fields(self) -> None:
        """Copy the adapter fields to the tower's configuration. A vision-only model is its own tower."""


@dataclass(kw_only=True)
class ImageTextFields(BranchFields):
    """
    [`BranchFields`] for a model with a text encoder.

    Args:
        text_lora (`bool`, defaults to `False`): whether the text encoder gets a LoRA adapter, named `text`.
    """

    text_lora: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.share_fields()

    def share_fields(self) -> None:
        """Copy the adapter fields and the dimension into `vision_config`, which a tower loads on its own."""
        for field in ADAPTER_FIELDS:
            setattr(self.vision_config, field, getattr(self, field))
        if hasattr(self, "projection_dim"):
            self.vision_config.projection_dim = self.projection_dim


def plain_values(config: Any) -> dict[str, Any]:
    """The fields of a base's configuration, without those of branches and of the saved file."""
    drop = {*ADAPTER_FIELDS, *BranchFields.__dataclass_fields__, *ImageTextFields.__dataclass_fields__, *NOT_SETTINGS}
    values = {key: value for key, value in config.to_dict().items() if key not in drop}
    if "vision_config" in values:
        values["vision_config"] = plain_values(config.vision_config)
    return values
