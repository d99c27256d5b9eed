"""Paired cosine similarity as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np

from gmail_hf.metrics import paired_cosine

DESCRIPTION = """\
Mean cosine similarity of the embeddings of generated images and those of their real partners: GMAIL's measure of
alignment.
"""

CITATION = """\
@inproceedings{mo2025gmail,
  title = {{GMAIL}: Generative Modality Alignment for generated Image Learning},
  author = {Mo, Shentong and Yun, Sukmin},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
}
"""

INPUTS = """
Args:
    predictions: (n, dim) embeddings of generated images; they are kept in float32.
    references: (n, dim) embeddings of real images, row i the partner of row i of predictions.
Returns:
    {"paired_cosine": in -1..1}
Examples:
    >>> import evaluate
    >>> from gmail_hf.metrics import metric_path
    >>> metric = evaluate.load(metric_path("paired_cosine"))
    >>> metric.compute(predictions=[[2.0, 0.0], [0.0, 1.0]], references=[[1.0, 0.0], [3.0, 0.0]])
    {'paired_cosine': 0.5}
"""


class PairedCosine(evaluate.Metric):
    def _info(self):
        embedding = datasets.Sequence(datasets.Value("float32"))
        features = datasets.Features(predictions=embedding, references=embedding)
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions, references):
        return {"paired_cosine": paired_cosine(np.float32(predictions), np.float32(references))}
