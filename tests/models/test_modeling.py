"""The two-branch model: identity at first, one by one = mixed, checkpointed = plain, reloaded = saved."""

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import base_dtypes, clip_config, make_clip, make_model, pixels, randomise, tokens
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
)

from gmail_hf import (
    GmailCLIPModel,
    GmailConfig,
    GmailVisionConfig,
    GmailVisionModel,
    GmailVisionModelWithProjection,
    attach_branches,
)
from gmail_hf.training.losses import gmail_loss

BRANCHES = [["gen", "real", "real", "gen", "gen"], ["real", "gen", "gen", "real", "gen"]]
TRAINABLE = [["gen"], ["real", "gen"], ["real"]]


def embeds(model, images, modality=None):
    return model.get_image_features(images, modality=modality).pooler_output


def adapter_gradients(model):
    return {
        name: parameter.grad.clone() for name, parameter in model.adapter_parameters() if parameter.grad is not None
    }


def assert_close(actual, expected, atol=1e-6, rtol=1e-5):
    assert actual.keys() == expected.keys() and actual
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


# Identity at first


@pytest.mark.parametrize("fields", [{}, {"trainable_modalities": ["real", "gen"]}, {"text_lora": True}], ids=str)
def test_every_branch_is_the_pretrained_clip_at_first(clip_folder, fields):
    clip = CLIPModel.from_pretrained(clip_folder)
    model = GmailCLIPModel.from_clip(clip_folder, **fields)
    images, input_ids = pixels(4), tokens(3)
    expected = clip(input_ids=input_ids, pixel_values=images)
    for modality in ("real", "gen", ["gen", "real", "gen", "real"]):
        actual = model(input_ids=input_ids, pixel_values=images, modality=modality)
        assert torch.equal(actual.logits_per_image, expected.logits_per_image), modality
        assert torch.equal(actual.text_embeds, expected.text_embeds)
        assert torch.equal(embeds(model, images, modality), clip.get_image_features(images).pooler_output)


class Wrapper(PreTrainedModel):
    """A model of somebody else that holds ours."""

    config_class = GmailConfig
    _no_split_modules = []

    def __init__(self, config):
        super().__init__(config)
        self.inner = GmailCLIPModel(config)
        self.head = nn.Linear(4, 4)
        self.post_init()


def gmail_config(**fields):
    return GmailConfig.from_base_config(clip_config(), **fields)


def nested_from_saved(tmp_path):
    Wrapper(gmail_config()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if ".adapters." not in key and ".branches." not in key}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return Wrapper.from_pretrained(tmp_path).inner


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: GmailCLIPModel(gmail_config(trainable_modalities=["real", "gen"], text_lora=True)),
        lambda folder: GmailCLIPModel._from_config(gmail_config(text_lora=True)),
        lambda folder: AutoModel.from_config(gmail_config()),
        lambda folder: Wrapper(gmail_config(text_lora=True)).inner,
        nested_from_saved,
    ],
    ids=["constructor", "from_config", "auto", "nested", "nested_without_adapters_in_the_file"],
)
def test_fresh_adapters_change_nothing_however_they_are_made(tmp_path, build):
    model = build(tmp_path).eval()
    lora_A = [parameter for name, parameter in model.named_parameters() if name.endswith("lora_A")]
    lora_B = [parameter for name, parameter in model.named_parameters() if name.endswith("lora_B")]
    assert lora_A and all(parameter.abs().sum() > 0 and parameter.isfinite().all() for parameter in lora_A)
    assert lora_B and all(not parameter.any() for parameter in lora_B)
    for weight in model.visual_projection.branches.values():
        assert torch.equal(weight, model.visual_projection.weight)
        assert weight.data_ptr() != model.visual_projection.weight.data_ptr()
    images = pixels(3)
    assert torch.equal(embeds(model, images, "gen"), embeds(model, images, "real"))


def test_vision_model_alone_starts_neutral():
    model = GmailVisionModel(gmail_config().vision_config).eval()
    images = pixels(2)
    assert torch.equal(model(images, modality="gen").pooler_output, model(images).pooler_output)
    assert any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("lora_A"))


