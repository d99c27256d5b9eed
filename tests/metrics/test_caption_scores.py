import math
import subprocess
from collections import Counter

import numpy as np
import pytest

from gmail_hf.metrics import caption_scores as captioning
from gmail_hf.metrics.caption_scores import caption_metrics, exact_match, missing_metrics

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
    row = [0] * (len(second) + 1)
    for word in first:
        above = row
        row = [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[-1]))
    return row[-1]


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


FUNCTION_WORDS = {"a", "the", "on", "is"}


def meteor(predictions: list[str], references: list[list[str]]) -> float:
    """
    Denkowski & Lavie (2014), weights of version 1.5 for English, for captions that use no word twice and only words
    without stems, synonyms and paraphrases: the alignment is then the words in common. Statistics are summed over the
    images, each with its best reference.
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75

    def weight(words):
        return sum(1 - delta if word in FUNCTION_WORDS else delta for word in words)

    def statistics(prediction, caption):
        words, truth = prediction.split(), caption.split()
        links = [(i, truth.index(word)) for i, word in enumerate(words) if word in truth]
        chunks = 0 if words == truth else sum((i - 1, j - 1) not in links for i, j in links)
        return np.array([weight(words[i] for i, _ in links), weight(words), weight(truth), len(links), chunks])

    def score(summed):
        matched, of_words, of_truth, links, chunks = summed
        if not matched:
            return 0.0
        precision, recall = matched / of_words, matched / of_truth
        mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
        return mean * (1 - gamma * (chunks / links) ** beta)

    pairs = zip(predictions, references, strict=True)
    return score(sum(max((statistics(p, c) for c in captions), key=score) for p, captions in pairs))


def random_captions(rng: np.random.Generator, replace: bool) -> tuple[list[str], list[list[str]]]:
    """
    Ten images with one to five references each, of words that METEOR knows no relatives of; every other prediction
    is a reference without its first word.
    """
    words = sorted([*FUNCTION_WORDS, "blorp", "zunk", "vask", "kwim", "drob", "flet"])
    captions = [[list(rng.choice(words, rng.integers(5, 10), replace)) for _ in range(1 + i % 5)] for i in range(10)]
    predictions = [captions[i][-1][1:] if i % 2 else list(rng.choice(words, 6, replace)) for i in range(10)]
    return [" ".join(p) for p in predictions], [[" ".join(caption) for caption in image] for image in captions]


@needs_java
@pytest.mark.parametrize("seed", range(3))
def test_second_implementation(seed):
    """BLEU@4, ROUGE-L and CIDEr as above, on hand-written captions and on random ones with several references."""
    for captions in ((PREDICTIONS, REFERENCES), random_captions(np.random.default_rng(seed), replace=True)):
        scores = caption_metrics(*captions, ["ROUGE-L", "BLEU@4", "CIDEr"])
        assert list(scores) == ["ROUGE-L", "BLEU@4", "CIDEr"] and min(scores.values()) > 0
        assert scores["BLEU@4"] == pytest.approx(bleu4(*captions), abs=1e-6)
        assert scores["ROUGE-L"] == pytest.approx(np.mean(list(map(rouge_l, *captions))))
        assert scores["CIDEr"] == pytest.approx(cider(*captions), abs=1e-6)


@pytest.mark.integration
@needs_java
def test_second_implementation_of_meteor():
    predictions, references = random_captions(np.random.default_rng(0), replace=False)
    references[0].append(predictions[0])
    assert caption_metrics(predictions, references, ["METEOR"])["METEOR"] == pytest.approx(
        meteor(predictions, references), abs=1e-9
    )


@pytest.mark.integration
@needs_java
def test_meteor_by_hand():
    """One empty caption, whose reference counts too, and a bar of METEOR's own protocol."""
    predictions, references = ["a ||| cat sat on a mat", ""], [["the cat sat on the mat"], ["a cat"]]
    matched = 0.75 * 3 + 0.25 * 1  # cat, sat, mat; on, a function word
    precision = matched / (0.75 * 3 + 0.25 * 3)  # a, on and a are function words
    recall = matched / (0.75 * (3 + 1) + 0.25 * (3 + 1))
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    penalty = 0.6 * (2 / 4) ** 0.2  # four matched words in two chunks: "cat sat on", "mat"
    scores = caption_metrics(predictions, references, ["METEOR"])
    assert scores == {"METEOR": pytest.approx(mean * (1 - penalty), abs=1e-6)}


@pytest.mark.integration
@needs_java
def test_meteors_process_is_kept_and_started_anew_when_it_has_ended():
    def score(predictions):
        return caption_metrics(predictions, [["a cat sat"]] * len(predictions), ["METEOR"])["METEOR"]

    alone, kept = score(["a cat"]), captioning._meteor()
    assert score(["a dog", "a cat sat"]) != alone == score(["a cat"])  # what came before does not count
    assert captioning._meteor() is kept
    kept.meteor_p.kill()
    kept.meteor_p.wait()
    assert score(["a cat"]) == alone and captioning._meteor() is not kept


@pytest.mark.integration
@needs_java
def test_an_interrupted_meteor_does_not_hang_the_next_call(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(captioning._meteor()), "_stat", interrupted)
        caption_metrics(["a cat"], [["a cat"]], ["METEOR"])
    assert caption_metrics(["a cat"], [["a cat"]], ["METEOR"])["METEOR"] > 0


