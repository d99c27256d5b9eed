"""A run's resolved captions, generator, settings and folder."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from .arguments import SynthesisArguments
from .captions import Captions, load_captions
from .pipelines import Generator, describe_generator
from .shards import ShardFolder

# Arguments that determine the shards' bytes directly. The others are resolved first, or do not affect the bytes.
OWN_SETTINGS = ("images_per_caption", "image_size", "compile", "batch_size", "seed", "shard_size", "image_format")


@dataclass(frozen=True)
class Job:
    """
    Result of [`make_job`].

    Args:
        captions ([`Captions`]): all captions of the split.
        generator ([`Generator`]): the pipeline, not yet loaded.
        settings (`dict`): everything that determines the shards' bytes, as recorded in the manifest.
        source (`dict`): origin of the captions, also recorded in the manifest.
        folder ([`ShardFolder`]): folder of the shards.
        shards (`range`): the shards to generate in this run.
    """

    captions: Captions
    generator: Generator
    settings: dict[str, Any]
    source: dict[str, Any]
    folder: ShardFolder
    shards: range

    def open(self) -> None:
        """Create the folder, or check that it has the same settings. Raises the errors of [`ShardFolder.open`]."""
        self.folder.open(self.settings, source=self.source)

    def pending(self) -> list[int]:
        """Return the unfinished shards of this run."""
        return sorted(set(self.shards) - self.folder.finished())


def make_job(args: SynthesisArguments, rows: Dataset | None = None, generator_path: str | None = None) -> Job:
    """
    Read the captions and the index of the pipeline. Nothing is written, and no weights are loaded.

    Args:
        args: settings of the run.
        rows: data set of the captions, if `args.dataset` is only its name.
        generator_path: folder of the pipeline, if `args.generator` is only its name.

    Raises:
        OSError, ValueError: see [`describe_generator`] and [`load_captions`].
    """
    generator = describe_generator(args, generator_path)
    captions = load_captions(args) if rows is None else Captions(rows, args)
    arguments = asdict(args)
    settings = {name: value for name, value in arguments.items() if name in OWN_SETTINGS} | {
        "captions": captions.fingerprint(),
        "num_captions": len(captions),
        "real_images": captions.real_images,
        "safety_policy": args.safety_policy,
        "negative_prompt": args.negative_prompt,
        "generator": generator.name,
        "generator_revision": generator.revision,
        "pipeline": generator.pipeline_class.__name__,
        "scheduler": generator.scheduler,
        "dtype": generator.dtype,
        "num_inference_steps": generator.call["num_inference_steps"],
        "guidance_scale": generator.guidance_scale,
    }
    source = {
        # Relative to another folder, a path would pass for a Hub id.
        "dataset_name": os.path.abspath(args.dataset) if os.path.exists(args.dataset) else args.dataset,
        "dataset_config_name": args.dataset_config,
        "dataset_revision": args.dataset_revision,
        "dataset_split": args.split,
        "caption_column": args.caption_column,
        "captions_license": args.captions_license,
    }
    num_rows = len(captions) * args.images_per_caption
    folder = ShardFolder(Path(args.output_dir), num_rows, args.shard_size, args.split_name)
    return Job(captions, generator, settings, source, folder, args.shards(folder.num_shards))
