"""Labels by hand, and what PEFT trains, saves and merges."""

import logging

import pytest
import torch
from tiny import picture, png
from tiny_llava import PATCHES, VICUNA_TEMPLATE, inputs, make_llava_processor, make_tokenizer, question
from transformers import Phi3Config, Phi3ForCausalLM, TrainingArguments

from gmail_hf.vlm import (
    LLAMA3_CHAT_TEMPLATE,
    GmailLlavaForConditionalGeneration,
    LlavaCollator,
    build_processor,
    language_model_lora,
    training,
)
from gmail_hf.vlm.training import optimizer_of

peft = pytest.importorskip("peft")


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


# A token that ends a turn, and a line break after it; no beginning of text.
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '\\n' }}{{ m['content'] + '<|eot_id|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\\n' }}{% endif %}"
)
CONVERSATION = [
    turn("system", "Brief."),
    *question(text="What?"),
    turn("assistant", "A käfer"),
    turn("user", "assistant A"),
    turn("assistant", "A"),
]
TEXT_ONLY = [{"messages": [turn("user", "Hello"), turn("assistant", "Hi")], "images": []}]


def labelled(processor, batch, row: int) -> list[str]:
    """The labelled stretches of a row, as text."""
    stretches, last = [], None
    for position, label in enumerate(batch["labels"][row].tolist()):
        if label != -100:
            assert label == batch["input_ids"][row, position]
            if last != position - 1:
                stretches.append([])
            stretches[-1].append(label)
            last = position
    return [processor.tokenizer.decode(ids) for ids in stretches]


def test_labels_of_several_turns(llava_processor):
    rows = [
        {"messages": CONVERSATION, "images": [picture(0)]},
        {"messages": [*question(images=2), turn("assistant", "B")], "images": [picture(1), png(2)]},
    ]
    batch = LlavaCollator(llava_processor)(rows)
    assert labelled(llava_processor, batch, 0) == ["A käfer<|eot_id|>", "A<|eot_id|>"]
    assert labelled(llava_processor, batch, 1) == ["B<|eot_id|>"]
    assert batch["pixel_values"].shape[0] == 3 and "modality" not in batch
    image_tokens = batch["input_ids"] == llava_processor.image_token_id
    assert image_tokens.sum(dim=1).tolist() == [PATCHES, 2 * PATCHES]
    assert (batch["labels"][image_tokens] == -100).all()
    # Padded on the right, unlabelled.
    padding = batch["attention_mask"][1] == 0
    assert padding.any() and padding.tolist() == sorted(padding.tolist())
    assert (batch["labels"][1][padding] == -100).all()


@pytest.mark.parametrize("template", [LLAMA3_CHAT_TEMPLATE, CHATML_TEMPLATE])
def test_input_is_what_the_pipeline_makes(llava_processor, template):
    processor = make_llava_processor(llava_processor.tokenizer, template)
    batch = LlavaCollator(processor)([{"messages": CONVERSATION, "images": [picture(0)]}])
    messages = [dict(message) for message in CONVERSATION]
    messages[1]["content"] = [{"type": "image", "image": picture(0)}, *messages[1]["content"][1:]]
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    # What follows the last end of turn is nothing to learn.
    length = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"], expected["input_ids"][:, :length])
    assert processor.tokenizer.decode(expected["input_ids"][0, length:]).strip() == ""
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert labelled(processor, batch, 0) == ["A käfer<|eot_id|>", "A<|eot_id|>"]


def test_a_conversation_is_rendered_once(llava_processor, monkeypatch):
    processor = make_llava_processor(llava_processor.tokenizer, LLAMA3_CHAT_TEMPLATE)
    collator, calls = LlavaCollator(processor), []
    template = processor.apply_chat_template
    monkeypatch.setattr(processor, "apply_chat_template", lambda *a, **k: calls.append(a) or template(*a, **k))
    first, rendered = collator.render(CONVERSATION), len(calls)
    assert collator.render(CONVERSATION) == first and len(calls) == rendered > 0
    monkeypatch.setattr(training, "KEPT_RENDERINGS", rendered)
    collator.render([{"role": "user", "content": "Another?"}, {"role": "assistant", "content": "Yes."}])
    assert 0 < len(collator._rendered) <= rendered < len(calls)


