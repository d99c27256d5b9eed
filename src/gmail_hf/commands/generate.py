"""
Generate an image for each caption of a data set, and store it with the caption and the real image, if there is one.

The first command uses the bundled digits and takes seconds, without a download (pip install "gmail-hf[digits]"). The
second one uses Stable Diffusion v2 on 8 GPUs, as in the paper:

    gmail-hf generate --dataset digits --generator digits --num_captions 96 --shard_size 16 --output_dir out
    accelerate launch --multi_gpu --num_processes 8 -m gmail_hf.commands.generate --dataset org/coco-captions \\
        --real_image_column image --output_dir coco-sd2 --push_to_hub --hub_dataset_id org/coco-sd2

With --split validation, the second command adds that split to the folder and to the repository. In a Slurm array with
50 shards per task and a shared folder, with these options in a YAML file:

    first=$((SLURM_ARRAY_TASK_ID * 50))
    gmail-hf generate --config captions.yaml --shard_range $first:$((first + 50))

To continue an interrupted run, run the same command again: it only generates the missing shards. Options in the YAML
file of --config are overridden by options on the command line.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cli import run
from .common import check_output_outside, logger
from .options import option, parse


@dataclass
class HubArguments:
    _argument_group_name = "upload"

    push_to_hub: str = option("Upload the finished shards to --hub_dataset_id.", "false", nargs="?", const="true")
    hub_dataset_id: str | None = option("Data set repository. Defaults to the name of --output_dir.")
    hub_private_repo: bool = option("Make a new repository private.", False)


def main(argv: Sequence[str]) -> None:
    from ..generation import SynthesisArguments

    args, hub = parse(argv, "generate", __doc__, (SynthesisArguments, HubArguments))
    push, repo_id = _push_options(hub, args.output_dir)
    check_output_outside(args.output_dir, args.dataset)

    from huggingface_hub import HfApi

    from ..generation.push import check_public, push_dataset
    from .bundled import synthesize

    is_main_process = int(os.environ.get("RANK", 0)) == 0
    if push:
        check_public(args.real_images)
    if push and is_main_process:  # without permission, this fails now rather than after days
        private = hub.hub_private_repo or None  # None is the organisation's default, False is public
        HfApi().create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    folder = synthesize(args)
    if is_main_process:
        print(f"{len(folder.finished())} of {folder.num_shards} shards are in {folder.path}/data.")
        if push:
            print(f"They are at {push_dataset(folder.path, repo_id, captions_license=args.captions_license)}.")


def _push_options(hub: HubArguments, output_dir: str) -> tuple[bool, str]:
    """Return whether to push, and the repository. `--push_to_hub REPO` is the form of the first releases."""
    switch = {"true": True, "false": False}.get(hub.push_to_hub.lower())
    if switch is None:
        logger.warning(
            f"--push_to_hub {hub.push_to_hub} is now --push_to_hub --hub_dataset_id {hub.push_to_hub}; the old form "
            "will be removed in the next release."
        )
        return True, hub.push_to_hub
    return switch, hub.hub_dataset_id or Path(output_dir).absolute().name


if __name__ == "__main__":
    run("generate")
