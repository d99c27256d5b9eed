"""
Generate, align, measure and draw on the bundled digits, in minutes: `gmail-hf demo`.

    python examples/demo.py
    python examples/demo.py --output_dir demo-near --guidance_scale 2 --num_inference_steps 20
"""

from gmail_hf.commands.cli import run

if __name__ == "__main__":
    run("demo")
