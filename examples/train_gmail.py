"""
Align the branches of a GMAIL CLIP (stage 1) or adapt its text encoder (stage 2): `gmail-hf train` on several devices.

    accelerate launch examples/train_gmail.py
    accelerate launch examples/train_gmail.py --config examples/configs/coco.yaml --dataset org/coco-sd2 \\
        --output_dir gmail-coco
"""

from gmail_hf.commands.cli import run

if __name__ == "__main__":
    run("train")