# One pass for a mixed batch


@pytest.mark.parametrize("trainable", TRAINABLE, ids=str)
@pytest.mark.parametrize("names", BRANCHES, ids=lambda names: "".join(name[0] for name in names))
def test_mixed_batch_equals_one_by_one(clip_folder, trainable, names):
    model = make_model(clip_folder, trainable_modalities=trainable, lora_targets=["q_proj", "fc2"])
    images = pixels(5)
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    mixed = embeds(model, images, names)
    (mixed * weight).sum().backward()
    mixed_gradients = adapter_gradients(model)
    model.zero_grad()
    single = torch.cat([embeds(model, images[i : i + 1], name) for i, name in enumerate(names)])
    (single * weight).sum().backward()
    torch.testing.assert_close(mixed, single, atol=1e-6, rtol=1e-5)
    assert_close(mixed_gradients, adapter_gradients(model))
    assert not torch.allclose(embeds(model, images, "gen"), embeds(model, images, "real"), atol=1e-3)


def test_list_of_one_name_equals_the_name(model):
    images = pixels(3)
    for name in ("real", "gen"):
        assert torch.equal(embeds(model, images, [name] * 3), embeds(model, images, name))
    assert torch.equal(embeds(model, images, ("gen", "gen", "gen")), embeds(model, images, "gen"))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("modality", ["gen", BRANCHES[0]], ids=["gen", "mixed"])
def test_gradient_checkpointing_equals_plain(clip_folder, use_reentrant, modality):
    model = make_model(clip_folder, text_lora=True).train()

    def gradients():
        model.zero_grad()
        images = embeds(model, pixels(5), modality)
        texts = model.get_text_features(tokens(5)).pooler_output
        (images * texts).sum().backward()
        return adapter_gradients(model)

    plain = gradients()
    assert len(plain) == sum(1 for _ in model.adapter_parameters())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_close(gradients(), plain)


def test_mini_batches_keep_the_default_branch_of_the_forward_pass(clip_folder):
    model = make_model(clip_folder, trainable_modalities=["real", "gen"]).train()

    def gradients(**options):
        model.zero_grad()
        with model.using("gen"):
            loss = model.embed_images(pixels(5), **options).square()[:, 0].sum()
        loss.backward()  # the branch is `real` again
        return adapter_gradients(model)

    assert_close(gradients(mini_batch_size=2), gradients())


@pytest.mark.parametrize("add", ["branches", "text LoRA"])
def test_adapters_join_a_model_that_checkpoints_already(clip_folder, add):
    if add == "branches":
        model = make_clip()
        model.gradient_checkpointing_enable()
        attach_branches(model)
        loss = model.train().vision_model(pixels(2), modality="gen").pooler_output.sum()
    else:
        model = make_model(clip_folder)
        model.gradient_checkpointing_enable()
        model.add_text_lora()
        loss = model.train().get_text_features(tokens(2)).pooler_output.sum()
    loss.backward()
    assert any(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_B" in name)


def test_a_mixed_batch_without_trained_branches_is_the_base(clip_folder):
    model = make_model(clip_folder, trainable_modalities=[])
    assert torch.equal(embeds(model, pixels(2), ["real", "gen"]), embeds(model, pixels(2)))


@pytest.mark.integration
@pytest.mark.parametrize("modality", ["gen", BRANCHES[0]], ids=["gen", "mixed"])
def test_compiles_as_one_graph(model, modality):
    images = pixels(5)
    torch.compiler.reset()
    # "aot_eager" traces forward and backward as inductor does, without waiting for a C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(input_ids=tokens(5), pixel_values=images, modality=modality)
        actual = compiled(input_ids=tokens(5), pixel_values=images, modality=modality)
    torch.testing.assert_close(actual.image_embeds, expected.image_embeds)
    report = torch._dynamo.explain(model)(input_ids=tokens(5), pixel_values=images, modality=modality)
    assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons


@pytest.mark.integration
def test_compiled_training_step_equals_eager(model):
    batch = {"generated_pixel_values": pixels(4), "real_pixel_values": pixels(4, seed=1)}
    gmail_loss(model(**batch))["loss"].backward()
    eager = adapter_gradients(model)
    model.zero_grad()
    torch.compiler.reset()
    gmail_loss(torch.compile(model, fullgraph=True, backend="aot_eager")(**batch))["loss"].backward()
    assert_close(adapter_gradients(model), eager)


# Options of transformers


def test_sdpa_equals_eager(clip_folder):
    outputs = []
    for attention in ("sdpa", "eager"):
        model = make_model(clip_folder, attn_implementation=attention)
        layer = model.vision_model.encoder.layers[0].self_attn
        assert layer.config._attn_implementation == attention
        outputs.append(embeds(model, pixels(4), ["gen", "real", "gen", "real"]))
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)


