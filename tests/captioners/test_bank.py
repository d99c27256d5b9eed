"""The caption bank of IFCap: retrieval, entity filtering and prompts by hand, and the nouns of captions."""

import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from tiny_captioner import CAPTIONS, make_bank

from gmail_hf.captioners import CaptionBank, listed_words, nltk_nouns
from gmail_hf.captioners.bank import MAX_PROMPT_LENGTH


def bank_of(entities, dim=2) -> CaptionBank:
    captions = [f"caption {row}" for row in range(len(entities))]
    found = dict(zip(captions, entities, strict=True))
    return CaptionBank.build(captions, np.ones((len(entities), dim)), found.get, make_tokenizer())


def test_nearest_captions_by_hand():
    bank = bank_of([[]] * 4)
    bank.embeds = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    queries = torch.tensor([[3.0, 0.3], [0.01, 0.1]])  # only directions matter
    assert bank.retrieve(queries, 3).tolist() == [[0, 1, 2], [2, 1, 0]]
    assert bank.retrieve(queries, 3, exclude=torch.tensor([0, 1])).tolist() == [[1, 2, 3], [2, 0, 3]]
    assert bank.retrieve(queries, 3, exclude=torch.tensor([0, 1]), chunk_size=1).tolist() == [[1, 2, 3], [2, 0, 3]]


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 50, 51])
def test_chunked_equals_full(chunk_size):
    rng = np.random.default_rng(0)
    bank = bank_of([[]] * 50, dim=8)
    bank.embeds = torch.from_numpy(rng.normal(size=(50, 8)).astype(np.float32))
    queries = torch.from_numpy(rng.normal(size=(6, 8)).astype(np.float32))
    scores = queries @ bank.embeds.T
    full = scores.argsort(dim=1, descending=True)
    assert torch.equal(bank.retrieve(queries, 5, chunk_size=chunk_size), full[:, :5])
    second = full[:, 1]
    expected = torch.cat([full[:, :1], full[:, 2:6]], dim=1)
    assert torch.equal(bank.retrieve(queries, 5, exclude=second, chunk_size=chunk_size), expected)


def test_frequent_entities_by_hand():
    bank = bank_of([["cat", "mat"], ["cat", "dog"], ["dog"], ["cat", "mat", "mat"], []])
    # cat: rows 0, 1, 3; mat: 0, 3, once each; dog: 1, 2
    assert bank.frequent_entities([0, 1, 2, 3, 4], threshold=2) == ["cat"]
    assert sorted(bank.frequent_entities([0, 1, 2, 3, 4], threshold=1)) == ["cat", "dog", "mat"]
    assert bank.frequent_entities([2, 4], threshold=0) == ["dog"]
    assert bank.frequent_entities([0, 1, 2, 3, 4], threshold=3) == []


def test_prompt_is_the_tokenised_sentence_in_alphabetical_order():
    bank = bank_of([["dog", "cat", "mat"], [], [f"thing{i}" for i in range(40)]])
    expected = make_tokenizer()("There are cat, dog, mat in the image.", add_special_tokens=False)["input_ids"]
    assert bank.prompt(["mat", "dog", "cat"]) == expected
    assert bank.prompt([]) == []
    cut = bank.prompt(bank.entities[2])
    two = make_tokenizer()("There are thing0, thing1 in the image.", add_special_tokens=False)["input_ids"]
    assert cut == two and len(two) <= MAX_PROMPT_LENGTH < len(two) + len(bank.words["thing10"]) + 1


def test_a_bank_has_each_caption_once_with_its_embedding():
    with pytest.raises(ValueError, match="2 captions, 1 of them distinct, and 2 embeddings"):
        CaptionBank.build(["a", "a"], np.ones((2, 3)), str.split, make_tokenizer())
    with pytest.raises(ValueError, match="2 captions, 2 of them distinct, and 1 embeddings"):
        CaptionBank.build(["a", "b"], np.ones((1, 3)), str.split, make_tokenizer())


def test_reloaded_equals_saved(tmp_path):
    bank = make_bank()
    bank.save(tmp_path)
    again = CaptionBank.from_pretrained(tmp_path)
    assert again.captions == list(CAPTIONS) and again.entities == bank.entities and again.words == bank.words
    assert torch.equal(again.embeds, bank.embeds)
    file = tmp_path / "caption_bank.safetensors"
    embeds = load_file(file)["embeds"]
    for bad in (embeds[1:], embeds.where(embeds != embeds[0, 0], torch.nan), embeds[:, 0]):
        save_file({"embeds": bad.contiguous()}, file)
        with pytest.raises(ValueError, match="damaged or do not belong together"):
            CaptionBank.from_pretrained(tmp_path)
    (tmp_path / "caption_bank.json").write_text('{"captions": []}')
    with pytest.raises(ValueError, match="damaged or do not belong together"):
        CaptionBank.from_pretrained(tmp_path)


def test_listed_words_are_whole_words_in_order():
    find = listed_words(["three", "fire hydrant", "fire", " Cat ", ""])
    assert find("A CAT, three threes and a fire hydrant by a fire") == ["Cat", "three", "fire hydrant", "fire"]
    assert find("nothing") == []
    with pytest.raises(ValueError, match="list of entities is empty"):
        listed_words([" ", ""])


def test_nouns_are_tagged_and_lemmatised(monkeypatch):
    """NLTK's data are not part of the tests: a table takes the place of its tagger."""
    tags = {"Two": "CD", "dogs": "NNS", "chase": "VBP", "a": "DT", "frisbee": "NN", "in": "IN", "London": "NNP"}
    nltk = types.SimpleNamespace(
        data=types.SimpleNamespace(find=lambda path: None),
        stem=types.SimpleNamespace(
            WordNetLemmatizer=lambda: types.SimpleNamespace(lemmatize=lambda word, pos: word.rstrip("s"))
        ),
        pos_tag=lambda words: [(word, tags[word]) for word in words],
    )
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    assert nltk_nouns()("Two dogs chase a frisbee, in London.") == ["dog", "frisbee", "london"]


def test_what_nltk_lacks_is_named(monkeypatch):
    def find(path):
        raise LookupError(path)

    monkeypatch.setitem(sys.modules, "nltk", types.SimpleNamespace(data=types.SimpleNamespace(find=find)))
    with pytest.raises(FileNotFoundError, match="nltk.downloader averaged_perceptron_tagger_eng wordnet, or provide"):
        nltk_nouns()
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r'pip install "gmail-hf\[ifcap\]", or provide a list'):
        nltk_nouns()
