"""Accuracy of multiple-choice questions as a module of `evaluate`."""

import datasets
import evaluate

from gmail_hf.metrics import vqa

DESCRIPTION = """\
Share of multiple-choice questions answered right. An answer in which no choice could be found counts as wrong.
"""

CITATION = """\
@inproceedings{lu2022learn,
  title = {Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering},
  author = {Lu, Pan and Mishra, Swaroop and Xia, Tony and Qiu, Liang and Chang, Kai-Wei and Zhu, Song-Chun and
    Tafjord, Oyvind and Clark, Peter and Kalyan, Ashwin},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
}
"""

INPUTS = """
Args:
    predictions: (n,) indices of choices, None where none was found; see `gmail_hf.metrics.answers.parse_choice`.
    references: (n,) indices of the right choices.
Returns:
    {"accuracy": in 0..1, "unparsed": share of None}
Examples:
    >>> import evaluate
    >>> from gmail_hf.metrics import metric_path
    >>> metric = evaluate.load(metric_path("multiple_choice_accuracy"))
    >>> metric.compute(predictions=[0, 2, None, 1], references=[0, 2, 3, 0])
    {'accuracy': 0.5, 'unparsed': 0.25}
"""


class MultipleChoiceAccuracy(evaluate.Metric):
    def _info(self):
        index = datasets.Value("int64")
        features = datasets.Features(predictions=index, references=index)
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions, references):
        return vqa.multiple_choice_accuracy(predictions, references)
