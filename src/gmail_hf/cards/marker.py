"""Whose card it is: one that was written here is written anew, one that somebody edited is left alone."""

import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

MARKER = "<!-- Written by gmail-hf. Remove this line, and the card is yours: it is not written over again. -->"


def written_here(folder: str | os.PathLike) -> bool:
    """Whether a folder's README.md is a card that may be written anew."""
    path = Path(folder, "README.md")
    return path.exists() and MARKER in path.read_text(encoding="utf-8")


def card_of_others(repo_id: str, repo_type: str = "model", token: str | bool | None = None) -> bytes | None:
    """The README.md of a repository of the Hub if it has one that was not written here."""
    try:
        content = Path(hf_hub_download(repo_id, "README.md", repo_type=repo_type, token=token)).read_bytes()
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return None if MARKER.encode() in content else content
