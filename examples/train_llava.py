"""
Train LLaVA or a projector to Llama 3 on generated images, test it on real ones: `gmail-hf vlm` on several devices.

    accelerate launch examples/train_llava.py
    accelerate launch examples/train_llava.py --config examples/configs/llava_1.5_7b.yaml --model gmail-coco-336 \\
        --dataset org/coco-sd2 --output_dir llava-coco
"""

from gmail_hf.commands.cli import run

if __name__ == "__main__":
    run("vlm")
