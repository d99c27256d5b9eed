"""What a caption names: its nouns by NLTK, or the words of a list."""

import re
from collections.abc import Callable, Iterable

NLTK_DATA = {
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "wordnet": "corpora/wordnet",
}


def listed_words(words: Iterable[str]) -> Callable[[str], list[str]]:
    """
    A function from a caption to those of `words` that it holds as whole words, in order, whatever their case.

    Raises:
        ValueError: there is no word.
    """
    names = {word.strip().lower(): word.strip() for word in words if word.strip()}
    if not names:
        raise ValueError("The list of entities is empty: give a word per line.")
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")
    return lambda caption: [names[found] for found in pattern.findall(caption.lower())]


def nltk_nouns() -> Callable[[str], list[str]]:
    """
    A function from an English caption to its lemmatised nouns, in order: NLTK's tagger and WordNet's lemmas.

    Raises:
        ImportError: NLTK is not installed.
        FileNotFoundError: its data are not on this machine; the message names the command that fetches them.
    """
    try:
        import nltk
    except ImportError as error:
        raise ImportError(
            'Nouns are found by NLTK: pip install "gmail-hf[ifcap]", or give a list of words as entities.'
        ) from error
    for name, path in NLTK_DATA.items():
        if not _has_data(nltk, path):
            raise FileNotFoundError(
                f"NLTK's '{name}' is not on this machine: python -m nltk.downloader {' '.join(NLTK_DATA)}, or give a "
                "list of words as entities."
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
