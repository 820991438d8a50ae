"""What OpenAI's API offers beyond the plain answer, asked by its own client and compared with an engine asked directly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from hildanext.config import Config
from hildanext.decoding.engines import Completion, Engine, Request, open_engine
from support import serving

PROMPT = "Once upon a time"
WARM = {"temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def client(converted: Config) -> Iterator[openai.OpenAI]:
    with serving.running(converted) as (url, _), serving.asking(url) as found:
        yield found


@pytest.fixture(scope="module")
def engine(converted: Config) -> Engine:
    return open_engine(converted)


@pytest.fixture(scope="module")
def expected(converted: Config, engine: Engine) -> Callable[..., Completion]:
    """`expected(prompt, **settings)`: the completion straight from an engine."""
    return lambda prompt, **changes: engine.generate(
        Request(engine.encode(prompt), engine.settings(converted)._replace(**changes))
    )


def texts_by_index(chunks: Any) -> list[str]:
    """The texts that the choices of a completion's stream add up to."""
    found: dict[int, str] = defaultdict(str)
    ends: dict[int, int] = defaultdict(int)
    for chunk in chunks:
        for choice in chunk.choices:
            assert not ends[choice.index], "a chunk behind the last one"
            found[choice.index] += choice.text
            ends[choice.index] += choice.finish_reason is not None
    assert all(ends.values())
    return [found[index] for index in sorted(found)]


def test_what_asks_for_nothing_changes_nothing(client: openai.OpenAI, expected) -> None:
    nothing = {
        "n": 1, "logprobs": None, "echo": False, "stop": None, "logit_bias": {}, "presence_penalty": 0.0, "seed": None,
        "frequency_penalty": 0, "suffix": None, "best_of": 1, "user": "me", "stream": False,
    }  # fmt: skip
    extra = {
        "top_k": -1,
        "min_p": 0.0,
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "unheard_of": [],
    }
    extra |= {"response_format": {"type": "text"}, "tools": None, "stream_options": None, "guided_json": ""}
    answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=6, **nothing, extra_body=extra)
    assert answer.choices[0].text == expected(PROMPT, max_new_tokens=6).text
    chat: Any = {
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "logprobs": False,
        "top_logprobs": None,
    }
    chat |= {"reasoning_effort": "low", "stop": [], "functions": [], "modalities": ["text"], "audio": None, "seed": -1}
    messages: Any = [{"role": "user", "content": "Hello", "name": None, "weight": None}]
    body = {"model": "model", "messages": messages, "max_tokens": 6}
    found = client.post("/chat/completions", cast_to=dict[str, Any], body=body | chat)
    assert (
        found["choices"][0]["message"]["content"]
        == expected([{"role": "user", "content": "Hello"}], max_new_tokens=6).text
    )
    asked = client.chat.completions.create(
        **body, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none"
    )
    assert asked.choices[0].message.content == found["choices"][0]["message"]["content"]


