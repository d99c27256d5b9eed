"""A vision tower whose forward pass takes `modality`, and a text encoder with an adapter."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import TransformersKwargs

from .configuration import TEXT_ADAPTER, AdapterFields
from .routing import OUTSIDE, BranchedLinear, BranchedModule, LoRAAdapter, Route, current_route, routed

Modality = str | Sequence[str]
IMAGE_INPUTS = ("pixel_values", "hidden_states")  # `main_input_name` is not to be relied on: SmolVLM's says input_ids


def keywords_of(function: Any) -> frozenset[str]:
    """The keywords that a method of transformers knows; what is left of them it would ignore."""
    known = set(inspect.signature(function).parameters) - {"self", "args", "kwargs"}
    return frozenset({*known, *TransformersKwargs.__annotations__, "return_dict", "use_cache", "is_causal"})


def reject_unknown(method: str, known: frozenset[str], kwargs: Iterable[str]) -> None:
    """
    transformers' models ignore keywords they do not know; `modalty="gen"` must not silently take the default branch.

    Raises:
        TypeError: a keyword is not among the `known` ones.
    """
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise TypeError(f"{method} got unexpected keyword argument(s) {unknown}.")


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter: a LoRA update or a branch's head."""
    return adapter_of(name) is not None


def adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to; None for a weight of the base."""
    parts = name.split(".")
    for container in ("adapters", "branches"):
        if container in parts:
            return parts[parts.index(container) + 1]
    return None


@torch.no_grad()
def init_adapters(module: nn.Module) -> None:
    """The part of `_init_weights` for modules with branches: LoRA updates are zero, heads copies of the base's."""
    if isinstance(module, LoRAAdapter):
        init.kaiming_uniform_(module.lora_A, a=5**0.5)
        init.zeros_(module.lora_B)
    elif isinstance(module, BranchedLinear):
        for weight in module.branches.values():
            init.copy_(weight, module.weight)
    elif isinstance(module, BranchedModule):
        base = dict(module.named_parameters())
        for branch in module.branches.values():
            for name, weight in branch.named_parameters():
                init.copy_(weight, base[name])


class BranchedTower:
    """
    Mixin of a vision tower: `forward` takes `modality`.

    `adapter_fields` are the settings of its branches, usually its configuration; `keywords` those of the base's
    `forward`, among them `grid_thw` for a tower that takes the patches of all images in one sequence, as Qwen-VL's.
    """

    adapter_fields: AdapterFields
    keywords: frozenset[str]
    _modality: str

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_adapters(module)

    @property
    def modality(self) -> str:
        """The branch used where a call names none."""
        return self._modality

    @modality.setter
    def modality(self, value: str) -> None:
        self.check_modalities([value])
        self._modality = value

    @contextmanager
    def using(self, modality: str) -> Iterator[None]:
        """Make `modality` the default branch inside a `with` block."""
        previous, self.modality = self.modality, modality
        try:
            yield
        finally:
            self.modality = previous

    def check_modalities(self, names: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a name is no branch of this tower.
        """
        unknown = sorted({str(name) for name in names if name not in self.adapter_fields.modalities})
        if unknown:
            raise ValueError(
                f"Unknown modality {unknown}; this model's branches are {self.adapter_fields.modalities}."
            )

    def route(self, modality: Modality | None, images: torch.Tensor, grid_thw: torch.Tensor | None = None) -> Route:
        """
        What `modality` means to the layers.

        Args:
            modality: a branch, or one per image; by default that of the forward pass around this call, or
                `self.modality`.
            images (`torch.Tensor` of shape `(images, ...)`): the images, or the patches of a packed tower.
            grid_thw (`torch.LongTensor` of shape `(images, 3)`, *optional*): patches per image of a packed tower.

        Raises:
            ValueError: a name is no branch of this model, or a list has not one name for each image.
            TypeError: neither a name nor a list of names.
        """
        if modality is None and current_route() is not OUTSIDE:
            return current_route()
        if modality is None:
            modality = self.modality
        if not isinstance(modality, Sequence):
            raise TypeError(f"`modality` is a name or a list with one name per image, got {modality!r}.")
        names = [modality] if isinstance(modality, str) else list(modality)
        self.check_modalities(names)
        count = len(images) if grid_thw is None else len(grid_thw)
        if not isinstance(modality, str) and len(names) != count:
            raise ValueError(f"`modality` lists {len(names)} branches for a batch of {count} images.")
        adapters = self.adapter_fields.trainable_modalities
        if len(set(names)) == 1:
            return names[0] if names[0] in adapters else None
        gates = [[float(name == adapter) for adapter in adapters] for name in names]
        gate = torch.tensor(gates, device=images.device)  # (images, adapters)
        return gate if grid_thw is None else gate.repeat_interleave(grid_thw.prod(-1).to(gate.device), dim=0)

    def forward(self, *args: Any, modality: Modality | None = None, **kwargs: Any) -> Any:
        """
        The base's forward pass, each image through the branch of its modality.

        Args:
            args, kwargs: as of the base's `forward`.
            modality (`str` or a list with one name per image, *optional*): default `self.modality`.

        Raises:
            ValueError: unknown modality, or a list of another length than the batch.
            TypeError: an unknown keyword.
        """
        reject_unknown(f"{type(self).__name__}.forward()", self.keywords, kwargs)
        given = args[:1] or [kwargs[name] for name in IMAGE_INPUTS if kwargs.get(name) is not None]
        if not given:
            raise ValueError("You have to specify pixel_values.")
        grid_thw = kwargs.get("grid_thw", args[1] if len(args) > 1 and "grid_thw" in self.keywords else None)
        route = self.route(modality, given[0], grid_thw)
        return routed(route, super().forward, *args, **kwargs)


class AdaptedText:
    """Mixin of a text encoder with a LoRA adapter that is always on: the `text` adapter of stage 2."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_adapters(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return routed(TEXT_ADAPTER, super().forward, *args, **kwargs)
