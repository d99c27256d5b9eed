"""
A GMAIL CLIP (Mo & Yun, ICML 2025) for those who have transformers and not gmail-hf: one CLIP, an image branch for
photographs, one for generated images.

    model = AutoModel.from_pretrained("org/gmail-coco", trust_remote_code=True)
    model.get_image_features(pixel_values, modality="gen")

This file lies in the repository of a model and needs nothing beside it. It serves one branch a call; batches of both,
training and evaluation are gmail-hf's (`pip install gmail-hf`).
"""

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, CLIPEncoderLayer, eager_attention_forward
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple


class GmailConfig(CLIPConfig):
    model_type = "gmail_clip"


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update for each adapter, and the layer as it is for every other name."""

    def __init__(self, linear, config, adapters):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scaling = config.lora_alpha / config.lora_rank
        self.adapters = nn.ModuleDict()
        for name in adapters:
            lora_A = torch.zeros(config.lora_rank, linear.in_features)
            lora_B = torch.zeros(linear.out_features, config.lora_rank)
            self.adapters[name] = nn.ParameterDict({"lora_A": lora_A, "lora_B": lora_B})

    def forward(self, hidden_states, branch=None):
        output = super().forward(hidden_states)
        if branch not in self.adapters:
            return output
        lora = self.adapters[branch]
        low_rank = nn.functional.linear(hidden_states, lora["lora_A"]) * self.scaling
        return output + nn.functional.linear(low_rank, lora["lora_B"])


class BranchProjection(nn.Linear):
    """CLIP's visual projection, and a copy of its own for each adapter."""

    def __init__(self, linear, adapters):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.branches = nn.ParameterDict({name: torch.zeros_like(self.weight) for name in adapters})

    def forward(self, pooled, branch=None):
        return nn.functional.linear(pooled, self.branches[branch] if branch in self.branches else self.weight)


class GmailAttention(CLIPAttention):
    def forward(self, hidden_states, attention_mask=None, branch=None, **kwargs):
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (linear(hidden_states, branch).view(heads).transpose(1, 2) for linear in projections)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scale, dropout=dropout, **kwargs
        )
        return self.out_proj(output.flatten(2), branch), weights


class GmailMLP(CLIPMLP):
    def forward(self, hidden_states, branch=None):
        return self.fc2(self.activation_fn(self.fc1(hidden_states, branch)), branch)


class GmailEncoderLayer(CLIPEncoderLayer):
    def __init__(self, tower_config, config, adapters):
        super().__init__(tower_config)
        self.self_attn, self.mlp = GmailAttention(tower_config), GmailMLP(tower_config)
        for module in (self.self_attn, self.mlp):
            for name, linear in list(module.named_children()):
                if isinstance(linear, nn.Linear):
                    own = adapters if name in config.lora_targets else ()
                    setattr(module, name, LoRALinear(linear, config, own))

    def forward(self, hidden_states, attention_mask=None, branch=None, **kwargs):
        output, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, branch, **kwargs)
        hidden_states = hidden_states + output
        return hidden_states + self.mlp(self.layer_norm2(hidden_states), branch)


class GmailCLIPModel(CLIPModel):
    """A `CLIPModel` whose image methods take `modality`, the branch; by default that of `self.modality`."""

    config_class = GmailConfig

    def __init__(self, config):
        super().__init__(config)
        towers = {self.vision_model: config.trainable_modalities, self.text_model: ["text"] * config.text_lora}
        for tower, adapters in towers.items():
            layers = [GmailEncoderLayer(tower.config, config, adapters) for _ in tower.encoder.layers]
            tower.encoder.layers = nn.ModuleList(layers)
        self.visual_projection = BranchProjection(self.visual_projection, config.trainable_modalities)
        self.modality = config.default_modality
        self.post_init()

    @can_return_tuple
    def get_image_features(self, pixel_values, interpolate_pos_encoding=False, modality=None, **kwargs):
        branch = self.modality if modality is None else modality
        if branch not in self.config.modalities:
            raise ValueError(f"`modality` is one of {self.config.modalities} for a whole batch, got {branch!r}.")
        unknown = kwargs.keys() - TransformersKwargs.__annotations__.keys() - {"return_dict"}
        if unknown:  # CLIP would swallow them
            raise TypeError(f"Unexpected keyword argument(s) {sorted(unknown)}.")
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, branch=branch, **kwargs
        )
        outputs.pooler_output = self.visual_projection(outputs.pooler_output, branch)
        return outputs

    def get_text_features(self, *args, modality=None, **kwargs):
        return super().get_text_features(*args, branch="text", **kwargs)
