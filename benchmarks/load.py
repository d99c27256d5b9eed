"""
Pairs/s that reach the trainer from JPEGs of 640x480 and from the prepared pairs, in one process.

    python benchmarks/load.py --num_pairs 256

The images are smooth random fields, whose JPEGs are about as large as photographs'; the processor is CLIP's at 224
pixels. A row is read and collated as in training, with both images (`--train_real` in training) or with the generated
one alone, whose partner's embedding is cached.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_pairs", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="A JSON file for the results.")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    import datasets
    from transformers import CLIPImageProcessor

    from gmail_hf.data import undecoded
    from gmail_hf.generation.prepare import prepare_pairs

    datasets.disable_progress_bars()
    processor = CLIPImageProcessor()
    jpegs, size = make_jpegs(args.num_pairs)
    with tempfile.TemporaryDirectory() as folder:
        jpegs.save_to_disk(f"{folder}/jpegs")
        start = time.perf_counter()
        prepare_pairs(jpegs, processor, f"{folder}/prepared")
        preparing = time.perf_counter() - start
        results = {"num_pairs": args.num_pairs, "jpeg_bytes": size, "prepare_pairs_per_s": args.num_pairs / preparing}
        for name in ("jpegs", "prepared"):
            pairs = undecoded(datasets.load_from_disk(f"{folder}/{name}"))
            for columns in ("both images", "generated image"):
                speeds = [measure(pairs, processor, args.batch_size, columns) for _ in range(args.repeats)]
                results[f"{name}, {columns}"] = {"pairs_per_s": statistics.median(speeds), "repeats": speeds}
    print(
        f"{args.num_pairs} pairs of 640x480 JPEGs, {size / 1000:.0f} kB each on average; prepared at "
        f"{results['prepare_pairs_per_s']:.0f} pairs/s"
    )
    for columns in ("both images", "generated image"):
        slow, fast = (results[f"{name}, {columns}"]["pairs_per_s"] for name in ("jpegs", "prepared"))
        print(f"{columns}: JPEG {slow:.0f} pairs/s, prepared {fast:.0f} pairs/s, {fast / slow:.1f} times as many")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


def measure(pairs, processor, batch_size: int, columns: str) -> float:
    """Pairs/s through the collator."""
    import numpy as np

    from gmail_hf.data import GmailCollator

    collate = GmailCollator(processor)
    if columns == "generated image":
        pairs = pairs.remove_columns("real_image")
    embeds = {"real_embeds": np.zeros(512, np.float32)} if columns == "generated image" else {}
    start = time.perf_counter()
    for first in range(0, len(pairs), batch_size):
        rows = pairs.__getitems__(list(range(first, min(first + batch_size, len(pairs)))))
        collate([row | embeds for row in rows])
    return len(pairs) / (time.perf_counter() - start)


def make_jpegs(num_pairs: int):
    """Pairs of 640x480 JPEGs at quality 90, and their mean size in bytes."""
    import io

    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as PILImage

    rng = np.random.default_rng(0)

    def jpeg() -> bytes:
        coarse = PILImage.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize((640, 480), PILImage.Resampling.BICUBIC), np.float32)
        noisy = (field + rng.normal(0, 6, field.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        PILImage.fromarray(noisy).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    columns = {name: [jpeg() for _ in range(num_pairs)] for name in ("real_image", "generated_image")}
    size = sum(len(content) for contents in columns.values() for content in contents) / (2 * num_pairs)
    features = Features(real_image=Image(), generated_image=Image(), caption=Value("string"), image_id=Value("int64"))
    cells = {name: [{"bytes": content, "path": None} for content in contents] for name, contents in columns.items()}
    rows = cells | {"caption": ["a field"] * num_pairs, "image_id": list(range(num_pairs))}
    return Dataset.from_dict(rows, features=features), size


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
