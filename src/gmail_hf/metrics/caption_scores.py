"""
Scores of captions against references, computed with the COCO evaluation code that papers use.

BLEU, METEOR, CIDEr, ROUGE-L and SPICE come from pycocoevalcap, because other implementations give other values. They
need `pip install "gmail-hf[captioning]"` and Java 11 or newer, for the Penn Treebank tokenizer and METEOR. SPICE and
WMD have further requirements, see `missing_metrics`, and are only computed on request.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .word_movers import check_word_vectors, load_word_vectors, word_movers_score

CAPTION_METRICS = ("BLEU@4", "METEOR", "CIDEr", "ROUGE-L")
EXTRA_CAPTION_METRICS = ("SPICE", "WMD")
# As in COCO's tokenizer, which then also removes punctuation.
PTB_OPTIONS = ("-preserveLines", "-lowerCase", "-encoding", "UTF-8")
# SPICE writes its result with Java's built-in JavaScript engine, which Java 15 removed.
SPICE_JAVA = 14
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def missing_metrics(
    metrics: Sequence[str] = CAPTION_METRICS, word_vectors: str | os.PathLike | None = None
) -> dict[str, str]:
    """
    Return the metrics that cannot be computed on this machine, each with a remedy.

    Nothing is downloaded. SPICE needs Java 14 or older and 385 MB of Stanford CoreNLP. WMD needs gensim, POT and word
    vectors.

    Args:
        metrics: names from `CAPTION_METRICS` and `EXTRA_CAPTION_METRICS`.
        word_vectors: as in `caption_metrics`.

    Raises:
        ValueError: an unknown metric, or word vectors in another format.
        FileNotFoundError: the word vectors do not exist.
    """
    known = (*CAPTION_METRICS, *EXTRA_CAPTION_METRICS)
    unknown = [metric for metric in metrics if metric not in known]
    if unknown:
        raise ValueError(f"unknown metric(s) {unknown}; choose from {list(known)}")
    if "WMD" in metrics and word_vectors is not None:
        check_word_vectors(word_vectors)
    remedies = {metric: _remedy(metric, word_vectors) for metric in metrics}
    return {metric: remedy for metric, remedy in remedies.items() if remedy}


def _remedy(metric: str, word_vectors: str | os.PathLike | None) -> str | None:
    if find_spec("pycocoevalcap") is None:
        return 'pycocoevalcap is missing; install it with `pip install "gmail-hf[captioning]"`'
    java = _java_version()
    if java is None:
        return "Java is missing; install Java 11 or newer, so that `java -version` works"
    if metric == "SPICE" and java > SPICE_JAVA:
        return f"SPICE needs Java {SPICE_JAVA} or older, but `java` has version {java}; put Java 11 first in PATH"
    if metric == "SPICE" and not all((_spice_folder() / jar).is_file() for jar in SPICE_JARS):
        return (
            "SPICE's Stanford CoreNLP is missing; download it (385 MB) with `python -m "
            f"pycocoevalcap.spice.get_stanford_models`, or put {' and '.join(SPICE_JARS)} into {_spice_folder()}"
        )
    if metric == "WMD" and (find_spec("gensim") is None or find_spec("ot") is None):
        return 'gensim or POT is missing; install them with `pip install "gmail-hf[captioning]"`'
    if metric == "WMD" and word_vectors is None:
        return (
            "WMD needs word vectors; pass a file in word2vec's format, such as GoogleNews-vectors-negative300.bin, as "
            "`word_vectors`"
        )
    return None


@functools.cache
def _java_version() -> int | None:
    if not shutil.which("java"):
        return None
    done = subprocess.run(["java", "-version"], capture_output=True, text=True)
    version = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    # On some systems `java` is a stub that only prints where to get Java.
    return int(version[1]) if version and done.returncode == 0 else None


def _spice_folder() -> Path:
    return Path(find_spec("pycocoevalcap").submodule_search_locations[0], "spice", "lib")


def caption_metrics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = CAPTION_METRICS,
    word_vectors: str | os.PathLike | None = None,
) -> dict[str, float | None]:
    """
    Compute COCO caption scores: corpus scores for BLEU@4 and METEOR, means over images for the others.

    CIDEr weights words by how rare they are among the given references, so only values of the same set are
    comparable. WMD is a similarity, see `word_movers_score`. METEOR's Java process, about 1 GB, keeps running for the
    next call.

    Args:
        predictions: one caption per image. It may be empty.
        references: one or more captions per image, none of them empty.
        metrics: names from `CAPTION_METRICS` and `EXTRA_CAPTION_METRICS`.
        word_vectors: for WMD, a file in word2vec's text or binary format, gzipped if its name ends in .gz.
            coco-caption uses GoogleNews-vectors-negative300.bin.

    Returns:
        Scores by name: CIDEr in 0..10, the others in 0..1 (papers print all of them times 100). None for a metric that
        cannot be computed on this machine, see `missing_metrics`, or that fails, with a warning.

    Raises:
        ValueError: empty lists or lists of different lengths, an image without references, an unknown metric, or word
            vectors in another format, see `check_word_vectors`.
        FileNotFoundError: the word vectors do not exist.
    """
    predictions = [_one_line(caption) for caption in predictions]
    references = [[_one_line(caption) for caption in captions] for captions in references]
    _check(predictions, references)
    missing = missing_metrics(metrics, word_vectors)
    if set(missing) == set(metrics):
        return dict.fromkeys(metrics)
    tokenized = iter(_tokenize([*predictions, *(caption for captions in references for caption in captions)]))
    results = {image: [next(tokenized)] for image in range(len(predictions))}
    truths = {image: [next(tokenized) for _ in captions] for image, captions in enumerate(references)}
    return {metric: None if metric in missing else _score(metric, truths, results, word_vectors) for metric in metrics}


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """
    Share of captions that equal one of their references except for white space, in 0..1.

    Raises:
        ValueError: as `caption_metrics`.
    """
    predictions = [_one_line(caption) for caption in predictions]
    references = [[_one_line(caption) for caption in captions] for captions in references]
    _check(predictions, references)
    return sum(p in captions for p, captions in zip(predictions, references, strict=True)) / len(predictions)


def _one_line(caption: str) -> str:
    # METEOR's protocol separates fields with these bars.
    return " ".join(caption.replace("|||", " ").split())


def _check(predictions: list[str], references: list[list[str]]) -> None:
    if not predictions:
        raise ValueError("predictions are empty; pass at least one caption")
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions, but references of {len(references)} images")
    for image, captions in enumerate(references):
        if not captions or not all(captions):
            raise ValueError(f"image {image} has no references or an empty one; remove it from both lists")


def _tokenize(captions: list[str]) -> list[str]:
    """Lower-case and tokenize captions and remove punctuation: COCO's tokenizer without its temporary file."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    command = ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, *PTB_OPTIONS],
        cwd=Path(ptbtokenizer.__file__).parent,
        input="\n".join(captions).encode(),
        capture_output=True,
        check=True,
    )
    lines = done.stdout.decode().split("\n")
    return [" ".join(w for w in lines[i].split() if w not in ptbtokenizer.PUNCTUATIONS) for i in range(len(captions))]


