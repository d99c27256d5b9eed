import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from gmail_hf.evaluation import captioning
from gmail_hf.evaluation.captioning import caption_metrics, exact_match, missing_metrics, plot_captions

PREDICTIONS = ["a red three and a green seven", "two birds sit on a wire", "a cat", "the the the the the"]
REFERENCES = [
    ["a red three and a green seven"],
    ["two birds on a wire", "some birds are sitting on a long wire"],
    ["a black cat sleeps on a mat", "there is a cat on a mat"],
    ["the cat is on the mat"],
]

REASON = "; ".join(sorted(set(missing_metrics().values())))
needs_java = pytest.mark.skipif(bool(REASON), reason=REASON)


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu4(predictions: list[str], references: list[list[str]]) -> float:
    """Papineni et al. (2002): clipped n-gram counts of the whole set, and the closest reference's length."""
    matched, total, length, closest = [0] * 4, [0] * 4, 0, 0
    for prediction, captions in zip(predictions, references, strict=True):
        words, truths = prediction.split(), [caption.split() for caption in captions]
        length += len(words)
        closest += min((abs(len(truth) - len(words)), len(truth)) for truth in truths)[1]
        for n in range(1, 5):
            counts, most = ngrams(words, n), Counter()
            for truth in truths:
                most |= ngrams(truth, n)
            matched[n - 1] += (counts & most).total()
            total[n - 1] += counts.total()
    precision = math.prod(m / t for m, t in zip(matched, total, strict=True)) ** 0.25
    return precision * min(1.0, math.exp(1 - closest / length))


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + longest_common_subsequence(first[:-1], second[:-1])
    return max(longest_common_subsequence(first[:-1], second), longest_common_subsequence(first, second[:-1]))


def rouge_l(prediction: str, captions: list[str]) -> float:
    """coco-caption's: the best precision and the best recall over the references, and their F-measure, beta 1.2."""
    lengths = [(longest_common_subsequence(prediction.split(), c.split()), len(c.split())) for c in captions]
    precision = max(common for common, _ in lengths) / len(prediction.split())
    recall = max(common / length for common, length in lengths)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def cider(predictions: list[str], references: list[list[str]]) -> float:
    """Vedantam et al. (2015), as coco-caption computes it: CIDEr-D, with clipped counts and a length penalty."""
    images = len(references)
    scores = []
    for prediction, captions in zip(predictions, references, strict=True):
        score = 0.0
        for n in range(1, 5):
            frequency = Counter()
            for truths in references:
                frequency.update(set().union(*(ngrams(truth.split(), n) for truth in truths)))

            def vector(caption, n=n, frequency=frequency):
                counts = ngrams(caption.split(), n)
                return {g: c * (math.log(images) - math.log(max(1, frequency[g]))) for g, c in counts.items()}

            ours = vector(prediction)
            for caption in captions:
                theirs = vector(caption)
                norms = math.sqrt(sum(v**2 for v in ours.values())) * math.sqrt(sum(v**2 for v in theirs.values()))
                dot = sum(min(value, theirs.get(g, 0)) * theirs.get(g, 0) for g, value in ours.items())
                delta = len(prediction.split()) - len(caption.split())
                if norms:
                    score += dot / norms * math.exp(-(delta**2) / (2 * 6.0**2)) / len(captions)
        scores.append(10 * score / 4)
    return float(np.mean(scores))


@needs_java
def test_values_by_hand():
    scores = caption_metrics(PREDICTIONS, REFERENCES, ["ROUGE-L", "BLEU@4", "CIDEr"])
    assert list(scores) == ["ROUGE-L", "BLEU@4", "CIDEr"]
    assert scores["BLEU@4"] == pytest.approx(bleu4(PREDICTIONS, REFERENCES), abs=1e-6)
    assert scores["ROUGE-L"] == pytest.approx(np.mean(list(map(rouge_l, PREDICTIONS, REFERENCES))))
    assert scores["CIDEr"] == pytest.approx(cider(PREDICTIONS, REFERENCES), abs=1e-6)