@pytest.mark.integration
@needs_java
def test_a_meteor_that_is_killed_costs_no_other_score(monkeypatch):
    meteor = type(captioning._meteor())
    stat = meteor._stat

    def killed(scorer, *arguments):
        scorer.meteor_p.kill()
        scorer.meteor_p.wait()
        return stat(scorer, *arguments)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="METEOR failed"):
        patch.setattr(meteor, "_stat", killed)
        assert caption_metrics(["a"], [["a"]], ["METEOR", "ROUGE-L"]) == {"METEOR": None, "ROUGE-L": 1.0}
    assert caption_metrics(["a cat"], [["a cat"]], ["METEOR"])["METEOR"] > 0


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
        monkeypatch.setattr(captioning, "_java_version", lambda: None)
        remedy = "install Java 11 or newer"
    missing = missing_metrics(["BLEU@4", "CIDEr"])
    assert set(missing) == {"BLEU@4", "CIDEr"} and all(remedy in text for text in missing.values())
    assert caption_metrics(["a"], [["a"]], ["BLEU@4", "CIDEr"]) == {"BLEU@4": None, "CIDEr": None}


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo 'get Java from java.com' >&2; exit 1", None),
        ("echo 'openjdk version \"17.0.15\" 2025-04-15' >&2", 17),
        ("echo 'java version \"1.8.0_312\"' >&2", 8),
        (None, None),
    ],
)
def test_java_version(monkeypatch, tmp_path, script, version):
    """On some systems `java` is a program that only says where to get Java."""
    if script:
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert captioning._java_version.__wrapped__() == version


@pytest.fixture
def spice_jars(monkeypatch, tmp_path):
    """A folder in which SPICE's Stanford CoreNLP is, as `java` 11 would find it; nothing is downloaded."""
    monkeypatch.setattr(captioning, "_java_version", lambda: 11)
    monkeypatch.setattr(captioning, "_spice_folder", lambda: tmp_path)
    for jar in captioning.SPICE_JARS:
        (tmp_path / jar).touch()
    return tmp_path


@needs_java
def test_spice_is_asked_of_pycocoevalcap(monkeypatch, spice_jars):
    from pycocoevalcap.spice import spice

    class Spice:
        def compute_score(self, truths, results):
            assert results == {0: ["a cat"], 1: [""]}
            assert truths == {0: ["a cat", "two cats"], 1: ["a dog"]}
            return np.float64(0.25), [{}, {}]

    monkeypatch.setattr(spice, "Spice", Spice)
    scores = caption_metrics(["A cat.", ""], [["a cat", "Two cats!"], ["a dog"]], ["SPICE", "ROUGE-L"])
    assert scores == {"SPICE": 0.25, "ROUGE-L": 0.5}


@needs_java
def test_spice_that_fails_costs_no_other_score(monkeypatch, spice_jars):
    from pycocoevalcap.spice import spice

    def fail(*_, **__):
        raise subprocess.CalledProcessError(1, ["java", "-jar", "spice-1.0.jar"])

    monkeypatch.setattr(spice.Spice, "compute_score", fail)
    monkeypatch.setattr(spice.Spice, "__init__", lambda self: None)
    with pytest.warns(UserWarning, match="SPICE failed.*spice-1.0.jar"):
        assert caption_metrics(["a"], [["a"]], ["SPICE", "ROUGE-L"]) == {"SPICE": None, "ROUGE-L": 1.0}


@needs_java
def test_spice_is_missing_and_nothing_is_downloaded(monkeypatch, spice_jars):
    from pycocoevalcap.spice import get_stanford_models

    monkeypatch.setattr(get_stanford_models, "urlretrieve", lambda *_, **__: pytest.fail("a download"))
    assert missing_metrics(["SPICE"]) == {}
    (spice_jars / captioning.SPICE_JARS[1]).unlink()
    remedy = missing_metrics(["CIDEr", "SPICE"])
    assert list(remedy) == ["SPICE"]
    for part in ("python -m pycocoevalcap.spice.get_stanford_models", str(spice_jars)):
        assert part in remedy["SPICE"]
    assert caption_metrics(["a"], [["a"]], ["SPICE", "ROUGE-L"]) == {"SPICE": None, "ROUGE-L": 1.0}
    monkeypatch.setattr(captioning, "_java_version", lambda: 17)
    assert "Java 14 or older, but `java` has version 17" in missing_metrics(["SPICE"])["SPICE"]


def test_exact_match():
    predictions = ["a red three", "a  green seven ", "A red three", ""]
    assert exact_match(predictions, [["x", "a red three"], ["a green seven"], ["a red three"], ["a"]]) == 0.5


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "predictions are empty"),
        (["a"], [["a"], ["b"]], "1 predictions, but references of 2 images"),
        (["a", "b"], [["a"], []], "image 1 has no references"),
        (["a"], [["a", " "]], "image 0 has no references or an empty one"),
    ],
)
def test_mistakes_are_named(predictions, references, message):
    for score in (caption_metrics, exact_match):
        with pytest.raises(ValueError, match=message):
            score(predictions, references)


def test_unknown_metric():
    with pytest.raises(ValueError, match=r"unknown metric\(s\) \['BLEU'\]"):
        caption_metrics(["a"], [["a"]], ["BLEU"])
