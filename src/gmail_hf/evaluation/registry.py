"""Definitions of the benchmarks by name."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..metrics.answers import MMMU_COLUMNS, POPE_COLUMNS, SCIENCEQA_COLUMNS

RETRIEVAL, ZERO_SHOT, CAPTIONING, VQA, ALIGNMENT = "retrieval", "zero_shot", "captioning", "vqa", "alignment"
PROBE = "probe"
# One of these columns must hold the image. Webdatasets name the column after the file extension.
IMAGE_COLUMNS = ("webp", "jpg", "jpeg", "png", "image")


@dataclass(frozen=True)
class ZeroShotQuestions:
    """
    Questions with the same possible answers for every image.

    Args:
        column (`str`): column of the correct answers: the number of a class, or a list with one per question.
        prompts (`list[list[list[str]]]`): texts by question and class, the same number per class.
    """

    column: str
    prompts: list[list[list[str]]]


@dataclass(frozen=True)
class Benchmark:
    """
    A data set and the tasks measured on it.

    Args:
        name (`str`): name on the command line.
        title (`str`): name in a report.
        tasks (`tuple[str, ...]`): the evaluators that can run on it.
        layout (`str`): the columns of its rows, a key of `LAYOUTS`.
        dataset (`str` or None): id on the Hub, or with `rows` the name in results. None if not all of the data set is
            on the Hub.
        split (`str`): the scored split.
        paper (`str` or None): tables of the paper with results on it.
        source (`str`): citation of the data set.
        rows (`Callable`, *optional*): for a benchmark bundled with a package: `rows(limit)` iterates over the first
            `limit` rows, or all for None, with images undecoded.
        questions ([`ZeroShotQuestions`], *optional*): for zero-shot classification with a layout other than `classes`.
        per_class (`bool`): the usual score is the mean accuracy per class, which also chooses a probe's
            hyperparameter.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    layout: str
    dataset: str | None
    split: str
    paper: str | None
    source: str
    rows: Callable[[int | None], Iterator[dict[str, Any]]] | None = None
    questions: ZeroShotQuestions | None = None
    per_class: bool = False


@dataclass(frozen=True)
class Layout:
    """
    Columns of a data set.

    Args:
        columns (`tuple[str, ...]`): all of them are required.
        images (`tuple[str, ...]`): one of them is required.
        files (`tuple[str, ...]`): required text files of the repository.
        description (`str`): description for users who provide their own data.
    """

    columns: tuple[str, ...]
    images: tuple[str, ...]
    files: tuple[str, ...]
    description: str


LAYOUTS = {
    # https://github.com/LAION-AI/CLIP_benchmark, clip_benchmark/webdataset_builder.py and datasets/builder.py
    "classes": Layout(
        columns=("cls",),
        images=IMAGE_COLUMNS,
        files=("classnames.txt", "zeroshot_classification_templates.txt"),
        description="a webdataset of images and `cls`, the row of each image's class in classnames.txt, with "
        "zeroshot_classification_templates.txt, where {c} is the place of the class",
    ),
    "captions": Layout(
        columns=("txt",),
        images=IMAGE_COLUMNS,
        files=(),
        description="a webdataset of images and `txt`, one caption per line; or pairs",
    ),
    # https://huggingface.co/datasets/Lin-Chen/ShareGPT4V holds the captions, COCO and others their images.
    "sharegpt4v": Layout(
        columns=("conversations", "image"),
        images=("image",),
        files=(),
        description="a folder with share-captioner_coco_lcs_sam_1246k_1107.json of Lin-Chen/ShareGPT4V and, at the "
        "paths that it names, the images of its first 1,000 rows (coco/train2017/...); or captions or pairs",
    ),
    # https://huggingface.co/datasets/BeichenZhang/Urban1k is a zip of this folder.
    "urban1k": Layout(
        columns=("txt",),
        images=("image",),
        files=(),
        description="the folder of Urban1k.zip of BeichenZhang/Urban1k, with image/NAME.jpg and, for each, "
        "caption/NAME.txt; or captions or pairs",
    ),
    "pairs": Layout(
        columns=("real_image", "caption", "image_id"),
        images=("real_image",),
        files=(),
        description="`real_image`, `caption`, `image_id` and, for alignment, `generated_image`",
    ),
    # https://huggingface.co/datasets/derek-thomas/ScienceQA
    "scienceqa": Layout(
        columns=SCIENCEQA_COLUMNS,
        images=("image",),
        files=(),
        description="the columns of derek-thomas/ScienceQA",
    ),
    # https://huggingface.co/datasets/MMMU/MMMU, one configuration per subject
    "mmmu": Layout(
        columns=MMMU_COLUMNS,
        images=("image_1",),
        files=(),
        description="the columns of MMMU/MMMU, one configuration per subject",
    ),
    # https://huggingface.co/datasets/lmms-lab/POPE
    "pope": Layout(
        columns=POPE_COLUMNS,
        images=("image",),
        files=(),
        description="the columns of lmms-lab/POPE: `image`, `question`, `answer` (yes or no) and `category` (random, "
        "popular or adversarial)",
    ),
}


