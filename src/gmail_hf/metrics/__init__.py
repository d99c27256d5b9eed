"""Metrics and plots as functions of numpy arrays. No function here loads a model.

scikit-learn, SciPy and matplotlib are imported only inside the functions that need them. Install them with
`pip install "gmail-hf[evaluation]"`.
"""

from .answers import (
    MultipleChoiceItem,
    mmmu_item,
    multiple_choice_accuracy,
    multiple_choice_items,
    multiple_choice_messages,
    parse_choice,
    pope_item,
    scienceqa_item,
)
from .calibration import expected_calibration_error
from .caption_scores import (
    CAPTION_METRICS,
    EXTRA_CAPTION_METRICS,
    caption_metrics,
    exact_match,
    missing_metrics,
)
from .classification import class_embeddings, zero_shot_accuracy, zero_shot_ranks
from .clip_score import CLIP_SCORE_PROMPT, clip_score, ref_clip_score
from .distribution import cmmd, density_coverage, energy_distance
from .intervals import bootstrap_interval
from .modules import metric_path
from .paired import alignment_metrics, centroid_distance, paired_cosine, separability, token_similarity
from .plots import plot_embeddings, plot_pairs
from .ranks import image_text_ranks, image_text_retrieval, ranks_from_similarity, recall_at_k, retrieval_ranks
from .readout import (
    AffineMap,
    GapClosed,
    TunedProbe,
    coral,
    gap_closed,
    logistic_probe,
    mean_shift,
    nearest_centroid,
    tuned_probe,
)
from .sgd_probe import sgd_probe
from .train_on_generated import PairEmbeddings, aggregate, to_markdown, train_on_generated
from .yes_no import parse_yes_no, yes_no_scores

__all__ = [
    "CAPTION_METRICS",
    "CLIP_SCORE_PROMPT",
    "EXTRA_CAPTION_METRICS",
    "AffineMap",
    "GapClosed",
    "MultipleChoiceItem",
    "PairEmbeddings",
    "TunedProbe",
    "aggregate",
    "alignment_metrics",
    "bootstrap_interval",
    "caption_metrics",
    "centroid_distance",
    "class_embeddings",
    "clip_score",
    "cmmd",
    "coral",
    "density_coverage",
    "energy_distance",
    "exact_match",
    "expected_calibration_error",
    "gap_closed",
    "image_text_ranks",
    "image_text_retrieval",
    "logistic_probe",
    "mean_shift",
    "metric_path",
    "missing_metrics",
    "mmmu_item",
    "multiple_choice_accuracy",
    "multiple_choice_items",
    "multiple_choice_messages",
    "nearest_centroid",
    "paired_cosine",
    "parse_choice",
    "parse_yes_no",
    "plot_embeddings",
    "plot_pairs",
    "pope_item",
    "ranks_from_similarity",
    "recall_at_k",
    "ref_clip_score",
    "retrieval_ranks",
    "scienceqa_item",
    "separability",
    "sgd_probe",
    "to_markdown",
    "token_similarity",
    "train_on_generated",
    "tuned_probe",
    "yes_no_scores",
    "zero_shot_accuracy",
    "zero_shot_ranks",
]
