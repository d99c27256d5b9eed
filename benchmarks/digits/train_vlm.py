"""
Train a small Idefics 3 on captions of real training scenes, in minutes on a CPU.

    python benchmarks/digits/train_vlm.py --output_dir vlm

Idefics 3 is the architecture of SmolVLM: a SigLIP-like tower without a class token, a pixel shuffle that keeps a
quarter of the tokens, one linear layer, and a Llama. The tower starts from the layers of the bundled CLIP except the
last one, whose patch tokens were never trained. The language model is the bundled Llama and is frozen. The model is
trained on captions only; it answers questions because its language model can.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from loop import Schedule, adamw, fit, save_half, to_pixel_values
from transformers import (
    AutoTokenizer,
    CLIPModel,
    HfArgumentParser,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaForCausalLM,
)

from gmail_hf.digits import clip_path, llama_path
from gmail_hf.digits.questions import QUESTIONS
from gmail_hf.digits.scenes import IMAGE_SIZE, draw_scenes
from gmail_hf.vlm.chat import with_images

IGNORED = -100
SCALE_FACTOR = 2  # the pixel shuffle turns 16 patches into 4 tokens
IMAGE_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


@dataclass
class VlmArguments:
    output_dir: str
    num_steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


def build_processor() -> Idefics3Processor:
    """A processor for unsplit 32 x 32 images in [-1, 1], with the bundled Llama's tokenizer and the image tokens."""
    tokenizer = AutoTokenizer.from_pretrained(llama_path(), padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS)})
    size = {"longest_edge": IMAGE_SIZE}
    scale = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False, **scale)
    patches = CLIPModel.from_pretrained(clip_path()).vision_model.embeddings.num_patches
    template = with_images(tokenizer.get_chat_template())
    return Idefics3Processor(images, tokenizer, patches // SCALE_FACTOR**2, chat_template=template)


def build_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    """A model with the bundled weights in its tower and language model, and random weights elsewhere."""
    llama, clip = LlamaForCausalLM.from_pretrained(llama_path()), CLIPModel.from_pretrained(clip_path())
    llama.resize_token_embeddings(len(processor.tokenizer))
    source = clip.vision_model
    source.encoder.layers = source.encoder.layers[:-1]
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "hidden_act")
    vision = {name: getattr(clip.config.vision_config, name) for name in names}
    vision["num_hidden_layers"] = len(source.encoder.layers)
    config = Idefics3Config(
        vision_config=vision,
        text_config=llama.config.to_dict(),
        scale_factor=SCALE_FACTOR,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
        pad_token_id=llama.config.pad_token_id,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(llama.model.state_dict())
    model.lm_head.load_state_dict(llama.lm_head.state_dict())
    model.generation_config = llama.generation_config
    tower = model.model.vision_model
    tower.encoder.load_state_dict(source.encoder.state_dict())
    tower.post_layernorm.load_state_dict(source.post_layernorm.state_dict())
    with torch.no_grad():
        tower.embeddings.patch_embedding.weight.copy_(source.embeddings.patch_embedding.weight)
        tower.embeddings.patch_embedding.bias.zero_()
        tower.embeddings.position_embedding.weight.copy_(source.embeddings.position_embedding.weight[1:])
    model.model.text_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    return model


def train(args: VlmArguments, model: Idefics3ForConditionalGeneration, processor: Idefics3Processor) -> None:
    """Train `model` in place on new scenes in each step. All captions have the same number of tokens."""
    tokenizer = processor.tokenizer
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS["caption"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    blank = draw_scenes("train", 1, np.random.default_rng(0))["images"][0]
    prompt = processor(text=prompt, images=[[blank]], add_special_tokens=False, return_tensors="pt").input_ids
    prompt = prompt.expand(args.batch_size, -1)

    def loss_of(model: Idefics3ForConditionalGeneration, step: int) -> torch.Tensor:
        scenes = draw_scenes("train", args.batch_size, np.random.default_rng([args.seed, step]))
        captions = [caption + tokenizer.eos_token for caption in scenes["captions"]]
        answers = tokenizer(captions, add_special_tokens=False, return_tensors="pt").input_ids
        labels = torch.cat([torch.full_like(prompt, IGNORED), answers], dim=1)
        ids = torch.cat([prompt, answers], dim=1)
        return model(input_ids=ids, pixel_values=to_pixel_values(scenes["images"])[:, None], labels=labels).loss

    schedule = Schedule(args.num_steps, args.learning_rate, warmup_steps=50, save_steps=250)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    fit(accelerator, model, adamw(model, 0.05), loss_of, schedule, Path(args.output_dir, "training_state"))


def make(args: VlmArguments) -> None:
    start = time.perf_counter()
    set_seed(args.seed)
    processor = build_processor()
    model = build_model(processor)
    train(args, model, processor)
    save_half(model, Path(args.output_dir))
    processor.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters, {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    make(HfArgumentParser(VlmArguments).parse_args_into_dataclasses()[0])
