"""
Word mover's distance between captions (Kusner et al., 2015) as a score.

It needs `pip install "gmail-hf[captioning]"` and a file with word vectors.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gensim.models import KeyedVectors

# As in coco-caption: NLTK's English list without the contractions, which its tokenizer splits.
STOP_WORDS = frozenset(
    """
    i me my myself you your yours yourself yourselves he him his himself she her hers herself it its itself
    we our ours ourselves they them their theirs themselves this that these those what which who whom
    a an the some any each both few all more most other such own same no nor not only
    am is are was were be been being have has had having do does did doing can will just should
    and but or if because as until while than so too very now then once again further here there when where why how
    of at by for with about against between into through during before after above below to from up down in out on off
    over under s t d m o y ll re ve ma don ain aren couldn didn doesn hadn hasn haven isn mightn mustn needn shan
    shouldn wasn weren won wouldn
    """.split()
)
PICKLES = (".pkl", ".pickle", ".model")


def word_movers_score(prediction: str, references: Sequence[str], vectors: KeyedVectors) -> float:
    """
    exp(-WMD) of a caption and its nearest reference: 1 for the same words, 0 if no words can be compared.

    This is the score of Kilickaya et al. (2017) as coco-caption computes it: stop words and words without a vector
    are dropped, and the best reference counts. Vectors are scaled to length 1, as in gensim 4. gensim 3 did not scale
    them, so figures published with it are not comparable.

    Args:
        prediction: lower-case words separated by spaces.
        references: one or more captions in the same form.
        vectors: gensim word vectors, see `load_word_vectors`.

    Raises:
        ValueError: a word's vector is zero or not finite.
    """
    prediction, *references = (_content_words(caption, vectors) for caption in (prediction, *references))
    return math.exp(-min(_distance(prediction, caption, vectors) for caption in references))


def _distance(first: list[str], second: list[str], vectors: KeyedVectors) -> float:
    distance = vectors.wmdistance(first, second)
    # gensim also returns infinity if all words have the same vector.
    return 0.0 if first and second and math.isinf(distance) else distance


def _content_words(caption: str, vectors: KeyedVectors) -> list[str]:
    words = [word for word in caption.split() if word not in STOP_WORDS and word in vectors]
    vectors.fill_norms()
    for word in words:
        if not 0 < vectors.norms[vectors.key_to_index[word]] < math.inf:  # its distance would be 0 to every word
            raise ValueError(f"the word vector of '{word}' is zero or not finite; use another file of word vectors")
    return words


def load_word_vectors(path: str | os.PathLike) -> KeyedVectors:
    """
    Load word vectors in word2vec's text or binary format, gzipped if the name ends in .gz.

    Raises:
        FileNotFoundError, ValueError: as `check_word_vectors`; also a ValueError for a damaged file.
    """
    from gensim.models import KeyedVectors

    binary = check_word_vectors(path)
    try:
        return KeyedVectors.load_word2vec_format(os.fspath(path), binary=binary)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not in word2vec's format: {error}") from error


def check_word_vectors(path: str | os.PathLike) -> bool:
    """
    Return whether a file in word2vec's format is binary. Only the beginning of the file is read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has another format, such as gensim's own, which is a pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"word vectors not found: {path}")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        header = file.readline(100)
        if path.suffix in PICKLES or header.startswith(b"\x80"):
            raise ValueError(
                f"{path} is a pickle, which may run code when it is loaded; save the vectors with "
                "`vectors.save_word2vec_format(path, binary=True)` and pass that file"
            )
        counts = header.split()
        if len(counts) != 2 or not all(count.isdigit() for count in counts):
            raise ValueError(
                f"{path} is not in word2vec's format: the first line must have the number of words and the dimension; "
                "add that line to a GloVe file"
            )
        dim = int(counts[1])
        fields = file.readline(100 + 50 * dim).split()
    try:
        return len([float(field) for field in fields[1:]]) != dim
    except ValueError:
        return True
