"""Code shared by the modules for the `evaluate` library in modules/."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import evaluate

EMBEDDING = datasets.Sequence(datasets.Value("float32"))
INTEGER = datasets.Value("int64")
TEXT = datasets.Value("string")

EXAMPLE = """Examples:
    >>> import evaluate
    >>> from gmail_hf.metrics import metric_path
    >>> metric = evaluate.load(metric_path("{name}"))
"""

CITATIONS = {
    "GMAIL": """\
@inproceedings{mo2025gmail,
  title = {{GMAIL}: Generative Modality Alignment for generated Image Learning},
  author = {Mo, Shentong and Yun, Sukmin},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
}
""",
    "CLIP": """\
@inproceedings{radford2021learning,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and Agarwal,
    Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and Krueger, Gretchen and
    Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year = {2021},
}
""",
    "COCO captions": """\
@article{chen2015microsoft,
  title = {Microsoft {COCO} Captions: Data Collection and Evaluation Server},
  author = {Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and Doll{\\'a}r,
    Piotr and Zitnick, C. Lawrence},
  journal = {arXiv preprint arXiv:1504.00325},
  year = {2015},
}
""",
    "CLIPScore": """\
@inproceedings{hessel2021clipscore,
  title = {{CLIPScore}: A Reference-free Evaluation Metric for Image Captioning},
  author = {Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2021},
}
""",
    "POPE": """\
@inproceedings{li2023evaluating,
  title = {Evaluating Object Hallucination in Large Vision-Language Models},
  author = {Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year = {2023},
}
""",
    "ScienceQA": """\
@inproceedings{lu2022learn,
  title = {Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering},
  author = {Lu, Pan and Mishra, Swaroop and Xia, Tony and Qiu, Liang and Chang, Kai-Wei and Zhu, Song-Chun and
    Tafjord, Oyvind and Clark, Peter and Kalyan, Ashwin},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
}
""",
}


def evaluate_module(
    citation: str, *inputs: dict[str, Any]
) -> Callable[[Callable[..., dict[str, Any]]], type[evaluate.Metric]]:
    """
    Turn a function of `predictions`, `references` and further keywords into a class that `evaluate.load` finds.

    The function's name becomes the name of the metric. Its docstring is split at "Args:" into the description and the
    description of the inputs. Code that loads `metric` is inserted after "Examples:".

    Args:
        citation: a key of `CITATIONS`.
        inputs: the features of one row. Several are alternatives.
    """

    def decorate(compute: Callable[..., dict[str, Any]]) -> type[evaluate.Metric]:
        name = compute.__name__
        description, arguments = inspect.getdoc(compute).split("\n\nArgs:")
        example = EXAMPLE.format(name=name)
        info = {
            "description": description,
            "citation": CITATIONS[citation],
            "inputs_description": f"\nArgs:{arguments}\n".replace("Examples:\n", example),
            "features": [datasets.Features(row) for row in inputs]
            if len(inputs) > 1
            else datasets.Features(inputs[0]),
        }
        members = {"_info": lambda self: evaluate.MetricInfo(**info), "_compute": staticmethod(compute)}
        return type(name.title().replace("_", ""), (evaluate.Metric,), members)

    return decorate
