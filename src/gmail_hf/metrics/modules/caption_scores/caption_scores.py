"""COCO caption scores as a module of `evaluate`."""

import datasets
import evaluate

from gmail_hf.metrics import CAPTION_METRICS, caption_metrics

DESCRIPTION = """\
BLEU@4, METEOR, CIDEr and ROUGE-L of captions, by the COCO evaluation code that published figures come from. They need
`pip install "gmail-hf[captioning]"` and Java 11 or newer; a score that cannot run is None.
"""

CITATION = """\
@article{chen2015microsoft,
  title = {Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author = {Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and Doll{\\'a}r,
    Piotr and Zitnick, C. Lawrence},
  journal = {arXiv preprint arXiv:1504.00325},
  year = {2015},
}
"""

INPUTS = """
Args:
    predictions: (n,) captions, one an image.
    references: (n,) lists of captions, one or more an image.
    metrics: names of scores; the four where none are given.
    word_vectors: for WMD, a file in word2vec's format.
Returns:
    {"BLEU@4": in 0..1, "METEOR": in 0..1, "CIDEr": in 0..10, "ROUGE-L": in 0..1}
Examples:
    >>> import evaluate
    >>> from gmail_hf.metrics import metric_path
    >>> metric = evaluate.load(metric_path("caption_scores"))
    >>> metric.compute(predictions=["a red three"], references=[["a red three"]], metrics=["ROUGE-L"])
    {'ROUGE-L': 1.0}
"""


class CaptionScores(evaluate.Metric):
    def _info(self):
        caption = datasets.Value("string")
        features = datasets.Features(predictions=caption, references=datasets.Sequence(caption))
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions, references, metrics=CAPTION_METRICS, word_vectors=None):
        return caption_metrics(predictions, references, metrics, word_vectors)
