"""CLIP's encoder layers with adapters: the branch an image takes arrives as an argument, the `route`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, CLIPEncoderLayer, eager_attention_forward

from .configuration_clip import ATTENTION_LINEARS, MLP_LINEARS, AdapterFields, GmailVisionConfig

# What a modality means to a linear layer: None, the shared weights alone; a name, that adapter; a tensor of shape
# (batch, adapters) holding zeros and ones, the adapter of each sample.
Route = str | torch.Tensor | None


class LoRAAdapter(nn.Module):
    """The weights of one low-rank update, `lora_B @ lora_A` (Hu et al., 2022, section 4.1); zero at first."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)


class ModalityLoRALinear(nn.Linear):
    """
    A linear layer with one LoRA update for each adapter, chosen by the call.

    The shared weight keeps `nn.Linear`'s parameter names, so a CLIP checkpoint loads into it as it is.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, lora: AdapterFields, adapters: Sequence[str] = ()
    ):
        super().__init__(in_features, out_features, bias=bias)
        self.rank = lora.lora_rank
        self.scaling = lora.lora_alpha / lora.lora_rank
        self.dropout = nn.Dropout(lora.lora_dropout)
        self.adapters = nn.ModuleDict({name: LoRAAdapter(in_features, out_features, self.rank) for name in adapters})

    def forward(self, hidden_states: torch.Tensor, route: Route = None) -> torch.Tensor:
        if route is None or not self.adapters:
            return super().forward(hidden_states)
        if isinstance(route, str):
            lora_A, lora_B, scale = self.adapters[route].lora_A, self.adapters[route].lora_B, self.scaling
        else:
            # All adapters in one product; the gate then closes the ranks that are not the sample's own.
            lora_A = torch.cat([adapter.lora_A for adapter in self.adapters.values()])  # (adapters * rank, in)
            lora_B = torch.cat([adapter.lora_B for adapter in self.adapters.values()], dim=1)  # (out, adapters * rank)
            scale = (
                route.repeat_interleave(self.rank, dim=1).unsqueeze(1) * self.scaling
            )  # (batch, 1, adapters * rank)
        low_rank = nn.functional.linear(self.dropout(hidden_states), lora_A)
        update = nn.functional.linear(low_rank * scale, lora_B)
        # The shared product last: where a checkpoint computes this again, it stops before it, see `GmailMLP`.
        return super().forward(hidden_states) + update


class ModalityProjection(nn.Linear):
    """CLIP's visual projection, and a full copy of it for each adapter (the paper's "Proj for Gen")."""

    def __init__(self, in_features: int, out_features: int, adapters: Sequence[str]):
        super().__init__(in_features, out_features, bias=False)
        self.names = tuple(adapters)  # in the order of a route's columns; ParameterDict sorts its keys
        self.branches = nn.ParameterDict({name: torch.empty_like(self.weight) for name in adapters})
        self.reset_branches()

    @torch.no_grad()
    def reset_branches(self) -> None:
        for weight in self.branches.values():
            weight.copy_(self.weight)

    def forward(self, pooled: torch.Tensor, route: Route = None) -> torch.Tensor:
        if isinstance(route, str):
            return nn.functional.linear(pooled, self.branches[route])
        output = super().forward(pooled)
        if route is None:
            return output
        for name, gate in zip(self.names, route.unbind(dim=1), strict=True):
            branch = nn.functional.linear(pooled, self.branches[name])
            output = torch.where(gate.unsqueeze(1) > 0, branch, output)
        return output


class GmailAttention(CLIPAttention):
    """CLIP's attention with routed linear layers: the tokens `asking` ask all of `hidden_states`."""

    def __init__(self, config: GmailVisionConfig | CLIPTextConfig, lora: AdapterFields, adapters: Sequence[str]):
        super().__init__(config)
        route_linears(self, ATTENTION_LINEARS, lora, adapters)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        route: Route,
        asking: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (len(hidden_states), -1, self.num_heads, self.head_dim)
        queries = self.q_proj(asking, route).view(heads).transpose(1, 2)  # (batch, heads, asking, head_dim)
        keys = self.k_proj(hidden_states, route).view(heads).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        values = self.v_proj(hidden_states, route).view(heads).transpose(1, 2)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attention(
            self, queries, keys, values, attention_mask, scaling=self.scale, dropout=dropout, **kwargs
        )  # (batch, asking, heads, head_dim)
        return self.out_proj(output.flatten(2).contiguous(), route), weights


class GmailMLP(CLIPMLP):
    """
    CLIP's MLP with routed linear layers.

    In training it keeps what `fc1` gave and computes the activation again in the backward pass: a frozen `fc2` does
    not need it, its low-rank update does. That is bit for bit the same, no slower, and saves 8 of the 20 hidden states
    that a layer keeps for each token.
    """

    def __init__(self, config: GmailVisionConfig | CLIPTextConfig, lora: AdapterFields, adapters: Sequence[str]):
        super().__init__(config)
        route_linears(self, MLP_LINEARS, lora, adapters)

    def forward(self, hidden_states: torch.Tensor, route: Route = None) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states, route)  # (batch, tokens, intermediate)
        if not (self.training and hidden_states.requires_grad):
            return self._activated(hidden_states, route)
        draws = self.fc2.dropout.p > 0
        return checkpoint(self._activated, hidden_states, route, use_reentrant=False, preserve_rng_state=draws)

    def _activated(self, hidden_states: torch.Tensor, route: Route) -> torch.Tensor:
        return self.fc2(self.activation_fn(hidden_states), route)


class GmailEncoderLayer(CLIPEncoderLayer):
    """
    CLIP's encoder layer, passing the route on.

    The last layer of an encoder may be asked for the class token alone, `(batch, 1, hidden)`: the pooled output
    depends on no other, which leaves five sixths of that layer's work undone.
    """

    def __init__(
        self,
        config: GmailVisionConfig | CLIPTextConfig,
        lora: AdapterFields,
        adapters: Sequence[str],
        is_last: bool = False,
    ):
        super().__init__(config)
        self.self_attn = GmailAttention(config, lora, adapters)
        self.mlp = GmailMLP(config, lora, adapters)
        self.is_last = is_last

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        route: Route = None,
        pooled_only: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        asked = asking = self.layer_norm1(hidden_states)
        if pooled_only and self.is_last:
            asking, hidden_states = asked[:, :1].contiguous(), hidden_states[:, :1].contiguous()
        attended, _ = self.self_attn(asked, attention_mask, route, asking, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states), route)


def route_linears(module: nn.Module, names: Sequence[str], lora: AdapterFields, adapters: Sequence[str]) -> None:
    """Replace the named linear layers by routed ones; a layer that is no LoRA target has no adapters."""
    for name in names:
        linear = getattr(module, name)
        own = adapters if name in lora.lora_targets else ()
        routed = ModalityLoRALinear(linear.in_features, linear.out_features, linear.bias is not None, lora, own)
        setattr(module, name, routed)


def encoder_layers(config: Any, lora: AdapterFields, adapters: Sequence[str]) -> nn.ModuleList:
    last = config.num_hidden_layers - 1
    return nn.ModuleList(GmailEncoderLayer(config, lora, adapters, index == last) for index in range(last + 1))
