"""OpenAI's API, asked by OpenAI's own Python client over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from hildanext.config import Config, parse_config
from hildanext.decoding.engines import Request, open_engine
from hildanext.errors import UsageError
from hildanext.model.pretrained import load_tokenizer
from support import serving
from support.serving import asking
from support.stepping import passed, stepping, until

MODEL = parse_config({}).model.base
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(converted: Config) -> Iterator[openai.OpenAI]:
    with serving.running(converted) as (url, _), asking(url) as found:
        yield found


@pytest.fixture(scope="module")
def expected(converted: Config):
    """`expected(prompt, **settings)`: the completion straight from an engine."""
    engine = open_engine(converted)
    return lambda prompt, **changes: engine.generate(
        Request(engine.encode(prompt), engine.settings(converted)._replace(**changes))
    )


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["model"]
    assert client.models.retrieve("model").owned_by == "hildanext"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI, expected) -> None:
    answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=6)
    direct = expected(PROMPT, max_new_tokens=6)
    assert (answer.object, answer.choices[0].text) == ("text_completion", direct.text)
    assert answer.choices[0].finish_reason == direct.finish_reason == "length"
    assert answer.usage.completion_tokens == len(direct.token_ids) == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_a_special_token_that_a_message_quotes_is_text(client: openai.OpenAI, converted: Config) -> None:
    tokenizer = load_tokenizer(converted.model)
    sizes = []
    for content in ("a", "a<|end|>a"):
        answer = client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": content}], max_completion_tokens=1
        )
        sizes.append(answer.usage.prompt_tokens)
    as_text = tokenizer("a<|end|>a", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in as_text
    assert sizes[1] - sizes[0] == len(as_text) - 1


def test_several_prompts(client: openai.OpenAI, expected) -> None:
    prompts = [PROMPT, "The", "A dog"]
    answer = client.completions.create(model="model", prompt=prompts, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [expected(prompt, max_new_tokens=5).text for prompt in prompts]


def test_a_chat_and_its_stream_agree(client: openai.OpenAI, expected) -> None:
    messages = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
    ours = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello"}]
    asked = {"model": "model", "messages": messages, "max_completion_tokens": 9}
    answer = client.chat.completions.create(**asked)
    direct = expected(ours, max_new_tokens=9)
    assert answer.choices[0].message.content == direct.text
    assert answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == direct.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]
    found, again = answer.usage.to_dict(), chunks[-1].usage.to_dict()
    cached = again.pop("prompt_tokens_details")["cached_tokens"]
    assert found.pop("prompt_tokens_details") == {"cached_tokens": 0}
    assert (chunks[-1].choices, again) == ([], found)
    # Asked again, all of the prompt's whole blocks but the last token's are there already.
    assert cached == (found["prompt_tokens"] - 1) // 4 * 4
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(client: openai.OpenAI, expected) -> None:
    messages = [{"role": "user", "content": "Tell me about a red house"}]
    before = 0
    for turn in range(3):
        answer = client.chat.completions.create(model="model", messages=messages, max_completion_tokens=5)
        assert answer.choices[0].message.content == expected(messages, max_new_tokens=5).text
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached >= before // 4 * 4 - 4  # at least the turn before as it was asked
        assert (cached > 0) == (turn > 0)
        before = answer.usage.prompt_tokens
        messages += [{"role": "assistant", "content": answer.choices[0].message.content}]
        messages += [{"role": "user", "content": "And"}]


def test_a_completions_stream(client: openai.OpenAI, expected) -> None:
    chunks = list(client.completions.create(model="model", prompt=PROMPT, max_tokens=9, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(PROMPT, max_new_tokens=9).text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_modes_and_thresholds_travel_in_extra_body(client: openai.OpenAI, expected) -> None:
    def stats(**extra):
        answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=8, extra_body=extra)
        return answer.model_extra["hildanext"][0]

    careful, all_at_once = stats(tau_mask=1.0, tau_edit=None), stats(tau_mask=0.0, tau_edit=None)
    assert careful["stats"]["forwards"] > all_at_once["stats"]["forwards"]
    for given, found in ((careful, {"tau_mask": 1.0}), (all_at_once, {"tau_mask": 0.0})):
        assert given["stats"]["forwards"] == expected(PROMPT, max_new_tokens=8, tau_edit=None, **found).stats.forwards
    assert stats(mode="S_MODE")["mode"] == "S_MODE"


def test_sampling_and_stops(client: openai.OpenAI, expected) -> None:
    asked = {"temperature": 0.9, "top_p": 0.8, "seed": 5}
    answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=8, **asked)
    direct = expected(PROMPT, max_new_tokens=8, **asked)
    assert answer.choices[0].text == direct.text
    stop = direct.text[3:5]
    stopped = client.completions.create(model="model", prompt=PROMPT, max_tokens=8, stop=stop, **asked)
    assert stopped.choices[0].text == direct.text[: direct.text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_the_seed_of_an_unseeded_answer_is_told_and_repeats_it(client: openai.OpenAI) -> None:
    asked = {"model": "model", "prompt": PROMPT, "max_tokens": 20, "temperature": 2.0}
    seed = lambda answer: answer.model_extra["hildanext"][0]["stats"]["seed"]  # noqa: E731
    answers = [client.completions.create(**asked) for _ in range(3)]
    assert len({seed(answer) for answer in answers}) == len({answer.choices[0].text for answer in answers}) == 3
    again = client.completions.create(**asked, seed=seed(answers[0]))
    assert again.choices[0].text == answers[0].choices[0].text
    chunks = list(client.completions.create(**asked, stream=True, seed=seed(answers[1])))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answers[1].choices[0].text
    assert seed(chunks[-1]) == seed(answers[1])
    batch = client.completions.create(**asked | {"prompt": [PROMPT] * 2})
    assert len({entry["stats"]["seed"] for entry in batch.model_extra["hildanext"]}) == 2


def test_bad_requests(client: openai.OpenAI) -> None:
    for changes, param, line in [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"extra_body": {"repetition_penalty": 1e-40}}, "repetition_penalty", "greater than or equal to 0.1"),
        ({"n": 9}, "n", "9 is above the 8 answers decoded side by side (engine.slots); lower it"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -2.5}, "presence_penalty", "greater than or equal to -2"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": 1, "echo": True}, "echo", "remove 'echo' or 'logprobs'"),
        ({"best_of": 2}, "best_of", "should be 1"),
        ({"suffix": "after"}, "suffix", "Extra inputs are not permitted; remove the field"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "the vocabulary has no token 99999; use ids from 0 to"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"prompt": [99999]}, "prompt", "the vocabulary has no token 99999; use ids from 0 to"),
        ({"prompt": [1, "a"]}, "prompt.0", "should be a valid"),
        ({"extra_body": {"response_format": {"type": "xml"}}}, "response_format.type", "should be 'text'"),
        ({"extra_body": {"response_format": {"type": "json_schema"}}}, "response_format", "needs a schema"),
        ({"extra_body": {"min_p": 1.5}}, "min_p", "less than or equal to 1"),
        ({"extra_body": {"tau_mask": 2}}, "tau_mask", "less than or equal to 1"),
        ({"extra_body": {"tau_mark": 0.5}}, "tau_mark", "Extra inputs are not permitted"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"max_tokens": 1000}, None, "this model's maximum context length is exceeded"),
        (
            {"max_tokens": 1000},
            None,
            "max_tokens (1000), rounded up to whole blocks 1004, exceed the model's context of 64",
        ),
        ({"max_tokens": 1000, "stream": True}, None, "exceed the model's context of 64"),
        ({"prompt": "a " * 70}, None, "exceed the model's context of 64"),
    ]:
        # No subtests: their capture would close the stderr that the server's thread logs to.
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**({"model": "model", "prompt": PROMPT} | changes))
        assert (caught.value.type, caught.value.param) == ("invalid_request_error", param), changes
        assert line in caught.value.message, changes
        assert caught.value.code == ("context_length_exceeded" if "context" in line else None), changes


def test_what_is_no_json_has_no_param(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="JSON decode error") as caught:
        client.post(
            "/completions",
            cast_to=object,
            content=b'{"a": }',
            options={"headers": {"Content-Type": "application/json"}},
        )
    assert caught.value.param is None


def test_other_models_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "Hi"}])
    assert (caught.value.type, caught.value.param) == ("not_found_error", "model")
    assert caught.value.code == "model_not_found"


def test_keys() -> None:
    config = parse_config({"engine": {"order": ["dummy"]}})
    with (
        serving.running(config, keys=[b"right"]) as (url, _),
        asking(url, "right") as right,
        asking(url, "wrong") as wrong,
    ):
        assert "hello" in right.completions.create(model="smollm2-135m", prompt="hello").choices[0].text
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.models.list()
        assert (caught.value.type, caught.value.code) == ("authentication_error", "invalid_api_key")


def test_a_full_queue_is_a_rate_limit_that_the_client_understands() -> None:
    with stepping(held=True, queue=0) as (url, worker, engine), asking(url) as client:
        with pytest.raises(openai.RateLimitError) as caught:  # three prompts, two places
            client.completions.create(model=MODEL, prompt=["a", "b", "c"], max_tokens=4)
        assert caught.value.response.headers["Retry-After"] == "1"
        assert caught.value.code == "rate_limit_exceeded"
        engine.held = False
        engine.go.release()
        until(worker, lambda: not worker.accepted)
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=2).choices[0].text == "xAA"


def test_one_of_several_prompts_that_fails_takes_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    with stepping() as (url, worker, engine), asking(url) as client:
        submit = engine.submit

        def fail(request: Request) -> object:
            if request.prompt_ids == list(b"bad"):
                raise UsageError("not this one")
            return submit(request)

        monkeypatch.setattr(engine, "submit", fail)
        names = lambda: {getattr(task.get_coro(), "__name__", "") for task in asyncio.all_tasks(worker.loop)}  # noqa: E731
        for stream in (False, True):
            # In a stream that the others have begun, the error is an event.
            with pytest.raises(openai.APIError, match="not this one"):
                list(
                    client.completions.create(
                        model=MODEL, prompt=["good", "bad", "good"], max_tokens=10**9, stream=stream
                    )
                )
            until(worker, lambda: not worker.accepted)
            until(worker, lambda: "completed" not in names())
            until(worker, lambda: not engine.waiting)


def test_a_client_that_leaves_a_stream_of_several_answers_frees_their_places() -> None:
    with stepping() as (url, worker, engine), asking(url) as client:
        stream = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=10**9, stream=True)
        indices = set()
        for chunk in stream:
            indices.add(chunk.choices[0].index)
            if indices == {0, 1}:
                break
        stream.close()
        until(worker, lambda: not worker.accepted)
        until(worker, lambda: not engine.waiting)


def test_an_error_in_a_stream_is_one_that_the_client_understands() -> None:
    with stepping(held=True) as (url, worker, engine), ThreadPoolExecutor(1) as pool, asking(url) as client:
        stream = pool.submit(
            lambda: list(client.completions.create(model=MODEL, prompt="x", max_tokens=9, stream=True))
        )
        until(worker, lambda: engine.waiting)
        passed(worker)
        engine.go.release()
        with pytest.raises(openai.APIError, match="the deadline passed") as caught:
            stream.result()
        error = {"type": "server_error", "param": None, "code": None}
        assert caught.value.body == {"message": caught.value.message, **error}
