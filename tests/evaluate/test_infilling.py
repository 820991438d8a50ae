"""Infilling: the decode rule over a span, worked out again here."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from hildanext.config import Config
from hildanext.decoding.rule import edit_step, propose
from hildanext.decoding.settings import Settings
from hildanext.evaluate.infilling import _spans, infill
from hildanext.evaluate.records import token_pieces
from hildanext.evaluate.ways import Models, ways
from hildanext.model.diffusion_lm import DiffusionLM


@pytest.fixture(scope="module")
def decided(models: Models) -> DiffusionLM:
    """The tiny model with larger weights: what it says depends on what it sees."""
    lm = copy.deepcopy(models.lm)
    with torch.no_grad():
        for weight in lm.model.parameters():
            weight.mul_(4)
    return lm


@torch.no_grad()
def filled_slowly(lm: DiffusionLM, text: list[int], span: range, settings: Settings) -> tuple[list[int], int]:
    """The same from transformers' own forward with a mask of zeros, a token at a time."""
    text = list(text)
    for i in span:
        text[i] = lm.mask_token_id
    passes = post = 0
    while True:
        passes += 1
        ids, n = torch.tensor([text]), len(text)
        logits = lm.model(
            input_ids=ids, attention_mask=torch.zeros(1, 1, n, n), position_ids=torch.arange(n)[None]
        ).logits[0]
        clean, after, changed_one = lm.mask_token_id not in text, list(text), False
        found = {}
        for i in span:
            where = i - 1 if lm.convention == "shifted" else i
            token, sure = propose(logits[where][None], mask_token_id=lm.mask_token_id, vocab_size=lm.vocab_size)
            found[i] = (int(token), float(sure))
        masked = [i for i in span if text[i] == lm.mask_token_id]
        chosen = [i for i in masked if found[i][1] > settings.tau_mask]
        if masked and not chosen:
            chosen = [max(masked, key=lambda i: found[i][1])]
        for i in chosen:
            after[i] = found[i][0]
        for i in set(span) - set(masked):
            if settings.tau_edit is not None and found[i][0] != text[i] and found[i][1] > settings.tau_edit:
                after[i], changed_one = found[i][0], True
        text = after
        post += clean
        if lm.mask_token_id not in text and (
            settings.tau_edit is None or post >= settings.max_post_steps or (clean and not changed_one)
        ):
            return text[span.start : span.stop], passes


@pytest.mark.parametrize("name", ["q_mode", "s_mode", "s_mode_no_edit"])
@pytest.mark.parametrize("tau_mask", [0.01, 0.9])
def test_infilling_is_the_rule_over_the_whole_text(
    small: Config, models: Models, decided: DiffusionLM, name: str, tau_mask: float
) -> None:
    settings = next(way.settings for way in ways(small, models) if way.name == name)
    assert settings is not None
    settings = settings._replace(tau_mask=tau_mask, max_post_steps=3)
    texts = token_pieces(Path(small.evaluate.data["infilling"]), models.lm.tokenizer, 16, 3)
    for text, span in zip(texts, _spans(texts, 5, 0), strict=True):
        ids, forwards, _ = infill(decided, text, span, settings)
        assert (ids, forwards) == filled_slowly(decided, text, span, settings)
        assert decided.mask_token_id not in ids


def test_infilling_looks_to_the_right(small: Config, models: Models, decided: DiffusionLM) -> None:
    settings = next(way.settings for way in ways(small, models) if way.name == "q_mode_no_edit")
    assert settings is not None
    text = token_pieces(Path(small.evaluate.data["infilling"]), models.lm.tokenizer, 16, 1)[0]
    found = {
        tuple(infill(decided, [*text[:10], *other], range(5, 9), settings)[0])
        for other in (text[10:], [7] * 6, [300] * 6, [50, 60, 70, 80, 90, 100])
    }
    assert len(found) > 1


def test_spans_have_text_on_both_sides() -> None:
    spans = _spans([[0] * 12] * 200, 10, 0)
    assert {span.start for span in spans} == {1}
    spans = _spans([[0] * 12] * 200, 4, 0)
    assert {span.start for span in spans} == set(range(1, 8))
    assert all(len(span) == 4 for span in spans)
    assert spans[:50] == _spans([[0] * 12] * 50, 4, 0)


def test_edits_touch_the_span_alone() -> None:
    """`edit_step` sees only the span; the prompt on either side is not among what it may write."""
    after, drafted, edited = edit_step(
        [9, 5], [6, 7], [0.9, 0.9], [True, True], mask_token_id=9, tau_mask=0.5, tau_edit=0.5
    )
    assert (after, drafted, edited) == ([6, 7], [0], [1])
