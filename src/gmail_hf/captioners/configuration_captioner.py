"""The common configuration of captioners on a model with branches."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ..branches.configuration import AdapterFields


@strict
class CaptionerConfig(PreTrainedConfig):
    """
    Fields of [`ClipCapConfig`] and [`IFCapConfig`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*): the image encoder's configuration: a
            [`GmailVisionConfig`] for CLIP, which is the default, or that of any other model with branches, such as a
            [`GmailSiglipConfig`] or a [`GmailDinov2Config`].
        text_config (`dict` or `PreTrainedConfig`, *optional*): the configuration of a causal language model, by
            default GPT-2's.
        prefix_length (`int`, defaults to 10): number of token embeddings per image.
        mapping_type (`str`): the mapping network that computes them, a key of `MAPPERS`.
        mapping_clip_length (`int`, defaults to 10): in a transformer, number of tokens for the image embedding.
        mapping_num_layers (`int`, defaults to 8): in a transformer, number of layers.
        mapping_num_heads (`int`, defaults to 8): in a transformer, number of attention heads.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: a field is out of range, `vision_config` is not
            that of a model with branches, or `text_config` is not that of a causal language model with room for a
            caption after the prefix.
        ValueError: an unknown field looks like one of these.
    """

    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="gmail_clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2"),
    }
    prompt_length = 0  # maximum number of tokens between the prefix and the caption

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    prefix_length: int = 10
    mapping_type: str = "mlp"
    mapping_clip_length: int = 10
    mapping_num_layers: int = 8
    mapping_num_heads: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_fields([key for key in kwargs if key.startswith(("prefix", "mapping", "entity", "noise"))])
        super().__post_init__(**kwargs)

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of the fields that are not in every configuration of transformers."""
        return sorted(set(cls.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__))

    @classmethod
    def check_fields(cls, names: list[str]) -> None:
        """
        Raises:
            ValueError: a name is not a field.
        """
        if unknown := [name for name in names if name not in cls.own_fields()]:
            raise ValueError(f"Unknown {cls.__name__} field(s) {unknown}; the fields are {cls.own_fields()}.")

    def validate_mapping(self) -> None:
        for field in ("prefix_length", "mapping_clip_length", "mapping_num_layers", "mapping_num_heads"):
            self.at_least(field, 1)

    def at_least(self, field: str, minimum: int) -> None:
        """
        Raises:
            ValueError: a field is smaller.
        """
        if getattr(self, field) < minimum:
            raise ValueError(f"`{field}` must be at least {minimum}, got {getattr(self, field)}.")

    def validate_vision_config(self) -> None:
        if not isinstance(self.vision_config, AdapterFields):
            raise ValueError(
                f"`vision_config` is a {type(self.vision_config).__name__}, which is not the configuration of a model "
                "with branches."
            )

    def validate_text_config(self) -> None:
        kind = type(self.text_config)
        encodes = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(self.text_config, "is_decoder", False)
        if self.text_config.is_encoder_decoder or encodes or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"`text_config` is a {kind.__name__}, which is not the configuration of a causal language model such "
                "as GPT-2 or Llama."
            )
        if self.max_caption_length is not None and self.max_caption_length < 1:
            raise ValueError(
                f"`prefix_length` ({self.prefix_length}) leaves no room for a caption in the language model's context."
            )

    @property
    def context_length(self) -> int | None:
        """The language model's context length; None if it has no limit."""
        context = getattr(self.text_config.get_text_config(), "max_position_embeddings", None)
        return None if context is None or context < 0 else context

    @property
    def max_caption_length(self) -> int | None:
        """The maximum number of caption tokens after prefix and prompt; None if the context has no limit."""
        context = self.context_length
        return None if context is None else context - self.prefix_length - self.prompt_length