def test_an_answer_is_accepted_when_it_is_sent_back(client: openai.OpenAI, expected) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hello"}]
    for turn in range(2):
        answer = client.chat.completions.create(model="model", messages=messages, max_tokens=4)
        said = answer.choices[0].message
        messages += [
            said.model_dump() if turn else said,
            {"role": "user", "content": [{"type": "text", "text": "And"}]},
        ]
    answer = client.chat.completions.create(model="model", messages=messages, max_tokens=4)
    ours = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": messages[1].content},
        {"role": "user", "content": "And"},
        {"role": "assistant", "content": messages[3]["content"]},
        {"role": "user", "content": "And"},
    ]
    assert answer.choices[0].message.content == expected(ours, max_new_tokens=4).text
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{"}}
    messages += [{"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "1", "content": "an animal"}]
    with pytest.raises(openai.BadRequestError, match="'messages': broken JSON in a tool call"):
        client.chat.completions.create(model="model", messages=messages, max_tokens=4)


def test_penalties_and_bias_reach_the_engine(client: openai.OpenAI, expected, engine: Engine) -> None:
    (forced,) = engine.encode("x")[-1:]
    for asked, ours in [
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": 2.0}, {"frequency_penalty": 2.0}),
        ({"logit_bias": {str(forced): 100}}, {"logit_bias": ((forced, 100.0),)}),
        (WARM | {"extra_body": {"min_p": 0.9}}, WARM | {"min_p": 0.9}),
    ]:
        answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=12, **asked)
        assert answer.choices[0].text == expected(PROMPT, max_new_tokens=12, **ours).text
    assert set(expected(PROMPT, max_new_tokens=12, logit_bias=((forced, 100.0),)).token_ids) == {forced}


def test_n_answers_differ_by_their_seeds_and_stream_with_their_index(client: openai.OpenAI, expected) -> None:
    prompts = [PROMPT, "A dog"]
    asked: Any = {"model": "model", "prompt": prompts, "max_tokens": 12, "n": 3, **WARM}
    truth = [
        expected(prompt, max_new_tokens=12, temperature=1.0, seed=5 + i).text for prompt in prompts for i in range(3)
    ]
    assert len(set(truth)) == 6
    answer = client.completions.create(**asked)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == truth
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert texts_by_index(chunks) == truth
    found, again = answer.usage.to_dict(), chunks[-1].usage.to_dict()
    del found["prompt_tokens_details"], again["prompt_tokens_details"]  # asked again, more may be cached
    assert found == again
    single = client.completions.create(model="model", prompt=prompts, max_tokens=1)
    assert found["prompt_tokens"] == single.usage.prompt_tokens  # a prompt counts once
    chat = client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": "Hi"}], n=2, max_tokens=9, temperature=1.0, stream=True
    )
    spoken: dict[int, str] = defaultdict(str)
    for chunk in chat:
        for part in chunk.choices:
            spoken[part.index] += part.delta.content or ""
    assert sorted(spoken) == [0, 1]
    assert spoken[0] != spoken[1]


def test_prompts_as_token_ids_and_echo(client: openai.OpenAI, expected, engine: Engine) -> None:
    ids = [engine.encode(prompt) for prompt in (PROMPT, "A dog")]
    truth = [expected(prompt, max_new_tokens=6).text for prompt in (PROMPT, "A dog")]
    asked: Any = {"model": "model", "max_tokens": 6}
    assert client.completions.create(**asked, prompt=ids[0]).choices[0].text == truth[0]
    assert [choice.text for choice in client.completions.create(**asked, prompt=ids).choices] == truth
    for prompt in (ids, [PROMPT, "A dog"]):
        echoed = [PROMPT + truth[0], "A dog" + truth[1]]
        answer = client.completions.create(**asked, prompt=prompt, echo=True)
        assert [choice.text for choice in answer.choices] == echoed
        assert texts_by_index(client.completions.create(**asked, prompt=prompt, echo=True, stream=True)) == echoed


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(client: openai.OpenAI, expected, engine: Engine, stream: bool) -> None:
    direct = expected(PROMPT, max_new_tokens=10, logprobs=3)
    answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=10, logprobs=3, stream=stream)
    parts = [c.logprobs for chunk in (answer if stream else [answer]) for c in chunk.choices if c.logprobs]
    tokens = [token for part in parts for token in part.tokens]
    assert "".join(tokens) == direct.text
    assert [value for part in parts for value in part.token_logprobs] == pytest.approx(
        [item.logprob for item in direct.logprobs]
    )
    offsets = [offset for part in parts for offset in part.text_offset]
    assert [direct.text[start : start + len(token)] for start, token in zip(offsets, tokens, strict=True)] == tokens
    tops = [top for part in parts for top in part.top_logprobs]
    for token, top, item in zip(tokens, tops, direct.logprobs, strict=True):
        assert top[token] == pytest.approx(item.logprob)
        assert max(top.values()) == pytest.approx(item.top[0][1])
        assert 1 <= len(top) <= 4


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(client: openai.OpenAI, expected, engine: Engine, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    direct = expected(messages, max_new_tokens=10, logprobs=2)
    answer = client.chat.completions.create(
        model="model", messages=messages, max_tokens=10, logprobs=True, top_logprobs=2, stream=stream
    )
    parts = [c.logprobs for chunk in (answer if stream else [answer]) for c in chunk.choices if c.logprobs]
    entries = [entry for part in parts for entry in part.content]
    assert len(entries) == len(direct.token_ids)
    for entry, item in zip(entries, direct.logprobs, strict=True):
        assert entry.logprob == pytest.approx(item.logprob)
        assert bytes(entry.bytes).decode() == entry.token == engine.detokenize([item.token])
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([value for _, value in item.top])
    with pytest.raises(openai.BadRequestError, match="needs 'logprobs': true") as caught:
        client.chat.completions.create(model="model", messages=messages, top_logprobs=2)
    assert caught.value.param == "top_logprobs"


def test_without_a_length_an_answer_may_use_the_rest_of_the_context(client: openai.OpenAI, converted: Config) -> None:
    for length in ({}, {"max_tokens": -1}, {"max_tokens": None}):
        body: Any = {"model": "model", "prompt": PROMPT, **length, "logit_bias": {"3": -100}}
        usage = client.post("/completions", cast_to=dict[str, Any], body=body)["usage"]
        assert usage["total_tokens"] == 64
    server = converted.server.model_copy(update={"max_new_tokens": 5})
    with serving.client(converted.model_copy(update={"server": server})) as bounded:
        body = {"model": "model", "prompt": PROMPT, "logit_bias": {"3": -100}}
        assert bounded.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 5
        refused = bounded.post("/v1/completions", json=body | {"max_tokens": 6})
        assert "an answer of 6 tokens is above the limit of 5 (server.max_new_tokens)" in refused.text
        assert len(bounded.post("/generate", json={"prompt": PROMPT}).json()["token_ids"]) <= 5
        assert bounded.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 6}).status_code == 400


