"""
The losses of GMAIL: pure functions of L2-normalised embeddings.

Every function takes the pairs of one batch; row `i` of each argument belongs to pair `i`. Two pairs that share an
image id or a caption id are never negatives of each other: COCO has five captions per image, a class name has many
images, and the losses should not separate these pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .distributed import gather
from .distributions import (
    energy_distance_loss,
    random_directions,
    sliced_wasserstein_loss,
    token_sliced_wasserstein_loss,
)

# Options that `recipe` sets unless they are given.
RECIPES = {
    "paper": {"align_weight": 1.0, "energy_weight": 0.0},
    "robust": {"align_weight": 0.0, "energy_weight": 10.0},
}

TOKEN_LOSSES = ("coral", "sliced_wasserstein")


@dataclass
class GmailLossConfig:
    """
    Weights and temperature of [`gmail_loss`]. The defaults are the paper's recipe, only Eq. 1. Each field is described
    by its `help`.

    Raises:
        ValueError: a value is out of range, every weight is zero, or the recipe is unknown.
    """

    recipe: str = field(
        default="paper",
        metadata={
            "help": "Default loss weights: 'paper' uses only Eq. 1; 'robust' uses only the energy distance, "
            "--align_weight 0 --energy_weight 10."
        },
    )
    temperature: float = field(default=0.07, metadata={"help": "Temperature tau of the alignment loss (Eq. 1)."})
    align_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the alignment loss (Eq. 1), see `alignment_loss`; set by --recipe by default."},
    )
    consistency_weight: float = field(
        default=0.0, metadata={"help": "Weight of 1 - cos of each pair, see `consistency_loss`."}
    )
    energy_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the energy distance between generated and real images of each caption, see "
            "`energy_distance_loss`; set by --recipe by default."
        },
    )
    sliced_wasserstein_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the sliced Wasserstein distance between generated and real images of each caption, see "
            "`sliced_wasserstein_loss`; our tables use 100."
        },
    )
    sliced_wasserstein_projections: int = field(
        default=64, metadata={"help": "Random directions per step of --sliced_wasserstein_weight."}
    )
    gen_text_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss between generated images and captions, see `contrastive_loss`."},
    )
    real_text_weight: float = field(
        default=0.0, metadata={"help": "Weight of the loss between real images and captions, see `contrastive_loss`."}
    )
    token_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of --token_loss, which aligns patch tokens for vision-language models. It needs another "
            "loss that aligns images."
        },
    )
    token_loss: str = field(
        default="coral",
        metadata={
            "help": "'coral' matches mean and covariance of generated and real patch tokens, see "
            "`token_alignment_loss`; 'sliced_wasserstein' matches their distributions for each caption, see "
            "`token_sliced_wasserstein_loss`, and our tables use it with --token_weight 10."
        },
    )
    symmetric: bool = field(default=False, metadata={"help": "Add the direction real -> generated to Eq. 1."})
    gather_negatives: bool = field(
        default=True, metadata={"help": "In distributed training, draw negatives from all processes."}
    )

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"`recipe` must be one of {list(RECIPES)}, got '{self.recipe}'.")
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not self.temperature > 0:  # also refuses NaN
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        if self.sliced_wasserstein_projections < 1:
            raise ValueError(
                f"`sliced_wasserstein_projections` must be at least 1, got {self.sliced_wasserstein_projections}."
            )
        if self.token_loss not in TOKEN_LOSSES:
            raise ValueError(f"`token_loss` must be one of {list(TOKEN_LOSSES)}, got '{self.token_loss}'.")
        weights = {f"{name}_weight": getattr(self, f"{name}_weight") for name in LOSS_NAMES}
        if not all(value >= 0 for value in weights.values()) or not any(weights.values()):
            raise ValueError(f"Loss weights must not be negative, nor all zero, got {weights}.")
        if self.token_weight > 0 and not self.aligns:
            raise ValueError(
                "`token_weight` needs another loss that aligns images: set `align_weight` or "
                "`energy_weight`, for example."
            )

    @property
    def aligns(self) -> bool:
        """Whether a loss compares generated images with real images."""
        return self.align_weight > 0 or self.learns_from_one_pair

    @property
    def learns_from_one_pair(self) -> bool:
        """Whether a loss compares the images of a pair and needs no other pairs."""
        return self.consistency_weight > 0 or self.energy_weight > 0 or self.sliced_wasserstein_weight > 0

    @property
    def needs_negatives(self) -> bool:
        """Whether a loss contrasts a pair with the other pairs of its batch."""
        return self.align_weight > 0 or self.needs_text

    @property
    def needs_generated(self) -> bool:
        """Whether a loss uses generated images."""
        return self.aligns or self.gen_text_weight > 0

    @property
    def needs_real(self) -> bool:
        """Whether a loss uses real images."""
        return self.aligns or self.real_text_weight > 0

    @property
    def needs_text(self) -> bool:
        """Whether a loss compares images with captions."""
        return self.gen_text_weight > 0 or self.real_text_weight > 0


LOSS_NAMES = ("align", "consistency", "energy", "sliced_wasserstein", "token", "gen_text", "real_text")
# The model's inputs that produce each input of the losses.
MADE_FROM = {
    "gen_embeds": "`generated_pixel_values`",
    "real_embeds": "`real_pixel_values`",
    "text_embeds": "`input_ids`",
    "gen_tokens": "`generated_pixel_values` and `token_layer`",
    "real_tokens": "`real_pixel_values` and `token_layer`",
}


def same_pair_mask(image_ids: torch.Tensor | None, caption_ids: torch.Tensor | None) -> torch.Tensor | None:
    """
    Mask of pairs that are not negatives of each other because they share an id.

    Args:
        image_ids, caption_ids (`torch.LongTensor` of shape `(pairs,)`, *optional*): equal numbers mean the same real
            image or the same caption.

    Returns:
        `torch.BoolTensor` of shape `(pairs, pairs)`, False on the diagonal; None without ids.
    """
    masks = [ids.unsqueeze(0) == ids.unsqueeze(1) for ids in (image_ids, caption_ids) if ids is not None]
    if not masks:
        return None
    return (masks[0] | masks[-1]).fill_diagonal_(False)


def _info_nce(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of the rows of `(pairs, pairs)` against the diagonal, without the masked entries."""
    if logits.shape[0] != logits.shape[1]:
        raise ValueError(
            f"Row i of each argument belongs to pair i, so numbers of rows must be equal, got {list(logits.shape)}."
        )
    if mask is not None:
        logits = logits.masked_fill(mask, float("-inf"))
    return nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def alignment_loss(
    gen_embeds: torch.Tensor,
    real_embeds: torch.Tensor,
    image_ids: torch.Tensor | None = None,
    caption_ids: torch.Tensor | None = None,
    temperature: float = 0.07,
    symmetric: bool = False,
) -> torch.Tensor:
    """
    Eq. 1 of GMAIL: classify the real partner of each generated image among the real images of the batch.

        L = -1/|B| sum_i log( exp(g_i . r_i / tau) / sum_j exp(g_i . r_j / tau) )

    with `j` over the partner and its negatives, see [`same_pair_mask`]. Eq. 1 only ranks the real images. To also
    bring the embeddings of a pair together, add [`consistency_loss`].

    Args:
        gen_embeds (`torch.FloatTensor` of shape `(pairs, dim)`): `f_g` of the generated images, L2-normalised.
        real_embeds (same shape): `f_r` of their real partners, L2-normalised.
        image_ids, caption_ids (`torch.LongTensor` of shape `(pairs,)`, *optional*): see [`same_pair_mask`].
        temperature (`float`): tau.
        symmetric (`bool`): average with the direction real -> generated. The paper uses one direction.

    Returns:
        `torch.FloatTensor` of shape `()`, in nats.

    Raises:
        ValueError: numbers of rows differ.
    """
    logits = gen_embeds @ real_embeds.t() / temperature  # (generated, real)
    mask = same_pair_mask(image_ids, caption_ids)
    loss = _info_nce(logits, mask)
    return (loss + _info_nce(logits.t(), mask)) / 2 if symmetric else loss


