"""Uploads finished shards to a data set repository on the Hub. Repeated calls only upload new shards."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from transformers.utils import logging

from ..publishing import dataset_card
from ..publishing.marker import card_of_others
from ..publishing.provenance import without_paths
from .engines import CONTACT_SHEET
from .shards import MANIFEST, ShardFolder, differences, open_folder, splits_of

# Per commit; an interrupted push continues after the last commit.
SHARDS_PER_COMMIT = 50

logger = logging.get_logger(__name__)


def push_dataset(
    folder: str | os.PathLike, repo_id: str, private: bool | None = None, captions_license: str | None = None
) -> str:
    """
    Upload the finished shards that the repository lacks, each split's manifest and contact sheet, and the card, unless
    a user edited the card. Folders of this machine are reduced to their last part.

    Args:
        folder: output folder of [`synthesize`], finished or not.
        repo_id: `org/name`, created if it does not exist.
        private: make a new repository private.
        captions_license: licence of the captions, as an identifier of the Hub. Defaults to the one given to the run.

    Returns:
        The repository's address.

    Raises:
        FileNotFoundError: `folder` has no finished shards.
        ValueError: a shard was changed, see [`ShardFolder.check`]; the shards contain paths of images, see
            [`check_public`]; the repository has shards of other settings, and the message lists the differences; or
            the repository has a split that `folder` lacks, which the new card would omit.
    """
    opened = [(shards, manifest) for shards, manifest in open_folder(folder) if shards.finished()]
    if not opened:
        raise FileNotFoundError(f"'{folder}' holds no finished shard yet.")
    for shards, manifest in opened:
        check_public(manifest["settings"]["real_images"])
        shards.check()
    if captions_license:
        for _, manifest in opened:
            manifest["source"]["captions_license"] = captions_license
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    repo_id = url.repo_id
    there = set(api.list_repo_files(repo_id, repo_type="dataset"))
    for shards, manifest in opened:
        _check_same_settings(repo_id, shards, manifest["settings"], there)
    lacking = [split for split in splits_of(there) if split not in {shards.split for shards, _ in opened}]
    if lacking:
        raise ValueError(
            f"'{repo_id}' holds the split(s) {lacking} and '{folder}' does not: push from a folder that holds all."
        )
    uploaded = [_upload(api, repo_id, shards, manifest, there) for shards, manifest in opened]
    others = card_of_others(repo_id, "dataset")
    if others is None:
        manifests = {shards.split: manifest for shards, manifest in opened}
        card = dataset_card(repo_id, manifests, {shards.split: count_rows(shards) for shards, _ in opened})
        api.create_commit(
            repo_id, [_add("README.md", str(card).encode())], commit_message="Update the card", repo_type="dataset"
        )
    elif "data_files:" in others:  # splits that are not listed there cannot be loaded
        unnamed = [shards.split for shards, _ in opened if f"data/{shards.split}-" not in others]
        if unnamed:
            logger.warning(f"The card of '{repo_id}' is yours: name the split(s) {unnamed} in its `data_files`.")
    new, old = (sum(counts) for counts in zip(*uploaded, strict=True))
    logger.info(f"{new} new shards uploaded, {old} were there.")
    return str(url)


def check_public(real_images: str | None) -> None:
    """
    Refuse to push shards with paths of images, which nobody else can open.

    Raises:
        ValueError: `real_images` is "reference".
    """
    if real_images == "reference":
        raise ValueError(
            "Shards made with --real_images reference hold paths of this machine and are not pushed: generate them "
            "with --real_images keep or drop."
        )


def _upload(
    api: HfApi, repo_id: str, shards: ShardFolder, manifest: dict[str, Any], there: set[str]
) -> tuple[int, int]:
    """Commit the finished shards of a split that are not `there`. Return the numbers of new and old shards."""
    finished = sorted(shards.finished())
    missing = [shard for shard in finished if _name_in_repo(shards, shard) not in there]
    about = [_add(shards.file(MANIFEST).name, (json.dumps(without_paths(manifest), indent=2) + "\n").encode())]
    if (sheet := shards.file(CONTACT_SHEET)).exists():
        about.append(_add(sheet.name, sheet))
    for start in range(0, len(missing), SHARDS_PER_COMMIT):
        chunk = missing[start : start + SHARDS_PER_COMMIT]
        operations = [_add(_name_in_repo(shards, shard), shards.shard_path(shard)) for shard in chunk]
        # The manifest is in each commit, so that an interrupted upload already describes its shards.
        api.create_commit(
            repo_id,
            about + operations,
            commit_message=f"Add {shards.split} shards {chunk[0]} to {chunk[-1]}",
            repo_type="dataset",
        )
    return len(missing), len(finished) - len(missing)


def count_rows(shards: ShardFolder) -> dict[str, int]:
    """Count a split's finished shards and their rows for the card. `truncated` counts captions, not rows."""
    images, captions, truncated = set(), set(), set()
    counts = {"shards": 0, "rows": 0, "nsfw": 0, "unchecked": 0}
    for shard in sorted(shards.finished()):
        table = pq.read_table(shards.shard_path(shard), columns=["image_id", "caption_id", "truncated", "nsfw"])
        images.update(table["image_id"].to_pylist())
        captions.update(table["caption_id"].to_pylist())
        truncated.update(table.filter(table["truncated"])["caption_id"].to_pylist())
        counts["shards"] += 1
        counts["rows"] += len(table)
        counts["nsfw"] += sum(verdict is True for verdict in table["nsfw"].to_pylist())
        counts["unchecked"] += table["nsfw"].null_count
    return counts | {"images": len(images), "captions": len(captions), "truncated": len(truncated)}


def _check_same_settings(repo_id: str, shards: ShardFolder, settings: dict, there: set[str]) -> None:
    name = shards.file(MANIFEST).name
    if name not in there:
        return
    theirs = json.loads(Path(hf_hub_download(repo_id, name, repo_type="dataset")).read_text())["settings"]
    theirs, settings = without_paths([theirs, settings])  # earlier releases pushed paths
    if theirs != settings:
        lines = "\n  ".join(differences(theirs, settings))
        raise ValueError(f"'{repo_id}' holds {shards.split} shards of other settings (there -> here):\n  {lines}")


def _name_in_repo(shards: ShardFolder, shard: int) -> str:
    return f"data/{shards.shard_path(shard).name}"


def _add(name: str, content: Path | bytes) -> CommitOperationAdd:
    return CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
