"""
Benchmarks and the diagnosis, as run by `gmail-hf evaluate` and `gmail-hf diagnose`.

The scores are computed by `gmail_hf.metrics`, whose functions take arrays and texts.
"""

from ..metrics.environment import environment
from ..metrics.scores import results_in, to_markdown
from .alignment import evaluate_alignment
from .captioning import evaluate_captioning, missing_caption_metrics
from .diagnosis import diagnose, diagnosis_html
from .load_model import LoadedModel, load_model
from .measure import Example, Measured, Settings
from .probe import evaluate_probe, open_training
from .registry import BENCHMARKS, LAYOUTS, Benchmark, ZeroShotQuestions, get_benchmark
from .report import provenance, to_html
from .retrieval import evaluate_retrieval
from .runner import finished, plan, run
from .sources import Source, open_source
from .vqa import evaluate_vqa
from .zero_shot import evaluate_zero_shot

__all__ = [
    "BENCHMARKS",
    "LAYOUTS",
    "Benchmark",
    "Example",
    "LoadedModel",
    "Measured",
    "Settings",
    "Source",
    "ZeroShotQuestions",
    "diagnose",
    "diagnosis_html",
    "environment",
    "evaluate_alignment",
    "evaluate_captioning",
    "evaluate_probe",
    "evaluate_retrieval",
    "evaluate_vqa",
    "evaluate_zero_shot",
    "finished",
    "get_benchmark",
    "load_model",
    "missing_caption_metrics",
    "open_source",
    "open_training",
    "plan",
    "provenance",
    "results_in",
    "run",
    "to_html",
    "to_markdown",
]
