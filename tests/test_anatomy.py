"""The table of architectures: every promise about where a model keeps its parts."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import keeprate as kr
from keeprate.anatomy import ARCHITECTURES, DECODERS, anatomy, decoder, grid_of, quarters, supported

TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


def small(**more) -> dict:
    return {**TINY, "image_size": 32, "patch_size": 8, **more}


@pytest.mark.parametrize(
    ("depth", "want"), [(12, (4, 7, 10)), (24, (7, 13, 19)), (4, (2, 3, 4)), (32, (9, 17, 25)), (2, (1, 2)), (1, (1,))]
)
def test_quarters_are_the_fields_placement(depth, want):
    assert quarters(depth) == want
    assert all(1 <= layer <= depth for layer in want)


@pytest.mark.parametrize("depth", range(1, 40))
def test_quarters_exist_in_every_depth(depth):
    found = quarters(depth)
    assert list(found) == sorted(set(found)) and found[0] >= 1 and found[-1] <= depth


@pytest.mark.parametrize(
    ("image", "patch", "want"), [(224, 16, (14, 14)), (336, 14, (24, 24)), ((96, 64), 8, (12, 8)), (30, (4, 8), (7, 3))]
)
def test_grid_of_reads_numbers_and_pairs(image, patch, want):
    assert grid_of(type("Config", (), {"image_size": image, "patch_size": patch})) == want


def test_an_oblong_model_has_an_oblong_grid():
    model = ViTForImageClassification(ViTConfig(**small(image_size=(32, 48)))).eval()
    assert anatomy(model).grid == (4, 6)
    with kr.vit.Radial(keep=0.5)(model) as trace, torch.no_grad():
        model(torch.randn(1, 3, 32, 48))
    assert trace.grid == (4, 6) and trace.assignments[0].shape == (1, 24)


def test_a_model_with_a_text_tower_is_reduced_in_the_vision_tower_only():
    config = CLIPConfig(
        text_config=CLIPTextConfig(**TINY, vocab_size=50, eos_token_id=2).to_dict(),
        vision_config=CLIPVisionConfig(**small()).to_dict(),
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    body = anatomy(model)
    assert body.name == "clip" and body.depth == 3 and len({id(layer) for layer in body.layers}) == 3
    assert all(any(layer is m for m in model.vision_model.modules()) for layer in body.layers)
    inputs = {"input_ids": torch.tensor([[3, 4, 2]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = model(**inputs, pixel_values=x)
        with kr.vit.TopK(keep=0.5)(model) as trace:
            reduced = model(**inputs, pixel_values=x)
    assert torch.equal(dense.text_embeds, reduced.text_embeds)
    assert not torch.equal(dense.image_embeds, reduced.image_embeds)
    assert trace.kept[0].shape == (2, 8)


def test_an_attention_pooling_head_reads_only_what_is_left():
    model = SiglipVisionModel(SiglipVisionConfig(**small(vision_use_head=True))).eval()
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:  # wide weights: attention is peaked, and by how much differs from sample to sample
            p.data = 0.4 * torch.randn(p.shape, generator=g)
    x = torch.randn(2, 3, 32, 32, generator=g)
    with torch.no_grad():
        dense = model(x).pooler_output
        with kr.vit.TopK(keep=1.0)(model):
            assert torch.equal(model(x).pooler_output, dense)
        with kr.vit.TopK(keep=0.5)(model) as trace:
            output = model(x)
    assert output.last_hidden_state.shape[1] == trace.kept[-1].shape[1] == 2
    assert not torch.equal(output.pooler_output, dense)
    for method in (kr.vit.TopK(keep=0.5), kr.vit.ToMe(r=3), kr.vit.TopK(keep=kr.Budget(coverage=0.5))):
        pair = torch.cat([x, 9 * x])
        with torch.no_grad():
            with method(model) as trace:
                physical = model(pair).pooler_output
            with method(model, masked=True):
                masked = model(pair).pooler_output
            with method(model) as alone:
                one = model(pair[:1]).pooler_output
        assert (trace.sizes[-1] == 0).any() == (method.name == "TopK" and method.budget.ragged)
        torch.testing.assert_close(masked, physical, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one, physical[:1], atol=1e-5, rtol=1e-4)
        assert alone.runs and not torch.equal(physical[:2], dense)


def test_a_mean_pooling_head_averages_over_original_patches():
    """A merged token counts as often as it has patches, in the mean over all of them."""
    from transformers import SiglipConfig, SiglipForImageClassification

    config = SiglipConfig(vision_config=SiglipVisionConfig(**small()).to_dict())
    config.num_labels = 3
    model = SiglipForImageClassification(config).eval()
    caught = []
    handle = model.vision_model.post_layernorm.register_forward_hook(lambda *a: caught.append(a[2]))
    with torch.no_grad(), kr.vit.ToMe(r=3)(model) as trace:
        logits = model(torch.randn(2, 3, 32, 32)).logits
    handle.remove()
    size = trace.sizes[-1].float()
    pooled = (caught[0] * size[..., None]).sum(1) / size.sum(1, keepdim=True)
    torch.testing.assert_close(logits, model.classifier(pooled))


def test_two_towers_are_one_too_many():
    pair = torch.nn.ModuleList([ViTModel(ViTConfig(**small())), ViTModel(ViTConfig(**small()))])
    with pytest.raises(ValueError, match=r"2|two|one"):
        anatomy(pair)


@pytest.mark.parametrize("given", ["vit", None, torch.nn.Linear(2, 2)])
def test_what_is_no_vision_model_is_named_with_all_that_are(given):
    with pytest.raises(ValueError, match=type(given).__name__):
        anatomy(given)
    with pytest.raises(ValueError) as error:
        anatomy(torch.nn.Linear(2, 2))
    assert all(name in str(error.value) for name in supported())
    assert all(row.tower in str(error.value) for row in ARCHITECTURES)


def test_names_are_unique():
    assert len(set(supported())) == len(ARCHITECTURES) == len({row.tower for row in ARCHITECTURES})


# --- language models --------------------------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def test_a_decoder_says_what_its_cache_looks_like():
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    body = decoder(model)
    assert (body.name, body.heads, body.kv_heads, body.head_dim) == ("llama", 4, 2, 4)
    assert body.body is model.model and body.attention == tuple(layer.self_attn for layer in model.model.layers)
    assert body.treated == (0, 1, 2)
    cos, sin = body.rotary(torch.tensor([[0, 5]]), 0)
    assert cos.shape == sin.shape == (1, 2, 4)
    assert torch.equal(cos[0, 0], torch.ones(4)) and torch.equal(sin[0, 0], torch.zeros(4))


def test_a_decoder_is_found_inside_and_its_head_dim_may_be_its_own():
    model = LlamaForCausalLM(LlamaConfig(**TEXT, head_dim=6))
    assert decoder(torch.nn.Sequential(model)).head_dim == 6
    assert decoder(model.model).body is model.model


def test_layers_with_a_window_are_left_alone():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**TEXT, head_dim=4, layer_types=kinds, sliding_window=8)
    body = decoder(Gemma3TextModel(config))
    assert body.treated == (0, 2) and len(body.attention) == 3
    position = torch.tensor([[3]])
    assert not torch.equal(body.rotary(position, 0)[0], body.rotary(position, 1)[0]), "each kind turns at its own speed"


def test_a_decoder_with_windows_alone_has_nothing_to_shorten():
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        decoder(MistralModel(MistralConfig(**TEXT, sliding_window=8)))
    assert decoder(MistralModel(MistralConfig(**TEXT, sliding_window=None))).treated == (0, 1, 2)


def test_what_is_no_language_model_is_named_with_all_that_are():
    with pytest.raises(ValueError, match="Linear must hold exactly one decoder") as error:
        decoder(torch.nn.Linear(2, 2))
    assert all(name in str(error.value) for name in DECODERS)
    two = torch.nn.ModuleList([LlamaForCausalLM(LlamaConfig(**TEXT)) for _ in range(2)])
    with pytest.raises(ValueError, match="found LlamaModel, LlamaModel"):
        decoder(two)


@pytest.mark.parametrize("method", [kr.vit.TopK(keep=0.5), kr.mllm.FastV(), kr.kv.SnapKV(keep=0.5)], ids=repr)
def test_what_holds_the_model_is_told_from_it(method):
    holder = SimpleNamespace(model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"SimpleNamespace.*pass its \.model"), method(holder):
        pytest.fail("no model was accepted")
