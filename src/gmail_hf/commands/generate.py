"""
Make synthetic pairs: a generated image for each caption, with the real image if there is one.

The bundled digits, in seconds and without a download (pip install "gmail-hf[digits]"), and Stable Diffusion v2 as in
the paper on 8 GPUs:

    gmail-hf generate --dataset digits --generator digits --num_captions 96 --shard_size 16 --output_dir out
    accelerate launch --multi_gpu --num_processes 8 -m gmail_hf.commands.generate --dataset org/coco-captions \\
        --real_image_column image --output_dir coco-sd2 --push_to_hub --hub_dataset_id org/coco-sd2

With --split validation, the second command adds that split to the folder and to the repository. In a Slurm array, with
50 shards per task and one folder that all tasks share:

    first=$((SLURM_ARRAY_TASK_ID * 50))
    gmail-hf generate --config coco.yaml --shard_range $first:$((first + 50))

The same command continues an interrupted run: it makes the missing shards only. Options come from --config, a YAML
file, then from the command line, which wins.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cli import run
from .common import logger
from .options import option, parse


@dataclass
class HubArguments:
    _argument_group_name = "upload"

    push_to_hub: str = option("Upload the finished shards to --hub_dataset_id.", "false", nargs="?", const="true")
    hub_dataset_id: str | None = option("Data set repository; by default the name of --output_dir.")
    hub_private_repo: bool = option("Make a new repository private.", False)


def main(argv: Sequence[str]) -> None:
    from ..generation import SynthesisArguments

    args, hub = parse(argv, "generate", __doc__, (SynthesisArguments, HubArguments))
    push, repo_id = _push_options(hub, args.output_dir)

    from huggingface_hub import HfApi

    from ..generation.push import check_public, push_dataset
    from .bundled import synthesize

    is_main_process = int(os.environ.get("RANK", 0)) == 0
    if push:
        check_public(args.real_images)
    if push and is_main_process:  # fails now rather than after days if the permission is missing
        HfApi().create_repo(repo_id, repo_type="dataset", private=hub.hub_private_repo, exist_ok=True)
    folder = synthesize(args)
    if is_main_process:
        print(f"{len(folder.finished())} of {folder.num_shards} shards are in {folder.path}/data.")
        if push:
            print(f"They are at {push_dataset(folder.path, repo_id)}.")


def _push_options(hub: HubArguments, output_dir: str) -> tuple[bool, str]:
    """Whether to push and where; `--push_to_hub REPO` is the spelling of the first releases."""
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
