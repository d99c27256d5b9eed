"""Detects whether gmail-hf wrote a card. Only such cards are replaced; cards that a user wrote or edited are kept."""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

# Part of each card. `signed` replaces the zeros with a digest of the card.
MARKER = "<!-- Written by gmail-hf (0000000000000000). Once you edit this card, gmail-hf no longer overwrites it. -->"
FORM = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
DIGEST = re.compile(r"(?<=<!-- Written by gmail-hf \()\w{16}(?=\))")


def signed(content: str) -> str:
    """Return a card's content with its digest in its [`MARKER`]."""
    blank = DIGEST.sub("0" * 16, content)
    return DIGEST.sub(hashlib.blake2b(blank.encode(errors="surrogateescape"), digest_size=8).hexdigest(), blank)


def written_here(content: str) -> bool:
    """Whether a card has a marker and is unchanged since it was signed."""
    return bool(DIGEST.search(content)) and signed(content) == content


def card_of_others(repo_id: str, repo_type: str = "model", token: str | bool | None = None) -> str | None:
    """Return the README.md of a Hub repository if it has one that gmail-hf did not write; otherwise None."""
    try:
        content = read_card(hf_hub_download(repo_id, "README.md", repo_type=repo_type, token=token))
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return None if written_here(content) or _is_empty_form(content) else content


def own_card(folder: str | os.PathLike) -> bool:
    """Whether a folder has a README.md that a user wrote or edited."""
    path = Path(folder, "README.md")
    return path.exists() and not written_here(read_card(path))


def _is_empty_form(content: str) -> bool:
    """Whether a card is the empty template that transformers writes when a processor is pushed before its model."""
    if FORM not in content:
        return False
    form = ModelCard.from_template(ModelCardData(), model_description=FORM)
    return ModelCard(content, ignore_metadata_errors=True).text.strip() == form.text.strip()


def read_card(path: str | os.PathLike) -> str:
    """Return the content of a card, byte for byte."""
    with open(path, encoding="utf-8", newline="", errors="surrogateescape") as file:
        return file.read()
