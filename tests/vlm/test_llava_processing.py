"""Processors and chat templates: a chat of texts stays as it was, image items become tokens, misfits are told."""

import pytest
import torch
from tiny import make_processor, picture
from tiny_llava import (
    LLAMA3_TOKENS,
    PATCHES,
    VICUNA_TEMPLATE,
    inputs,
    make_llava_processor,
    make_tokenizer,
    question,
    save_llama,
)
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlavaProcessor,
)

from gmail_hf.vlm import (
    LLAMA3_CHAT_TEMPLATE,
    GmailLlavaForConditionalGeneration,
    build_processor,
    check_processor,
    with_images,
)

CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " What is <this>?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Why?"},
]
GENERATION_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)


def in_items(chat):
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]


@pytest.mark.parametrize("template", [LLAMA3_CHAT_TEMPLATE, VICUNA_TEMPLATE, GENERATION_TEMPLATE])
@pytest.mark.parametrize("prompt", [False, True])
def test_a_chat_of_texts_renders_as_before(template, prompt):
    settings = {"tokenize": False, "add_generation_prompt": prompt}
    expected = make_tokenizer(chat_template=template).apply_chat_template(CHAT, **settings)
    tokenizer = make_tokenizer(chat_template=with_images(template))
    assert tokenizer.apply_chat_template(CHAT, **settings) == expected
    assert tokenizer.apply_chat_template(in_items(CHAT), **settings) == expected


def test_llama3_format():
    """As in the model card of Meta Llama 3: https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/"""
    rendered = make_tokenizer(chat_template=LLAMA3_CHAT_TEMPLATE).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    turns = [("system", "Be brief."), ("user", "What is <this>?"), ("assistant", "A cat."), ("user", "Why?")]
    expected = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns)
    assert rendered == f"<|begin_of_text|>{expected}<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_image_items_become_image_tokens():
    tokenizer = make_tokenizer(chat_template=with_images(VICUNA_TEMPLATE))
    chat = [*question(images=2, text="Same?"), {"role": "assistant", "content": "No."}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "USER: <image>\n<image>\nSame? ASSISTANT: No. "
    with pytest.raises(Exception, match="type video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


def test_build_processor_and_model(gmail_folder, llama_folder, tmp_path):
    processor = build_processor(gmail_folder, llama_folder)
    assert type(processor) is LlavaProcessor
    text = processor.apply_chat_template(question(), tokenize=False, add_generation_prompt=True)
    batch = processor(images=[picture(0)], text=text, add_special_tokens=False, return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == PATCHES
    torch.testing.assert_close(
        batch["pixel_values"], make_processor()(images=[picture(0)], return_tensors="pt")["pixel_values"]
    )
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail_folder, llama_folder, processor)
    check_processor(processor, model.config)
    tokens = len(processor.tokenizer)
    assert tokens == 256 + len(LLAMA3_TOKENS) + 2  # image and padding
    assert model.get_input_embeddings().num_embeddings >= tokens
    assert model.config.text_config.vocab_size == model.lm_head.out_features >= tokens
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    ends = processor.tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    assert model.generation_config.eos_token_id == sorted(ends)
    # On text it is the language model that it was made from.
    llama = LlamaForCausalLM.from_pretrained(llama_folder)
    ids = torch.arange(200, 250).unsqueeze(0)
    with torch.no_grad():
        known = model(input_ids=ids).logits[..., : llama.config.vocab_size]
        torch.testing.assert_close(known, llama(input_ids=ids).logits)
    with torch.no_grad():
        gen, real = (model(**inputs(processor), modality=name).logits for name in ("gen", "real"))
    assert (gen - real).abs().max() > 1e-3
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    again = GmailLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.generation_config.eos_token_id == sorted(ends)
    with torch.no_grad():
        assert torch.equal(again(**inputs(processor), modality="gen").logits, gen)


@pytest.mark.parametrize("kind", ["llama3", "llava", "vicuna"])
def test_chat_template_makes_all_inputs(kind, llava, llava_folder, gmail_folder, llama_folder):
    """One beginning of text, whether template or tokenizer writes it, and batches as one by one."""
    if kind == "llama3":
        processor = build_processor(gmail_folder, llama_folder)
        model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail_folder, llama_folder, processor)
    else:
        tokenizer = AutoTokenizer.from_pretrained(llava_folder, padding_side="left")  # as LLaVA's are published
        processor = make_llava_processor(tokenizer, VICUNA_TEMPLATE if kind == "vicuna" else LLAMA3_CHAT_TEMPLATE)
        model = llava
    conversations = []
    for index, text in enumerate(("What?", "What is it that you see?")):
        items = [{"type": "image", "image": picture(index)}, {"type": "text", "text": text}]
        conversations.append([{"role": "user", "content": items}])
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(conversations, processor_kwargs={"padding": True}, **settings)
    assert (batch["input_ids"] == processor.tokenizer.bos_token_id).sum(dim=1).tolist() == [1, 1]
    length = batch["input_ids"].shape[1]
    model.generation_config.eos_token_id = None
    together = model.generate(**batch, modality="real", max_new_tokens=5, do_sample=False)[:, length:]
    said = []
    for row, conversation in enumerate(conversations):
        alone = processor.apply_chat_template(conversation, **settings)
        assert torch.equal(batch["input_ids"][row, -alone["input_ids"].shape[1] :], alone["input_ids"][0])
        assert torch.equal(batch["pixel_values"][row], alone["pixel_values"][0])
        output = model.generate(**alone, modality="real", max_new_tokens=5, do_sample=False)
        said.append(output[0, alone["input_ids"].shape[1] :])
    assert torch.equal(together, torch.stack(said))


def test_a_tokenizer_keeps_its_own_tokens(gmail_folder, tmp_path):
    save_llama(tmp_path, make_tokenizer([*LLAMA3_TOKENS, "<image>", "<pad>"], pad_token="<pad>"), vocab_size=263)
    processor = build_processor(gmail_folder, tmp_path)
    assert len(processor.tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path))
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail_folder, tmp_path, processor)
    assert model.config.text_config.vocab_size == 263