def consistency_loss(gen_embeds: torch.Tensor, real_embeds: torch.Tensor) -> torch.Tensor:
    """
    Mean of `1 - cos` over the pairs, in [0, 2]. It reduces the distance within pairs, which Eq. 1 does not. Not in the
    paper.

    Args:
        gen_embeds, real_embeds (`torch.FloatTensor` of shape `(pairs, dim)`): L2-normalised.

    Returns:
        `torch.FloatTensor` of shape `()`.
    """
    return (1 - (gen_embeds * real_embeds).sum(dim=-1)).mean()


def token_alignment_loss(
    gen_tokens: torch.Tensor, real_tokens: torch.Tensor, gather_statistics: bool = True
) -> torch.Tensor:
    """
    Deep CORAL (Sun & Saenko, 2016) on patch tokens: match mean and covariance of generated and real tokens.

        L = mean((m_g - m_r)^2) + ||C_g - C_r||^2 / ||C_r||^2

    Each channel is first divided by its standard deviation over the real tokens. Not in the paper: Eq. 1 only compares
    pooled embeddings, and in our runs it increases the distance between patch tokens, which LLaVA reads. The images of
    a pair share a caption but not a layout, so the loss compares the two sets of tokens and needs no partners.

    Args:
        gen_tokens (`torch.FloatTensor` of shape `(pairs, tokens, hidden)`): tokens of generated images through `gen`.
        real_tokens (same shape): tokens of real images through `real`.
        gather_statistics (`bool`): in distributed training, compute mean and covariance over all processes.

    Returns:
        `torch.FloatTensor` of shape `()`, at least 0.
    """
    gen_tokens, real_tokens = gen_tokens.flatten(0, 1), real_tokens.flatten(0, 1)  # (pairs * tokens, hidden)
    real_mean, real_covariance = _moments(real_tokens, gather_statistics)
    gen_mean, gen_covariance = _moments(gen_tokens, gather_statistics)
    scale = real_covariance.diagonal().clamp_min(1e-6).rsqrt().detach()
    scales = scale[:, None] * scale
    gap = (gen_mean - real_mean) * scale
    spread = (gen_covariance - real_covariance) * scales
    return gap.square().mean() + spread.square().sum() / (real_covariance * scales).square().sum()


