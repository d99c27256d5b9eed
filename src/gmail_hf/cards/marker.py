"""Whose card it is: one that was written here is written anew, one that somebody edited is left alone."""

from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.repocard import RepoCard

MARKER = "<!-- Written by gmail-hf. Remove this line, and the card is yours: it is not written over again. -->"


def card_of_others(repo_id: str, repo_type: str = "model", token: str | None = None) -> RepoCard | None:
    """The card of a repository of the Hub if it has one that was not written here."""
    try:
        card = RepoCard.load(repo_id, repo_type=repo_type, token=token, ignore_metadata_errors=True)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return None if MARKER in card.text else card
