"""
Store pairs as pixels at the size the model takes, so that training decodes no image.

    python -m gmail_hf.commands.prepare --dataset out --model digits --output_dir prepared
    gmail-hf train --dataset prepared --model digits
"""

import argparse

from transformers import AutoProcessor

from ..generation.prepare import prepare_pairs
from .bundled import load_pairs, model_path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="Pairs, as for training.")
    parser.add_argument("--split", default="train", help="Their split.")
    parser.add_argument("--model", required=True, help="The model whose processor is used, or 'digits'.")
    parser.add_argument("--output_dir", required=True, help="The folder to write.")
    parser.add_argument("--num_proc", type=int, help="Processes that decode.")
    args = parser.parse_args(argv)
    processor = AutoProcessor.from_pretrained(model_path(args.model))
    prepared = prepare_pairs(load_pairs(args.dataset, args.split), processor, args.output_dir, args.num_proc)
    print(f"{len(prepared)} pairs are in {args.output_dir}: train with --dataset {args.output_dir}.")


if __name__ == "__main__":
    main()