def _moments(tokens: torch.Tensor, gather_statistics: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(hidden,)` and covariance `(hidden, hidden)` of tokens `(tokens, hidden)`, optionally of all processes."""
    count, total = tokens.new_tensor([len(tokens)]), tokens.sum(dim=0, keepdim=True)
    if gather_statistics:
        count, total = gather(count), gather(total)
    mean = total.sum(dim=0) / count.sum()
    centred = tokens - mean
    products = (centred.t() @ centred).unsqueeze(0)  # (1, hidden, hidden)
    if gather_statistics:
        products = gather(products)
    return mean, products.sum(dim=0) / count.sum()


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_ids: torch.Tensor | None = None,
    caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    CLIP's image-text loss (Radford et al., 2021, Figure 3). Pairs that share an id are not negatives of each other.

    Args:
        image_embeds (`torch.FloatTensor` of shape `(pairs, dim)`): L2-normalised.
        text_embeds (same shape): L2-normalised embeddings of the captions.
        logit_scale (`float` or `torch.FloatTensor` of shape `()`): inverse temperature, `model.logit_scale.exp()`.
        image_ids, caption_ids (`torch.LongTensor` of shape `(pairs,)`, *optional*): see [`same_pair_mask`].

    Returns:
        `torch.FloatTensor` of shape `()`, in nats: the mean of both directions.

    Raises:
        ValueError: numbers of rows differ.
    """
    logits = image_embeds @ text_embeds.t() * logit_scale  # (images, texts)
    mask = same_pair_mask(image_ids, caption_ids)
    return (_info_nce(logits, mask) + _info_nce(logits.t(), mask)) / 2


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
    image_ids: torch.Tensor | None = None,
    caption_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    SigLIP's image-text loss (Zhai et al., 2023, Eq. 2). Pairs that share an id are not negatives of each other.

        L = -1/|B| sum_i sum_j log sigmoid(z_ij (t x_i . y_j + b)),  z_ij = 1 if i = j, else -1

    Args:
        image_embeds, text_embeds, image_ids, caption_ids: as in [`contrastive_loss`].
        logit_scale (`float` or `torch.FloatTensor` of one element): `t`, `model.logit_scale.exp()`.
        logit_bias (`float` or `torch.FloatTensor` of one element): `b`, `model.logit_bias`.

    Returns:
        `torch.FloatTensor` of shape `()`, in nats.
    """
    logits = image_embeds @ text_embeds.t() * logit_scale + logit_bias  # (images, texts)
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    terms = -nn.functional.logsigmoid(signs * logits)
    mask = same_pair_mask(image_ids, caption_ids)
    return (terms if mask is None else terms.masked_fill(mask, 0)).sum(dim=1).mean()


def gmail_loss(
    embeds: Mapping[str, torch.Tensor | None],
    image_ids: torch.Tensor | None = None,
    caption_ids: torch.Tensor | None = None,
    logit_scale: torch.Tensor | float | None = None,
    config: GmailLossConfig | None = None,
    logit_bias: torch.Tensor | float | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """
    Compute all losses of a batch of pairs in float32.

    Args:
        embeds ([`GmailOutput`] or a `dict`): `gen_embeds`, `real_embeds`, `text_embeds` of shape `(pairs, dim)`,
            L2-normalised, and `gen_tokens`, `real_tokens` of shape `(pairs, tokens, hidden)`. Only those that the
            losses of `config` compare are required.
        image_ids, caption_ids (`torch.LongTensor` of shape `(pairs,)`, *optional*): see [`same_pair_mask`].
        logit_scale (`float` or `torch.FloatTensor` of shape `()`, *optional*): see [`contrastive_loss`]; required by
            the text losses.
        config ([`GmailLossConfig`], *optional*): weights and temperature; defaults to the paper's recipe, Eq. 1.
        logit_bias (`float` or `torch.FloatTensor` of one element, *optional*): if given, the text losses are
            [`sigmoid_loss`].
        seed (`int`): seed for the directions of [`sliced_wasserstein_loss`], also for tokens. Use a different one for
            each step, and the same one in all processes.

    Returns:
        `dict` of `torch.FloatTensor` of shape `()`: the weighted sum as `loss`, and the terms whose weight is not
        zero, unweighted, by name: `align`, `consistency`, `energy`, `sliced_wasserstein`, `token`, `gen_text`,
        `real_text`.

    Raises:
        ValueError: embeddings or tokens of a loss are missing, or numbers of rows differ.
    """
    config = config or GmailLossConfig()
    given = {name: embeds.get(name) for name in _compared(config)}
    for name, tensor in given.items():
        if tensor is None:
            raise ValueError(f"The losses compare `{name}`: pass {MADE_FROM[name]} to the model.")
    if config.needs_text and logit_scale is None:
        raise ValueError("The text losses need `logit_scale`: pass `model.logit_scale.exp()`.")
    counts = {"image_ids": image_ids, "caption_ids": caption_ids, **given}
    counts = {name: len(rows) for name, rows in counts.items() if rows is not None}
    if len(set(counts.values())) > 1:
        raise ValueError(f"A batch of pairs needs the same number of rows in each input, got {counts}.")
    # Similarities in bfloat16 have errors of 0.004, and the temperature divides them by 0.07.
    with torch.autocast(next(iter(given.values())).device.type, enabled=False):
        given = {name: tensor.float() for name, tensor in given.items()}
        tokens = {name: given.pop(name) for name in ("gen_tokens", "real_tokens") if name in given}
        own_caption_ids = caption_ids
        if config.gather_negatives:
            given = {name: gather(tensor) for name, tensor in given.items()}
            image_ids, caption_ids = gather(image_ids), gather(caption_ids)
        if not any(len(tensor) for tensor in given.values()):  # no pair of the batch could be read
            zero = sum(tensor.sum() for tensor in given.values())
            return {"loss": zero, **{name: zero for name in LOSS_NAMES if getattr(config, f"{name}_weight") > 0}}
        losses = {}
        if config.align_weight > 0:
            losses["align"] = alignment_loss(
                given["gen_embeds"], given["real_embeds"], image_ids, caption_ids, config.temperature, config.symmetric
            )
        if config.consistency_weight > 0:
            losses["consistency"] = consistency_loss(given["gen_embeds"], given["real_embeds"])
        if config.energy_weight > 0:
            losses["energy"] = energy_distance_loss(given["gen_embeds"], given["real_embeds"], caption_ids)
        if config.sliced_wasserstein_weight > 0:
            gen, real = given["gen_embeds"], given["real_embeds"]
            losses["sliced_wasserstein"] = sliced_wasserstein_loss(
                gen, real, _directions(gen, config, seed), caption_ids
            )
        if config.token_weight > 0 and config.token_loss == "coral":
            losses["token"] = token_alignment_loss(**tokens, gather_statistics=config.gather_negatives)
        elif config.token_weight > 0:
            directions = _directions(tokens["gen_tokens"], config, seed)
            losses["token"] = token_sliced_wasserstein_loss(
                **tokens, directions=directions, caption_ids=own_caption_ids, gather_tokens=config.gather_negatives
            )
        for kind in ("gen", "real"):
            if getattr(config, f"{kind}_text_weight") > 0:
                pair = given[f"{kind}_embeds"], given["text_embeds"], logit_scale
                if logit_bias is None:
                    losses[f"{kind}_text"] = contrastive_loss(*pair, image_ids, caption_ids)
                else:
                    losses[f"{kind}_text"] = sigmoid_loss(*pair, logit_bias, image_ids, caption_ids)
        total = sum(getattr(config, f"{name}_weight") * loss for name, loss in losses.items())
        return {"loss": total, **losses}


def _directions(embeds: torch.Tensor, config: GmailLossConfig, seed: int) -> torch.Tensor:
    return random_directions(embeds.shape[-1], config.sliced_wasserstein_projections, seed).to(embeds.device)


def _compared(config: GmailLossConfig) -> list[str]:
    """Names of the embeddings and tokens that the losses compare."""
    needed = {
        "gen_embeds": config.needs_generated,
        "real_embeds": config.needs_real,
        "text_embeds": config.needs_text,
        "gen_tokens": config.token_weight > 0,
        "real_tokens": config.token_weight > 0,
    }
    return [name for name, is_needed in needed.items() if is_needed]
