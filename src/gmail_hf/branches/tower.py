"""A vision tower whose forward pass takes `modality`, and a text encoder with an adapter."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import TransformersKwargs

from .configuration import AUTO, TEXT_ADAPTER, AdapterFields
from .routing import OUTSIDE, BranchedLinear, BranchedModule, LoRAAdapter, Route, current_route, routed

Modality = str | Sequence[str]
IMAGE_INPUTS = ("pixel_values", "hidden_states")  # not `main_input_name`, which is input_ids for SmolVLM's tower


def keywords_of(function: Any) -> frozenset[str]:
    """The keywords that a method of transformers knows. It ignores all others."""
    known = set(inspect.signature(function).parameters) - {"self", "args", "kwargs"}
    return frozenset({*known, *TransformersKwargs.__annotations__, "return_dict", "use_cache", "is_causal"})


def reject_unknown(method: str, known: frozenset[str], kwargs: Iterable[str]) -> None:
    """
    Refuse unknown keywords, which models of transformers ignore: `modalty="gen"` must not use the default branch.

    Raises:
        TypeError: a keyword is not among the `known` ones.
    """
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise TypeError(f"{method} got unexpected keyword argument(s) {unknown}.")


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter belongs to an adapter, a LoRA update or a branch's head, by its name."""
    return adapter_of(name) is not None


def adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to, by the parameter's name; None for a weight of the base."""
    parts = name.split(".")
    for container in ("adapters", "branches"):
        if container in parts:
            return parts[parts.index(container) + 1]
    return None


def cast_base(module: nn.Module, dtype: torch.dtype) -> None:
    """
    Cast the weights of the base to `dtype`. Adapters keep their precision, and so do buffers: rotary position
    embeddings need float32 frequencies.
    """
    for name, parameter in module.named_parameters():
        if not is_adapter_weight(name):
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def init_adapters(module: nn.Module) -> None:
    """The part of `_init_weights` for modules with branches: zero LoRA updates, and copies of the base's head."""
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
    Mixin for a vision tower whose `forward` takes `modality`.

    `adapter_fields` are the settings of its branches, usually its configuration. `keywords` are the keywords of the
    base's `forward`. They contain `grid_thw` or `image_sizes` if the tower joins the patches of all images in one
    sequence, as in Qwen-VL and Pixtral.
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
        """The branch used if a call passes no `modality`."""
        return self._modality

    @modality.setter
    def modality(self, value: str) -> None:
        self.check_modalities([value])
        self._modality = value

    @contextmanager
    def using(self, modality: str) -> Iterator[None]:
        """
        Make `modality` the default branch inside a `with` block.

        This changes the model for all threads. Concurrent threads pass `modality` to each call instead.
        """
        previous, self.modality = self.modality, modality
        try:
            yield
        finally:
            self.modality = previous

    def check_modalities(self, names: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a name is not a branch of this tower.
        """
        unknown = sorted({str(name) for name in names if name not in self.adapter_fields.modalities})
        if AUTO in unknown:
            raise ValueError(
                f'Only `get_image_features` and `embed_images` of a model that embeds images take `modality="{AUTO}"`'
                ", as one name for all. Elsewhere, pass the list of names that its `detect_modality` returns."
            )
        if unknown:
            raise ValueError(
                f"Unknown modality {unknown}; this model's branches are {self.adapter_fields.modalities}."
            )

    def patches_of(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | None = None,
        image_sizes: torch.Tensor | Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor | None:
        """
        The number of patches of each image, if the tower joins those of all images in one sequence.

        Args:
            pixel_values (`torch.Tensor`): the tower's images or patches.
            grid_thw (`torch.LongTensor` of shape `(images, 3)`, *optional*): the patches of Qwen-VL.
            image_sizes (`torch.LongTensor` of shape `(images, 2)` or a list, *optional*): height and width of the
                padded images of Pixtral, in pixels; by default they have no padding.

        Returns:
            `torch.LongTensor` of shape `(images,)`, or None for any other tower.
        """
        if grid_thw is not None:
            return grid_thw.prod(dim=-1)
        if "image_sizes" not in self.keywords:
            return None
        sizes = [pixel_values.shape[-2:]] * len(pixel_values) if image_sizes is None else image_sizes
        return (torch.as_tensor(sizes) // self.config.patch_size).prod(dim=-1)

    def route(self, modality: Modality | None, images: torch.Tensor, patches: torch.Tensor | None = None) -> Route:
        """
        Convert `modality` to the route of the layers.

        Args:
            modality: a branch, or one per image; by default that of the enclosing forward pass, or `self.modality`.
            images (`torch.Tensor` of shape `(images, ...)`): the images, or the patches of Qwen-VL.
            patches (`torch.LongTensor` of shape `(images,)`, *optional*): the result of `patches_of`.

        Raises:
            ValueError: a name is not a branch of this model, or a list does not have one name per image.
            TypeError: `modality` is neither a name nor a list of names.
        """
        if modality is None and current_route() is not OUTSIDE:
            return current_route()
        if modality is None:
            modality = self.modality
        if not isinstance(modality, Sequence):
            raise TypeError(f"`modality` must be a name or a list with one name per image, got {modality!r}.")
        names = [modality] if isinstance(modality, str) else list(modality)
        self.check_modalities(names)
        count = len(images if patches is None else patches)
        if not isinstance(modality, str) and len(names) != count:
            raise ValueError(f"`modality` lists {len(names)} branches for a batch of {count} images.")
        adapters = self.adapter_fields.trainable_modalities
        if not set(names) & set(adapters):
            return None
        if len(set(names)) == 1:
            return names[0]
        gates = [[float(name == adapter) for adapter in adapters] for name in names]
        gate = torch.tensor(gates, device=images.device)  # (images, adapters)
        return gate if patches is None else gate.repeat_interleave(patches.to(gate.device), dim=0)

    def forward(self, *args: Any, modality: Modality | None = None, **kwargs: Any) -> Any:
        """
        The base's forward pass, with each image through the branch of its modality.

        Args:
            args, kwargs: the arguments of the base's `forward`.
            modality (`str` or a list with one name per image, *optional*): defaults to `self.modality`.

        Raises:
            ValueError: unknown modality, or the length of the list differs from the batch size.
            TypeError: an unknown keyword.
        """
        reject_unknown(f"{type(self).__name__}.forward()", self.keywords, kwargs)
        given = args[:1] or [kwargs[name] for name in IMAGE_INPUTS if kwargs.get(name) is not None]
        if not given:
            raise ValueError("You have to specify pixel_values.")
        packing = next((name for name in ("grid_thw", "image_sizes") if name in self.keywords), None)
        sizes = {packing: kwargs.get(packing, args[1] if len(args) > 1 else None)} if packing else {}
        route = self.route(modality, given[0], self.patches_of(given[0], **sizes))
        return routed(route, super().forward, *args, **kwargs)


class AdaptedText:
    """Mixin for a text encoder with a LoRA adapter that is always active, the `text` adapter of stage 2."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_adapters(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return routed(TEXT_ADAPTER, super().forward, *args, **kwargs)