def test_base_llama_gets_llama3s_format(gmail_folder, tmp_path):
    save_llama(tmp_path, make_tokenizer())
    rendered = build_processor(gmail_folder, tmp_path).apply_chat_template(CHAT, tokenize=False)
    assert rendered == make_tokenizer(chat_template=LLAMA3_CHAT_TEMPLATE).apply_chat_template(CHAT, tokenize=False)


def test_no_template_at_all(gmail_folder, tmp_path):
    save_llama(tmp_path, make_tokenizer(["<s>", "</s>"]))
    with pytest.raises(ValueError, match="chat_template="):
        build_processor(gmail_folder, tmp_path)
    processor = build_processor(gmail_folder, tmp_path, chat_template=VICUNA_TEMPLATE)
    assert processor.apply_chat_template(question(), tokenize=False) == "USER: <image>\nWhat? "


def test_processors_that_do_not_fit(llava, llava_processor):
    tokenizer, image_processor = llava_processor.tokenizer, llava_processor.image_processor
    good = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    check_processor(LlavaProcessor(image_processor, tokenizer, **good), llava.config)
    large = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    bad = {
        r"patch_size 4, but the model needs 8": {"patch_size": 4},
        r"select_strategy full, but the model needs default": {"vision_feature_select_strategy": "full"},
        r"num_additional_image_tokens 0, but the model needs 1": {"num_additional_image_tokens": 0},
        r"image size \(32, 32\), but the model needs \(16, 16\)": {"image_processor": large},
        r"no image token '<image>'": {"tokenizer": make_tokenizer()},
    }
    for message, change in bad.items():
        arguments = {"image_processor": image_processor, "tokenizer": tokenizer, **good, **change}
        with pytest.raises(ValueError, match=message):
            check_processor(LlavaProcessor(**arguments), llava.config)


def test_models_that_are_no_pair(clip_folder, gmail_folder, llama_folder, tmp_path):
    processor = build_processor(gmail_folder, llama_folder)
    with pytest.raises(ValueError, match="not a GmailCLIPModel"):
        GmailLlavaForConditionalGeneration.from_vision_text_pretrained(clip_folder, llama_folder, processor)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(processor.tokenizer)))
    gpt2.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a gpt2, does not have the layout"):
        GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail_folder, tmp_path, processor)
    processor.patch_size = 4
    with pytest.raises(ValueError, match="patch_size 4"):
        GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail_folder, llama_folder, processor)
