"""
The name `digits` on the command line: the pairs, captions, models, generator and benchmark bundled with the package.

Each function takes a name as a user gives it. `digits` becomes what [`gmail_hf.digits`] holds; any other name is passed
on unchanged.
"""

from typing import Any

from datasets import Dataset

from ..evaluation.registry import BENCHMARKS, Benchmark, get_benchmark
from ..generation import SynthesisArguments
from ..generation import synthesize as _synthesize
from ..generation.shards import ShardFolder
from ..training import loading
from ..vlm import Conversations

DIGITS = "digits"

__all__ = [
    "BENCHMARKS",
    "DIGITS",
    "Benchmark",
    "conversations",
    "get_benchmark",
    "load_pairs",
    "model_path",
    "synthesize",
    "text_model_path",
]


def load_pairs(
    name: str,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Dataset:
    """
    Pairs by name, see [`training.loading.load_pairs`]; `digits` are those of [`digits.load_pairs`].

    Args:
        name, split, config_name, revision, columns, max_samples: as there.
        seed: of the digits scenes and their generated images.
    """
    if name == DIGITS:
        from ..digits import load_pairs

        return loading.rename_columns(load_pairs(split, max_samples, seed), columns or {}, name)
    return loading.load_pairs(name, split, config_name, revision, columns, max_samples)


def model_path(name: str) -> str:
    """What `from_pretrained` takes for a CLIP or GMAIL model of this name."""
    if name == DIGITS:
        from ..digits import clip_path

        return clip_path()
    return name


def text_model_path(name: str) -> str:
    """What `from_pretrained` takes for a language model of this name."""
    if name == DIGITS:
        from ..digits import llama_path

        return llama_path()
    return name


def synthesize(args: SynthesisArguments, pipeline: Any = None) -> ShardFolder:
    """As [`generation.synthesize`], where `dataset_name` and `generator` may be `digits`."""
    return _synthesize(args, pipeline)


def conversations(rows: Dataset, image_column: str, name: str, **options: Any) -> Conversations:
    """
    A [`vlm.Conversations`] of a data set; scenes of digits without a column of conversations give one row for each of
    [`digits.questions.QUESTIONS`].
    """
    return Conversations(rows, image_column, name, **options)
