"""Text as tokens arrive: no half characters and no part of a stop string, with byte-level and byte-fallback tokenizers.

The truth: the bytes of the tokens so far, decoded as UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hildanext.model.ar_generate import ar_complete_batch
from hildanext.model.text_stream import REPLACEMENT, TextStream
from hildanext.terminal.cells import token_texts
from support.models import make_byte_fallback_tokenizer, make_tokenizer

TOKENIZERS = {"byte level": make_tokenizer(), "byte fallback": make_byte_fallback_tokenizer()}
BY_KIND = pytest.mark.parametrize("kind", TOKENIZERS)
# Written by no letter of these tokenizers' vocabularies, by some, and by characters of one to four bytes.
ANY = st.integers(1, 0x10FFFF).filter(lambda i: not 0xD800 <= i < 0xE000 and i not in (0xFFFD, 0x2581)).map(chr)
TEXTS = st.lists(st.sampled_from("the cat\n\u00e9\u20ac\U0001f642") | ANY, min_size=1).map("".join)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[int]], str]:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def n_bytes(tokenizer: PreTrainedTokenizerFast, token_id: int) -> int:
    """Bytes of a token's text: each character of a byte-level token is one; a fallback token `<0x41>` is one."""
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    if tokenizer is TOKENIZERS["byte level"]:
        return len(token)
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace("\u2581", " ").encode())


def written(tokenizer: PreTrainedTokenizerFast, text: str, ids: list[int]) -> str:
    """The complete characters of `text` that its first tokens write."""
    prefix = " " if tokenizer is TOKENIZERS["byte fallback"] else ""  # SentencePiece puts a space before a text
    encoded = (prefix + text).encode()[: sum(n_bytes(tokenizer, i) for i in ids)]
    return encoded.decode(errors="ignore")[len(prefix) :]


@BY_KIND
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=60, deadline=None)
def test_what_is_shown_is_what_is_complete(kind: str, text: str, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = ids_of(tokenizer, text)
    places = sorted({0, *(min(cut, len(ids)) for cut in cuts), len(ids)})
    stream, shown = TextStream(decoder(tokenizer)), ""
    for start, end in pairwise(places):
        shown += stream.push(ids[start:end], last=False)
        assert shown == stream.text == written(tokenizer, text, ids[:end])
    assert shown == text
    assert stream.push([], last=True) == ""


@BY_KIND
@given(text=TEXTS, cut=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_an_answer_cut_inside_a_character_keeps_the_others(kind: str, text: str, cut: int) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = ids_of(tokenizer, text)[:cut]
    stream = TextStream(decoder(tokenizer))
    stream.push(ids, last=True)
    complete = written(tokenizer, text, ids)
    assert stream.text.startswith(complete)
    assert set(stream.text[len(complete) :]) <= {REPLACEMENT}
    assert "".join(token_texts(decoder(tokenizer), ids, None)) == complete


@BY_KIND
@given(ids=st.lists(st.integers(0, 299), max_size=30), cut=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_bytes_that_are_no_text_lose_none_behind_them(kind: str, ids: list[int], cut: int) -> None:
    tokenizer = TOKENIZERS[kind]
    letter = ids_of(tokenizer, "cat")
    stream = TextStream(decoder(tokenizer))
    pieces = [stream.push(ids[:cut], last=False), stream.push(ids[cut:], last=False), stream.push(letter, last=True)]
    assert "".join(pieces) == stream.text
    assert stream.text.endswith("cat")


@BY_KIND
@given(before=TEXTS, stop=TEXTS, after=TEXTS, sizes=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_a_stop_string_of_any_characters(kind: str, before: str, stop: str, after: str, sizes: int) -> None:
    tokenizer, text = TOKENIZERS[kind], before + stop + after
    ids = ids_of(tokenizer, text)
    stream, shown = TextStream(decoder(tokenizer), (stop,)), ""
    for start in range(0, len(ids), sizes):
        shown += stream.push(ids[start : start + sizes], last=start + sizes >= len(ids))
        if stream.stopped:
            break
    assert stream.stopped
    assert shown == stream.text == text[: text.index(stop)]
    assert stream.token_ids == ids[: len(stream.token_ids)]
    assert written(tokenizer, text, stream.token_ids).startswith(shown)
    assert not written(tokenizer, text, stream.token_ids[:-1]).startswith(shown) or not stream.token_ids


def repeating(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> LlamaForCausalLM:
    """A Llama that writes `ids`, all different, again and again: its layers do nothing, its head knows what follows."""
    size = 320
    sizes: dict[str, Any] = {"vocab_size": size, "hidden_size": size, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=None, eos_token_id=0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for one, following in zip(ids, [*ids[1:], ids[0]], strict=True):
            model.lm_head.weight[following, one] = 1.0
    return model


@BY_KIND
def test_a_stop_string_of_long_characters_ends_the_base_in_time(kind: str) -> None:
    """Four tokens for each character, and more of them than the string has characters."""
    tokenizer = TOKENIZERS[kind]
    cycle = ids_of(tokenizer, "\U0001f642")[-4:]
    assert len(set(cycle)) == 4
    model = repeating(tokenizer, cycle)
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    stop = "\U0001f642" * 9
    done = ar_complete_batch(model, tokenizer, [cycle], 100, stop=(stop,))[0]
    assert (done.text, done.ended, len(forwards)) == ("", True, 36)
