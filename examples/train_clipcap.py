"""
Train a captioner on generated images, then caption real ones: `gmail-hf caption` on several devices.

    accelerate launch examples/train_clipcap.py
    accelerate launch examples/train_clipcap.py --config examples/configs/clipcap_coco.yaml --model gmail-coco \\
        --dataset org/coco-sd2 --output_dir clipcap-coco
"""

from gmail_hf.commands.cli import run

if __name__ == "__main__":
    run("caption")
