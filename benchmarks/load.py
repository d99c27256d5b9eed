"""
Pairs/s that reach the trainer with two worker processes, from JPEGs of 640x480 and from prepared pairs.

The bare loop only decodes the JPEGs of a pair with PIL and resizes their shorter edge to 224 pixels. It neither crops
nor normalises, and sends nothing to the main process. Rows with one image are the default of stage 1, where the
partner's embedding is cached.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import subjects
from measuring import Settings, row, take_turns, timed

WORKERS, BATCH = 2, 32


def load(settings: Settings) -> Iterator[dict[str, Any]]:
    """Pairs/s of all sides in a `DataLoader` with the same settings, without the time to start its workers."""
    import datasets

    from gmail_hf.generation.prepare import prepare_pairs
    from gmail_hf.training.data import undecoded

    datasets.disable_progress_bars()
    count = settings.choose(128, 256, 4096)
    jpegs, processor = subjects.jpeg_pairs(count), subjects.image_processor()
    with tempfile.TemporaryDirectory() as folder:
        jpegs.save_to_disk(f"{folder}/jpegs")
        jpegs = datasets.load_from_disk(f"{folder}/jpegs")
        prepare_pairs(jpegs, processor, f"{folder}/prepared")
        prepared = datasets.load_from_disk(f"{folder}/prepared")
        sides = {}
        for suffix, unused in {"": [], ", one image": ["real_image"]}.items():
            read, stored = (undecoded(pairs).remove_columns(unused) for pairs in (jpegs, prepared))
            collate = gmail_collator(processor)
            sides |= {
                "bare" + suffix: reader(read, decode_and_resize),
                "JPEG" + suffix: reader(read, collate),
                "prepared" + suffix: reader(stored, collate),
                "prepared, no workers" + suffix: reader(stored, collate, workers=0),
            }
        speeds = take_turns(sides, settings.choose(2, 5, 5))
    note = f"{count} pairs, {WORKERS} workers"
    for name, ours in speeds.items():
        kind, _, suffix = name.partition(", one")
        if kind != "bare":
            bare = speeds["bare" + (", one" + suffix) * bool(suffix)]
            aim = ">= 0.9" if kind == "JPEG" else ">= 10"
            yield row("load", name, "PIL decode + resize", "pairs/s", ours, bare, aim, note)


def reader(pairs: Any, collate: Callable[[list[dict]], Any], workers: int = WORKERS) -> Callable[[], float]:
    """A function that reads all pairs once in random order and returns pairs/s."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        pairs,
        BATCH,
        shuffle=True,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
    )

    def use(batch: Any) -> None:
        for name in batch if isinstance(batch, dict) else ():
            if name.endswith("pixel_values"):
                batch[name].float().sub_(batch["pixel_mean"][:, None, None]).div_(batch["pixel_std"][:, None, None])

    def read() -> float:
        return len(loader) * BATCH / timed(lambda: [use(batch) for batch in loader])

    read()  # starts the workers
    return read


def gmail_collator(processor: Any) -> Callable[[list[dict]], Any]:
    """`GmailTrainer`'s collator. Rows with one image get a constant embedding in place of a cached one."""
    import numpy as np

    from gmail_hf.training.data import GmailCollator

    collate, embeds = GmailCollator(processor, eight_bit=True), {"real_embeds": np.zeros(512, np.float32)}
    return lambda rows: collate(rows if "real_image" in rows[0] else [row | embeds for row in rows])


def decode_and_resize(rows: list[dict[str, Any]]) -> int:
    from PIL import Image

    for images in rows:
        for column in ("real_image", "generated_image"):
            if column in images:
                with Image.open(io.BytesIO(images[column]["bytes"])) as image:
                    scale = 224 / min(image.size)
                    size = round(scale * image.width), round(scale * image.height)
                    image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return len(rows)
