"""Run an example on generated embeddings that a training-free map has moved onto the real ones.

    python benchmarks/paper/training_free.py coral PAIRS examples/train_gmail.py [ARGUMENT ...]

The map (`mean_shift` or `coral`, see gmail_hf.metrics) is fitted on the train split of PAIRS, f_r(generated)
against f_r(real); the example then reads mapped embeddings wherever it caches those of generated images.
"""

import runpy
import sys
from pathlib import Path

import datasets

import gmail_hf.training.embeddings
import gmail_hf.training.trainer
from gmail_hf import metrics
from gmail_hf.training.embeddings import cached_embeds, embeds_array
from gmail_hf.training.loading import load_pairs


def mapped(name: str, pairs: datasets.Dataset):
    """`cached_embeds`, with the map applied to generated images."""

    def cached(dataset, column, model, processor, modality="real", **kwargs):
        embeds = cached_embeds(dataset, column, model, processor, modality, **kwargs)
        if column != "generated_image":
            return embeds
        generated, real = (
            embeds_array(cached_embeds(pairs, f"{side}_image", model, processor)) for side in ("generated", "real")
        )
        move = getattr(metrics, name)(generated, real)
        rows = move(embeds_array(embeds)).astype("float32")
        return datasets.Dataset.from_dict({"image_embeds": list(rows)}, features=embeds.features)

    return cached


if __name__ == "__main__":
    name, pairs, script = sys.argv[1:4]
    replaced = mapped(name, load_pairs(pairs, "train"))
    gmail_hf.training.embeddings.cached_embeds = gmail_hf.training.trainer.cached_embeds = replaced
    sys.argv, sys.path[0] = sys.argv[3:], str(Path(script).parent)  # as python starts a script
    runpy.run_path(script, run_name="__main__")
