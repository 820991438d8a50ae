"""The schedules at their corners."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hildanext.config import SftConfig, TrainConfig, WsdConfig
from hildanext.diffusion.schedule import sft_point, total_steps, wsd_point

TRAIN = TrainConfig(lr=1.0, lr_warmup_steps=4, lr_final_ratio=0.1)


def sizes(wsd: WsdConfig, seq_len: int) -> list[int]:
    return [wsd_point(step, wsd, TRAIN, seq_len).block_size for step in range(total_steps(wsd))]


def test_linear_goes_from_one_to_the_row_and_down_to_the_decoding_block():
    wsd = WsdConfig(warmup_steps=64, stable_steps=10, decay_steps=32, final_block=32)
    found = sizes(wsd, 128)
    assert found[0] == 1
    assert found[:64] == sorted(found[:64])
    assert found[64:74] == [128] * 10
    assert found[74:] == sorted(found[74:], reverse=True)
    assert found[-1] == 32
    assert found[16] == round(1 + 127 * 16 / 64)


def test_ladder_holds_every_rung_equally_long():
    wsd = WsdConfig(
        shape="ladder",
        warmup_steps=8,
        stable_steps=2,
        decay_steps=6,
        final_block=32,
        warmup_ladder=[1, 4, 32, 64],
        decay_ladder=[128, 64, 32],
    )
    assert sizes(wsd, 256) == [1, 1, 4, 4, 32, 32, 64, 64, 256, 256, 128, 128, 64, 64, 32, 32]


def test_learning_rate_warms_up_stays_and_decays_with_the_block():
    wsd = WsdConfig(warmup_steps=10, stable_steps=5, decay_steps=10, final_block=8)
    rates = [wsd_point(step, wsd, TRAIN, 64).lr for step in range(25)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([1 - 0.9 * (i + 1) / 10 for i in range(10)])


@given(
    warmup=st.integers(0, 20),
    stable=st.integers(0, 20),
    decay=st.integers(1, 20),
    peak=st.one_of(st.none(), st.integers(1, 99)),
    final=st.integers(1, 64),
    seq_len=st.integers(8, 64),
)
@settings(max_examples=80, deadline=None)
def test_sizes_stay_within_the_row_and_end_at_the_final_block(warmup, stable, decay, peak, final, seq_len):
    wsd = WsdConfig(warmup_steps=warmup, stable_steps=stable, decay_steps=decay, peak_block=peak, final_block=final)
    found = sizes(wsd, seq_len)
    assert all(1 <= size <= seq_len for size in found)
    assert found[-1] == min(final, seq_len)
    phases = [wsd_point(step, wsd, TRAIN, seq_len).phase for step in range(total_steps(wsd))]
    assert phases == ["warmup"] * warmup + ["stable"] * stable + ["decay"] * decay


def test_sft_keeps_its_block_and_decays_in_its_last_share():
    sft = SftConfig(steps=10, lr=2.0, lr_warmup_steps=1, lr_decay_share=0.4)
    points = [sft_point(step, sft, 0.5, 16) for step in range(10)]
    assert {point.block_size for point in points} == {16}
    assert [point.lr for point in points] == pytest.approx([1.0, *[2.0] * 5, 1.75, 1.5, 1.25, 1.0])
    assert [point.phase for point in points] == ["warmup", *["stable"] * 5, *["decay"] * 4]
