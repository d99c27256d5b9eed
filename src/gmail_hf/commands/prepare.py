"""
Decode pairs in advance and store them as pixels at the model's input size, so that training does not decode images.

    gmail-hf prepare --dataset out --model digits --output_dir prepared
    gmail-hf train --dataset prepared --model digits
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .cli import run
from .common import PAIRS, check_output_not_read
from .options import REQUIRED, option, parse


@dataclass
class PrepareArguments:
    _argument_group_name = "preparation"

    dataset: str = option(PAIRS, REQUIRED)
    model: str = option("Hub id or folder of the model whose image processor is used, or digits.", REQUIRED)
    output_dir: str = option("New folder for the prepared pairs.", REQUIRED)
    split: str = option("Split of --dataset.", "train")
    num_proc: int | None = option("Number of processes for decoding.")


def main(argv: Sequence[str]) -> None:
    (args,) = parse(argv, "prepare", __doc__, (PrepareArguments,))
    check_output_not_read(args.output_dir, args.dataset)

    from ..generation.prepare import prepare_pairs
    from ..models.loading import load_processor
    from .bundled import load_pairs, model_path

    processor = load_processor(model_path(args.model))
    prepared = prepare_pairs(load_pairs(args.dataset, args.split), processor, args.output_dir, args.num_proc)
    print(f"{len(prepared)} pairs are in {args.output_dir}: train with --dataset {args.output_dir}.")


if __name__ == "__main__":
    run("prepare")
