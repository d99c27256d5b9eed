"""
Train the generator of `gmail_hf.digits` from scratch, a latent diffusion model of the real train scenes.

    python benchmarks/digits/train_generator.py --output_dir generator

It first trains the autoencoder (32x32x3 <-> 8x8x4), then the denoiser on its latents, conditioned on the frozen text
encoder of the base CLIP. An interrupted run resumes from its last saved state.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from loop import Schedule, fit, save_half, to_pixel_values
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, HfArgumentParser

from gmail_hf.digits import clip_path
from gmail_hf.digits.scenes import IMAGE_SIZE, draw_scenes

NUM_TRAIN_TIMESTEPS = 1_000
LATENT_SIZE = IMAGE_SIZE // 4


@dataclass
class GeneratorArguments:
    output_dir: str
    clip: str = clip_path()
    vae_steps: int = 2_000
    vae_batch_size: int = 64
    vae_learning_rate: float = 2e-3
    kl_weight: float = 5e-4
    num_scenes: int = 40_000
    unet_steps: int = 8_000
    unet_batch_size: int = 96
    unet_learning_rate: float = 1.5e-3
    caption_dropout: float = 0.1
    ema_decay: float = 0.998
    warmup_steps: int = 200
    save_steps: int = 250
    seed: int = 0
    mixed_precision: str = "bf16"


def build_vae() -> AutoencoderKL:
    """An autoencoder with 0.4 million parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet(text_width: int) -> UNet2DConditionModel:
    """A denoiser with 1.4 million parameters. It attends to the caption at 4x4, where a digit covers about 2x2."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        use_linear_projection=True,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule with v-prediction, for training and sampling."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
    )


def train_vae(args: GeneratorArguments, accelerator: Accelerator) -> AutoencoderKL:
    """Train the autoencoder on new train scenes, with the absolute error and a small KL term."""
    set_seed(args.seed)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=1e-4, betas=(0.9, 0.98))

    def loss_of(vae: AutoencoderKL, step: int) -> torch.Tensor:
        scenes = draw_scenes("train", args.vae_batch_size, np.random.default_rng([args.seed, 1, step]))
        pixel_values = to_pixel_values(scenes["images"], accelerator.device)
        with accelerator.autocast():
            posterior = vae.encode(pixel_values).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
        error = (reconstruction.float() - pixel_values).abs().mean()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return error + args.kl_weight * kl

    schedule = Schedule(args.vae_steps, args.vae_learning_rate, args.warmup_steps, args.save_steps)
    folder = Path(args.output_dir, "training_state", "vae")
    return fit(accelerator, vae, optimizer, loss_of, schedule, folder).eval()


@torch.no_grad()
def encode_scenes(
    args: GeneratorArguments, accelerator: Accelerator, vae: AutoencoderKL
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Means and standard deviations of the latents of `num_scenes` train scenes, `(n, 4, 8, 8)`, and the captions.

    Sets the autoencoder's scaling factor, with which latents have unit variance.
    """
    means, deviations, captions = [], [], []
    for start in tqdm(range(0, args.num_scenes, 500), desc="encode scenes"):
        scenes = draw_scenes("train", 500, np.random.default_rng([args.seed, 2, start]))
        posterior = vae.encode(to_pixel_values(scenes["images"], accelerator.device)).latent_dist
        means.append(posterior.mean)
        deviations.append(posterior.std)
        captions += scenes["captions"]
    mean, deviation = torch.cat(means), torch.cat(deviations)
    variance = mean.var() + deviation.square().mean()
    vae.register_to_config(scaling_factor=variance.rsqrt().item())
    return mean * vae.config.scaling_factor, deviation * vae.config.scaling_factor, captions


@torch.no_grad()
def embed_captions(
    captions: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token states `(distinct captions + 1, 16, width)` with the empty caption first, and each scene's row `(n,)`."""
    distinct, index = np.unique(captions, return_inverse=True)
    tokens = tokenizer(["", *distinct], padding="max_length", return_tensors="pt").input_ids
    states = [text_encoder(ids)[0] for ids in tokens.split(500)]
    return torch.cat(states).to(device), torch.from_numpy(index + 1).to(device)


def train_unet(
    args: GeneratorArguments,
    accelerator: Accelerator,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
) -> UNet2DConditionModel:
    """Train the denoiser on the latents and return the moving average of its weights."""
    mean, deviation, captions = encode_scenes(args, accelerator, vae)
    text_states, caption_index = embed_captions(captions, tokenizer, text_encoder, accelerator.device)
    set_seed(args.seed)
    unet = build_unet(text_encoder.config.hidden_size)
    # In bfloat16 on CPUs, fused attention is several times slower backward. A loaded model uses its own default.
    unet.set_attn_processor(AttnProcessor())
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=1e-2, betas=(0.9, 0.98))
    alphas = build_scheduler().alphas_cumprod.to(accelerator.device)

    def loss_of(unet: UNet2DConditionModel, step: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(mean), (args.unet_batch_size,), generator=random)
        jitter, noise = torch.randn(2, args.unet_batch_size, *mean.shape[1:], generator=random).to(accelerator.device)
        timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, chosen.shape, generator=random).to(accelerator.device)
        dropped = torch.rand(chosen.shape, generator=random) < args.caption_dropout
        rows = caption_index[chosen].masked_fill(dropped.to(accelerator.device), 0)  # 0 is the empty caption
        latents = mean[chosen] + deviation[chosen] * jitter
        signal = alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        with accelerator.autocast():
            velocity = unet(signal * latents + spread * noise, timesteps, text_states[rows]).sample
        return (velocity.float() - (signal * noise - spread * latents)).square().mean()

    schedule = Schedule(args.unet_steps, args.unet_learning_rate, args.warmup_steps, args.save_steps)
    folder = Path(args.output_dir, "training_state", "unet")
    return fit(accelerator, unet, optimizer, loss_of, schedule, folder, args.ema_decay)


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
) -> None:
    """Save a folder for `StableDiffusionPipeline.from_pretrained`, with float16 weights."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for name in ("vae", "text_encoder", "unet"):
        save_half(getattr(pipeline, name), folder / name)


def main() -> None:
    args = HfArgumentParser(GeneratorArguments).parse_args_into_dataclasses()[0]
    start = time.perf_counter()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    tokenizer = CLIPTokenizer.from_pretrained(args.clip)
    text_encoder = CLIPTextModel.from_pretrained(args.clip)
    vae = train_vae(args, accelerator)
    unet = train_unet(args, accelerator, vae, tokenizer, text_encoder)
    save_pipeline(Path(args.output_dir), vae.cpu(), unet.cpu(), tokenizer, text_encoder)
    minutes = (time.perf_counter() - start) / 60
    print(f"{unet.num_parameters():,} + {vae.num_parameters():,} parameters, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