def test_a_template_that_rewrites_earlier_turns(llava_processor):
    template = "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '-' }}{% endfor %}"
    with pytest.raises(ValueError, match="renders the start of a conversation differently"):
        LlavaCollator(make_llava_processor(llava_processor.tokenizer, template)).render(CONVERSATION)


def test_a_template_without_an_end_of_turn_gets_one():
    tokenizer = make_tokenizer(["<s>", "</s>", "<image>", "<pad>"], pad_token="<pad>")
    processor = make_llava_processor(tokenizer, VICUNA_TEMPLATE)
    conversation = CONVERSATION[1:]
    batch = LlavaCollator(processor)([{"messages": conversation, "images": [picture(0)]}])
    expected = f"<s>USER: {'<image>' * PATCHES}\nWhat? ASSISTANT: A käfer</s>USER: assistant A ASSISTANT: A</s>"
    assert tokenizer.decode(batch["input_ids"][0]) == expected
    assert labelled(processor, batch, 0) == [" A käfer</s>", " A</s>"]


def test_modalities_one_an_image(llava_processor):
    rows = [
        {"messages": [*question(images=2), turn("assistant", "B")], "images": [picture(1), picture(2)]},
        {"messages": CONVERSATION, "images": [picture(0)], "modality": "real"},
    ]
    rows[0]["modality"] = None
    assert LlavaCollator(llava_processor, "gen")(rows)["modality"] == ["gen", "gen", "real"]
    del rows[0]["modality"]
    assert LlavaCollator(llava_processor, "gen")(rows)["modality"] == ["gen", "gen", "real"]


def test_text_only_rows(llava_processor):
    batch = LlavaCollator(llava_processor)(TEXT_ONLY)
    assert labelled(llava_processor, batch, 0) == ["Hi<|eot_id|>"] and "pixel_values" not in batch


def test_unreadable_image_is_not_learned(llava_processor, caplog):
    rows = [{"messages": CONVERSATION, "images": [image]} for image in (png(0, truncated=True), png(1))]
    with caplog.at_level(logging.WARNING):
        batch = LlavaCollator(llava_processor)(rows)
    assert labelled(llava_processor, batch, 0) == [] and len(labelled(llava_processor, batch, 1)) == 2


def test_a_conversation_longer_than_the_model_takes_is_told_once(llava_processor, caplog):
    rows = [{"messages": CONVERSATION, "images": [picture(0)]}]
    length = LlavaCollator(llava_processor)(rows)["input_ids"].shape[1]
    with caplog.at_level(logging.WARNING):
        LlavaCollator(llava_processor, max_length=length)(rows)
        assert not caplog.messages
        collator = LlavaCollator(llava_processor, max_length=length - 1)
        for _ in range(2):
            assert collator(rows)["input_ids"].shape[1] == length
    assert len(caplog.messages) == 1 and f"{length} tokens, more than the {length - 1}" in caplog.text


