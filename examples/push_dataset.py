"""
Push synthetic pairs to the Hub: the finished shards, of all splits, that the repository lacks, and a card of them.

    python examples/push_dataset.py out org/digits-pairs
    python examples/push_dataset.py coco-sd2 org/coco-sd2 --captions_license cc-by-4.0

It may run while shards are still being made, and again later: only new shards are uploaded.
"""

import argparse
import logging
import sys


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="The --output_dir of examples/generate_dataset.py.")
    parser.add_argument("repo_id", help="The data set repository, org/name.")
    parser.add_argument("--private", action="store_true", help="Make it private, if it is not there yet.")
    parser.add_argument("--captions_license", help="Licence of the captions, an identifier of the Hub: cc-by-4.0.")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    from gmail_hf.generation import push_dataset

    logging.basicConfig(format="%(message)s")
    logging.getLogger("gmail_hf").setLevel(logging.INFO)
    url = push_dataset(args.folder, args.repo_id, args.private, args.captions_license)
    print(f"The shards are at {url}.")


if __name__ == "__main__":
    main()
