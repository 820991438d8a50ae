"""Grouped attention against transformers' own, which repeats the keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hildanext.model.decoding_attention import NAME, grouped_attention, use_grouped_attention
from support.models import random_llama


class Module(torch.nn.Module):
    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


@given(
    batch=st.integers(1, 3),
    kv=st.integers(1, 3),
    groups=st.integers(1, 4),
    width=st.integers(1, 5),
    length=st.integers(5, 9),
    widths=st.tuples(st.sampled_from([4, 8]), st.sampled_from([4, 8])),
    extra=st.sampled_from([{}, {"dropout": 0.0}, {"sliding_window": None}]),
)
@settings(max_examples=80, deadline=None)
def test_the_same_as_with_repeated_keys(batch, kv, groups, width, length, widths, extra):
    generator = torch.Generator().manual_seed(batch * 100 + width)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key = rand(batch, kv * groups, width, widths[0]), rand(batch, kv, length, widths[0])
    value = rand(batch, kv, length, widths[1])
    visible = torch.rand(batch, 1, width, length, generator=generator) < 0.7
    visible[..., 0] = True
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    module = Module(groups)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3, **extra)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3, **extra)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.is_contiguous()


@pytest.mark.parametrize("asked", ["no mask", "a mask a head", "softcap"])
def test_what_it_does_not_know_goes_to_transformers(asked):
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    mask = None if asked == "no mask" else torch.zeros(1, 4 if asked == "a mask a head" else 1, 3, 3)
    if asked == "softcap":
        with pytest.raises(ValueError, match="does not support `softcap`"):
            grouped_attention(Module(2), query, key, key, mask, softcap=30.0)
        return
    found, _ = grouped_attention(Module(2), query, key, key, mask)
    torch.testing.assert_close(found, sdpa_attention_forward(Module(2), query, key, key, mask)[0])


def test_only_sdpa_is_replaced():
    model = random_llama()
    model.set_attn_implementation("eager")
    use_grouped_attention(model)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    use_grouped_attention(model)
    assert model.config._attn_implementation == NAME