def _classes(name: str, title: str, dataset: str, source: str, per_class: bool = False) -> Benchmark:
    place, tasks = f"clip-benchmark/wds_{dataset}", (ZERO_SHOT, PROBE)
    return Benchmark(name, title, tasks, "classes", place, "test", "Table 4", source, per_class=per_class)


_CAPTIONED = (RETRIEVAL, CAPTIONING, ALIGNMENT)
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "coco", "COCO", _CAPTIONED, "captions", "clip-benchmark/wds_mscoco_captions", "test",
            "Tables 1, 2, 6-9, 11, 13, 14, 16, 17", "Lin et al., 2014",
        ),
        Benchmark(
            "flickr30k", "Flickr30k", _CAPTIONED, "captions", "clip-benchmark/wds_flickr30k", "test", "Tables 3, 5",
            "Young et al., 2014",
        ),
        Benchmark(
            "sharegpt4v", "ShareGPT4V", (RETRIEVAL,), "sharegpt4v", None, "train", "Table 7",
            "Chen et al., 2023; the first 1,000 rows are Long-CLIP's test set (Zhang et al., 2024)",
        ),
        Benchmark(
            "urban1k", "Urban-1k", (RETRIEVAL,), "urban1k", None, "test", None,
            "Zhang et al., 2024; the second test set of Long-CLIP",
        ),
        _classes("dtd", "DTD", "vtab-dtd", "Cimpoi et al., 2014"),
        _classes("cars", "Stanford Cars", "cars", "Krause et al., 2013"),
        _classes("sun397", "SUN397", "sun397", "Xiao et al., 2010"),
        _classes("food101", "Food-101", "food101", "Bossard et al., 2014"),
        _classes("aircraft", "FGVC Aircraft", "fgvc_aircraft", "Maji et al., 2013", per_class=True),
        _classes("pets", "Oxford-IIIT Pets", "vtab-pets", "Parkhi et al., 2012", per_class=True),
        _classes("caltech101", "Caltech-101", "vtab-caltech101", "Fei-Fei et al., 2004", per_class=True),
        _classes("imagenet", "ImageNet-1k", "imagenet1k", "Russakovsky et al., 2015"),
        Benchmark(
            "scienceqa", "ScienceQA, questions with an image", (VQA,), "scienceqa", "derek-thomas/ScienceQA", "test",
            "Tables 10, 15", "Lu et al., 2022",
        ),
        Benchmark(
            "mmmu", "MMMU", (VQA,), "mmmu", "MMMU/MMMU", "validation", "Tables 10, 15", "Yue et al., 2024"
        ),
        Benchmark("pope", "POPE", (VQA,), "pope", "lmms-lab/POPE", "test", None, "Li et al., 2023"),
    )
}  # fmt: skip


def get_benchmark(name: str, benchmarks: Mapping[str, Benchmark] = BENCHMARKS) -> Benchmark:
    """
    Return a benchmark by name.

    Raises:
        ValueError: unknown name. The message lists the known ones.
    """
    if name not in benchmarks:
        raise ValueError(f"Unknown benchmark '{name}'; choose from {', '.join(benchmarks)}.")
    return benchmarks[name]
