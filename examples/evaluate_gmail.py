"""
Score a model on benchmarks by name: `gmail-hf evaluate`.

    python examples/evaluate_gmail.py --model gmail-digits --benchmarks digits --output_dir scores
    python examples/evaluate_gmail.py --model org/gmail-coco --benchmarks coco,dtd --output_dir coco-scores
"""

from gmail_hf.commands.cli import run

if __name__ == "__main__":
    run("evaluate")
