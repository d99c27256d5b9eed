"""Separability of generated and real embeddings as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np

from gmail_hf.metrics import separability

DESCRIPTION = """\
Cross-validated accuracy of a linear probe that tells embeddings of generated images from those of real ones: 0.5 is
chance, 1.0 a clean split. It sees a gap between the two modalities that ranking, and so retrieval, can leave open.
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
    seed: draws the folds; 0 where none is given.
    folds: at least 2, at most n; 5 where none is given.
Returns:
    {"separability": in 0..1}
Examples:
    >>> import evaluate
    >>> from gmail_hf.metrics import metric_path
    >>> metric = evaluate.load(metric_path("separability"))
    >>> metric.compute(predictions=[[1.0, 0.1], [1.0, 0.2]] * 5, references=[[0.1, 1.0], [0.2, 1.0]] * 5)
    {'separability': 1.0}
"""


class Separability(evaluate.Metric):
    def _info(self):
        embedding = datasets.Sequence(datasets.Value("float32"))
        features = datasets.Features(predictions=embedding, references=embedding)
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions, references, seed=0, folds=5):
        generated, real = np.float32(predictions), np.float32(references)
        return {"separability": separability(generated, real, seed, folds)}
