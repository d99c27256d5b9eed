"""Finished shards to a data set repository of the Hub, and later those that came since."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import logging

from ..cards import dataset_card
from ..cards.marker import card_of_others
from .engines import CONTACT_SHEET
from .shards import MANIFEST, ShardFolder, differences, open_folder

# Shards of one commit: a push that is interrupted goes on after the last one.
SHARDS_PER_COMMIT = 50

logger = logging.get_logger(__name__)


def push_dataset(
    folder: str | os.PathLike, repo_id: str, private: bool | None = None, captions_license: str | None = None
) -> str:
    """
    Upload the finished shards that the repository lacks, the manifest and the contact sheet, then its card, unless
    somebody edited that.

    Args:
        folder: what [`synthesize`] made, finished or not.
        repo_id: `org/name`; made if it is not there.
        private: make it private.
        captions_license: licence of the captions, an identifier of the Hub; by default what the run was told.

    Returns:
        The repository's address.

    Raises:
        FileNotFoundError: `folder` holds no shards.
        ValueError: the repository holds shards of other settings; the message shows what differs.
    """
    shards, manifest = open_folder(folder)
    finished = sorted(shards.finished())
    if not finished:
        raise FileNotFoundError(f"'{folder}' holds no finished shard yet.")
    if captions_license:
        manifest["source"]["captions_license"] = captions_license
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    repo_id = url.repo_id
    _check_same_settings(repo_id, manifest["settings"])
    there = set(api.list_repo_files(repo_id, repo_type="dataset"))
    missing = [shard for shard in finished if _name_in_repo(shards, shard) not in there]
    about = [_add(MANIFEST, shards.path / MANIFEST)]
    if (shards.path / CONTACT_SHEET).exists():
        about.append(_add(CONTACT_SHEET, shards.path / CONTACT_SHEET))
    for start in range(0, len(missing), SHARDS_PER_COMMIT):
        chunk = missing[start : start + SHARDS_PER_COMMIT]
        operations = [_add(_name_in_repo(shards, shard), shards.shard_path(shard)) for shard in chunk]
        # The manifest goes first, so that even a repository of one commit tells what its shards are.
        api.create_commit(
            repo_id,
            operations if MANIFEST in there or start else about + operations,
            commit_message=f"Add shards {chunk[0]} to {chunk[-1]}",
            repo_type="dataset",
        )
    if card_of_others(repo_id, "dataset") is None:
        card = dataset_card(repo_id, manifest, count_rows(shards))
        api.create_commit(
            repo_id, [_add("README.md", str(card).encode())], commit_message="Update the card", repo_type="dataset"
        )
    logger.info(f"{len(missing)} new shards uploaded, {len(finished) - len(missing)} were there.")
    return str(url)


def count_rows(shards: ShardFolder) -> dict[str, int]:
    """What the card tells of the finished shards, counted in their columns."""
    images, captions = set(), set()
    counts = {"shards": 0, "rows": 0, "truncated": 0, "nsfw": 0, "unchecked": 0}
    for shard in sorted(shards.finished()):
        table = pq.read_table(shards.shard_path(shard), columns=["image_id", "caption_id", "truncated", "nsfw"])
        images.update(table["image_id"].to_pylist())
        captions.update(table["caption_id"].to_pylist())
        counts["shards"] += 1
        counts["rows"] += len(table)
        counts["truncated"] += sum(table["truncated"].to_pylist())
        counts["nsfw"] += sum(verdict is True for verdict in table["nsfw"].to_pylist())
        counts["unchecked"] += table["nsfw"].null_count
    return counts | {"images": len(images), "captions": len(captions)}


def _check_same_settings(repo_id: str, settings: dict) -> None:
    try:
        theirs = json.loads(Path(hf_hub_download(repo_id, MANIFEST, repo_type="dataset")).read_text())["settings"]
    except EntryNotFoundError:
        return
    if theirs != settings:
        lines = "\n  ".join(differences(theirs, settings))
        raise ValueError(f"'{repo_id}' holds shards of other settings (there -> here):\n  {lines}")


def _name_in_repo(shards: ShardFolder, shard: int) -> str:
    return f"data/{shards.shard_path(shard).name}"


def _add(name: str, content: Path | bytes) -> CommitOperationAdd:
    return CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
