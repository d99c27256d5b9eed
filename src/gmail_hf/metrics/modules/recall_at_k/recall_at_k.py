"""Image-text retrieval as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np

from gmail_hf.metrics import image_text_retrieval

DESCRIPTION = """\
Recall@K of captions by images and of images by captions, by cosine similarity, with median ranks. An image with
several captions is a hit if any of them is among the first K, as in CLIP's paper. Ties count against the model.
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
    predictions: (n, dim) embeddings of images, row i the image of caption i; they are kept in float32. An image with
        five captions stands in five rows and counts once.
    references: (n, dim) embeddings of captions.
    image_ids: (n,) integers or strings, equal for rows of one image.
    ks: the Ks; 1, 5 and 10 where none are given.
Returns:
    {"image_to_text_R@1": in 0..1, ..., "image_to_text_median_rank": from 1, and the same of "text_to_image"}
Examples:
    >>> import evaluate
    >>> from gmail_hf.metrics import metric_path
    >>> metric = evaluate.load(metric_path("recall_at_k"))
    >>> images, captions = [[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6], [0.9, 0.1]]
    >>> metric.compute(predictions=images, references=captions, image_ids=[7, 8], ks=[1])["text_to_image_R@1"]
    0.5
"""


class RecallAtK(evaluate.Metric):
    def _info(self):
        embedding = datasets.Sequence(datasets.Value("float32"))
        features = [
            datasets.Features(predictions=embedding, references=embedding, image_ids=datasets.Value(kind))
            for kind in ("int64", "string")
        ]
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions, references, image_ids, ks=(1, 5, 10)):
        images, texts = np.float32(predictions), np.float32(references)
        return image_text_retrieval(images, texts, image_ids, ks=ks)
