"""
A step of stage 1 on images in memory: a base with branches, compared with two copies of the base and PEFT's LoRA on
    one.

The branches need no forward pass for the real images, which are embedded once before training.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import subjects
import torch
import trainers
from measuring import Settings, row, take_turns, timed
from torch.nn.functional import normalize
from transformers import AutoModel, Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel

import gmail_hf
from gmail_hf.branches.routing import RoutedLinear

LORA = {"lora_rank": trainers.RANK, "lora_alpha": trainers.ALPHA}
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}


@dataclass
class Tower:
    """A vision encoder in training. `embed_real` is None if real images are embedded once, before training."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    embed_real: Callable[[torch.Tensor], torch.Tensor] | None
    parameters: list[torch.nn.Parameter]

    def step(self, images: torch.Tensor, settings: Settings) -> Callable[..., None]:
        """A function that does a step of Eq. 1 and AdamW on the first `count` images, by default on all."""
        optimizer = torch.optim.AdamW([p for p in self.parameters if p.requires_grad], lr=1e-4)

        def advance(count: int = len(images)) -> None:
            with subjects.autocast(settings):
                generated = self.embed(images[:count]).float()
                with torch.no_grad():  # the values of precomputed embeddings do not matter for speed
                    real = self.embed_real(images[:count]).float() if self.embed_real else generated.detach()
            gmail_hf.alignment_loss(generated, real).backward()
            optimizer.step()
            optimizer.zero_grad()

        return advance


def gmail_tower(model: Any, **options: Any) -> Tower:
    vision = [parameter for name, parameter in model.train().named_parameters() if "text" not in name]
    return Tower(lambda images: model.embed_images(images, "gen", **options), None, vision)


def two_models(make: Callable[[], Any], targets: str | list[str], head: list[str] | None) -> Tower:
    """The common alternative: a frozen model and another one with PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=trainers.RANK, lora_alpha=trainers.ALPHA, target_modules=targets, modules_to_save=head)
    real = make().requires_grad_(False)
    generated = get_peft_model(make(), lora).train()

    def embed(model: Any, images: torch.Tensor) -> torch.Tensor:
        return normalize(getattr(model, "get_image_features", model)(images).pooler_output, dim=-1)

    vision = [p for model in (real, generated) for name, p in model.named_parameters() if "text" not in name]
    return Tower(lambda images: embed(generated, images), lambda images: embed(real, images), vision)


def siglip(small: bool) -> SiglipModel:
    """The default sizes of transformers, which are those of B/16."""
    return SiglipModel(SiglipConfig(vision_config=SMALL if small else {}, text_config={"num_hidden_layers": 1}))


def dinov2(small: bool) -> Dinov2Model:
    """The default sizes of transformers, which are those of B/14."""
    return Dinov2Model(Dinov2Config(image_size=224, patch_size=14, **(SMALL if small else {})))


# By name: the function that creates a base, and the modules of its head, which each branch copies.
BASES = {"SigLIP-B/16": (siglip, ["head"]), "DINOv2-B/14": (dinov2, None)}


@contextmanager
def towers_of(name: str, settings: Settings) -> Iterator[tuple[Callable[[], Tower], Callable[[], Tower]]]:
    """Functions that create both sides for a base: branches, and two copies with PEFT on the same layers."""
    make, head = BASES[name]
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(settings.device):
            make(settings.quick).save_pretrained(folder)

        def base() -> Any:
            return AutoModel.from_pretrained(folder).to(settings.device)

        def ours() -> Any:
            return gmail_hf.from_base(folder, **LORA).to(settings.device)

        targets = [layer for layer, module in ours().named_modules() if isinstance(module, RoutedLinear)]
        yield lambda: gmail_tower(ours()), partial(two_models, base, targets, head)


def bases(settings: Settings) -> Iterator[dict[str, Any]]:
    """pairs/s of a step on each base of `BASES`."""
    batch = settings.batch or settings.choose(2, 8, 128)
    images = torch.randn(batch, 3, 224, 224, device=settings.device)

    def speed(advance: Callable[[], None]) -> float:
        return batch / timed(advance, settings)

    for name in BASES:
        with towers_of(name, settings) as makers:
            ours, theirs = (make().step(images, settings) for make in makers)
            for advance in (ours, theirs):
                advance()
            sides = {"ours": partial(speed, ours), "theirs": partial(speed, theirs)}
            speeds = take_turns(sides, settings.choose(2, 5, 5))
        against = "two of the base, PEFT on one, real images recomputed"
        yield row(
            "bases",
            f"a step on {name}, images in memory",
            against,
            "pairs/s",
            *speeds.values(),
            ">= 1.5",
            f"batch {batch}",
        )