def test_flash_attention_is_answered_by_transformers(clip_folder):
    with pytest.raises((ImportError, ValueError), match="(?i)flash"):
        GmailCLIPModel.from_clip(clip_folder, attn_implementation="flash_attention_2")


def test_bfloat16_stays_close(clip_folder, tmp_path):
    model = make_model(clip_folder)
    model.save_pretrained(tmp_path)
    half = GmailCLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert base_dtypes(half) == {torch.bfloat16}
    names = ["gen", "real", "gen", "real"]
    expected, actual = model.embed_images(pixels(4), names), half.embed_images(pixels(4).bfloat16(), names)
    assert actual.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(expected, actual.float()).min() > 0.999
    pair = half(generated_pixel_values=pixels(4).bfloat16(), real_pixel_values=pixels(4, 1).bfloat16())
    loss = gmail_loss(pair)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for _, parameter in half.adapter_parameters())


def test_hidden_states_and_attentions(clip_folder):
    model = make_model(clip_folder, attn_implementation="eager")
    outputs = model.vision_model(pixels(2), modality="gen", output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 5, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 5, 5)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 2, 5))
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])


def test_other_image_sizes_on_request(model):
    larger = torch.nn.functional.interpolate(pixels(2), scale_factor=2)
    with pytest.raises(ValueError, match="16"):
        model.get_image_features(larger, modality="gen")
    features = model.get_image_features(larger, interpolate_pos_encoding=True, modality="gen")
    assert features.last_hidden_state.shape == (2, 17, 32)


# The branch a call takes


def test_default_branch(clip_folder, tmp_path):
    model = make_model(clip_folder)
    images = pixels(2)
    gen, real = embeds(model, images, "gen"), embeds(model, images, "real")
    assert torch.equal(embeds(model, images), real)
    with model.using("gen"):
        assert torch.equal(embeds(model, images), gen)
    assert model.modality == "real"
    with pytest.raises(RuntimeError, match="inside"), model.using("gen"):
        raise RuntimeError("inside")
    assert model.modality == "real"
    model.modality = "gen"
    assert torch.equal(embeds(model, images), gen)
    other = GmailCLIPModel.from_clip(clip_folder, default_modality="gen")
    assert other.modality == other.vision_model.modality == "gen"
    other.save_pretrained(tmp_path)
    assert GmailCLIPModel.from_pretrained(tmp_path).modality == "gen"


# What trains


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_adapters_train(clip_folder, tmp_path):
    model = GmailCLIPModel.from_clip(clip_folder, text_lora=True)
    adapters = {name for name, _ in model.adapter_parameters()}
    assert trainable(model) == adapters
    assert {name.split(".")[0] for name in adapters} == {"vision_model", "text_model", "visual_projection"}
    model.save_pretrained(tmp_path)
    assert trainable(GmailCLIPModel.from_pretrained(tmp_path)) == adapters
    assert trainable(GmailCLIPModel(model.config)) == adapters


@pytest.mark.parametrize("names", TRAINABLE, ids=str)
def test_pair_loss_reaches_every_trained_branch_and_nothing_else(clip_folder, names):
    model = make_model(clip_folder, trainable_modalities=names)
    gmail_loss(model(generated_pixel_values=pixels(4), real_pixel_values=pixels(4, seed=1)))["loss"].backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert reached == any(f".{branch}" in name for branch in names) and reached == parameter.requires_grad, name