def _score(
    metric: str,
    truths: dict[int, list[str]],
    results: dict[int, list[str]],
    word_vectors: str | os.PathLike | None,
) -> float | None:
    if metric == "BLEU@4":
        from pycocoevalcap.bleu.bleu import Bleu

        return float(Bleu(4).compute_score(truths, results, verbose=0)[0][3])
    if metric == "WMD":
        vectors = load_word_vectors(word_vectors)
        return sum(word_movers_score(results[image][0], truths[image], vectors) for image in results) / len(results)
    if metric == "METEOR":
        if _meteor().meteor_p.poll() is not None:  # the process has ended
            _meteor.cache_clear()
        Scorer = _meteor
    elif metric == "CIDEr":
        from pycocoevalcap.cider.cider import Cider as Scorer
    elif metric == "SPICE":
        from pycocoevalcap.spice.spice import Spice as Scorer
    else:
        from pycocoevalcap.rouge.rouge import Rouge as Scorer
    scorer = Scorer()
    try:
        return float(scorer.compute_score(truths, results)[0])
    except BaseException as error:
        if metric == "METEOR":  # it still holds its lock, and the next call would wait forever
            if scorer.lock.locked():
                scorer.lock.release()
            _meteor.cache_clear()
        # SPICE includes native code that does not run on every machine, and METEOR's process may run out of memory.
        failures = (OSError, ValueError, subprocess.CalledProcessError)
        if metric not in ("METEOR", "SPICE") or not isinstance(error, failures):
            raise
        warnings.warn(f"{metric} failed; Java's message is above, if there is one: {error}", stacklevel=2)
        return None


@functools.cache
def _meteor() -> Any:
    """Start METEOR's process, about 1 GB. It loads its tables in ten seconds and scores a thousand captions in one."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()
