"""GmailTrainer: cached = fresh, resumed = straight through, accumulated = mean; what it logs, saves and refuses."""

import functools
import json
import math

import datasets
import pytest
import torch
from tiny import assert_equal, logged, make_clip, make_model, make_pairs, make_processor, weights
from transformers import Trainer

from gmail_hf import GmailCLIPModel, GmailTrainer, GmailTrainingArguments, fit_detector
from gmail_hf.training import embeddings
from gmail_hf.training.data import GmailCollator
from gmail_hf.training.losses import gmail_loss
from gmail_hf.training.preparation import EmbeddedPairs

METRICS = {"paired_cosine", "gen_to_real_R@1", "gen_to_real_R@5", "gen_to_real_R@10", "centroid_distance", "loss"}


# Equivalences


@pytest.mark.parametrize("fields", [{}, {"consistency_weight": 2.0, "symmetric": True}], ids=str)
def test_cached_real_embeddings_train_like_fresh_ones(train, fields):
    cached, fresh = train(**fields), train(cache_real_embeds=False, **fields)
    assert isinstance(cached.train_dataset, EmbeddedPairs)
    assert not isinstance(fresh.train_dataset, EmbeddedPairs)
    assert len(logged(cached)) == 4 and logged(cached) == pytest.approx(logged(fresh), rel=1e-4)
    torch.testing.assert_close(weights(cached), weights(fresh), rtol=1e-3, atol=1e-3)


def test_eight_bit_batches_train_like_whole_ones(train):
    whole = functools.partial(GmailTrainer, data_collator=GmailCollator(make_processor()))
    small, whole = train(cache_real_embeds=False), train(cache_real_embeds=False, trainer=whole)
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in (small, whole)]
    assert [batch["generated_pixel_values"].dtype for batch in batches] == [torch.uint8, torch.float32]
    assert logged(small) == logged(whole)
    assert_equal(weights(small), weights(whole))


def test_mini_batches_train_like_the_whole_batch(train):
    whole = train(per_device_train_batch_size=16, max_steps=2)
    small = train(per_device_train_batch_size=16, max_steps=2, contrastive_mini_batch_size=3)
    assert logged(small) == pytest.approx(logged(whole), rel=1e-5)