def test_the_last_message_is_continued(client: openai.OpenAI, engine: Engine, converted: Config) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Once upon"}]
    asked: Any = {"model": "model", "messages": messages, "max_tokens": 6}
    answer = client.chat.completions.create(
        **asked, extra_body={"continue_final_message": True, "add_generation_prompt": False}
    )
    opened = engine.encode(messages[:1])  # ends where an answer begins
    text = engine.detokenize(opened) + "Once upon"
    direct = engine.generate(Request(engine.encode(text), engine.settings(converted)._replace(max_new_tokens=6)))
    assert answer.choices[0].message.content == direct.text
    for extra, line in [
        ({"continue_final_message": True, "add_generation_prompt": True}, "set 'add_generation_prompt' to false"),
        ({"continue_final_message": True, "messages": messages[:1]}, "the last message must be the assistant's"),
    ]:
        with pytest.raises(openai.BadRequestError, match=line) as caught:
            client.chat.completions.create(**asked | {"extra_body": extra})
        assert caught.value.param == "continue_final_message"


def test_tokenize_and_detokenize(converted: Config, engine: Engine) -> None:
    messages = [{"role": "user", "content": "Hello there"}]
    with serving.client(converted) as client:
        for body, ids in [
            ({"prompt": PROMPT}, engine.encode(PROMPT)),
            ({"messages": messages, "model": "model"}, engine.encode(messages)),
            ({"messages": messages, "add_generation_prompt": False}, engine.encode(messages)[:-3]),
        ]:
            answer = client.post("/tokenize", json=body).json()
            if "add_generation_prompt" in body:
                assert answer["tokens"] == engine.encode(messages)[: answer["count"]] != engine.encode(messages)
                continue
            assert answer == {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": None}
        strings = client.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()["token_strs"]
        assert "".join(strings) == client.post("/detokenize", json={"tokens": engine.encode(PROMPT)}).json()["prompt"]
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 64
        for path, body, status, line in [
            ("/tokenize", {}, 422, "exactly one of 'prompt' and 'messages'"),
            ("/tokenize", {"prompt": "a", "messages": messages}, 422, "exactly one of"),
            ("/tokenize", {"prompt": "a", "model": "other"}, 404, "'other' is not served here"),
            ("/detokenize", {"tokens": [99999]}, 400, "the vocabulary has no token 99999"),
            ("/detokenize", {"tokens": [-1]}, 422, "'tokens.0': "),
        ]:
            answer = client.post(path, json=body)
            assert (answer.status_code, line in answer.json()["detail"]) == (status, True), answer.text
