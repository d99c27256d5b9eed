"""
Train the small language model of `gmail_hf.digits` from scratch on the language of the captions, without images.

    python benchmarks/digits/train_llama.py --output_dir llama
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from loop import Schedule, adamw, fit, save_half
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gmail_hf.digits.questions import QUESTIONS, scene_answers
from gmail_hf.digits.scenes import COLOR_NAMES
from gmail_hf.vlm.chat import LLAMA3_CHAT_TEMPLATE

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
SPECIAL_TOKENS = (BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", PAD)
MAX_LENGTH = 512
IGNORED = -100
# Every `HELD_OUT`th of the 3,000 scenes is held out from training, in any wording.
HELD_OUT = 10


@dataclass
class LlamaArguments:
    output_dir: str
    num_steps: int = 1_200
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    save_steps: int = 250
    seed: int = 0
    mixed_precision: str = "no"


def all_scenes(held_out: bool) -> list[dict]:
    """All possible scenes without images: 2,700 for training or 300 held out for testing."""
    scenes = [
        {"digits": [left, right], "colors": [first, second]}
        for left in range(10)
        for right in range(10)
        for first in COLOR_NAMES
        for second in COLOR_NAMES
        if first != second
    ]
    order = np.random.default_rng(0).permutation(len(scenes))
    return [scenes[i] for position, i in enumerate(order) if (position % HELD_OUT == 0) == held_out]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train Llama 3's byte-level BPE on the language of the scenes, so that every word of it is one token."""
    tokenizer = Tokenizer(models.BPE())
    words = r"\p{L}+| \p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    text = [describe(scene, rng) for scene in all_scenes(held_out=False) for _ in range(4)]
    text += [answer for scene in all_scenes(held_out=False) for answer in scene_answers(scene).values()]
    text += [*QUESTIONS.values(), "user\n\n", "assistant\n\n", "system\n\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,  # never reached: training stops when every word is one token
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token="<|eot_id|>",
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        chat_template=LLAMA3_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with 0.4 million parameters and random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are short
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(EOS)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def describe(scene: dict, rng: np.random.Generator) -> str:
    """
    Describe a scene by its caption or in one of several other wordings.

    A language model that has seen only captions would find words by their position. With many wordings it learns to
    use their meaning, which a projector of images can provide.
    """
    answers = scene_answers(scene)
    facts = [
        (f"{side} {what}", answers[f"{side}_{what}"]) for side in ("left", "right") for what in ("digit", "color")
    ]
    sides = [f"a {answers[f'{side}_color']} {answers[f'{side}_digit']} on the {side}" for side in ("left", "right")]
    wording = rng.integers(4)
    if wording == 0:
        return answers["caption"]
    if wording == 1:
        return " and ".join(sides[i] for i in rng.permutation(2))
    # Facts in any order, some of them repeated.
    said = [*rng.permutation(4), *rng.integers(4, size=rng.integers(5))]
    if wording == 2:
        return ", ".join(f"{facts[i][0]} {facts[i][1]}" for i in said)
    return " ".join(f"{facts[i][0].split()[0]} {facts[i][1]}" for i in said)  # "left three right green left red ..."


def draw_texts(
    scenes: list[dict],
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    num_questions: int,
    rng: np.random.Generator,
) -> dict[str, torch.Tensor]:
    """
    Draw a batch of random texts. Every eighth one is a caption. The others are chats that describe a scene in the
    first user turn and ask `num_questions` of `QUESTIONS`.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 `(texts, tokens)`, padded on the right. Only captions and the
        assistant's turns are labelled.
    """
    rows, labels = [], []
    for index in range(batch_size):
        scene = scenes[rng.integers(len(scenes))]
        answers = scene_answers(scene)
        if index % 8 == 0:
            rows.append(tokenizer(answers["caption"] + EOS).input_ids)
            labels.append(rows[-1])
            continue
        chat, ids, row_labels = [], [], []
        for question in rng.permutation(list(QUESTIONS))[:num_questions]:
            description = "" if chat else describe(scene, rng) + "\n"
            chat.append({"role": "user", "content": description + QUESTIONS[question]})
            prompt = chat_ids(tokenizer, chat, add_generation_prompt=True)
            chat.append({"role": "assistant", "content": answers[question]})
            row_labels += [IGNORED] * (len(prompt) - len(ids))
            ids = chat_ids(tokenizer, chat)
            row_labels += ids[len(prompt) :]
        rows.append(ids)
        labels.append(row_labels)
    length = max(len(ids) for ids in rows)
    padding = [length - len(ids) for ids in rows]
    return {
        "input_ids": torch.tensor([ids + [0] * pad for ids, pad in zip(rows, padding, strict=True)]),
        "attention_mask": torch.tensor([[1] * (length - pad) + [0] * pad for pad in padding]),
        "labels": torch.tensor([row + [IGNORED] * pad for row, pad in zip(labels, padding, strict=True)]),
    }


def chat_ids(tokenizer: PreTrainedTokenizerFast, chat: list[dict], add_generation_prompt: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
    return tokenizer(text, add_special_tokens=False).input_ids


def train(
    args: LlamaArguments, accelerator: Accelerator, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Trains `model` in place; every step draws new texts."""
    scenes = all_scenes(held_out=False)

    def loss_of(model: LlamaForCausalLM, step: int) -> torch.Tensor:
        # Long chats cost the most and teach the least: each eighth step has them.
        num_questions = 1 if step % 8 else len(QUESTIONS)
        rng = np.random.default_rng([args.seed, step])
        batch = draw_texts(scenes, tokenizer, args.batch_size, num_questions, rng)
        with accelerator.autocast():
            return model(**{name: rows.to(accelerator.device) for name, rows in batch.items()}).loss

    schedule = Schedule(args.num_steps, args.learning_rate, args.warmup_steps, args.save_steps)
    fit(
        accelerator, model, adamw(model, args.weight_decay), loss_of, schedule, Path(args.output_dir, "training_state")
    )


@torch.no_grad()
def answer_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> dict[str, float]:
    """Share of exact answers to each question about the held-out scenes, described in words."""
    rng = np.random.default_rng(seed)
    scenes = all_scenes(held_out=True)
    tokenizer.padding_side = "left"
    accuracy = {}
    for key, question in QUESTIONS.items():
        chats = [[{"role": "user", "content": f"{describe(scene, rng)}\n{question}"}] for scene in scenes]
        prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt").to(model.device)
        outputs = model.generate(**inputs, do_sample=False, max_new_tokens=12)[:, inputs.input_ids.shape[1] :]
        said = tokenizer.batch_decode(outputs, skip_special_tokens=True)
        expected = [scene_answers(scene)[key] for scene in scenes]
        accuracy[key] = float(np.mean([one == other for one, other in zip(said, expected, strict=True)]))
    return accuracy


def main() -> None:
    args = HfArgumentParser(LlamaArguments).parse_args_into_dataclasses()[0]
    start = time.perf_counter()
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(args, accelerator, model, tokenizer)
    model.cpu()
    save_half(model, Path(args.output_dir))
    tokenizer.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters, {(time.perf_counter() - start) / 60:.1f} minutes")
    model = LlamaForCausalLM.from_pretrained(args.output_dir).eval()
    print("exact answers about held-out scenes:", answer_accuracy(model, tokenizer))


if __name__ == "__main__":
    main()
