"""The 'self' source: what the base model answers, kept, resumed, read as documents."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hildanext.config import parse_config
from hildanext.data.corpus import find_sources, is_held_out
from hildanext.data.documents import Document, read_documents
from hildanext.data.encode import encode_document, fill_block
from hildanext.data.prepare import prepare_data
from hildanext.data.sources.self_answers import until_repeat, written_file
from hildanext.errors import ConfigError, DataError, UsageError
from hildanext.model.ar_generate import ArCompletion
from hildanext.model.policy import choose_policy
from hildanext.model.pretrained import load_causal_lm, load_tokenizer
from hildanext.model.prompts import encode_prompt
from hildanext.model.self_answers import write_answers

PROMPTS = ["Tell a story about Mia.", "Leo has a kite.", "What is red?", "Mia", "Once upon a time", "Leo has a kite."]


@pytest.fixture
def config(tmp_path, tiny_base):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")

    def make(**changes):
        source = {"kind": "self", "path": str(prompts), "into": ["train", "sft"], "max_new_tokens": 9, "batch": 2}
        return parse_config(
            {
                "paths": {"data": str(tmp_path / "data")},
                "model": {"base": str(tiny_base), "device": "cpu", "dtype": "float32"},
                "data": {"sources": [source | changes], "eval_share": 0.0},
            }
        )

    return make


def written(config) -> Path:
    return written_file(config.paths.data, config.data.sources[0])


def prepare(config) -> dict:
    """What the command `prepare-data` does."""
    write_answers(config)
    return prepare_data(config)


def records(config) -> list[dict]:
    return [json.loads(line) for line in written(config).read_text().splitlines()]


def test_answers_are_those_of_the_base_alone(config):
    """Greedy, each prompt by itself through the stock model, token by token and without a cache."""
    one = config()
    write_answers(one)
    model, tokenizer = load_causal_lm(one.model, choose_policy("cpu", "float32"), torch.float32)
    expected = {}
    for prompt in PROMPTS:
        ids = encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
        begun = len(ids)
        while len(ids) < begun + 9 and tokenizer.eos_token_id not in ids[begun:]:
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        expected[tuple(ids[:begun])] = ids
    found = {tuple(r["input_ids"][: r["n_prompt"]]): r["input_ids"] for r in records(one) if "input_ids" in r}
    assert len(records(one)) == 5  # a prompt that stands there twice is asked once
    assert found
    assert found == {prompt: expected[prompt] for prompt in found}


@pytest.mark.parametrize("keep", [0, 1, 3, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_killed_run_goes_on_and_writes_the_same_file(config, keep, temperature):
    one = config(temperature=temperature)
    write_answers(one)
    whole = written(one).read_bytes()
    lines = whole.splitlines(keepends=True)
    written(one).write_bytes(b"".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2])
    write_answers(one)
    assert written(one).read_bytes() == whole


def test_a_finished_file_is_not_asked_for_again(config, monkeypatch):
    one = config()
    write_answers(one)
    monkeypatch.setattr("hildanext.model.self_answers.ar_complete_batch", None)
    write_answers(one)


def test_repeated_and_empty_answers_are_left_out(config, monkeypatch, capsys):
    given = iter([" ", "one", "One ", "two", "two"])

    def answer(base, tokenizer, prompts, max_new_tokens, **how):
        return [ArCompletion(next(given), [5, 6], 0.0, False) for _ in prompts]

    monkeypatch.setattr("hildanext.model.self_answers.ar_complete_batch", answer)
    one = config()
    write_answers(one)
    assert [record.get("text") for record in records(one)] == [None, "one", None, "two", None]
    assert "3 of 5 answers are empty or duplicates and are left out" in capsys.readouterr().err
    prepare(one)  # and again: what is read back is counted alike
    assert "3 of 5" in capsys.readouterr().err


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(2, 5))
def test_an_answer_is_cut_where_it_first_repeats_itself(ids, n):
    def repeats(k):  # whether the run that begins at k stood there before
        return len(ids[k : k + n]) == n and any(ids[j : j + n] == ids[k : k + n] for j in range(k))

    assert until_repeat(ids, n) == next((k for k in range(len(ids)) if repeats(k)), len(ids))
    assert until_repeat(ids, None) == len(ids)


def test_repetitions_are_left_out_and_counted(config, monkeypatch, capsys):
    said = iter([[5, 6, 5, 6, 5], [5], [5, 6, 7, 8], [5, 5, 5, 6], [9, 9]])

    def answer(base, tokenizer, prompts, max_new_tokens, **how):
        return [ArCompletion(f"text {ids}", ids, 0.0, False) for ids in (next(said) for _ in prompts)]

    monkeypatch.setattr("hildanext.model.self_answers.ar_complete_batch", answer)
    for n, kept, told in (
        (2, [[5, 6], [5], [5, 6, 7, 8], [5], [9, 9]], 6),
        (3, [[5, 6], [5], [5, 6, 7, 8], [5, 5, 5, 6], [9, 9]], 3),
    ):
        one = config(cut_repeats=n)  # of the same file: nothing is asked again
        manifest = prepare(one)
        assert f"{told} of 16 tokens repeat earlier text and are left out" in capsys.readouterr().err
        assert manifest["rejects"]["total"] == 0
        found = read_documents(Path(one.paths.data) / "processed" / "train.jsonl")
        assert sorted(doc.input_ids[doc.n_prompt :] for doc in found) == sorted(kept)


def test_documents_supervise_the_answer_in_sft(config):
    one = config()
    manifest = prepare(one)
    n = manifest["documents"]["sft_train"]
    assert n == manifest["documents"]["train"] == sum("text" in record for record in records(one))
    tokenizer = load_tokenizer(one.model)
    documents = list(read_documents(Path(one.paths.data) / "processed" / "sft_train.jsonl"))
    for document, record in zip(documents, [r for r in records(one) if "text" in r], strict=True):
        encoded = encode_document(document, tokenizer)
        assert encoded.input_ids.tolist() == record["input_ids"]
        assert encoded.loss_mask.tolist() == [i >= record["n_prompt"] for i in range(len(record["input_ids"]))]
        assert encode_document(document, tokenizer, all_tokens=True).loss_mask.all()
        # An answer that was cut off is not taught to end.
        filled = fill_block(encoded, 8, 64, tokenizer.eos_token_id)
        ended = record["input_ids"][-1] == tokenizer.eos_token_id
        assert len(filled.input_ids) == (-(-len(record["input_ids"]) // 8) * 8 if ended else len(record["input_ids"]))


def test_a_prompt_is_held_out_with_whatever_it_is_answered(config):
    one = config(temperature=1.0)
    one = one.model_copy(update={"data": one.data.model_copy(update={"eval_share": 0.5})})
    prepare(one)

    def prompts(split):
        found = read_documents(Path(one.paths.data) / "processed" / f"{split}.jsonl")
        return {tuple(document.input_ids[: document.n_prompt]) for document in found}

    held_out = prompts("eval")
    written(one).unlink()
    written(one).with_suffix(".json").unlink()
    other = one.model_copy(update={"train": one.train.model_copy(update={"seed": 7})})
    prepare(other)
    assert prompts("eval") == held_out == prompts("sft_eval")
    assert not held_out & prompts("train")


def test_the_same_prompts_at_two_temperatures(config):
    one = config()
    (source,) = one.data.sources
    warm = source.model_copy(update={"temperature": 1.5})
    both = one.model_copy(update={"data": one.data.model_copy(update={"sources": [source, warm]})})
    write_answers(both)
    files = [written_file(one.paths.data, each) for each in (source, warm)]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert files[0].name.startswith("prompts-")
    found = [place.path for each in find_sources(both, "train") for place in each.files]
    assert found == [str(path) for path in files]


def test_another_model_or_prompt_is_no_silent_mixture(config):
    write_answers(config())
    before = written(config()).read_bytes()
    other = config()
    other = other.model_copy(update={"train": other.train.model_copy(update={"seed": 7})})
    with pytest.raises(
        DataError, match=r"prompts-\w+.jsonl: written with another value of seed; delete it and prompts-\w+.json"
    ):
        write_answers(other)
    Path(config().data.sources[0].path).write_text("Another prompt\n")
    with pytest.raises(DataError, match="written with another value of prompts"):
        write_answers(config())
    assert written(config()).read_bytes() == before


def test_bad_input(config, tmp_path):
    with pytest.raises(UsageError, match="is not a file of prompts"):
        write_answers(config(path=str(tmp_path / "nowhere.txt")))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"promt": "not"}\n')
    with pytest.raises(DataError, match=r"1 of 2 records rejected .*: expected .* x1 \(.*bad.jsonl:2\)"):
        write_answers(config(path=str(bad)))
    with pytest.raises(ConfigError, match="needs 'path'"):
        config(path=None)
    one = config()
    with pytest.raises(DataError, match="does not exist; run 'hildanext prepare-data' first"):
        find_sources(one, "train")


def test_a_question_is_held_out_from_the_base_and_from_people_alike(config):
    """Else the base's answer to a held-out question would be trained on."""
    one = config()
    questions = [f"What is {i} of {i + 1}?" for i in range(12)]
    Path(one.data.sources[0].path).write_text("\n".join(questions))
    prepare(one.model_copy(update={"data": one.data.model_copy(update={"eval_share": 0.5})}))
    splits = {
        split: {doc.asked for doc in read_documents(Path(one.paths.data) / "processed" / f"{split}.jsonl")}
        for split in ("train", "eval")
    }
    assert all(splits.values())
    for split, asked in splits.items():
        for question in asked:
            assert question in questions
            by_people = Document("1", "instruct", messages=[{"role": "user", "content": question.upper()}])
            assert is_held_out(by_people, 0.5) == (split == "eval")
