"""The MLP that computes its activation again: the same numbers, fewer kept."""

import pytest
import torch
from tiny import clip_config, pixels
from torch.utils.flop_counter import FlopCounterMode

from gmail_hf import GmailCLIPModel, GmailConfig
from gmail_hf.branches.routing import RecomputedMLP


def make_model(**fields):
    torch.manual_seed(0)
    model = GmailCLIPModel(GmailConfig.from_base_config(clip_config(), **fields)).train()
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def plain(self, hidden_states):
    return self.fc2(self.activation_fn(self.fc1(hidden_states)))


def gradients(model, modality):
    model.zero_grad()
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeds = model.embed_images(pixels(4), modality)
    embeds.square().sum().sub(embeds[0, 0]).backward()
    return embeds, [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())


@pytest.mark.parametrize("modality", ["gen", ["real", "gen", "gen", "real"]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_bit_for_bit_those_of_the_plain_mlp(monkeypatch, modality, dropout):
    model = make_model(lora_dropout=dropout)
    embeds, grads, kept = gradients(model, modality)
    monkeypatch.setattr(RecomputedMLP, "forward", plain)
    plain_embeds, plain_grads, plain_kept = gradients(model, modality)
    assert torch.equal(embeds, plain_embeds)
    assert len(grads) == len(plain_grads) > 0
    assert all(map(torch.equal, grads, plain_grads))
    assert kept < plain_kept


def test_the_shared_product_is_not_computed_again(monkeypatch):
    def operations():
        model = make_model()
        with FlopCounterMode(display=False) as counter:
            model.embed_images(pixels(4), "gen").sum().backward()
        return counter.get_total_flops()

    again = operations()
    monkeypatch.setattr(RecomputedMLP, "forward", plain)
    tokens, config = 4 * 5, clip_config().vision_config
    product = 2 * tokens * config.hidden_size * config.intermediate_size
    assert 0 < again - operations() < product  # the low-rank ones of both layers are


@pytest.mark.parametrize("modality", ["real", "gen", ["real", "gen", "gen", "real"]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_embeddings_need_only_the_class_token_of_the_last_layer(modality, attention):
    model = make_model()
    model.set_attn_implementation(attention)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def embed(function):
        with FlopCounterMode(display=False) as counter:
            embeds = function()
        grads = torch.autograd.grad(embeds.square().sum(), weights) if modality != "real" else ()
        return embeds, grads, counter.get_total_flops()

    whole, whole_grads, flops = embed(lambda: model.get_image_features(pixels(4), modality=modality).pooler_output)
    pooled, grads, fewer = embed(lambda: model.pooled(pixels(4), modality))
    tokens, width = 5, model.config.vision_config.hidden_size
    torch.testing.assert_close(pooled, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grads, whole_grads, atol=1e-5, rtol=1e-5)
    intermediate = model.config.vision_config.intermediate_size
    shared = 2 * 4 * (tokens - 1) * 2 * width * (width + intermediate)  # queries, out_proj and MLP of the patches
    assert flops - fewer >= shared
