"""
Push the finished shards of generated pairs and their card to the Hub: `gmail-hf push`.

    python examples/push_dataset.py out org/digits-pairs
    python examples/push_dataset.py coco-sd2 org/coco-sd2 --captions_license cc-by-4.0
"""

from gmail_hf.commands.cli import run

if __name__ == "__main__":
    run("push")
