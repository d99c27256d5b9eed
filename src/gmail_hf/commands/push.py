"""
Upload finished shards of all splits that the Hub repository lacks, and their card.

    gmail-hf push out org/digits-pairs
    gmail-hf push coco-sd2 org/coco-sd2 --captions_license cc-by-4.0

You can run it while gmail-hf generate is running, and again later: only new shards are uploaded.
"""

from collections.abc import Sequence

from .cli import run
from .options import OptionParser


def main(argv: Sequence[str]) -> None:
    parser = OptionParser("push", __doc__)
    parser.usage = "%(prog)s FOLDER REPO [--OPTION VALUE ...]"
    parser.add_argument("folder", help="The --output_dir of gmail-hf generate.")
    parser.add_argument("repo", help="Data set repository, org/name.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make a new repository private.")
    parser.add_argument("--captions_license", help="Licence of the captions, as an identifier of the Hub: cc-by-4.0.")
    args = parser.parse_args(parser.renamed_words(argv))

    from ..generation import push_dataset

    private = args.hub_private_repo or None  # None is the organisation's default, False is public
    url = push_dataset(args.folder, args.repo, private, args.captions_license)
    print(f"The shards are at {url}.")


if __name__ == "__main__":
    run("push")
