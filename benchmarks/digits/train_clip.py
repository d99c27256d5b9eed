"""
Train the base CLIP of `gmail_hf.digits` from scratch on real train scenes and their captions, without generated
images.

    python benchmarks/digits/train_clip.py --output_dir clip
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from judge import caption_recall, embed_images, probe_accuracy
from loop import Schedule, adamw, fit, save_half, to_pixel_values
from tokenizer import MAX_LENGTH, build_tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer, HfArgumentParser

from gmail_hf.digits.scenes import IMAGE_SIZE, draw_scenes, load_digits
from gmail_hf.training.losses import contrastive_loss

VISION = {
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}


@dataclass
class ClipArguments:
    output_dir: str
    num_steps: int = 2_800
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    save_steps: int = 250
    seed: int = 0
    mixed_precision: str = "bf16"


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """A processor for 32x32 images that neither resizes nor crops them."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP with 1.3 million parameters and random weights."""
    special_tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        **special_tokens,
    }
    config = CLIPConfig(text_config=text_config, vision_config=VISION, projection_dim=64)
    # In bfloat16 on CPUs, fused attention is several times slower backward. A loaded model uses its own default.
    config._attn_implementation = "eager"
    return CLIPModel(config)


def caption_ids(captions: list[str]) -> torch.Tensor:
    """Integers `(n,)`, equal for equal captions."""
    return torch.from_numpy(np.unique(captions, return_inverse=True)[1])


def train(args: ClipArguments, accelerator: Accelerator, model: CLIPModel, processor: CLIPProcessor) -> None:
    """Train `model` in place. Every step draws new scenes from the train handwriting."""
    optimizer = adamw(model, args.weight_decay)
    optimizer.register_step_post_hook(lambda *_: model.logit_scale.data.clamp_(max=np.log(100)))

    def loss_of(model: CLIPModel, step: int) -> torch.Tensor:
        scenes = draw_scenes("train", args.batch_size, np.random.default_rng([args.seed, step]))
        tokens = processor.tokenizer(scenes["captions"], padding=True, return_tensors="pt").to(accelerator.device)
        with accelerator.autocast():
            outputs = model(pixel_values=to_pixel_values(scenes["images"], accelerator.device), **tokens)
        embeds = outputs.image_embeds.float(), outputs.text_embeds.float()
        ids = caption_ids(scenes["captions"]).to(accelerator.device)
        return contrastive_loss(*embeds, model.logit_scale.exp(), caption_ids=ids)

    schedule = Schedule(args.num_steps, args.learning_rate, args.warmup_steps, args.save_steps)
    fit(accelerator, model, optimizer, loss_of, schedule, Path(args.output_dir, "training_state"))


def main() -> None:
    args = HfArgumentParser(ClipArguments).parse_args_into_dataclasses()[0]
    start = time.perf_counter()
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    train(args, accelerator, model, processor)
    model.cpu()
    save_half(model, Path(args.output_dir))
    processor.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters, {(time.perf_counter() - start) / 60:.1f} minutes")

    model = CLIPModel.from_pretrained(args.output_dir).eval()
    probed = load_digits("train", 5_000)
    embeds = embed_images(model, processor, probed["real_image"][:])
    for split in ("validation", "test"):
        scenes = load_digits(split, 1_000)
        print(split, "image to caption:", caption_recall(model, processor, scenes))
        images = embed_images(model, processor, scenes["real_image"][:])
        accuracy = probe_accuracy(embeds, probed["digits"], images, scenes["digits"])
        print(split, "digit probe, left and right:", accuracy)


if __name__ == "__main__":
    main()
