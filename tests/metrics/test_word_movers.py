import gzip
import math
import pickle

import numpy as np
import pytest

from gmail_hf.metrics import caption_scores as captioning
from gmail_hf.metrics.caption_scores import caption_metrics, missing_metrics
from gmail_hf.metrics.word_movers import check_word_vectors, load_word_vectors, word_movers_score

pytest.importorskip("gensim")
REASON = "; ".join(sorted(set(missing_metrics().values())))
needs_java = pytest.mark.skipif(bool(REASON), reason=REASON)

# Of length 5, 1, 2, 1: only directions count. red and crimson are 60 degrees apart, red and cat 90, dog and cat 180.
VECTORS = {
    "red": (5, 0),
    "crimson": (0.5, math.sqrt(0.75)),
    "cat": (0, 2),
    "feline": (0, 2),
    "dog": (0, -1),
    "the": (1, 1),
}


def write_vectors(path, binary=False):
    lines = [f"{len(VECTORS)} 2\n".encode()]
    for word, vector in VECTORS.items():
        numbers = np.array(vector, "<f4").tobytes() if binary else " ".join(map(repr, map(float, vector))).encode()
        lines.append(word.encode() + b" " + numbers + b"\n")
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.writelines(lines)
    return path


@pytest.fixture
def vectors(tmp_path):
    return load_word_vectors(write_vectors(tmp_path / "vectors.txt"))


@pytest.mark.parametrize(
    ("prediction", "references", "distance"),
    [
        ("the red cat", ["a cat red"], 0),  # stop words and order do not count
        ("red", ["crimson"], 1),  # the chord of 60 degrees
        ("cat", ["dog"], 2),
        ("red", ["cat"], math.sqrt(2)),
        ("cat", ["dog", "unseen", "crimson"], 2 * math.sin(math.radians(15))),  # the nearest reference
        # cat stays, and the half that is red moves to crimson.
        ("red cat", ["crimson cat"], 1 / 2),
        # cat is a half of the one and a third of the other: that third stays; a sixth and all of red move to dog.
        ("red cat", ["cat dog dog"], 1 / 6 * 2 + 1 / 2 * math.sqrt(2)),
        ("red unseen", ["red"], 0),  # a word without a vector is left out
        ("cat", ["feline"], 0),  # another word with the same vector
        ("unseen", ["unseen"], math.inf),
        ("", ["red"], math.inf),
        ("the", ["the"], math.inf),
    ],
)
def test_word_movers_by_hand(vectors, prediction, references, distance):
    assert word_movers_score(prediction, references, vectors) == pytest.approx(math.exp(-distance), abs=1e-6)


@needs_java
def test_wmd_is_the_mean_over_images(tmp_path):
    path = write_vectors(tmp_path / "vectors.bin", binary=True)
    scores = caption_metrics(["A RED cat.", "cat", ""], [["dog", "red cat"], ["dog"], ["dog"]], ["WMD"], path)
    assert scores == {"WMD": pytest.approx((1 + math.exp(-2) + 0) / 3, abs=1e-6)}


def test_formats_of_word_vectors(tmp_path):
    texts = [write_vectors(tmp_path / name) for name in ("a.txt", "a.vec", "a.txt.gz")]
    binaries = [write_vectors(tmp_path / name, binary=True) for name in ("b.bin", "b.bin.gz")]
    assert [check_word_vectors(path) for path in texts + binaries] == [False] * 3 + [True] * 2
    for path in texts + binaries:
        loaded = load_word_vectors(str(path))
        for word, vector in VECTORS.items():
            np.testing.assert_allclose(loaded[word], vector, rtol=1e-6)


def test_pickles_are_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    named, hidden = tmp_path / "vectors.model", tmp_path / "vectors.bin"
    named.write_bytes(pickle.dumps(Bomb(), protocol=0))
    hidden.write_bytes(pickle.dumps(Bomb()))
    for path in (named, hidden):
        for read in (check_word_vectors, load_word_vectors, lambda path: missing_metrics(["WMD"], path)):
            with pytest.raises(ValueError, match=f"{path} is a pickle.*save_word2vec_format"):
                read(path)


def test_word_vectors_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="word vectors not found: .*absent.bin"):
        missing_metrics(["WMD"], tmp_path / "absent.bin")
    glove = tmp_path / "glove.txt"
    glove.write_text("red 1.0 0.0\ncat 0.0 1.0\n")
    with pytest.raises(ValueError, match="not in word2vec's format.*GloVe"):
        check_word_vectors(glove)
    for binary in (False, True):
        path = write_vectors(tmp_path / "cut", binary)
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(ValueError, match="cut is damaged"):
            load_word_vectors(path)
    for value in ("0.0", "nan", "inf"):
        path = tmp_path / "bad.txt"
        path.write_text(f"2 2\nred 1.0 0.0\ncat {value} 0.0\n")
        with pytest.raises(ValueError, match="word vector of 'cat' is zero or not finite"):
            word_movers_score("red", ["cat"], load_word_vectors(path))


@needs_java
def test_wmd_is_missing_with_the_remedy(monkeypatch, tmp_path):
    assert "as `word_vectors`" in missing_metrics(["WMD"])["WMD"]
    assert caption_metrics(["a"], [["a"]], ["ROUGE-L", "WMD"]) == {"ROUGE-L": 1.0, "WMD": None}
    there = captioning.find_spec
    monkeypatch.setattr(captioning, "find_spec", lambda name: None if name == "ot" else there(name))
    path = write_vectors(tmp_path / "vectors.txt")
    assert 'pip install "gmail-hf[captioning]"' in missing_metrics(["WMD"], path)["WMD"]
