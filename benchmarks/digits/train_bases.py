"""
Train further bases for the paper's tables on real train scenes, without generated images, in minutes on a CPU.

    python benchmarks/digits/train_bases.py --kind siglip --output_dir siglip

siglip: a SigLIP from scratch with its sigmoid loss (Zhai et al., 2023). synclr: a vision-only ViT from scratch with
the contrastive loss of SynCLR (Tian et al., 2023), where images with the same caption are positives; SynCLR uses
generated images, this recipe uses real ones. longclip: the bundled CLIP with stretched text positions, fine-tuned on
captions that also describe positions and background (Long-CLIP, Zhang et al., 2024). The towers have the size of the
bundled CLIP's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from loop import Schedule, adamw, fit, save_half, to_pixel_values
from tokenizer import MAX_LENGTH, build_tokenizer
from train_clip import VISION, caption_ids
from transformers import (
    AutoProcessor,
    CLIPModel,
    HfArgumentParser,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    ViTConfig,
    ViTModel,
)

from gmail_hf import stretch_positions
from gmail_hf.digits import clip_path
from gmail_hf.digits.scenes import IMAGE_SIZE, draw_scenes
from gmail_hf.training.losses import contrastive_loss, sigmoid_loss

LONG_CONTEXT = 96
HEIGHTS = {"high": (0, 14.4), "in the middle": (14.4, 17.6), "low": (17.6, 32)}  # pixels from the top
GROUNDS = ("reddish", "greenish", "bluish")
DARK = 0.12  # mean of the channels


@dataclass
class BaseArguments:
    output_dir: str
    kind: str = field(metadata={"choices": ("siglip", "synclr", "longclip")})
    num_steps: int = 800
    batch_size: int = 256
    learning_rate: float = 1e-3
    mixed_precision: str = "no"  # bf16 is twice as fast on CPUs with AVX-512, and 25 times slower on others
    seed: int = 0


def long_captions(scenes: dict[str, np.ndarray | list]) -> list[str]:
    """Captions of `draw_scenes` with the positions of both digits and the colour of the background, n strings."""
    captions = []
    for caption, heights, tint in zip(scenes["captions"], scenes["heights"], scenes["tints"], strict=True):
        left, right = caption.split(" and ")
        first, second = (
            next(name for name, (top, bottom) in HEIGHTS.items() if top <= height < bottom) for height in heights
        )
        ground = "dark" if tint.mean() < DARK else GROUNDS[tint.argmax()]
        captions.append(f"{left} {first} on the left and {right} {second} on the right, on a {ground} ground")
    return captions


def siglip(args: BaseArguments) -> tuple[SiglipModel, SiglipProcessor, Callable]:
    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": MAX_LENGTH, "projection_size": VISION["hidden_size"]}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    model.logit_scale.data.fill_(np.log(10))
    model.logit_bias.data.fill_(-10)  # as in the paper
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def loss_of(model: SiglipModel, step: int) -> torch.Tensor:
        scenes = draw_scenes("train", args.batch_size, np.random.default_rng([args.seed, step]))
        tokens = tokenizer(scenes["captions"], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
        outputs = model(pixel_values=to_pixel_values(scenes["images"]), input_ids=tokens["input_ids"])
        embeds = outputs.image_embeds.float(), outputs.text_embeds.float()
        ids = caption_ids(scenes["captions"])
        return sigmoid_loss(*embeds, model.logit_scale.exp(), model.logit_bias, caption_ids=ids)

    return model, SiglipProcessor(images, tokenizer), loss_of


def synclr(args: BaseArguments) -> tuple[ViTModel, SiglipImageProcessorPil, Callable]:
    model = ViTModel(ViTConfig(**VISION), add_pooling_layer=False)
    width = VISION["hidden_size"]
    # Part of the model, so that the optimizer trains it. It is not saved.
    model.head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, 64))
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}

    def loss_of(model: ViTModel, step: int) -> torch.Tensor:
        rng = np.random.default_rng([args.seed, step])
        first = draw_scenes("train", args.batch_size // 2, rng)
        second = draw_scenes("train", args.batch_size // 2, rng, first)
        outputs = [model(to_pixel_values(scenes["images"])) for scenes in (first, second)]
        embeds = [model.head(output.last_hidden_state[:, 0]).float() for output in outputs]
        embeds = [torch.nn.functional.normalize(values, dim=-1) for values in embeds]
        return contrastive_loss(*embeds, 10, caption_ids=caption_ids(first["captions"]))

    return model, SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3), loss_of


def longclip(args: BaseArguments) -> tuple[CLIPModel, AutoProcessor, Callable]:
    model = CLIPModel.from_pretrained(clip_path())
    stretch_positions(model, LONG_CONTEXT, keep=9)  # a short caption has 9 tokens
    processor = AutoProcessor.from_pretrained(clip_path())
    processor.tokenizer.model_max_length = LONG_CONTEXT

    def loss_of(model: CLIPModel, step: int) -> torch.Tensor:
        scenes = draw_scenes("train", args.batch_size, np.random.default_rng([args.seed, step]))
        captions = long_captions(scenes)
        tokens = processor.tokenizer(captions, padding=True, return_tensors="pt")
        outputs = model(pixel_values=to_pixel_values(scenes["images"]), **tokens)
        embeds = outputs.image_embeds.float(), outputs.text_embeds.float()
        return contrastive_loss(*embeds, model.logit_scale.exp(), caption_ids=caption_ids(captions))

    return model, processor, loss_of


KINDS = {"siglip": siglip, "synclr": synclr, "longclip": longclip}


def train(args: BaseArguments) -> None:
    start = time.perf_counter()
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=True)
    model, processor, loss_of = KINDS[args.kind](args)
    if args.mixed_precision == "bf16":
        model.set_attn_implementation("eager")  # in bfloat16 on CPUs, fused attention is much slower backward
    schedule = Schedule(args.num_steps, args.learning_rate, warmup_steps=100, save_steps=250)
    fit(accelerator, model, adamw(model, 0.05), loss_of, schedule, Path(args.output_dir, "training_state"))
    if args.kind == "synclr":
        del model.head
    save_half(model, Path(args.output_dir))
    processor.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters, {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    train(HfArgumentParser(BaseArguments).parse_args_into_dataclasses()[0])