# Save and load


@pytest.mark.parametrize("fields", [{}, {"trainable_modalities": ["real", "gen"], "text_lora": True}], ids=str)
@pytest.mark.parametrize("loader", [GmailCLIPModel, AutoModel, AutoModelForZeroShotImageClassification])
def test_reloaded_equals_saved(clip_folder, tmp_path, loader, fields):
    model = make_model(clip_folder, lora_rank=3, lora_alpha=5, lora_targets=["v_proj", "fc1"], **fields)
    model.save_pretrained(tmp_path)
    reloaded = loader.from_pretrained(tmp_path)
    assert isinstance(reloaded, GmailCLIPModel) and isinstance(AutoConfig.from_pretrained(tmp_path), GmailConfig)
    expected, actual = model.config.to_dict(), reloaded.config.to_dict()
    assert {**actual, "_name_or_path": None} == {**expected, "_name_or_path": None}
    inputs = {"input_ids": tokens(4), "pixel_values": pixels(4), "modality": ["real", "gen", "gen", "real"]}
    assert torch.equal(reloaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_sharded_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    reloaded = GmailCLIPModel.from_pretrained(tmp_path)
    assert torch.equal(embeds(reloaded, pixels(2), "gen"), embeds(model, pixels(2), "gen"))


def test_vision_model_loads_from_every_layout(model, tmp_path):
    expected = model.vision_model(pixels(2), modality="gen").pooler_output
    model.save_pretrained(tmp_path / "whole")
    model.vision_model.save_pretrained(tmp_path / "tower")
    (tmp_path / "prefixed").mkdir()
    (tmp_path / "prefixed" / "config.json").write_text((tmp_path / "tower" / "config.json").read_text())
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    prefixed = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in weights.items()}
    prefixed["vision_model.embeddings.position_ids"] = torch.arange(5).unsqueeze(0)
    save_file(prefixed, tmp_path / "prefixed" / "model.safetensors", metadata={"format": "pt"})
    for layout in ("whole", "tower", "prefixed"):
        tower, info = GmailVisionModel.from_pretrained(tmp_path / layout, output_loading_info=True)
        assert not info["missing_keys"], layout
        assert torch.equal(tower(pixels(2), modality="gen").pooler_output, expected), layout
    assert isinstance(AutoModel.from_pretrained(tmp_path / "tower"), GmailVisionModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "tower"), GmailVisionConfig)


