"""Configuration of ClipCap on a two-branch CLIP."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ..models.configuration_clip import GmailVisionConfig


@strict
class ClipCapConfig(PreTrainedConfig):
    """
    Configuration of a [`ClipCapForConditionalGeneration`]; defaults are those of ClipCap's paper.

    Args:
        vision_config (`dict` or [`GmailVisionConfig`], *optional*): the image encoder's; its `projection_dim` is the
            dimension of the image embeddings.
        text_config (`dict` or `PreTrainedConfig`, *optional*): that of any causal language model; default GPT-2's.
        prefix_length (`int`, defaults to 10): token embeddings that an image becomes.
        mapping_type (`str`, defaults to `"mlp"`): the network that makes them, `"mlp"` or `"transformer"`.
        mapping_clip_length (`int`, defaults to 10): transformer: tokens that the image embedding is spread over.
        mapping_num_layers (`int`, defaults to 8): transformer: layers.
        mapping_num_heads (`int`, defaults to 8): transformer: attention heads.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: a field is out of range, or `text_config` is of no
            causal language model, or of one whose context the prefix fills.
        ValueError: a field is unknown and named like one of these.
    """

    model_type = "gmail_clipcap"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=GmailVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    prefix_length: int = 10
    mapping_type: Literal["mlp", "transformer"] = "mlp"
    mapping_clip_length: int = 10
    mapping_num_layers: int = 8
    mapping_num_heads: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        typos = [key for key in kwargs if key.startswith(("prefix", "mapping"))]
        if typos:
            raise ValueError(f"Unknown ClipCapConfig field(s) {typos}; the fields are {OWN_FIELDS}.")
        super().__post_init__(**kwargs)

    def validate_mapping(self) -> None:
        for field in ("prefix_length", "mapping_clip_length", "mapping_num_layers", "mapping_num_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"`{field}` must be at least 1, got {getattr(self, field)}.")

    def validate_text_config(self) -> None:
        kind = type(self.text_config)
        encodes = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(self.text_config, "is_decoder", False)
        if self.text_config.is_encoder_decoder or encodes or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"`text_config` is a {kind.__name__}, which is of no causal language model; ClipCap continues a "
                "prefix, as GPT-2 and Llama do."
            )
        if self.max_caption_length is not None and self.max_caption_length < 1:
            raise ValueError(
                f"`prefix_length` ({self.prefix_length}) leaves no room for a caption in the language model's context."
            )

    @property
    def max_caption_length(self) -> int | None:
        """Tokens of a caption that fit the language model's context after the prefix; None where it has no bound."""
        context = getattr(self.text_config.get_text_config(), "max_position_embeddings", None)
        return None if context is None or context < 0 else context - self.prefix_length


OWN_FIELDS = sorted(set(ClipCapConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__))
