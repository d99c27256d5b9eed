"""Mapping networks of ClipCap (Mokady et al., 2021) and IFCap, from an image embedding to a prefix."""

import torch
from torch import nn

from .configuration_captioner import CaptionerConfig


class MLPMapper(nn.Sequential):
    """
    One hidden layer half as wide as the prefix, with tanh (section 3.2), for a language model that is trained, too.

    It maps image embeddings `(batch, embed_dim)` to prefixes `(batch, prefix_length, hidden)`.
    """

    def __init__(self, config: CaptionerConfig, embed_dim: int, hidden: int):
        width = config.prefix_length * hidden
        super().__init__(
            nn.Linear(embed_dim, width // 2),
            nn.Tanh(),
            nn.Linear(width // 2, width),
            nn.Unflatten(1, (config.prefix_length, hidden)),
        )


class TransformerMapper(nn.Module):
    """
    A transformer on `mapping_clip_length` tokens for the embedding and `prefix_length` learned constants, whose
    outputs are the prefix (section 3.3), for a frozen language model.

    It maps image embeddings `(batch, embed_dim)` to prefixes `(batch, prefix_length, hidden)`.

    Raises:
        ValueError: `hidden` is not a multiple of `mapping_num_heads`.
    """

    def __init__(self, config: CaptionerConfig, embed_dim: int, hidden: int):
        super().__init__()
        if hidden % config.mapping_num_heads:
            raise ValueError(
                f"`mapping_num_heads` ({config.mapping_num_heads}) must divide the language model's width, {hidden}."
            )
        self.clip_length = config.mapping_clip_length
        self.linear = nn.Linear(embed_dim, self.clip_length * hidden)
        self.prefix_const = nn.Parameter(torch.randn(config.prefix_length, hidden))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden, config.mapping_num_heads, 2 * hidden, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(config.mapping_num_layers)
        )

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        return self.transform(self.spread(image_embeds))

    def spread(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Map the embedding to tokens `(batch, mapping_clip_length, hidden)`."""
        return self.linear(image_embeds).unflatten(1, (self.clip_length, -1))

    def transform(self, image: torch.Tensor) -> torch.Tensor:
        """Map these tokens to the prefix `(batch, prefix_length, hidden)`."""
        states = torch.cat([image, self.prefix_const.expand(len(image), -1, -1)], dim=1)
        for layer in self.layers:
            states = layer(states)
        return states[:, self.clip_length :]


class FusionMapper(TransformerMapper):
    """
    A [`TransformerMapper`] whose image tokens first attend to retrieved captions (IFCap's fusion module, Lee et al.,
    2024, section 3). The tokens are the queries, a linear map of the captions' embeddings gives keys and values, and
    the output is added to the tokens, as in a transformer.

    It maps image embeddings `(batch, embed_dim)` and caption embeddings `(batch, captions, embed_dim)` to
    prefixes `(batch, prefix_length, hidden)`.
    """

    def __init__(self, config: CaptionerConfig, embed_dim: int, hidden: int):
        super().__init__(config, embed_dim, hidden)
        self.retrieved_linear = nn.Linear(embed_dim, hidden)
        self.cross_attention = nn.MultiheadAttention(hidden, config.mapping_num_heads, batch_first=True)

    def forward(self, image_embeds: torch.Tensor, retrieved_embeds: torch.Tensor) -> torch.Tensor:
        image, retrieved = self.spread(image_embeds), self.retrieved_linear(retrieved_embeds)
        return self.transform(image + self.cross_attention(image, retrieved, retrieved, need_weights=False)[0])


MAPPERS = {"mlp": MLPMapper, "transformer": TransformerMapper, "fusion": FusionMapper}
