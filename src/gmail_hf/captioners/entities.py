"""The entities of a caption: its nouns, found with NLTK, or words from a list."""

import re
from collections.abc import Callable, Iterable

NLTK_DATA = {
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "wordnet": "corpora/wordnet",
}


def listed_words(words: Iterable[str]) -> Callable[[str], list[str]]:
    """
    A function from a caption to the `words` in it, as complete words, in order and ignoring case.

    Raises:
        ValueError: `words` is empty.
    """
    names = {word.strip().lower(): word.strip() for word in words if word.strip()}
    if not names:
        raise ValueError("The list of entities is empty: write one word per line.")
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")
    return lambda caption: [names[found] for found in pattern.findall(caption.lower())]


def nltk_nouns() -> Callable[[str], list[str]]:
    """
    A function from an English caption to its lemmatised nouns in order, with NLTK's tagger and WordNet's lemmas.

    Raises:
        ImportError: NLTK is not installed.
        FileNotFoundError: NLTK's data is missing; the message has the command to download it.
    """
    try:
        import nltk
    except ImportError as error:
        raise ImportError(
            'Finding nouns needs NLTK: pip install "gmail-hf[ifcap]", or provide a list of words as entities.'
        ) from error
    for name, path in NLTK_DATA.items():
        if not _has_data(nltk, path):
            raise FileNotFoundError(
                f"NLTK's '{name}' is missing: python -m nltk.downloader {' '.join(NLTK_DATA)}, or provide a list of "
                "words as entities."
            )
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize

    def nouns(caption: str) -> list[str]:
        words = re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", caption)
        return [lemmatize(word.lower(), "n") for word, tag in nltk.pos_tag(words) if tag.startswith("NN")]

    return nouns


def _has_data(nltk, path: str) -> bool:
    for name in (path, f"{path}.zip"):
        try:
            nltk.data.find(name)
            return True
        except LookupError:
            pass
    return False
