"""
Generating images: `synthesize` compared with a bare loop around the pipeline, and the time of restarting a finished
    run.

On the CPU it uses the bundled generator, on CUDA the architecture of Stable Diffusion v2 with random weights and 512
pixels. The bare loop reads the captions, generates PIL images and drops them, without encoding or writing them.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from measuring import Settings, growth, row, take_turns, timed


def generate(settings: Settings) -> Iterator[dict[str, Any]]:
    """images/s on the same captions, seeds and batches, and the seconds of a finished run."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    num_images = settings.choose(64, 1024, 256)  # enough to make the fixed cost of a run small
    with tempfile.TemporaryDirectory() as folder:
        generator = "digits"
        if settings.device == "cuda":
            generator = f"{folder}/sd2"
            random_stable_diffusion_2(settings).save_pretrained(generator)
        for batch in settings.choose((16,), (16, 64), (8, 32)):
            sides, _ = bare_and_synthesize(generator, num_images, batch, folder)
            sides["bare"](batch)  # warms up
            speeds = take_turns(sides, settings.choose(2, 3, 3))
            note = f"{'Stable Diffusion v2' if settings.device == 'cuda' else 'digits'}, {num_images} images"
            yield row(
                "generate",
                f"synthesize, batch {batch}",
                "a bare loop",
                "images/s",
                speeds["synthesize"],
                speeds["bare"],
                ">= 0.97",
                note,
            )
        points = {
            rows: finished_run(rows, generator, folder)
            for rows in settings.choose((1_000, 10_000), (100_000, 1_000_000), (100_000, 1_000_000))
        }
        yield growth("generate", "seconds of a finished run by rows", points, "s")


def bare_and_synthesize(
    generator: str, num_images: int, batch_size: int, folder: str, **fields: Any
) -> tuple[dict[str, Callable[..., float]], Any]:
    """A function per side that generates the images and returns images/s, and the pipeline of both sides."""
    import torch

    from gmail_hf.commands.bundled import make_job, synthesize
    from gmail_hf.generation import SynthesisArguments
    from gmail_hf.generation.pipelines import device_of_process
    from gmail_hf.generation.sampler import row_seed

    names = itertools.count()
    path = write_captions([f"thing {row}" for row in range(num_images)], folder)

    def arguments() -> SynthesisArguments:
        return SynthesisArguments(
            output_dir=f"{folder}/{batch_size}-{next(names)}",
            dataset=path,
            generator=generator,
            batch_size=batch_size,
            shard_size=-(-num_images // 2),
            **fields,
        )

    described = make_job(arguments()).generator
    pipeline = described.load(device_of_process())

    def bare(count: int) -> None:
        captions = make_job(arguments()).captions
        for first in range(0, count, batch_size):
            rows = range(first, min(first + batch_size, count))
            generators = [torch.Generator().manual_seed(row_seed(0, captions.caption_ids[row], 0)) for row in rows]
            pipeline([captions.captions[row] for row in rows], generator=generators, **described.call)

    sides = {
        "bare": lambda count=num_images: count / timed(lambda: bare(count)),
        "synthesize": lambda: num_images / timed(lambda: synthesize(arguments(), pipeline)),
    }
    return sides, pipeline


def write_captions(captions: list[str], folder: str) -> str:
    """Write captions to a parquet file and return its path."""
    from datasets import Dataset

    path = f"{folder}/captions-{len(captions)}.parquet"
    Dataset.from_dict({"caption": captions, "image_id": list(range(len(captions)))}).to_parquet(path)
    return path


def finished_run(num_rows: int, generator: str, folder: str) -> float:
    """Seconds of a run whose rows are all finished: it reads captions, compares settings and lists shards."""
    from gmail_hf.commands.bundled import make_job, synthesize
    from gmail_hf.generation import SynthesisArguments
    from gmail_hf.generation.engines import CONTACT_SHEET

    captions = [f"a photograph of thing {row % 7919} near thing {row % 104729}" for row in range(num_rows)]
    path = write_captions(captions, folder)
    args = SynthesisArguments(output_dir=f"{folder}/finished-{num_rows}", dataset=path, generator=generator)
    job = make_job(args)  # also fills the cache of datasets for the parquet file
    job.open()
    for shard in job.shards:
        job.folder.shard_path(shard).touch()
    (job.folder.path / CONTACT_SHEET).touch()
    return timed(lambda: synthesize(args))


def random_stable_diffusion_2(settings: Settings) -> Any:
    """Stable Diffusion v2-base's architecture with random weights; the denoiser has 0.87 billion parameters."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from gmail_hf.digits import clip_path

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(clip_path(), model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        projection_dim=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(settings.device):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=768,
        )
        text_encoder = CLIPTextModel(text)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.bfloat16)
