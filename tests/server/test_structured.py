"""Structured output over HTTP: OpenAI's own client, schemas, tools, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from hildanext.config import Config
from hildanext.decoding.constraint import GrammarCompiler
from hildanext.decoding.grammar import Grammar
from hildanext.model.prompts import encode_prompt
from hildanext.server.structured import AnswerReader, Tool, call_grammar
from support import serving
from support.models import make_tokenizer, write_converted, write_gated
from support.schemas import SCHEMAS, WORD, faults, record

ASKED: list[Any] = [{"role": "user", "content": "Which cat?"}]
WEATHER = record(city={"enum": ["Oslo", "Rome", "Lima"]}, days={"type": "integer", "minimum": 1, "maximum": 9})
FIND = {
    "$defs": {"w": WORD},
    **record(
        word={"$ref": "#/$defs/w"},
        deep={"type": "array", "items": record(x={"enum": ['}"', "]"]}), "minItems": 1, "maxItems": 2},
    ),
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "find-word", "parameters": FIND, "strict": True}},
    {"type": "function", "function": {"name": "now", "parameters": record()}},
]
PARAMETERS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


class Cat(BaseModel):
    name: Annotated[str, Field(max_length=6)]
    colour: Literal["red", "grey"]
    age: Annotated[int, Field(ge=0, le=30)]
    friends: Annotated[list[Literal["dog", "mouse"]], Field(max_length=2)]


@pytest.fixture(scope="module", params=["ungated", "gated"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Config]]:
    write = write_gated if request.param == "gated" else write_converted
    config = write(tmp_path_factory.mktemp("served"), context=2048, decode={"max_new_tokens": 300})
    with serving.running(config) as (url, _):
        yield url, config


@pytest.fixture(scope="module")
def client(served: tuple[str, Config]) -> Iterator[openai.OpenAI]:
    with serving.asking(served[0]) as found:
        yield found


def test_parse_gives_the_pydantic_model(client: openai.OpenAI) -> None:
    for temperature in (0.0, 1.0):
        answer = client.chat.completions.parse(
            model="model", messages=ASKED, response_format=Cat, temperature=temperature, seed=3
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Cat)


def test_a_stream_of_json_is_the_answer(client: openai.OpenAI) -> None:
    schema = SCHEMAS["union"]
    asked: dict[str, Any] = {"model": "model", "messages": ASKED, "seed": 4, "temperature": 0.8}
    asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "union", "schema": schema}}
    answer = client.chat.completions.create(**asked).choices[0]
    assert faults(schema, json.loads(answer.message.content or "")) == []
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.message.content
    assert chunks[-1].choices[0].finish_reason == answer.finish_reason == "stop"


def test_json_object_is_the_beginning_of_an_object(client: openai.OpenAI) -> None:
    for tokens in (1, 30):
        answer = client.chat.completions.create(
            model="model", messages=ASKED, response_format={"type": "json_object"}, max_tokens=tokens
        ).choices[0]
        assert (answer.message.content or "").startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.message.content or ""), dict)


def test_text_is_no_constraint(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "model", "messages": ASKED, "max_tokens": 12}
    plain = client.chat.completions.create(**asked)
    same: list[dict[str, Any]] = [
        {"response_format": {"type": "text"}},
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": []},
        {"tool_choice": "auto"},
        {"tools": ["of another kind"], "tool_choice": "none"},
        {"extra_body": {"response_format": {}, "tools": False, "tool_choice": ""}},
    ]
    for changes in same:
        found = client.chat.completions.create(**asked | changes)
        assert found.choices[0].message == plain.choices[0].message
        assert found.usage.prompt_tokens == plain.usage.prompt_tokens


def collected(chunks: list[Any]) -> tuple[str, list[dict[str, str]]]:
    """The content and the calls that a stream's deltas make up, as OpenAI's clients put them together."""
    content, calls = "", list[dict[str, str]]()
    for chunk in chunks:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for call in delta.tool_calls or []:
            if call.id is not None:  # the name comes first
                assert (call.index, call.type, call.function.arguments) == (len(calls), "function", "")
                calls.append({"name": call.function.name, "arguments": ""})
            else:
                assert call.function.name is None
                calls[call.index]["arguments"] += call.function.arguments
    return content, calls


def check_calls(calls: list[Any]) -> None:
    for call in calls:
        assert call.type == "function"
        assert faults(PARAMETERS[call.function.name], json.loads(call.function.arguments)) == []
    assert len({call.id for call in calls}) == len(calls)


def test_required_and_named_tools_are_called_and_streamed(client: openai.OpenAI) -> None:
    called = set()
    named = {"type": "function", "function": {"name": "find-word"}}
    for seed, choice in [(1, "required"), (2, "required"), (3, named)]:
        asked: dict[str, Any] = {"model": "model", "messages": ASKED, "seed": seed, "temperature": 1.2}
        asked |= {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 400}
        answer = client.chat.completions.create(**asked).choices[0]
        assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
        check_calls(answer.message.tool_calls or [])
        (call,) = answer.message.tool_calls or []
        called.add(call.function.name)
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert collected(chunks) == ("", [{"name": call.function.name, "arguments": call.function.arguments}])
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert call.function.name == "find-word"


def test_several_calls_or_one(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "model", "messages": ASKED, "tools": TOOLS[2:], "tool_choice": "required"}
    counts = []
    for seed in range(4):
        answer = client.chat.completions.create(**asked, temperature=1.5, seed=seed, max_tokens=400).choices[0]
        counts.append(len(answer.message.tool_calls or []))
        assert {call.function.name for call in answer.message.tool_calls or []} == {"now"}
    assert min(counts) >= 1
    one = client.chat.completions.create(**asked, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls or []) == 1


def test_each_of_several_answers_has_calls_and_logprobs_of_its_own(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "model", "messages": ASKED, "tools": [TOOLS[0], TOOLS[2]], "logprobs": True}
    asked |= {"temperature": 1.2, "max_tokens": 400, "parallel_tool_calls": False, "tool_choice": "required"}
    choices = client.chat.completions.create(**asked, n=3, seed=1).choices
    chunks = list(client.chat.completions.create(**asked, n=3, seed=1, stream=True))
    for i, choice in enumerate(choices):
        (call,) = choice.message.tool_calls or []
        own = client.chat.completions.create(**asked, seed=1 + i).choices[0]
        assert own.message.tool_calls[0].function == call.function
        mine = [chunk for chunk in chunks if chunk.choices[0].index == i]
        assert collected(mine) == ("", [{"name": call.function.name, "arguments": call.function.arguments}])
        assert (mine[-1].choices[0].finish_reason, choice.finish_reason) == ("tool_calls", "tool_calls")
        tokens = [entry.token for entry in choice.logprobs.content]
        text = f'{{"name": "{call.function.name}", "arguments": {call.function.arguments}}}'
        assert f"<tool_call>\n{text}\n</tool_call>" in "".join(tokens)
        parts = [chunk.choices[0].logprobs for chunk in mine]
        assert [entry.token for part in parts if part for entry in part.content] == tokens


def test_a_call_and_the_answer_to_it_are_sent_back(client: openai.OpenAI) -> None:
    """The chat template knows no calls, so the model sees what it wrote."""
    asked: dict[str, Any] = {"model": "model", "messages": ASKED, "tools": TOOLS, "tool_choice": "required"}
    said = (
        client.chat.completions.create(**asked, parallel_tool_calls=False, seed=1, temperature=1.2).choices[0].message
    )
    (call,) = said.tool_calls or []
    told = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    function = f'{{"name": "{call.function.name}", "arguments": {call.function.arguments}}}'
    text = [
        {"role": "assistant", "content": f"<tool_call>\n{function}\n</tool_call>"},
        {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"},
    ]
    answers = [
        client.chat.completions.create(model="model", messages=[*ASKED, *more], max_tokens=8)
        for more in ([said, told], text)
    ]
    assert answers[0].usage.prompt_tokens == answers[1].usage.prompt_tokens
    assert answers[0].choices[0].message == answers[1].choices[0].message


def test_the_tokens_of_a_prompt_with_tools_can_be_counted(client: openai.OpenAI, served: tuple[str, Config]) -> None:
    asked: dict[str, Any] = {"model": "model", "messages": ASKED, "tools": TOOLS}
    answer = client.chat.completions.create(**asked, max_tokens=1)
    counted = httpx2.post(f"{served[0]}/tokenize", json=asked).json()
    assert counted["count"] == answer.usage.prompt_tokens > 100


def test_plain_completions_take_a_response_format(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "union", "schema": SCHEMAS["union"]}}
    asked: dict[str, Any] = {"model": "model", "prompt": ["x", "y"], "echo": True, "temperature": 0.8, "seed": 2}
    answer = client.completions.create(**asked, extra_body={"response_format": schema})
    for choice, prompt in zip(answer.choices, asked["prompt"], strict=True):
        assert choice.text.startswith(prompt)
        assert faults(SCHEMAS["union"], json.loads(choice.text.removeprefix(prompt))) == []
        assert choice.finish_reason == "stop"


def test_auto_answers_in_words_or_calls(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "model", "messages": ASKED, "tools": TOOLS, "max_tokens": 40, "temperature": 1.0}
    for seed in range(2):
        answer = client.chat.completions.create(**asked, seed=seed).choices[0]
        check_calls([call for call in answer.message.tool_calls or [] if answer.finish_reason == "tool_calls"])
        content, calls = collected(list(client.chat.completions.create(**asked, seed=seed, stream=True)))
        assert content == (answer.message.content or "")
        assert len(calls) == len(answer.message.tool_calls or [])


def test_generate_takes_a_schema_too(served: tuple[str, Config]) -> None:
    for name in ("tagged union", "optional"):
        body = {"prompt": "x", "json_schema": SCHEMAS[name], "temperature": 0.7, "seed": 1}
        answer = httpx2.post(f"{served[0]}/generate", json=body).json()
        assert (answer["finish_reason"], faults(SCHEMAS[name], json.loads(answer["text"]))) == ("stop", [])
    refused = httpx2.post(f"{served[0]}/generate", json={"prompt": "x", "json_schema": {"not": {}}})
    assert (refused.status_code, "'not'" in refused.json()["detail"]) == (400, True)


def test_bad_requests(client: openai.OpenAI) -> None:
    def schema(of: Any) -> dict[str, Any]:
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}}

    function = {"name": "f", "parameters": {"type": "array"}}
    for changes, line in [
        (schema({"not": {"type": "null"}}), "uses 'not', which is not supported"),
        (schema(record(a={"type": "array", "contains": {}})), "uses 'contains', which is not supported"),
        ({"response_format": {"type": "json_schema"}}, "'response_format': 'json_schema' needs a schema"),
        ({"response_format": {"type": "xml"}}, "'response_format.type'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "no tool is named 'g'"),
        ({"tool_choice": "required"}, "'required' needs 'tools'"),
        ({"tool_choice": "sometimes", "tools": TOOLS}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "'response_format': an answer that may call"),
        ({"tools": [{"type": "function", "function": function}]}, "the parameters of 'f' must have the type 'object'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 500_000}}]}, "characters"),
    ]:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model="model", messages=ASKED, stream=stream, **changes)
            assert line in caught.value.message, changes


def test_tools_are_shown_by_the_template_or_in_the_system_message() -> None:
    tokenizer = make_tokenizer()
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    messages = [{"role": "system", "content": "Be kind."}, *ASKED]
    own = tokenizer.decode(encode_prompt(tokenizer, messages, tools=tools))
    assert own.startswith('<|im_start|>system\n[{"type": "function"')
    tokenizer.chat_template = tokenizer.chat_template.replace("tools", "none")
    shown = tokenizer.decode(encode_prompt(tokenizer, messages, tools=tools))
    assert shown.startswith("<|im_start|>system\nBe kind.\n\nYou can call functions.")
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather"}}\n</tools>' in shown
    assert "Be kind." not in tokenizer.decode(encode_prompt(tokenizer, ASKED, tools=tools))
    assert "get_weather" in tokenizer.decode(encode_prompt(tokenizer, ASKED, tools=tools))


def test_calls_and_their_answers_are_shown_by_the_template_or_as_text() -> None:
    tokenizer = make_tokenizer()
    calls = [{"function": {"name": name, "arguments": '{"city": "Oslo", "days": 3}'}} for name in ("f", "g")]
    answers = [{"role": "tool", "content": text} for text in ("rain", "sun")]
    messages = [*ASKED, {"role": "assistant", "content": "See.", "tool_calls": calls}, *answers, *ASKED]
    assert '<call>{"name": "f"' in tokenizer.decode(encode_prompt(tokenizer, messages))
    tokenizer.chat_template = tokenizer.chat_template.replace("tool_calls", "none")
    shown = tokenizer.decode(encode_prompt(tokenizer, messages))
    written = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "Oslo", "days": 3}}}}\n</tool_call>' for name in "fg"
    ]
    assert "<|im_start|>assistant\nSee.\n" + "\n".join(written) + "<|im_end|>" in shown
    told = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>"
    assert f"<|im_start|>user\n{told}<|im_end|>\n<|im_start|>user\n" in shown
    reader = AnswerReader(calls=True)  # what is shown is what the model is to write
    reader.push("\n".join(written), last=True)
    assert [call["function"]["name"] for call in reader.calls] == ["f", "g"]


def test_an_engine_without_structured_output_says_so() -> None:
    with serving.client(serving.dummy()) as client:
        answer = client.post("/generate", json={"prompt": "x", "json_schema": {}})
    assert (answer.status_code, "no structured output" in answer.json()["detail"]) == (400, True)


def test_behind_text_calls_have_their_form_to_the_end() -> None:
    tokenizer = make_tokenizer()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), [], (tokenizer.eos_token_id,))
    tools = [Tool.model_validate(tool) for tool in TOOLS]

    def fits(text: str, **options: bool) -> bool:
        """Whether the whole text is an answer."""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        constraint = compiler.compile(Grammar.of_lark(call_grammar(tools, **options))).start()
        return constraint.fitting(ids) == len(ids)

    def call(name: str, arguments: str) -> str:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'

    now, weather = call("now", "{}"), call("get_weather", '{"city": "Oslo", "days": 3}')
    for text in (now, weather, call("find-word", '{"word": "a", "deep": [{"x": "]"}]}')):
        assert fits(text, several=False, optional=False)
        assert fits(f"Let me see. {text}", several=False, optional=True)
    assert fits(f"{now}\n{weather}\n{now}", several=True, optional=False)
    assert fits("In words: a < b, <tool> {", several=True, optional=True)
    assert not fits(f"{now}\n{weather}", several=False, optional=True)
    assert not fits("In words.", several=True, optional=False)
    assert not fits(f"{now} and more", several=True, optional=True)
    assert not fits("<tool_call> is a word", several=True, optional=True)
    for name, arguments in [("then", "{}"), ("now", '{"a": 1}'), ("get_weather", '{"city": "Paris", "days": 3}')]:
        assert not fits(call(name, arguments), several=True, optional=True)


# --- Reading calls from text

WORDS = st.text(st.sampled_from('ab"{}[]\\<tool_c/>:, \n'), max_size=12)
ARGUMENTS = st.dictionaries(WORDS, WORDS | st.integers() | st.lists(WORDS, max_size=2), max_size=3)


@given(WORDS, st.lists(st.tuples(st.sampled_from(["f", "g-2"]), ARGUMENTS), max_size=3), st.data())
@settings(max_examples=200, deadline=None)
def test_calls_are_read_however_the_text_is_cut(said: str, calls: list[tuple[str, Any]], data: st.DataObject) -> None:
    said = said.replace("<tool_call>", "")
    written = [f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(a)}}}\n</tool_call>' for name, a in calls]
    text = said + "\n".join(written)
    reader, deltas, at = AnswerReader(calls=True), list[dict[str, Any]](), 0
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        deltas += reader.push(text[at : at + size])
        at += size
    deltas += reader.push("", last=True)
    assert reader.content == said == "".join(delta.get("content", "") for delta in deltas)
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reader.calls] == calls
    streamed: dict[int, str] = {}
    for (change,) in (delta["tool_calls"] for delta in deltas if "tool_calls" in delta):
        streamed[change["index"]] = streamed.get(change["index"], "") + change["function"]["arguments"]
    assert [streamed[i] for i in range(len(calls))] == [call["function"]["arguments"] for call in reader.calls]
    assert reader.finish_reason("stop") == ("tool_calls" if calls else "stop")
    assert reader.finish_reason("length") == "length"
    plain = AnswerReader(calls=False)
    assert (plain.push(text, last=True), plain.calls) == ([{"content": text}] if text else [], [])
