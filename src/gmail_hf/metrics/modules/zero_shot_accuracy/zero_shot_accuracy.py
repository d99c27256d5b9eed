"""Zero-shot classification as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np

from gmail_hf.metrics import zero_shot_accuracy

DESCRIPTION = """\
Top-1 accuracy of images classified by the nearest class embedding, by cosine similarity, over images and as the mean
over the classes that occur. An image as near to another class as to its own counts as wrong.
"""

CITATION = """\
@inproceedings{radford2021learning,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and Agarwal,
    Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and Krueger, Gretchen and
    Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year = {2021},
}
"""

INPUTS = """
Args:
    predictions: (n, dim) embeddings of images; they are kept in float32.
    references: (n,) integers, the rows of `classes` that are right.
    classes: (classes, dim) embeddings, see `gmail_hf.metrics.class_embeddings`; given to `compute`.
Returns:
    {"top1": in 0..1, "mean_per_class": in 0..1}
Examples:
    >>> import evaluate
    >>> from gmail_hf.metrics import metric_path
    >>> metric = evaluate.load(metric_path("zero_shot_accuracy"))
    >>> metric.compute(predictions=[[3.0, 1.0], [1.0, 3.0]], references=[0, 0], classes=[[1.0, 0.0], [0.0, 1.0]])
    {'top1': 0.5, 'mean_per_class': 0.5}
"""


class ZeroShotAccuracy(evaluate.Metric):
    def _info(self):
        embedding = datasets.Sequence(datasets.Value("float32"))
        features = datasets.Features(predictions=embedding, references=datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions, references, classes):
        return zero_shot_accuracy(np.float32(predictions), np.asarray(classes), np.asarray(references))