def test_batch_without_a_readable_image_teaches_nothing(llava, llava_processor):
    """A mean over no token is NaN: one such batch would make every weight NaN."""
    batch = LlavaCollator(llava_processor)([{"messages": CONVERSATION, "images": [png(0, truncated=True)]}])
    llava.freeze_all_but_projector()
    loss = llava(**batch, num_items_in_batch=torch.tensor(0)).loss
    loss.backward()
    assert loss.item() == 0
    gradients = [parameter.grad for parameter in llava.model.multi_modal_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_batch_without_images_trains_nothing_of_the_projector(llava, llava_processor):
    batch = LlavaCollator(llava_processor)(TEXT_ONLY)
    with torch.no_grad():
        expected = llava.eval()(**batch).loss
    llava.freeze_all_but_projector()
    loss = llava.train()(**batch).loss
    loss.backward()
    assert torch.equal(loss, expected) and loss > 0
    gradients = [parameter.grad for parameter in llava.model.multi_modal_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_conversations_that_cannot_be_learned(llava_processor):
    collator = LlavaCollator(llava_processor)
    with pytest.raises(ValueError, match="1 image item.s. and 2 image.s."):
        collator([{"messages": CONVERSATION, "images": [picture(0), picture(1)]}])
    with pytest.raises(ValueError, match="no assistant's turn"):
        collator([{"messages": question(), "images": [picture(0)]}])


def train(model, processor, steps: int = 3) -> None:
    batch = LlavaCollator(processor, "gen")([{"messages": CONVERSATION, "images": [picture(0)]}])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def changed(model, before: dict) -> set[str]:
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


def snapshot(model) -> dict:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_projector_alone(llava, llava_processor):
    before = snapshot(llava)
    llava.freeze_all_but_projector()
    train(llava, llava_processor)
    assert changed(llava, before) == {name for name in before if "multi_modal_projector" in name}


def test_learning_rate_of_the_projector(llava, tmp_path):
    model = peft.get_peft_model(llava, language_model_lora(rank=2, alpha=4))
    args = TrainingArguments(tmp_path, learning_rate=2e-4, weight_decay=0.1, use_cpu=True)
    assert optimizer_of(model, args) is None
    projector, others = optimizer_of(model, args, 2e-5).param_groups
    assert (projector["lr"], others["lr"], projector["weight_decay"], others["weight_decay"]) == (2e-5, 2e-4, 0.1, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [[names.pop(id(parameter)) for parameter in group["params"]] for group in (projector, others)]
    assert not names and all("multi_modal_projector" in name for name in groups[0])
    assert all(".lora_" in name for name in groups[1])


def test_lora_on_the_language_model(llava, llava_processor, llava_folder, gmail_folder, tmp_path):
    before = snapshot(llava)
    model = peft.get_peft_model(llava, language_model_lora(rank=2, alpha=4))
    # B is zero at first, which leaves A without gradient.
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".language_model.layers." in name or ".multi_modal_projector." in name for name in trained)
    layers = llava.config.text_config.num_hidden_layers
    assert sum(".lora_A." in name for name in trained) == 7 * layers
    assert sum("multi_modal_projector" in name for name in trained) == 4
    train(model, llava_processor)
    batch = inputs(llava_processor)
    with torch.no_grad():
        expected = model(**batch, modality="gen").logits
        real = model(**batch, modality="real").logits
    assert (expected - real).abs().max() > 1e-2
    said = model.generate(**batch, modality="gen", max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path / "adapter")

    base = GmailLlavaForConditionalGeneration.from_llava(llava_folder, gmail=gmail_folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch, modality="gen").logits, expected)

    merged = model.merge_and_unload()
    assert type(merged) is GmailLlavaForConditionalGeneration
    frozen = [name for name in before if "vision_tower" in name or "embed_tokens" in name or "lm_head" in name]
    assert all(torch.equal(merged.state_dict()[name], before[name]) for name in frozen)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = GmailLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**batch, modality="gen").logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(reloaded.generate(**batch, modality="gen", max_new_tokens=5, do_sample=False), said)


def test_lora_on_fused_layers(gmail_folder, tmp_path):
    """Phi-3 has one layer for queries, keys and values, and one for the gate and what it gates."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Phi3Config(**shape, vocab_size=261, bos_token_id=256, eos_token_id=257, pad_token_id=257)
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer(chat_template=LLAMA3_CHAT_TEMPLATE).save_pretrained(tmp_path)
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(
        gmail_folder, tmp_path, build_processor(gmail_folder, tmp_path)
    )
    model = peft.get_peft_model(model, language_model_lora(rank=2, alpha=4))
    trained = [name for name, _ in model.named_parameters() if ".lora_A." in name and "language_model" in name]
    assert {name.split(".")[-4] for name in trained} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