class FirstStep(GmailTrainer):
    """Plain gradient descent by one step, so that weights tell the gradient; remembers its batches."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        collate, self.batches = self.data_collator, []
        self.data_collator = lambda rows: self.batches.append(collate(rows)) or self.batches[-1]
        self.before = {name: p.detach().clone() for name, p in self.model.adapter_parameters()}

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=1.0)
        return self.optimizer

    def gradient(self):
        return {name: self.before[name] - p.detach() for name, p in self.model.adapter_parameters()}


def normalised(batch):
    mean, std = (batch[name][:, None, None] for name in ("pixel_mean", "pixel_std"))
    return (batch["generated_pixel_values"] - mean) / std


@pytest.mark.parametrize("steps", [1, 2])
def test_accumulation_averages_batches(train, clip_folder, steps):
    options = {"max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = train(
        make_pairs(16),
        trainer=FirstStep,
        per_device_train_batch_size=16 // steps,
        gradient_accumulation_steps=steps,
        **options,
    )
    assert [len(batch["real_embeds"]) for batch in trainer.batches] == [16 // steps] * steps
    model = make_model(clip_folder).train()
    losses = []
    for batch in trainer.batches:
        embeds = {"gen_embeds": model.embed_images(normalised(batch), "gen"), "real_embeds": batch["real_embeds"]}
        losses.append(gmail_loss(embeds, batch["image_ids"], batch["caption_ids"])["loss"])
    torch.stack(losses).mean().backward()
    expected = {name: parameter.grad for name, parameter in model.adapter_parameters()}
    torch.testing.assert_close(trainer.gradient(), expected, rtol=1e-4, atol=1e-5)
    mean = sum(loss.item() for loss in losses) / steps
    assert logged(trainer) == pytest.approx([mean], rel=1e-4)
    assert logged(trainer, "align_loss") == pytest.approx([mean], rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_equals_straight_through(train, clip_folder, tmp_path, dropout):
    fields = {"trainable_modalities": ["real", "gen"], "text_lora": True, "lora_dropout": dropout}
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gen_text_weight": 0.5}
    straight = train(model=make_model(clip_folder, **fields), **options)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    other = GmailCLIPModel.from_clip(clip_folder, **fields)  # whatever it holds is replaced
    resumed = train(model=other, resume=checkpoint, **options)
    assert_equal(weights(resumed), weights(straight))
    assert logged(resumed)[-3:] == logged(straight)[-3:]
    if not dropout:
        assert_equal(GmailCLIPModel.from_pretrained(tmp_path / "run" / "checkpoint-6").state_dict(), weights(straight))


def test_a_resumed_run_keeps_the_detector(train, clip_folder, tmp_path):
    detected = GmailCLIPModel.from_clip(clip_folder)
    fit_detector(detected, make_processor(), make_pairs(20))
    train(model=detected, max_steps=1, save_strategy="steps", save_steps=1)
    fresh = GmailCLIPModel.from_clip(clip_folder)
    train(model=fresh, resume=str(tmp_path / "run" / "checkpoint-1"), max_steps=2).save_model()
    saved = GmailCLIPModel.from_pretrained(tmp_path / "run").detector
    assert torch.equal(saved.weight, detected.detector.weight) and saved.scores == detected.detector.scores


# Logs, evaluation, files


def test_terms_are_logged_and_add_up(train, clip_folder):
    trainer = train(
        model=make_model(clip_folder, text_lora=True),
        consistency_weight=2.0,
        gen_text_weight=0.5,
        real_text_weight=0.25,
        logging_steps=2,
    )
    names = ["align_loss", "consistency_loss", "gen_text_loss", "real_text_loss"]
    terms = [logged(trainer, name) for name in names]
    for loss, align, consistency, gen_text, real_text in zip(logged(trainer), *terms, strict=True):
        assert loss == pytest.approx(align + 2 * consistency + 0.5 * gen_text + 0.25 * real_text, rel=1e-3)


def test_evaluation_metrics_and_best_model(train, clip_folder, arguments, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    args = arguments(
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, **steps
    )  # the loss falls, so that the first checkpoint is "best" and must come back
    pairs = make_pairs(12)
    trainer = GmailTrainer(make_model(clip_folder), args, pairs, pairs, make_processor())
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert losses[0] > losses[1] > losses[2]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_equal(weights(trainer), GmailCLIPModel.from_pretrained(tmp_path / "run" / "checkpoint-2").state_dict())
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in METRICS} <= metrics.keys()
    assert metrics["eval_loss"] == pytest.approx(losses[0], rel=1e-4)
    gen = embeddings.embed_images(trainer.model, make_processor(), pairs["generated_image"], "gen")
    real = embeddings.embed_images(trainer.model, make_processor(), pairs["real_image"], "real")
    assert metrics["eval_paired_cosine"] == pytest.approx(float((gen * real).sum(1).mean()), abs=1e-5)
    first = ((gen @ real.T).argmax(axis=1) == range(12)).mean()
    assert metrics["eval_gen_to_real_R@1"] == pytest.approx(first)


def test_dict_of_evaluation_sets_and_one_by_call(train, clip_folder, arguments):
    sets = {"near": make_pairs(6), "far": make_pairs(5, seed=100)}
    trainer = GmailTrainer(make_model(clip_folder), arguments(), make_pairs(8), sets, make_processor())
    metrics = trainer.evaluate()
    for name in sets:
        assert {f"eval_{name}_{metric}" for metric in METRICS} <= metrics.keys()
    alone = trainer.evaluate(make_pairs(5, seed=100))
    assert alone["eval_paired_cosine"] == pytest.approx(metrics["eval_far_paired_cosine"], abs=1e-6)
    with pytest.raises(ValueError, match="eval_dataset lacks"):
        trainer.evaluate(make_pairs(3).remove_columns(["caption"]))


def test_persistent_workers_read_the_data_set_of_a_call(clip_folder, arguments):
    args = arguments(dataloader_num_workers=1, dataloader_persistent_workers=True)
    pairs = make_pairs(8)
    trainer = GmailTrainer(make_model(clip_folder), args, None, pairs, make_processor())
    own, other, again = (trainer.evaluate(given)["eval_loss"] for given in (None, pairs.select(range(4)), None))
    assert own == again != other


def test_dropping_the_only_batch_is_refused(clip_folder, arguments):
    args = arguments(dataloader_drop_last=True, per_device_eval_batch_size=6)
    for sets, message in (
        ({"train_dataset": make_pairs(3)}, "train_dataset has 3 pairs, fewer than one batch of 4"),
        ({"eval_dataset": make_pairs(5)}, "eval_dataset has 5 pairs, fewer than one batch of 6"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*drop_last=False"):
            GmailTrainer(make_model(clip_folder), args, processing_class=make_processor(), **sets)


def test_resuming_a_finished_run_reports_no_loss(train, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    train(**options)
    resumed = train(resume=str(tmp_path / "run" / "checkpoint-2"), **options)
    assert logged(resumed, "train_runtime") and not logged(resumed, "train_loss")


def test_predict_takes_pairs_with_a_bad_image(clip_folder, arguments):
    trainer = GmailTrainer(make_model(clip_folder), arguments(), processing_class=make_processor())
    output = trainer.predict(make_pairs(6, bad_generated=(2,)))
    shapes = {name: embeds.shape for name, embeds in output.predictions.items()}
    assert shapes == {"gen_embeds": (5, 24), "real_embeds": (5, 24)} and "test_paired_cosine" in output.metrics


def test_saves_settings_as_json_and_no_pickle(train, tmp_path):
    trainer = train(save_strategy="steps", save_steps=4)
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        assert not (folder / "training_args.bin").exists()
        assert json.loads((folder / "training_args.json").read_text())["temperature"] == 0.07
        assert (folder / "gen" / "adapter_model.safetensors").exists()
        assert (folder / "processor_config.json").exists() or (folder / "preprocessor_config.json").exists()
    assert_equal(GmailCLIPModel.from_pretrained(tmp_path / "run").state_dict(), weights(trainer))


@pytest.mark.parametrize("cache", [True, False])
def test_skipped_pairs_are_logged(train, cache):
    pairs = make_pairs(8, bad_real=(2,), bad_generated=(5,))
    trainer = train(pairs, cache_real_embeds=cache, max_steps=4)  # two epochs
    assert logged(trainer, "skipped_pairs")[-1] == 4
    assert all(math.isfinite(loss) for loss in logged(trainer))


@pytest.mark.parametrize("cache", [True, False])
def test_bad_image_stops_training_under_error(train, cache):
    pairs = make_pairs(40, bad_real=(4,))  # not among the sampled rows
    with pytest.raises(ValueError, match="row 4" if cache else "image_id id-4"):
        train(pairs, cache_real_embeds=cache, on_bad_image="error", max_steps=10)


def test_streamed_pairs_train(train):
    stream = make_pairs(20).to_iterable_dataset(num_shards=2)
    trainer = train(stream, max_steps=3)
    assert len(logged(trainer)) == 3
    generated = datasets.IterableDataset.from_generator(make_pairs(8).__iter__)
    assert len(logged(train(generated, max_steps=2))) == 2


def test_an_interrupted_call_leaves_no_numbers(train, tmp_path):
    pairs = make_pairs(8, bad_generated=(2,))
    options = {"max_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = train(pairs, **options)
    interrupted = train(pairs, **options)
    interrupted.cost()
    interrupted.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert straight.skipped_pairs == interrupted.skipped_pairs == 2
    assert logged(interrupted, "align_loss")[-1] == pytest.approx(logged(interrupted)[-1], rel=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_evaluation_in_half_precision_keeps_the_weights(clip_folder, arguments, dtype):
    pairs = make_pairs(8)
    trainer = GmailTrainer(
        make_model(clip_folder), arguments(**{f"{dtype}_full_eval": True}), pairs, pairs, make_processor()
    )
    before = weights(trainer)
    assert trainer.evaluate()["eval_loss"] > 0
    assert_equal(weights(trainer), before)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# What trains


def changed(trainer, before):
    return {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("fields", "options", "part"),
    [
        ({}, {}, ".gen"),
        ({"trainable_modalities": ["real", "gen"]}, {}, ""),
        ({"text_lora": True}, {}, ".gen"),
        ({"text_lora": True}, {"align_weight": 0.0, "gen_text_weight": 1.0}, ".text"),
        ({"text_lora": True}, {"align_weight": 0.0, "real_text_weight": 1.0}, ".text"),
        ({"text_lora": True}, {"gen_text_weight": 1.0}, ""),
    ],
    ids=str,
)
def test_trains_what_the_losses_reach(clip_folder, train, fields, options, part):
    model = make_model(clip_folder, **fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = {name for name, _ in model.adapter_parameters() if part in name}
    trainer = train(model=model, **options)
    assert changed(trainer, before) == adapters
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == adapters


@pytest.mark.parametrize("options", [{"gen_text_weight": 1.0, "align_weight": 0.0}], ids=str)
def test_nothing_to_train_is_an_error(train, options):
    with pytest.raises(ValueError, match="Nothing to train.*text_lora=True"):
        train(**options)


def test_real_branch_that_trains_is_never_cached(clip_folder, train):
    trainer = train(model=make_model(clip_folder, trainable_modalities=["real", "gen"]))
    assert not isinstance(trainer.train_dataset, EmbeddedPairs)


def test_token_loss_trains_on_pixels(train):
    trainer = train(token_weight=0.5)
    assert not isinstance(trainer.train_dataset, EmbeddedPairs)
    tokens = logged(trainer, "token_loss")
    assert len(tokens) == 4 and all(loss > 0 for loss in tokens)
    for loss, align, token in zip(logged(trainer), logged(trainer, "align_loss"), tokens, strict=True):
        assert loss == pytest.approx(align + 0.5 * token, rel=1e-3)


@pytest.mark.parametrize("layer", [3, -4])
def test_token_layer_that_the_tower_lacks_is_told(train, layer):
    with pytest.raises(ValueError, match=f"`token_layer` {layer} is out of range: the vision tower has 2 layers"):
        train(token_weight=0.5, token_layer=layer)


def test_optimal_pairing_stays_within_captions_and_raises_the_cosine(train):
    pairs = make_pairs(24, captions=["a cat", "a dog"] * 12)
    trainer = train(pairs, pairing="optimal", max_steps=2)
    partners = trainer.train_dataset.partners
    assert sorted(partners) == list(range(24)) and (partners % 2 == [i % 2 for i in range(24)]).all()
    gen, real = (
        embeddings.embed_images(trainer.model, make_processor(), pairs[f"{side}_image"], "real")
        for side in ("generated", "real")
    )
    assert (gen * real[partners]).sum() > (gen * real).sum() + 1e-3


@pytest.mark.parametrize(
    ("dataset", "fields"),
    [(make_pairs(8), {"trainable_modalities": ["real", "gen"]}), (make_pairs(8).to_iterable_dataset(), {})],
    ids=["trained", "streamed"],
)
def test_optimal_pairing_needs_cached_embeddings(clip_folder, train, dataset, fields):
    with pytest.raises(ValueError, match="frozen real branch.*not streamed"):
        train(dataset, model=make_model(clip_folder, **fields), pairing="optimal")


def test_wrong_model_or_arguments_are_refused(clip, arguments, clip_folder):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="CLIPModel.*from_base"):
        GmailTrainer(clip, arguments(), make_pairs(4), processing_class=make_processor())
    with pytest.raises(TypeError, match="GmailTrainingArguments"):
        GmailTrainer(make_model(clip_folder), TrainingArguments(output_dir="x"), make_pairs(4))
    with pytest.raises(TypeError, match="train_dataset must be a data set .* got list"):
        GmailTrainer(make_model(clip_folder), arguments(), list(make_pairs(4)), processing_class=make_processor())
    with pytest.raises(ValueError, match="processing_class"):
        GmailTrainer(make_model(clip_folder), arguments(), make_pairs(4))
    with pytest.raises(ValueError, match="train_dataset lacks"):
        pairs = make_pairs(4).rename_column("caption", "text")
        GmailTrainer(make_model(clip_folder), arguments(), pairs, processing_class=make_processor())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": 64}, "lora_alpha=8, but this model has 64"),
        ({"trainable_modalities": ["real", "gen"]}, r"trainable_modalities=\['gen'\], but this model has"),
        ({"text_lora": True}, "text_lora=False, but this model has True"),
    ],
    ids=str,
)
def test_resuming_with_another_model_is_refused(train, clip_folder, tmp_path, fields, message):
    train(model=GmailCLIPModel.from_clip(clip_folder), max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=message):
        train(model=GmailCLIPModel.from_clip(clip_folder, **fields), resume=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        (make_pairs(20), {"temperature": 0.1}, "other settings: temperature=0.07, but this run has 0.1. Resume with"),
        (make_pairs(20), {"recipe": "robust"}, "other settings: align_weight=1.0, but this run has 0.0"),
        (make_pairs(20), {"images_per_caption": 2}, "other settings: images_per_caption=1, but this run has 2"),
        (make_pairs(19), {}, "was trained on other pairs. Resume with the original ones"),
        (make_pairs(20, captions=[f"a bird {i}" for i in range(20)]), {}, "was trained on other pairs"),
    ],
    ids=["temperature", "recipe", "batches", "fewer", "captions"],
)
def test_resuming_another_run_is_refused(train, tmp_path, pairs, options, message):
    train(max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=message):
        train(pairs, resume=str(tmp_path / "run" / "checkpoint-1"), **options)


def test_resuming_with_a_setting_that_changes_no_loss(train, tmp_path):
    train(max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    resumed = train(resume=checkpoint, max_steps=2, learning_rate=1e-3, contrastive_mini_batch_size=2)
    assert len(logged(resumed)) == 2


def test_resuming_on_another_base_is_refused(train, clip_folder, tmp_path):
    train(model=GmailCLIPModel.from_clip(clip_folder), max_steps=2, save_strategy="steps", save_steps=1)
    make_clip(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="with other weights"):
        train(model=GmailCLIPModel.from_clip(tmp_path / "other"), resume=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("cached", [True, False])
def test_corrupt_image_alone_in_its_batch(train, cached):
    pairs = make_pairs(9, bad_generated=(8,))
    trainer = train(
        pairs, cache_real_embeds=cached, per_device_train_batch_size=1, max_steps=9, consistency_weight=1.0
    )
    assert all(math.isfinite(loss) for loss in logged(trainer)) and trainer.skipped_pairs == 1
    trainer.args.per_device_eval_batch_size = 8
    metrics, whole = trainer.evaluate(pairs), trainer.evaluate(pairs.select(range(8)))
    assert metrics["eval_paired_cosine"] == pytest.approx(whole["eval_paired_cosine"], abs=1e-6)


def test_branches_that_no_loss_reaches_stay_frozen(clip_folder, arguments):
    model = make_model(clip_folder, modalities=["real", "gen", "sketch"], trainable_modalities=["gen", "sketch"])
    GmailTrainer(model=model, args=arguments(), train_dataset=make_pairs(4), processing_class=make_processor())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".gen" in name for name in trained)


def test_several_gpus_in_one_process_are_refused(clip_folder, arguments):
    args = arguments()
    args._n_gpu = 2
    with pytest.raises(ValueError, match="for 2 GPUs .*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        GmailTrainer(make_model(clip_folder), args, make_pairs(4), processing_class=make_processor())


def test_sharded_weights_are_refused(clip_folder, arguments, monkeypatch):
    create = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="FSDP or ZeRO-3: train with DDP"):
        GmailTrainer(make_model(clip_folder), arguments(), make_pairs(4), processing_class=make_processor())


def test_a_streamed_evaluation_in_several_processes_is_refused(clip_folder, arguments, monkeypatch):
    args = arguments()
    monkeypatch.setattr(GmailTrainingArguments, "world_size", property(lambda self: 2))
    streamed = make_pairs(4).to_iterable_dataset()
    with pytest.raises(ValueError, match="eval_dataset is streamed.*one process"):
        GmailTrainer(make_model(clip_folder), args, make_pairs(4), streamed, make_processor())


def test_so_is_one_that_is_given_later(clip_folder, arguments, monkeypatch):
    trainer = GmailTrainer(make_model(clip_folder), arguments(), make_pairs(4), processing_class=make_processor())
    monkeypatch.setattr(GmailTrainingArguments, "world_size", property(lambda self: 2))
    for call, name in ((trainer.evaluate, "eval_dataset"), (trainer.predict, "test_dataset")):
        with pytest.raises(ValueError, match=f"{name} is streamed"):
            call(make_pairs(4).to_iterable_dataset())


def test_float16_weights_are_refused(clip_folder, arguments):
    with pytest.raises(ValueError, match="float16 weights cannot be trained.*float32"):
        GmailTrainer(make_model(clip_folder).half(), arguments(), make_pairs(4), processing_class=make_processor())


def test_cost_of_a_step(clip_folder, arguments):
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(clip_folder)
    trainer = GmailTrainer(model, arguments(), make_pairs(8), processing_class=make_processor())
    before = weights(trainer)
    cost = trainer.cost()
    assert_equal(weights(trainer), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = sum(parameter.numel() for _, parameter in model.adapter_parameters())
    assert (cost["trained_parameters"], cost["parameters"]) == (trained, model.num_parameters())
    batch = trainer.data_collator(trainer.train_dataset.__getitems__([0, 1, 2, 3]))
    with FlopCounterMode(display=False) as counter:
        embeds = {"gen_embeds": model.embed_images(normalised(batch), "gen"), "real_embeds": batch["real_embeds"]}
        loss = gmail_loss(embeds)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    assert cost["flops_per_step"] == counter.get_total_flops() > forward
    # The forward pass of 4 images of 4 patches and a class token by hand, two operations a multiplication.
    width, inner, rank, dim = 32, 48, 4, 24
    linear, mlp = width * width + 2 * rank * width, 2 * (width * inner + rank * (width + inner))
    first, last = 5 * (4 * linear + mlp), 5 * 2 * linear + 2 * linear + mlp  # all tokens; keys and values of all
    expected = 2 * (4 * (first + last) + 4 * 4 * (3 * 8 * 8) * width + 4 * width * dim + 4 * 4 * dim)
    assert 1.0 <= forward / expected < 1.05  # not all kernels of attention are counted
    assert cost["peak_memory_bytes"] > 10**8
