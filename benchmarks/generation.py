"""
What making pairs costs beside the bare pipeline, and how soon a run knows where it stands.

    python benchmarks/generation.py --generator digits --num_images 256

prints three things: images/s of `synthesize` against a bare loop around the pipeline on the same captions, seeds and
batches (the median of alternating repeats); images/s of the loop by batch size; and the seconds that a run of a
million finished rows takes to find out that there is nothing to do. On a GPU, with the architecture of Stable
Diffusion v2 at random weights, 512 pixels, 50 steps:

    python benchmarks/generation.py --generator sd2-random --num_images 256 --batch_sizes 8 16 32

The bare loop reads the captions, makes PIL images and drops them: it neither encodes nor writes.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="digits", help="A pipeline by id or folder, 'digits' or 'sd2-random'.")
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--finished_rows", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, help="A JSON file for the results.")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        generator = args.generator
        if generator == "sd2-random":
            generator = f"{folder}/sd2"
            random_stable_diffusion_2().save_pretrained(generator)
        results = {
            "machine": f"{platform.machine()}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}",
            "torch": torch.__version__,
            "threads": 1 if not torch.cuda.is_available() else torch.get_num_threads(),
            "generator": args.generator,
            "speed": {size: measure_speed(args, generator, size, folder) for size in args.batch_sizes},
            "state_of_finished_rows": measure_state(args.finished_rows, generator, folder),
        }
    for size, speed in results["speed"].items():
        print(
            f"batch {size:>3}: bare {speed['bare']:.2f} images/s, synthesize {speed['synthesize']:.2f} images/s, "
            f"overhead {speed['overhead']:+.1%} (repeats {', '.join(f'{o:+.1%}' for o in speed['overheads'])})"
        )
    state = results["state_of_finished_rows"]
    print(
        f"{args.finished_rows:,} finished rows: nothing to do after {state['seconds']:.2f} s, "
        f"of which {state['listing_seconds']:.3f} s for listing {state['shards']} shards"
    )
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


def measure_speed(args, generator: str, batch_size: int, folder: str) -> dict:
    """Images/s of a bare loop and of `synthesize`, one after the other, several times, after a warm-up."""
    import torch

    from gmail_hf.generation import SynthesisArguments, synthesize
    from gmail_hf.generation.captions import load_captions
    from gmail_hf.generation.pipelines import describe_generator, device_of_process
    from gmail_hf.generation.sampler import row_seed

    def arguments(name: str) -> SynthesisArguments:
        return SynthesisArguments(
            output_dir=f"{folder}/{name}",
            dataset_name="digits",
            generator=generator,
            num_captions=args.num_images,
            num_inference_steps=args.num_inference_steps,
            batch_size=batch_size,
            shard_size=-(-args.num_images // 2),
        )

    described = describe_generator(arguments("bare"))
    pipeline = described.load(arguments("bare"), device_of_process())

    def bare(count: int) -> float:
        start = time.perf_counter()
        captions = load_captions(arguments("bare"))
        for first in range(0, count, batch_size):
            rows = range(first, min(first + batch_size, count))
            generators = [torch.Generator().manual_seed(row_seed(0, captions.caption_ids[row], 0)) for row in rows]
            pipeline([captions.captions[row] for row in rows], generator=generators, **described.call)
        return time.perf_counter() - start

    def whole(repeat: int) -> float:
        start = time.perf_counter()
        synthesize(arguments(f"{batch_size}-{repeat}"), pipeline)
        return time.perf_counter() - start

    bare(batch_size)
    times = [(bare(args.num_images), whole(repeat)) for repeat in range(args.repeats)]
    overheads = [ours / theirs - 1 for theirs, ours in times]
    return {
        "bare": args.num_images / statistics.median(theirs for theirs, _ in times),
        "synthesize": args.num_images / statistics.median(ours for _, ours in times),
        "overhead": statistics.median(overheads),
        "overheads": overheads,
    }


def measure_state(num_rows: int, generator: str, folder: str) -> dict:
    """Seconds until a run knows that all its rows are finished: captions read, settings compared, shards listed."""
    from datasets import Dataset

    from gmail_hf.generation import SynthesisArguments, synthesize
    from gmail_hf.generation.engines import CONTACT_SHEET, ShardWorker

    path = f"{folder}/captions.parquet"
    captions = [f"a photograph of thing {row % 7919} beside thing {row % 104729}" for row in range(num_rows)]
    Dataset.from_dict({"caption": captions, "image_id": list(range(num_rows))}).to_parquet(path)
    args = SynthesisArguments(output_dir=f"{folder}/finished", dataset_name=path, generator=generator)
    worker = ShardWorker(args)  # also builds the cache that datasets keeps of the parquet file
    worker.open()
    for shard in range(worker.folder.num_shards):
        worker.folder.shard_path(shard).touch()
    (worker.folder.path / CONTACT_SHEET).touch()
    start = time.perf_counter()
    worker.folder.finished()
    listing = time.perf_counter() - start
    start = time.perf_counter()
    synthesize(args)
    return {
        "seconds": time.perf_counter() - start,
        "listing_seconds": listing,
        "shards": worker.folder.num_shards,
        "rows": num_rows,
    }


def random_stable_diffusion_2():
    """Stable Diffusion v2-base's architecture, 0.87 billion parameters of the denoiser, at random weights."""
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
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.bfloat16)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
