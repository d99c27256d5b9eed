"""
Layers with branches: linear layers with LoRA updates, and modules with one copy per branch.

A pretrained module is converted by changing its class. The object and the names of its parameters do not change, so
checkpoints of the base load as before. The branch of a forward pass is its *route*, which is stored in a thread-local
variable during that pass and nowhere else.
"""

import math
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

# None: only the shared weights; a name: that adapter; a tensor of shape (rows, adapters) of zeros and ones: the
# adapter of each row; False: outside of a forward pass.
Route = str | torch.Tensor | None | bool
OUTSIDE = False


class _ThreadRoute(threading.local):  # unlike a ContextVar, torch.compile can trace and guard it
    def __init__(self) -> None:
        self.now: Route = OUTSIDE  # not a class attribute: torch before 2.13 would always read its default


_ROUTE = _ThreadRoute()


def current_route() -> Route:
    """The route of this thread's forward pass; `OUTSIDE` if there is none."""
    return _ROUTE.now


def routed(route: Route, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call `function` under a route."""
    before, _ROUTE.now = _ROUTE.now, route
    try:
        return function(*args, **kwargs)
    finally:
        _ROUTE.now = before


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Change the class of `module` to `new`, a subclass of its class."""
    module.__class__ = new
    if "_old_forward" in vars(module):  # called by the hooks of accelerate, for example with a `device_map`
        module._old_forward = new.forward.__get__(module)
    if hasattr(module, "_can_record_outputs"):  # transformers registers outputs such as hidden states by class name
        _CAN_RECORD_REGISTRY.update({str(new): module._can_record_outputs})  # item assignment differs before 5.24


@cache
def with_mixin(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    """A subclass with a mixin. It keeps the name of `base`, by which transformers and FSDP find a model's layers."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, **pickled_as(with_mixin, mixin, base)}
    return type(base.__name__, (mixin, base), names)


def pickled_as(make: Callable[..., type], *args: type) -> dict[str, Callable]:
    """Attributes of the class `make(*args)`, by which pickle, which only finds classes of a module, makes it again."""

    def __reduce_ex__(self: Any, protocol: int) -> tuple:
        reduced = object.__reduce_ex__(self, protocol)
        if type(self) is not make(*args):  # a subclass, which pickle finds itself
            return reduced
        # By name, because dill copies a cached function, and the copy would make another class.
        return _new, (make.__module__, make.__qualname__, *args), *reduced[2:]

    return {"__reduce_ex__": __reduce_ex__}


def _new(module: str, make: str, *args: type) -> Any:
    made = getattr(import_module(module), make)(*args)
    return made.__new__(made)


class LoRAAdapter(nn.Module):
    """The weights of one low-rank update, `lora_B @ lora_A` (Hu et al., 2022, section 4.1), initially zero."""

    def __init__(self, in_features: int, out_features: int, rank: int, device: torch.device | None = None):
        super().__init__()
        # In float32 for any precision of the base: bfloat16 would lose small steps.
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)


class RoutedLinear(nn.Linear):
    """A linear layer of a pretrained model with one LoRA update per adapter."""

    adapters: nn.ModuleDict
    rank: int
    scaling: float

    def attach(self, adapters: Sequence[str], rank: int, scaling: float, dropout: float) -> None:
        """Add fresh adapters; called once, after changing the class."""
        self.rank, self.scaling = rank, scaling
        self.dropout = nn.Dropout(dropout).train(self.training)
        size = self.in_features, self.out_features, rank, self.weight.device
        self.adapters = nn.ModuleDict({name: LoRAAdapter(*size) for name in adapters})

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        route = _ROUTE.now
        if route is None:
            return super().forward(hidden_states)
        if route is OUTSIDE:
            raise RuntimeError(
                "A layer with branches ran outside of its model's forward pass. Call the model with `modality`, not "
                "its layers. For activation checkpointing, use the model's `gradient_checkpointing_enable`."
            )
        if isinstance(route, str):
            lora_A, lora_B, scale = self.adapters[route].lora_A, self.adapters[route].lora_B, self.scaling
        else:
            # One product for all adapters. The gate then zeroes the ranks of the other adapters in each row.
            lora_A = torch.cat([adapter.lora_A for adapter in self.adapters.values()])  # (adapters * rank, in)
            lora_B = torch.cat([adapter.lora_B for adapter in self.adapters.values()], dim=1)  # (out, adapters * rank)
            gate = gate_of(route, hidden_states).to(hidden_states)  # a `device_map` may split the layers
            scale = gate.repeat_interleave(self.rank, dim=-1) * self.scaling  # (rows, 1, ..., adapters * rank)
        lora_A, lora_B = lora_A.to(hidden_states.dtype), lora_B.to(hidden_states.dtype)
        low_rank = nn.functional.linear(self.dropout(hidden_states), lora_A) * scale
        update = nn.functional.linear(low_rank, lora_B)
        # The shared product comes last, so that `RecomputedMLP` does not recompute it.
        return super().forward(hidden_states) + update

    @torch.no_grad()
    def merged_weight(self, adapter: str) -> torch.Tensor:
        """The weight `(out, in)` with an adapter's update added, in the weight's dtype."""
        lora = self.adapters[adapter]
        update = lora.lora_B.float() @ lora.lora_A.float() * self.scaling
        return (self.weight.float() + update).to(self.weight.dtype)


def gate_of(route: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The gate `(rows, 1, ..., adapters)` of a layer's input `(rows, ..., features)`."""
    if rows.dim() == 3 and len(rows) == 1 < len(route) == rows.shape[1]:  # Pixtral: all patches in one row
        return route[None]
    step, rest = divmod(len(route), len(rows))
    # Packed patches: a layer after patch merging has one row per `step` patches.
    if rest or (step > 1 and rows.dim() > 2):
        raise RuntimeError(
            f"`modality` covers {len(route)} rows, but a layer has {len(rows)} rows, because this architecture merges "
            "rows between its layers. Use a single modality per batch."
        )
    return route[::step].view(len(rows), *[1] * (rows.dim() - 2), route.shape[1])


def _select(route: Route, base: torch.Tensor, branches: dict[str, Callable[[], torch.Tensor]]) -> torch.Tensor:
    """The output of each row's branch; `base` for rows without one."""
    if isinstance(route, str):
        return branches[route]()
    output = base
    for gate, branch in zip(route.to(base.device).unbind(dim=1), branches.values(), strict=True):
        output = torch.where(gate.view(-1, *[1] * (base.dim() - 1)) > 0, branch(), output)
    return output


class BranchedLinear(nn.Linear):
    """A linear head with a copy of its weight per adapter, such as CLIP's `visual_projection` (Figure 2)."""

    branches: nn.ParameterDict

    def attach(self, adapters: Sequence[str]) -> None:
        self.names = tuple(adapters)  # in the order of a gate's columns; ParameterDict sorts its keys
        self.branches = nn.ParameterDict({name: self.weight.detach().clone().float() for name in adapters})

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        output, route = super().forward(pooled), _ROUTE.now
        if route is None or route is OUTSIDE or not self.names:
            return output
        weights = {name: self.branches[name].to(pooled.dtype) for name in self.names}
        branches = {name: partial(nn.functional.linear, pooled, weight) for name, weight in weights.items()}
        return _select(route, output, branches)


class BranchedModule:
    """Mixin for any other head, such as SigLIP's `head`, with a copy of the module per adapter."""

    def attach(self, adapters: Sequence[str]) -> None:
        copies = {name: deepcopy(self).float() for name in adapters}
        for copy in copies.values():
            copy.__class__ = type(self).__mro__[2]  # the original class of the head
        self.names = tuple(adapters)
        self.branches = nn.ModuleDict(copies)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output, route = super().forward(*args, **kwargs), _ROUTE.now
        if route is None or route is OUTSIDE or not self.names:
            return output
        branches = {name: partial(self._branch, name, *args, **kwargs) for name in self.names}
        return _select(route, output, branches)

    def _branch(self, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        branch, dtype = self.branches[name], args[0].dtype
        weights = {key: weight.to(dtype) for key, weight in branch.named_parameters()}
        return torch.func.functional_call(branch, weights, args, kwargs)


class _BoundLayer:
    """Mixin for layers that transformers can checkpoint: the recomputation uses the route of the forward pass."""

    @property
    def _gradient_checkpointing_func(self) -> Callable:
        return lambda function, *args: self._checkpoint(partial(routed, _ROUTE.now, function), *args)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable) -> None:
        self._checkpoint = function


class RecomputedMLP:
    """
    Mixin for an MLP of `fc1`, `activation_fn` and `fc2`.

    In training it keeps the output of `fc1` and recomputes the activation in the backward pass, where the low-rank
    update of `fc2` needs it. The values are the same bit for bit, it is not slower, and it saves 8 of the 20 hidden
    states that a layer keeps per token.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)  # (..., tokens, intermediate)
        if not (self.training and hidden_states.requires_grad) or torch.compiler.is_compiling():
            return self._activated(hidden_states)
        activated = partial(routed, _ROUTE.now, self._activated)
        draws = self.fc2.dropout.p > 0
        return checkpoint(activated, hidden_states, use_reentrant=False, preserve_rng_state=draws)

    def _activated(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(hidden_states))


def route_modules(module: nn.Module, adapters: Sequence[str], is_target: Callable[[str], bool], **lora: Any) -> None:
    """
    Add adapters to every matching linear layer of `module`, and bind its checkpointed layers to the route.

    Args:
        module: a tower.
        adapters: names of the adapters.
        is_target: whether a linear layer with this name gets adapters.
        lora: `rank`, `scaling` and `dropout`.
    """
    for name, linear in list(module.named_modules()):
        if type(linear) is nn.Linear and is_target(name):
            change_class(linear, RoutedLinear)
            linear.attach(adapters, **lora)
    for part in list(module.modules()):
        if isinstance(part, GradientCheckpointingLayer) and not isinstance(part, _BoundLayer):
            change_class(part, with_mixin(_BoundLayer, type(part)))
            if "_gradient_checkpointing_func" in vars(part):  # checkpointing was on already
                part._checkpoint = vars(part).pop("_gradient_checkpointing_func")
        if _is_plain_mlp(part) and not isinstance(part, RecomputedMLP):
            change_class(part, with_mixin(RecomputedMLP, type(part)))


def _is_plain_mlp(module: nn.Module) -> bool:
    """Whether a module is exactly `fc2(activation_fn(fc1(x)))`, with a routed `fc2`."""
    names = {name for name, _ in module.named_children()}
    return names == {"activation_fn", "fc1", "fc2"} and isinstance(module.fc2, RoutedLinear)


def branch_head(head: nn.Module, adapters: Sequence[str]) -> None:
    """Give each adapter a copy of the module that computes the pooled embedding."""
    change_class(head, BranchedLinear if type(head) is nn.Linear else with_mixin(BranchedModule, type(head)))
    head.attach(adapters)
