"""Configuration of the two-branch CLIP: everything of CLIP's own configuration, plus what the adapters need."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPVisionConfig
from transformers.configuration_utils import SubConfigSpec

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP_LINEARS = ("fc1", "fc2")
TEXT_ADAPTER = "text"


def is_adapter_like(key: str) -> bool:
    """Whether a keyword looks meant for an adapter field."""
    return key.startswith("lora") or "modalit" in key


@dataclass(kw_only=True)
class AdapterFields:
    """The adapter settings that [`GmailConfig`] and [`GmailVisionConfig`] share; see [`GmailConfig`]."""

    lora_rank: int = 4
    lora_alpha: int | float = 8
    lora_dropout: int | float = 0.0
    lora_targets: list[str] | None = None
    modalities: list[str] | None = None
    trainable_modalities: list[str] | None = None
    default_modality: str = "real"

    def __post_init__(self, **kwargs: Any) -> None:
        # Strict configs take no mutable defaults, and accept unknown keys in silence: both are dealt with here.
        if self.lora_targets is None:
            self.lora_targets = [*ATTENTION_LINEARS, *MLP_LINEARS]
        if self.modalities is None:
            self.modalities = ["real", "gen"]
        if self.trainable_modalities is None:
            self.trainable_modalities = ["gen"]
        typos = [key for key in kwargs if is_adapter_like(key)]
        if typos:
            raise ValueError(
                f"Unknown {type(self).__name__} field(s) {typos}; the adapter fields are {ADAPTER_FIELDS}."
            )
        super().__post_init__(**kwargs)

    def validate_lora(self) -> None:
        if self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, got {self.lora_rank}.")
        if self.lora_alpha <= 0:
            raise ValueError(f"`lora_alpha` must be positive, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must lie in [0, 1), got {self.lora_dropout}.")
        known = [*ATTENTION_LINEARS, *MLP_LINEARS]
        unknown = [target for target in self.lora_targets if target not in known]
        if unknown or not self.lora_targets:
            raise ValueError(f"`lora_targets` must name one or more of {known}, got {self.lora_targets}.")

    def validate_modalities(self) -> None:
        for field in ("modalities", "trainable_modalities"):
            names = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"`{field}` names a modality twice: {names}.")
        if "real" not in self.modalities:  # training and evaluation encode photographs through it
            raise ValueError(f"`modalities` must contain 'real', the branch for photographs, got {self.modalities}.")
        # The names become module names and folder names.
        invalid = [name for name in self.modalities if not name.isidentifier() or name == TEXT_ADAPTER]
        if invalid:
            raise ValueError(
                f"`modalities` must be Python identifiers other than '{TEXT_ADAPTER}' (the text tower's adapter), "
                f"got {invalid}."
            )
        unknown = [name for name in self.trainable_modalities if name not in self.modalities]
        if unknown:
            raise ValueError(f"`trainable_modalities` {unknown} are not among `modalities` {self.modalities}.")
        if self.default_modality not in self.modalities:
            raise ValueError(f"`default_modality` '{self.default_modality}' is not among {self.modalities}.")


ADAPTER_FIELDS = list(AdapterFields.__dataclass_fields__)


@strict
class GmailVisionConfig(AdapterFields, CLIPVisionConfig):
    """Configuration of a [`GmailVisionModel`]: a `CLIPVisionConfig` plus the adapter fields of [`GmailConfig`]."""

    model_type = "gmail_clip_vision_model"
    base_config_key = "vision_config"


@strict
class GmailConfig(AdapterFields, CLIPConfig):
    """
    Configuration of a [`GmailCLIPModel`]: a `CLIPConfig` plus the fields below.

    Args:
        lora_rank (`int`, defaults to 4): rank of every LoRA update (the paper's ablation: 4 is best of 2, 4, 6).
        lora_alpha (`int` or `float`, defaults to 8): updates are scaled by `lora_alpha / lora_rank`.
        lora_dropout (`float`, defaults to 0.0): dropout on the input of the LoRA updates, in training.
        lora_targets (`list[str]`, *optional*): linear layers of the vision encoder that get a LoRA update; default all
            of `q_proj, k_proj, v_proj, out_proj, fc1, fc2`.
        modalities (`list[str]`, defaults to `["real", "gen"]`): the image branches; `"real"` must be among them.
        trainable_modalities (`list[str]`, defaults to `["gen"]`): the branches that have an adapter of their own, LoRA
            and visual projection. A branch that is not listed *is* the pretrained CLIP: no parameters, no cost.
            `["real", "gen"]` trains both.
        default_modality (`str`, defaults to `"real"`): the branch used where none is asked for.
        text_lora (`bool`, defaults to `False`): whether the text encoder gets a LoRA adapter, named `text`.
        base_model_name_or_path (`str`, *optional*): the CLIP that the shared weights come from.
        base_model_revision (`str`, *optional*): its commit, where it came from the Hub.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: a field is out of range.
        ValueError: a field is unknown and named like one of these.
    """

    model_type = "gmail_clip"
    sub_configs_defaults = {
        **CLIPConfig.sub_configs_defaults,
        "vision_config": SubConfigSpec(config_class=GmailVisionConfig),
    }

    vision_config: dict | GmailVisionConfig | None = None
    text_lora: bool = False
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.share_fields()

    def share_fields(self) -> None:
        """Copy the adapter fields and the dimension into `vision_config`, where a tower on its own reads them."""
        for field in [*ADAPTER_FIELDS, "projection_dim"]:
            setattr(self.vision_config, field, getattr(self, field))

    @classmethod
    def from_clip_config(cls, config: CLIPConfig, **fields: Any) -> "GmailConfig":
        """The configuration of `config`'s CLIP with adapters; `fields` are those of [`GmailConfig`]."""
        values = config.to_dict()
        for entry in (values, values["vision_config"]):
            for key in ("model_type", "architectures", "transformers_version"):
                entry.pop(key, None)
        return cls(**values, **fields)


# What a CLIPConfig does not have.
OWN_FIELDS = sorted(GmailConfig.__dataclass_fields__.keys() - CLIPConfig.__dataclass_fields__.keys())
