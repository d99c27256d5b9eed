"""Stage 1 on every base: `GmailTrainer` trains the gen branch, evaluates, saves and comes back."""

import app
import pytest
import torch
from tiny import make_pairs, picture, randomise
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from towers import IMAGES, TEXT, make
from transformers import (
    AutoModel,
    BitImageProcessor,
    CLIPImageProcessor,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    pipeline,
)

from gmail_hf import GmailTrainer, GmailTrainingArguments, from_base
from gmail_hf.branches.tower import adapter_of
from gmail_hf.models.base import text_options
from gmail_hf.training.losses import sigmoid_loss


def small_tokenizer():
    """Words of the captions, in the vocabulary of the small models."""
    words = [f"{caption} {row}" for row, caption in enumerate(["a cat", "a dog", "two birds", "a red car"])]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["[UNK]", *" ".join(words).split()]))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")


SIZE = {"height": 16, "width": 16}
CLIP = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE)
PROCESSORS = {
    "clip": CLIP,
    "metaclip_2": CLIP,
    "siglip": SiglipImageProcessor(size=SIZE),
    "siglip2": Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
}
DEFAULT = BitImageProcessor(size=SIZE, do_center_crop=False)


@pytest.mark.parametrize(
    "name", ["clip", "metaclip_2", "siglip", "siglip2", "dinov2", "dinov2_with_registers", "dinov3", "vit"]
)
def test_the_gen_branch_trains(name, tmp_path):
    make(name).save_pretrained(tmp_path / "base")
    model = from_base(tmp_path / "base")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    args = GmailTrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
    )
    processor = PROCESSORS.get(name, DEFAULT)
    trainer = GmailTrainer(model, args, make_pairs(8), make_pairs(8, seed=50), processor)
    trainer.train()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and {adapter_of(key) for key in changed} == {"gen"}
    expected = trainer.evaluate()
    trainer.save_model()
    again = AutoModel.from_pretrained(tmp_path / "out")
    resumed = GmailTrainer(again, args, make_pairs(8), make_pairs(8, seed=50), processor).evaluate()
    assert resumed["eval_paired_cosine"] == pytest.approx(expected["eval_paired_cosine"], abs=1e-5)


def test_text_losses_of_siglip(tmp_path):
    """Captions padded to the context length, and the sigmoid loss with SigLIP's own scale and bias."""
    siglip = make("siglip")
    siglip.save_pretrained(tmp_path / "base")
    model = from_base(tmp_path / "base", text_lora=True)
    assert (
        text_options(model) == text_options(siglip) == {"padding": "max_length", "truncation": True, "max_length": 16}
    )
    args = GmailTrainingArguments(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, align_weight=0, real_text_weight=1,
        use_cpu=True, report_to=[], logging_steps=1,
    )  # fmt: skip
    processor = SiglipProcessor(image_processor=PROCESSORS["siglip"], tokenizer=small_tokenizer())
    trainer = GmailTrainer(model, args, make_pairs(4), processing_class=processor)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (4, 16)
    loss = trainer.compute_loss(model, batch)
    with torch.no_grad():
        real, text = batch["real_embeds"], model.embed_text(batch["input_ids"], batch.get("attention_mask"))
        logits = torch.nn.functional.normalize(real, dim=-1) @ text.t() * model.logit_scale.exp() + model.logit_bias
        expected = -torch.nn.functional.logsigmoid((2 * torch.eye(4) - 1) * logits).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    trainer.train()
    assert trainer.state.log_history[0]["real_text_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_sigmoid_loss_by_hand():
    images = torch.eye(3, 4)
    texts = torch.eye(3, 4)
    # Logits are 2 - 1 = 1 on the diagonal and -1 elsewhere: every term is log(1 + e^-1).
    expected = 3 * torch.log1p(torch.exp(torch.tensor(-1.0)))
    torch.testing.assert_close(sigmoid_loss(images, texts, 2.0, -1.0), expected)
    # The first two share a caption, so that each has one negative less.
    masked = sigmoid_loss(images, texts, 2.0, -1.0, caption_ids=torch.tensor([5, 5, 6]))
    torch.testing.assert_close(masked, expected * 7 / 9)


def test_the_pipeline_serves_siglip(tmp_path):
    """The real branch scores like plain SigLIP, with its sigmoid and its padding; the gen branch differs."""
    siglip = SiglipModel(SiglipConfig(text_config={**TEXT, "max_position_embeddings": 64}, vision_config=IMAGES))
    processor = SiglipProcessor(image_processor=PROCESSORS["siglip"], tokenizer=small_tokenizer())
    for folder in ("base", "gmail"):
        processor.save_pretrained(tmp_path / folder)
    siglip.save_pretrained(tmp_path / "base")
    randomise(from_base(tmp_path / "base")).save_pretrained(tmp_path / "gmail")
    labels = {"candidate_labels": ["a cat", "a dog"], "hypothesis_template": "{}"}

    def scores(pipe):
        return {entry["label"]: entry["score"] for entry in pipe(picture(0), **labels)}

    plain = pipeline("zero-shot-image-classification", model=str(tmp_path / "base"))
    served = pipeline("zero-shot-image-classification", model=str(tmp_path / "gmail"))
    assert type(served.model).__name__ == "GmailSiglipModel"
    assert scores(served) == pytest.approx(scores(plain), abs=1e-6)
    expected = torch.tensor([scores(plain)[label] for label in labels["candidate_labels"]]).logit().softmax(0)
    shown = app.score(served.model, processor, picture(0), labels["candidate_labels"])["real"]
    assert list(shown.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    with served.model.using("gen"):
        assert scores(served) != pytest.approx(scores(plain), abs=1e-6)
