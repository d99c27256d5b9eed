"""The settings of branches, shared by all configurations of models with branches."""

import math
from dataclasses import dataclass
from typing import Any

TEXT_ADAPTER = "text"  # the name of the text encoder's adapter
ATTACHED = "gmail_attached_"  # begins the `model_type` of a tower that `attach_branches` changed
AUTO = "auto"  # no branch: a detector chooses one for each image


def is_adapter_like(key: str) -> bool:
    """Whether a keyword looks like an adapter field."""
    return key.startswith("lora") or "modalit" in key


@dataclass(kw_only=True)
class AdapterFields:
    """
    Settings of the branches of a vision tower.

    Args:
        lora_rank (`int`, defaults to 4): rank of the LoRA updates (in the paper's ablation, 4 is the best of 2, 4, 6).
        lora_alpha (`int` or `float`, defaults to 8): updates are scaled by `lora_alpha / lora_rank`.
        lora_dropout (`float`, defaults to 0.0): dropout on the input of the LoRA updates in training.
        lora_targets (`list[str]`, *optional*): names of the linear layers that get a LoRA update, such as `q_proj`; by
            default every linear layer of the encoder.
        modalities (`list[str]`, defaults to `["real", "gen"]`): the image branches, which must include `"real"`.
        trainable_modalities (`list[str]`, defaults to `["gen"]`): the branches with their own LoRA and head. A
            branch that is not listed is the pretrained model, without parameters or cost. `["real", "gen"]` trains
            both.
        default_modality (`str`, defaults to `"real"`): the branch used if a call passes no `modality`.
        head (`str`, defaults to `"own"`): `"own"` gives each trainable branch a copy of the module that computes the
            pooled embedding; with `"shared"`, branches differ only by LoRA.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: a field is out of range.
        ValueError: an unknown field looks like one of these.
    """

    lora_rank: int = 4
    lora_alpha: int | float = 8
    lora_dropout: int | float = 0.0
    lora_targets: list[str] | None = None
    modalities: list[str] | None = None
    trainable_modalities: list[str] | None = None
    default_modality: str = "real"
    head: str = "own"

    def __post_init__(self, **kwargs: Any) -> None:
        # Strict configs allow no mutable defaults, and silently accept unknown keys.
        if self.modalities is None:
            self.modalities = ["real", "gen"]
        if self.trainable_modalities is None:
            self.trainable_modalities = ["gen"]
        typos = [key for key in kwargs if is_adapter_like(key)]
        if typos:
            raise ValueError(
                f"Unknown {type(self).__name__} field(s) {typos}; the adapter fields are {ADAPTER_FIELDS}."
            )
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init(**kwargs)

    @property
    def adapter_scaling(self) -> float:
        """The factor of every LoRA update."""
        return self.lora_alpha / self.lora_rank

    def validate_lora(self) -> None:
        if not 1 <= self.lora_rank <= 4096:
            raise ValueError(f"`lora_rank` must be between 1 and 4096, got {self.lora_rank}.")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ValueError(f"`lora_alpha` must be positive and finite, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        if self.lora_targets is not None and not self.lora_targets:
            raise ValueError("`lora_targets` must list one or more linear layers, got [].")
        if self.head not in ("own", "shared"):
            raise ValueError(f"`head` must be 'own' or 'shared', got '{self.head}'.")

    def validate_modalities(self) -> None:
        for field in ("modalities", "trainable_modalities"):
            names = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"`{field}` lists a modality twice: {names}.")
        if len(self.modalities) > 64:
            raise ValueError(f"`modalities` lists {len(self.modalities)} branches; at most 64 are supported.")
        if "real" not in self.modalities:  # training and evaluation encode photographs through it
            raise ValueError(f"`modalities` must contain 'real', the branch for photographs, got {self.modalities}.")
        # The names are used as names of modules and folders.
        invalid = [name for name in self.modalities if not name.isidentifier() or name in (TEXT_ADAPTER, AUTO)]
        if invalid:
            raise ValueError(
                f"`modalities` must be Python identifiers other than '{TEXT_ADAPTER}' (the text encoder's adapter) "
                f"and '{AUTO}', but {invalid} are not."
            )
        unknown = [name for name in self.trainable_modalities if name not in self.modalities]
        if unknown:
            raise ValueError(f"`trainable_modalities` {unknown} are not among `modalities` {self.modalities}.")
        if self.default_modality not in self.modalities:
            raise ValueError(f"`default_modality` '{self.default_modality}' is not among {self.modalities}.")


ADAPTER_FIELDS = list(AdapterFields.__dataclass_fields__)
