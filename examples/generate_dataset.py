"""
Make synthetic pairs: a generated image for every caption, beside the real one where there is one.

The embedded default, in seconds and without a download (needs `pip install "gmail-hf[digits]"`):

    python examples/generate_dataset.py --dataset_name digits --generator digits --num_captions 96 --shard_size 16 \\
        --output_dir out

Stable Diffusion v2 as in the paper, on 8 GPUs:

    accelerate launch --multi_gpu --num_processes 8 examples/generate_dataset.py \\
        --dataset_name org/coco-captions --real_image_column image --output_dir coco-sd2 --push_to_hub org/coco-sd2

The same with `--dataset_split validation` adds that split to the folder and to the repository.

A Slurm array, 50 shards a task, all in one shared folder:

    first=$((SLURM_ARRAY_TASK_ID * 50))
    python examples/generate_dataset.py --config coco.yaml --shard_range $first:$((first + 50))

Whatever interrupts it, the same command goes on: it makes the shards that are missing and no other. Settings come
from `--config`, a YAML file of the options, and then from the command line, which wins.
"""

import argparse
import logging
import os
import sys


def parse_args(argv: list[str]):
    """[`SynthesisArguments`] of a command line and its `--config`."""
    import yaml
    from transformers import HfArgumentParser

    from gmail_hf.generation import SynthesisArguments

    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config", help="A YAML file of these options.")
    parser = HfArgumentParser(SynthesisArguments, description=__doc__, parents=[config])
    path = config.parse_known_args(argv)[0].config
    if path is not None:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
        unknown = sorted(set(values) - {action.dest for action in parser._actions})
        if unknown:
            parser.error(f"{path} has unknown options {unknown}")
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(argv)[0]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)

    from huggingface_hub import HfApi

    from gmail_hf.commands.bundled import synthesize
    from gmail_hf.generation import push_dataset

    logging.basicConfig(format="%(message)s")
    logging.getLogger("gmail_hf").setLevel(logging.INFO)
    is_main_process = int(os.environ.get("RANK", 0)) == 0
    if args.push_to_hub and is_main_process:  # a missing permission is told now, not after days
        HfApi().create_repo(args.push_to_hub, repo_type="dataset", private=args.private, exist_ok=True)
    folder = synthesize(args)
    if is_main_process:
        print(f"{len(folder.finished())} of {folder.num_shards} shards are in {folder.path}/data.")
        if args.push_to_hub:
            url = push_dataset(folder.path, args.push_to_hub)
            print(f"They are at {url}.")


if __name__ == "__main__":
    main()