@needs_java
def test_meteor_by_hand():
    """
    Denkowski & Lavie (2014) with the weights of version 1.5 for English, for statistics summed over the set, which has
    an empty caption in it and a bar of METEOR's own protocol.
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    matched = delta * 3 + (1 - delta) * 1  # cat, sat, mat; on, a function word
    precision = matched / (delta * 3 + (1 - delta) * 3)  # a, on, a are function words
    recall = matched / (delta * (3 + 1) + (1 - delta) * (3 + 1))  # the reference of the empty caption counts too
    mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
    penalty = gamma * (2 / 4) ** beta  # four matched words in two chunks: "cat sat on", "mat"
    scores = caption_metrics(["a ||| cat sat on a mat", ""], [["the cat sat on the mat"], ["a cat"]], ["METEOR"])
    assert scores == {"METEOR": pytest.approx(mean * (1 - penalty), abs=1e-6)}


@needs_java
def test_text_is_tokenised_as_coco_does():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = ["A Red three, and a green-seven.", "", "don't stop! (never)", "Café — two birds", "\u2028a  b\n"]
    theirs = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions[:3])})
    assert captioning._tokenize(captions[:3]) == [theirs[i][0] for i in range(3)]
    assert exact_match([captions[-1]], [["a b"]]) == 1
    scores = caption_metrics(["A RED three.", "caf\u00e9"], [["a red three"], ["Caf\u00c9!"]], ["BLEU@4", "ROUGE-L"])
    assert scores["ROUGE-L"] == 1


@needs_java
def test_odd_captions():
    fast = ["BLEU@4", "CIDEr", "ROUGE-L"]
    scores = caption_metrics(["", "a ||| b\nc"], [["a cat"], ["a b c", "|||  a"]], fast)
    assert all(math.isfinite(score) for score in scores.values())
    assert scores["ROUGE-L"] == pytest.approx(0.5)  # 0 for the empty one, 1 for the other
    assert caption_metrics(["", ""], [["a"], ["b"]], fast) == dict.fromkeys(fast, 0.0)


@pytest.mark.parametrize("lacks", ["pycocoevalcap", "java"])
def test_what_cannot_run_is_missing_with_the_remedy(monkeypatch, lacks):
    if lacks == "pycocoevalcap":
        monkeypatch.setattr(captioning, "find_spec", lambda name: None)
        remedy = r'pip install "gmail-hf[captioning]"'
    else:
        monkeypatch.setattr(captioning, "find_spec", lambda name: object())
        monkeypatch.setattr(captioning, "_java_runs", lambda: False)
        remedy = "install Java 11 or newer"
    missing = missing_metrics(["BLEU@4", "CIDEr"])
    assert set(missing) == {"BLEU@4", "CIDEr"} and all(remedy in text for text in missing.values())
    assert caption_metrics(["a"], [["a"]], ["BLEU@4", "CIDEr"]) == {"BLEU@4": None, "CIDEr": None}


def test_java_that_only_stands_in_for_one(monkeypatch, tmp_path):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'get Java from java.com' >&2\nexit 1\n")
    java.chmod(0o755)
    for path, runs in ((tmp_path, False), (tmp_path / "empty", False)):
        monkeypatch.setenv("PATH", str(path))
        captioning._java_runs.cache_clear()
        assert captioning._java_runs() is runs
    captioning._java_runs.cache_clear()


def test_exact_match():
    predictions = ["a red three", "a  green seven ", "A red three", ""]
    assert exact_match(predictions, [["x", "a red three"], ["a green seven"], ["a red three"], ["a"]]) == 0.5


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no captions to score"),
        (["a"], [["a"], ["b"]], "1 predictions, but references of 2 images"),
        (["a", "b"], [["a"], []], "image 1 has no references"),
        (["a"], [["a", " "]], "image 0 has no references, or an empty one"),
    ],
)
def test_mistakes_are_named(predictions, references, message):
    for score in (caption_metrics, exact_match):
        with pytest.raises(ValueError, match=message):
            score(predictions, references)


def test_unknown_metric():
    with pytest.raises(ValueError, match=r"unknown metric\(s\) \['BLEU'\]"):
        caption_metrics(["a"], [["a"]], ["BLEU"])


def test_contact_sheet(tmp_path):
    """Every image is there, at its pixels' colours."""
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = [Image.new("RGB", (8, 8), color) for color in colors]
    plot_captions(tmp_path / "sheet.png", images, ["a" * 300, "b", "é"], [["x"], ["b"], ["y"]], columns=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        counts = {color: count for count, color in sheet.getcolors(maxcolors=2**24)}
    assert all(counts[color] == captioning.SIDE**2 for color in colors)
    with pytest.raises(ValueError, match="equally long"):
        plot_captions(tmp_path / "sheet.png", images, ["a"], [["a"]])
