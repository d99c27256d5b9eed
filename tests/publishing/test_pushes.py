"""What a training pushes while it runs: to which revision, and with which card."""

from concurrent.futures import Future
from pathlib import Path

import pytest

from gmail_hf import GmailTrainer
from gmail_hf.publishing.marker import written_here


class Hub:
    """The branches that were created, the revision and the cards of each commit, and a card that a user wrote."""

    def __init__(self):
        self.branches, self.revisions, self.cards, self.edited = [], [], [], None


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()

    def create_commit(self, repo_id, operations, revision=None, **options):
        hub.revisions.append(revision)
        cards = [part.path_or_fileobj for part in operations if part.path_in_repo == "README.md"]
        hub.cards.append([Path(card).read_text() for card in cards])
        future = Future()
        future.set_result(None)
        return future

    def init_hf_repo(self, *args, **options):
        self.hub_model_id, self.push_in_progress = "org/model", None

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", create_commit)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_branch", lambda self, repo_id, *, branch, **options: hub.branches.append(branch)
    )
    monkeypatch.setattr("gmail_hf.publishing.model_cards.card_of_others", lambda *args, **options: hub.edited)
    monkeypatch.setattr(GmailTrainer, "init_hf_repo", init_hf_repo)
    return hub


SAVES = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_strategy": "every_save"}


def test_a_card_that_is_edited_on_the_hub_during_a_training_stays(train, hub, monkeypatch):
    save = GmailTrainer._save_checkpoint

    def edited_before_the_second_save(self, *args):
        hub.edited = "# Edited on the Hub" if self.state.global_step > 1 else None
        save(self, *args)

    monkeypatch.setattr(GmailTrainer, "_save_checkpoint", edited_before_the_second_save)
    trainer = train(max_steps=3, **SAVES)
    first, *others = hub.cards
    assert written_here(*first) and others == [[], []]
    card = Path(trainer.args.output_dir, "README.md")
    card.write_text("# Edited here")  # which the user wants to push
    trainer._push_from_checkpoint(str(Path(trainer.args.output_dir, "checkpoint-3")))
    assert hub.cards[-1] == ["# Edited here"]


@pytest.mark.parametrize(("revision", "created"), [("v2", ["v2"]), ("refs/pr/3", []), (None, [])])
def test_the_branch_of_hub_revision_is_created(train, hub, revision, created):
    train(max_steps=1, hub_revision=revision, **SAVES)
    assert hub.branches == created and hub.revisions == [revision]
