"""
Resolves the name `digits` on the command line to the bundled pairs, captions, models, generator and benchmark.

Each function takes a name from the command line. `digits` selects the contents of [`gmail_hf.digits`]; other names
are used unchanged.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from .. import digits
from ..captioners import listed_words, nltk_nouns
from ..digits.benchmark import BENCHMARK
from ..digits.generate import GUIDANCE_SCALE, NUM_INFERENCE_STEPS
from ..digits.questions import QUESTIONS, scene_messages
from ..digits.scenes import DIGIT_NAMES
from ..evaluation import registry
from ..evaluation.own_data import own_benchmark
from ..generation import SynthesisArguments, engines, job
from ..generation.shards import ShardFolder
from ..training import loading
from ..vlm import Conversations

DIGITS = "digits"
BENCHMARKS = {**registry.BENCHMARKS, DIGITS: BENCHMARK}


def load_pairs(
    name: str,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    messages_column: str | None = None,
) -> Dataset:
    """
    Load pairs by name, see [`training.loading.load_pairs`]. `digits` loads [`digits.load_pairs`].

    Args:
        name, split, config_name, revision, columns, max_samples, messages_column: as in
            [`training.loading.load_pairs`].
        seed: seed of the digits scenes and their generated images.
    """
    if name == DIGITS:
        return loading.rename_columns(digits.load_pairs(split, max_samples, seed), columns or {}, name)
    return loading.load_pairs(name, split, config_name, revision, columns, max_samples, messages_column)


def model_path(name: str) -> str:
    """Return the name or path of a CLIP or GMAIL model for `from_pretrained`."""
    return digits.clip_path() if name == DIGITS else name


def text_model_path(name: str) -> str:
    """Return the name or path of a language model for `from_pretrained`."""
    return digits.llama_path() if name == DIGITS else name


def entity_finder(name: str) -> Callable[[str], list[str]]:
    """
    A function from a caption to its entities: `nltk`, a file with a word per line, or `digits`.

    Raises:
        FileNotFoundError: the file does not exist.
        ImportError, FileNotFoundError, ValueError: see [`captioners.nltk_nouns`] and [`captioners.listed_words`].
    """
    if name == "nltk":
        return nltk_nouns()
    if name == DIGITS:
        return listed_words(DIGIT_NAMES)
    if not Path(name).is_file():
        raise FileNotFoundError(f"--entities '{name}' is no file; give one with a word per line, or nltk.")
    return listed_words(Path(name).read_text(encoding="utf-8").splitlines())


def get_benchmark(name: str, place: str | None = None) -> registry.Benchmark:
    """As [`evaluation.get_benchmark`], from `BENCHMARKS`. Other names refer to the user's own data at `place`."""
    if name not in BENCHMARKS and place is not None:
        return own_benchmark(name, place)
    return registry.get_benchmark(name, BENCHMARKS)


def make_job(args: SynthesisArguments) -> job.Job:
    """As [`generation.job.make_job`], where `dataset` and `generator` may be `digits`."""
    rows = digits.load_digits(args.split, args.num_captions) if args.dataset == DIGITS else None
    if args.generator != DIGITS:
        return job.make_job(args, rows)
    steps = args.num_inference_steps or NUM_INFERENCE_STEPS
    guidance = GUIDANCE_SCALE if args.guidance_scale is None else args.guidance_scale
    args = replace(args, num_inference_steps=steps, guidance_scale=guidance)
    return job.make_job(args, rows, digits.generator_path())


def synthesize(args: SynthesisArguments, pipeline: Any = None) -> ShardFolder:
    """As [`generation.synthesize`], with [`make_job`]."""
    return engines.synthesize(args, pipeline, make_job)


def conversations(rows: Dataset, image_column: str, name: str, **options: Any) -> Conversations:
    """
    Create a [`vlm.Conversations`] of a data set. For digits scenes, which have the columns `digits` and `colors`, it
    asks all of [`digits.questions.QUESTIONS`], unless they have a column of conversations.
    """
    ask = {kind: partial(scene_messages, questions=[kind]) for kind in QUESTIONS}
    scenes = {"digits", "colors"} <= set(rows.column_names)
    return Conversations(rows, image_column, name, ask=ask if scenes else None, **options)