def add_position_ids(folder):
    """What transformers 4 stored beside the weights."""
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.embeddings.position_ids"] = torch.arange(5).unsqueeze(0)
    weights["text_model.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_layout_of_transformers_4(clip_folder, tmp_path):
    clip = CLIPModel.from_pretrained(clip_folder)
    clip.save_pretrained(tmp_path / "clip")
    add_position_ids(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config.update(transformers_version="4.16.0", torch_dtype="float32")
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    model = GmailCLIPModel.from_clip(tmp_path / "clip")
    inputs = {"input_ids": tokens(3), "pixel_values": pixels(3)}
    assert torch.equal(model(**inputs, modality="gen").logits_per_text, clip(**inputs).logits_per_text)
    randomise(model).save_pretrained(tmp_path / "gmail")
    add_position_ids(tmp_path / "gmail")
    reloaded = GmailCLIPModel.from_pretrained(tmp_path / "gmail")
    assert torch.equal(embeds(reloaded, pixels(2), "gen"), embeds(model, pixels(2), "gen"))


@pytest.mark.parametrize(
    "key", ["text_projection.weight", "vision_model.encoder.layers.1.mlp.fc1.adapters.gen.lora_B"]
)
@pytest.mark.parametrize("loader", [GmailCLIPModel, AutoModel])
def test_incomplete_checkpoint_is_refused(model, tmp_path, key, loader):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=key):
        loader.from_pretrained(tmp_path)


def test_weights_without_a_place_are_refused(clip_folder, tmp_path):
    make_model(clip_folder, trainable_modalities=["real", "gen"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trainable_modalities"):
        GmailCLIPModel.from_pretrained(tmp_path, trainable_modalities=["gen"])


def test_plain_clip_is_refused_with_the_remedy(clip_folder):
    with pytest.raises(ValueError, match="from_base"):
        GmailCLIPModel.from_pretrained(clip_folder)


def test_incomplete_clip_is_refused(clip_folder, tmp_path):
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="visual_projection.weight"):
        GmailCLIPModel.from_clip(tmp_path)


def test_from_clip_passes_dtype_and_revision_on(clip_folder):
    model = GmailCLIPModel.from_clip(clip_folder, dtype=torch.bfloat16, revision="main", lora_rank=2)
    assert model.dtype == torch.bfloat16 and model.config.lora_rank == 2
    assert (model.config.base_model_name_or_path, model.config.base_model_revision) == (str(clip_folder), "main")
    assert base_dtypes(model) == {torch.bfloat16}


def test_copies_and_state_dict_keep_clip_names(model):
    model.add_text_lora()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.text_model) is type(model.text_model)
        assert torch.equal(embeds(twin, pixels(2), "gen"), embeds(model, pixels(2), "gen"))
    assert set(make_clip().state_dict()) <= set(model.state_dict())


PIPELINE = """
import json, sys
import gmail_hf
from transformers import pipeline
from PIL import Image
image = Image.open(sys.argv[2])
classifier = pipeline("zero-shot-image-classification", model=sys.argv[1])
scores = classifier(image, candidate_labels=["a cat", "two birds", "a dog"])
print(json.dumps([type(classifier.model).__name__, scores]))
"""


@pytest.mark.integration
def test_pipeline_by_path_in_a_fresh_process(clip_folder, tmp_path, processor):
    from tiny import picture
    from transformers import pipeline

    make_model(clip_folder).save_pretrained(tmp_path / "gmail")
    processor.save_pretrained(tmp_path / "gmail")
    picture(0).save(tmp_path / "image.png")
    command = [sys.executable, "-c", PIPELINE, str(tmp_path / "gmail"), str(tmp_path / "image.png")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    name, scores = json.loads(result.stdout.splitlines()[-1])
    plain = pipeline("zero-shot-image-classification", model=str(clip_folder))
    assert name == "GmailCLIPModel"
    expected = plain(picture(0), candidate_labels=["a cat", "two birds", "a dog"])
    assert [row["label"] for row in scores] == [row["label"] for row in expected]
    # Matrix products of two processes can differ in the last bit, by how their memory is aligned.
    assert [row["score"] for row in scores] == pytest.approx([row["score"] for row in expected], abs=1e-6)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "gmail"), CLIPProcessor)


def test_image_side_loads_from_a_whole_checkpoint_and_from_its_own(model, tmp_path):
    images, names = pixels(3), ["gen", "real", "gen"]
    expected = model.get_image_features(images, modality=names).pooler_output
    model.save_pretrained(tmp_path / "whole")
    side = GmailVisionModelWithProjection.from_pretrained(tmp_path / "whole")
    side.save_pretrained(tmp_path / "side")
    for loaded in (side, GmailVisionModelWithProjection.from_pretrained(tmp_path / "side")):
        assert torch.equal(loaded(images, modality=names).image_embeds, expected)
    with pytest.raises(ValueError, match="Unknown modality"):
        side(images, modality="generated")
    with pytest.raises(TypeError, match="modalty"):
        side(images, modalty="gen")


def test_image_side_refuses_adapters_without_a_trained_branch(clip_folder, tmp_path):
    make_model(clip_folder).save_adapters(tmp_path / "adapters")
    GmailVisionModel.from_pretrained(tmp_path / "adapters")
    shutil.rmtree(tmp_path / "adapters" / "gen")
    with pytest.raises(OSError, match="has no adapter 'gen'"):
        GmailVisionModel.from_pretrained(tmp_path / "adapters")
