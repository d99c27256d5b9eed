"""
Generate pairs, in one process or several: `gmail-hf generate`.

    python examples/generate_dataset.py --dataset digits --generator digits --num_captions 96 --shard_size 16 \\
        --output_dir out
    accelerate launch examples/generate_dataset.py --dataset org/coco-captions --output_dir coco-sd2 \\
        --push_to_hub --hub_dataset_id org/coco-sd2
"""

from gmail_hf.commands.cli import run

if __name__ == "__main__":
    run("generate")
