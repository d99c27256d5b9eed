"""Fixtures of the captioning tests: a two-branch CLIP and two tiny language models, saved."""

import pytest
from tiny_captioner import TEXT_CONFIGS, make_captioner, save_gmail_model, save_text_model


@pytest.fixture(scope="session")
def gmail_folder(clip_folder, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gmail")
    save_gmail_model(clip_folder, folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_folders(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in TEXT_CONFIGS}
    for name, folder in folders.items():
        save_text_model(name, folder)
    return folders


@pytest.fixture(
    params=[(text, mapping) for text in ("gpt2", "llama") for mapping in ("mlp", "transformer")], ids="-".join
)
def captioner(request, gmail_folder, text_folders):
    """Each language model with each mapping network."""
    text, mapping_type = request.param
    return make_captioner(gmail_folder, text_folders[text], mapping_type=mapping_type)


@pytest.fixture
def gpt2_captioner(gmail_folder, text_folders):
    return make_captioner(gmail_folder, text_folders["gpt2"])
