"""Proto to domain: what is refused, and what is taken over."""

import math
from typing import Any

import pytest
from fake_engine import EOS, FakeEngine
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from nanoserve_client.v1 import admin_pb2, model_pb2
from nanoserve_client.v1 import generation_pb2 as pb

from nanoserve.dialect.tools import Choosing, ToolChoice
from nanoserve.engine.reply import Wanted
from nanoserve.errors import InvalidRequest, ModelNotFound
from nanoserve.request import Constraint, ConstraintKind, SamplingParams
from nanoserve.rpc import validate

MODEL = FakeEngine().model


def generation(**fields: Any) -> validate.Asked:
    fields = fields if {"text", "chat", "token_ids"} & set(fields) else {"text": "hi", **fields}
    return validate.generation(json_format.ParseDict(fields, pb.GenerateRequest()), MODEL)


def violations(convert, *args) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        convert(*args)
    return {v.field: v.description for v in caught.value.violations}


def refused(**fields: Any) -> dict[str, str]:
    return violations(lambda: generation(**fields))


def refused_message(request: pb.GenerateRequest) -> dict[str, str]:
    return violations(validate.generation, request, MODEL)


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"chat": {"messages": messages, **fields}}


USER = {"role": "ROLE_USER", "content": "hi"}
ASSISTANT = {"role": "ROLE_ASSISTANT", "content": "ho"}


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("path", "lowest", "highest", "too_low", "too_high"),
    [
        ("sampling.temperature", 0, 100, -0.001, 100.01),
        ("sampling.top_p", 0, 1, -0.001, 1.001),
        ("sampling.min_p", 0, 1, -0.001, 1.001),
        ("sampling.frequency_penalty", -2, 2, -2.001, 2.001),
        ("sampling.presence_penalty", -2, 2, -2.001, 2.001),
        ("sampling.repetition_penalty", 0.001, 100, 0, 100.01),
        ("sampling.logit_bias[7]", -100, 100, -100.01, 100.01),
        ("sampling.top_k", 0, 2**32 - 1, None, None),
        ("sampling.seed", 0, 2**64 - 1, None, None),
        ("stopping.max_tokens", 0, 2**32 - 1, None, None),
        ("stopping.min_tokens", 0, 2**32 - 1, None, None),
        ("output.logprobs", 0, 20, None, 21),
        ("output.prompt_logprobs", 0, 20, None, 21),
        ("output.min_delta_tokens", 0, 2**32 - 1, None, None),
        ("n", 1, 128, 0, 129),
        ("priority", -100, 100, -101, 101),
        ("max_draft_tokens", 0, 64, None, 65),
    ],
)
def test_numbers_are_taken_within_their_range_and_refused_outside(path, lowest, highest, too_low, too_high):
    for value in (lowest, highest):
        validate.generation(with_number(path, value), MODEL)
    for value in (too_low, too_high):
        if value is not None:
            assert list(refused_message(with_number(path, value))) == [path]
    if path.startswith("sampling.") and path not in ("sampling.top_k", "sampling.seed"):
        for value in (math.nan, math.inf, -math.inf):
            assert list(refused_message(with_number(path, value))) == [path]


def with_number(path: str, value: float) -> pb.GenerateRequest:
    request = pb.GenerateRequest(text="hi")
    *parents, name = path.split(".")
    message: Any = getattr(request, parents[0]) if parents else request
    if name.endswith("]"):
        message.logit_bias[int(name[len("logit_bias[") : -1])] = value
    else:
        setattr(message, name, value)
    return request


def test_a_refusal_says_what_is_allowed():
    assert refused(sampling={"repetition_penalty": 0}) == {
        "sampling.repetition_penalty": "0 is not allowed; allowed: above 0, up to 100"
    }
    assert refused(stopping={"max_tokens": 0, "min_tokens": 1}) == {"stopping.min_tokens": "is more than max_tokens, 0"}
    assert refused(sampling={"temperature": 100.1}) == {
        "sampling.temperature": "100.1 is not allowed; allowed: 0 to 100"
    }
    assert refused(n=129) == {"n": "129 is not allowed; allowed: 1 to 128"}


def test_all_violations_are_reported_at_once():
    assert set(
        refused(
            **chat({"role": "ROLE_USER"}, template_kwargs_json="{"),
            sampling={"temperature": -1, "topP": 2, "logitBias": {"7": 200, "300": 1}},
            stopping={"strings": ["ok", ""], "maxTokens": 1, "minTokens": 2, "timeLimit": "0s"},
            output={"logprobs": 21, "omitText": True},
            cache={"salt": "x" * 257},
            n=0,
            priority=101,
        )
    ) == {
        "chat.messages[0].content",
        "chat.template_kwargs_json",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.logit_bias[7]",
        "sampling.logit_bias[300]",
        "stopping.strings",
        "stopping.strings[1]",
        "stopping.min_tokens",
        "stopping.time_limit",
        "output.logprobs",
        "cache.salt",
        "n",
        "priority",
    }


# ------------------------------------------------------------------------------------------------ prompts


def test_exactly_one_prompt_is_required():
    assert list(refused_message(pb.GenerateRequest())) == ["prompt"]


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (pb.GenerateRequest(text=""), "text"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 257, 300])), "token_ids.ids[1]"),
        (pb.GenerateRequest(chat=pb.Chat()), "chat.messages"),
    ],
)
def test_prompts_that_are_refused(request_, path):
    assert list(refused_message(request_)) == [path]


def test_prompts_that_are_taken():
    assert generation(text=" ").prompt == " "
    assert generation(token_ids={"ids": [0, EOS]}).prompt == [0, 256]


def test_a_chat_becomes_what_templates_know():
    call = {"id": "c1", "name": "add", "argumentsJson": '{"a": 1, "b": 2}'}
    prompt = generation(
        **chat(
            {"role": "ROLE_SYSTEM", "content": "be brief"},
            {"role": "ROLE_DEVELOPER", "content": ""},
            {"role": "ROLE_USER", "content": "1+2?", "name": "Ann"},
            {"role": "ROLE_ASSISTANT", "toolCalls": [call]},
            {"role": "ROLE_TOOL", "content": "3", "toolCallId": "c1"},
            tools=[{"name": "add", "description": "Adds.", "parametersJson": '{"type": "object"}'}, {"name": "now"}],
            templateKwargsJson='{"enable_thinking": false}',
        )
    ).prompt
    assert prompt.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": ""},
        {"role": "user", "content": "1+2?", "name": "Ann"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    assert [tool["function"] for tool in prompt.tools] == [
        {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
        {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
    ]
    assert prompt.template_kwargs == {"enable_thinking": False}
    assert prompt.continue_final_message is False
    assert generation(**chat(USER, ASSISTANT, continueFinalMessage=True)).prompt.continue_final_message is True


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        (chat({"content": "who?"}), "chat.messages[0].role"),
        (chat(USER, {"role": 9, "content": "?"}), "chat.messages[1].role"),
        (chat({"role": "ROLE_USER"}), "chat.messages[0].content"),
        (chat(USER | {"toolCallId": "c"}), "chat.messages[0].tool_call_id"),
        (chat(USER | {"toolCalls": [{"name": "f", "argumentsJson": "{}"}]}), "chat.messages[0].tool_calls"),
        (
            chat(ASSISTANT | {"toolCalls": [{"argumentsJson": "{}"}]}),
            "chat.messages[0].tool_calls[0].name",
        ),
        (chat(USER, continueFinalMessage=True), "chat.continue_final_message"),
        (
            chat(
                {"role": "ROLE_ASSISTANT", "toolCalls": [{"name": "f", "argumentsJson": "{}"}]},
                continueFinalMessage=True,
            ),
            "chat.continue_final_message",
        ),
        (chat(USER, tools=[{"name": "ok"}, {"description": "nameless"}]), "chat.tools[1].name"),
    ],
)
def test_chats_that_are_refused(fields, path):
    assert list(refused(**fields)) == [path]


BAD_JSON = ["{", "[1]", "null", "1", '{"a": NaN}', '{"a": Infinity}', '{"a": "\\ud800"}', "[" * 100_000, " "]


@pytest.mark.parametrize("text", BAD_JSON)
def test_json_fields_take_only_a_json_object(text):
    assert list(refused(**chat(USER, templateKwargsJson=text))) == ["chat.template_kwargs_json"]
    tools = [{"name": "f", "parametersJson": text}]
    assert list(refused(**chat(USER, tools=tools))) == ["chat.tools[0].parameters_json"]
    calls = [{"name": "f", "argumentsJson": text}]
    path = "chat.messages[0].tool_calls[0].arguments_json"
    assert list(refused(**chat(ASSISTANT | {"toolCalls": calls}))) == [path]


def test_arguments_of_a_tool_call_must_be_given():
    calls = [{"name": "f"}]
    assert list(refused(**chat(ASSISTANT | {"toolCalls": calls}))) == ["chat.messages[0].tool_calls[0].arguments_json"]


# ---------------------------------------------------------------------------------------------- the rest


def test_the_model_is_the_served_one_or_unnamed():
    assert generation(model="fake") == generation(model="")
    with pytest.raises(ModelNotFound, match="'other'"):
        generation(model="other")


def test_unset_fields_take_the_models_default_or_the_contracts():
    assert generation().params == SamplingParams(temperature=0.75, top_k=40, max_tokens=None)


def test_set_fields_are_used_as_they_are_even_if_zero():
    params = generation(sampling={"temperature": 0, "topK": 0, "seed": 0, "minP": 0}).params
    assert (params.temperature, params.top_k, params.seed) == (0.0, 0, 0)


def test_options_reach_the_engines_terms():
    wanted = generation(
        stopping={
            "maxTokens": 9,
            "minTokens": 9,
            "strings": ["a", "b" * 1024],
            "tokenIds": [3, 4],
            "ignoreEos": True,
            "includeMatch": True,
            "timeLimit": "1.25s",
        },
        output={"keepSpecialTokens": True, "logprobs": 0, "promptLogprobs": 20},
        sampling={"logitBias": {"5": -1.5}},
        n=3,
    )
    assert wanted.params == SamplingParams(
        n=3,
        temperature=0.75,
        top_k=40,
        logit_bias={5: -1.5},
        max_tokens=9,
        min_tokens=9,
        stop=("a", "b" * 1024),
        stop_token_ids=frozenset({3, 4}),
        ignore_eos=True,
        include_stop=True,
        time_limit_s=1.25,
        logprobs=0,
        prompt_logprobs=20,
        skip_special_tokens=False,
    )
    assert generation(output={"omitText": True}).params.detokenize is False
    assert generation(maxDraftTokens=3).params.max_draft_tokens == 3
    assert generation(predictedText="as it was").params.prediction == "as it was"
    assert generation(predictedTokenIds={"ids": [3, 4]}).params.prediction == (3, 4)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"stopping": {"strings": ["x"] * 17}}, "stopping.strings"),
        ({"stopping": {"strings": ["x" * 1025]}}, "stopping.strings[0]"),
        ({"stopping": {"strings": ["x"]}, "output": {"omitText": True}}, "stopping.strings"),
        ({"stopping": {"tokenIds": [1] * 1025}}, "stopping.token_ids"),
        ({"stopping": {"tokenIds": [1, 257]}}, "stopping.token_ids[1]"),
        ({"predictedTokenIds": {"ids": [1, 257]}}, "predicted_token_ids.ids[1]"),
        ({"stopping": {"minTokens": 5, "maxTokens": 4}}, "stopping.min_tokens"),
        ({"sampling": {"logitBias": {"257": 1}}}, "sampling.logit_bias[257]"),
        ({"sampling": {"logitBias": {str(i): 1 for i in range(1025)}}}, "sampling.logit_bias"),
        ({"cache": {"salt": "x" * 257}}, "cache.salt"),
    ],
)
def test_options_that_are_refused(fields, path):
    assert list(refused(**fields)) == [path]


@pytest.mark.parametrize(
    ("seconds", "nanos", "allowed"),
    [
        (0, 1, True),
        (315_576_000_000, 999_999_999, True),
        (0, 0, False),
        (-1, 0, False),
        (0, -1, False),
        (1, -1, False),
        (-1, 1, False),
        (315_576_000_001, 0, False),
        (-(2**63), 0, False),
        (1, 1_000_000_000, False),
        (1, -(2**31), False),
    ],
)
def test_a_time_limit_is_a_valid_duration_above_zero(seconds, nanos, allowed):
    limit = Duration(seconds=seconds, nanos=nanos)
    request = pb.GenerateRequest(text="hi", stopping=pb.Stopping(time_limit=limit))
    if allowed:
        assert validate.generation(request, MODEL).params.time_limit_s == seconds + nanos / 1e9
    else:
        assert list(refused_message(request)) == ["stopping.time_limit"]


def test_millions_of_violations_are_not_collected():
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage()] * 5000))
    assert len(refused_message(request)) == 1000
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[999] * 100_000))
    assert list(refused_message(request)) == ["token_ids.ids[0]"]


def test_tokenization_takes_a_text_or_a_chat():
    def convert(**fields: Any) -> Any:
        return validate.tokenization(model_pb2.TokenizeRequest(**fields), MODEL)

    assert convert(text="") == ("", None)
    assert convert(text="a", add_special_tokens=False) == ("a", False)
    assert convert(chat=pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="x")]))[0].messages
    assert list(violations(convert)) == ["prompt"]
    assert list(violations(lambda: convert(chat=pb.Chat()))) == ["chat.messages"]
    with pytest.raises(ModelNotFound):
        convert(text="x", model="other")


def test_detokenization_takes_ids_of_the_vocabulary():
    def convert(*ids: int, **fields: Any) -> list[int]:
        return validate.detokenization(model_pb2.DetokenizeRequest(token_ids=ids, **fields), MODEL)

    assert convert() == []
    assert convert(1, 256) == [1, 256]
    assert list(violations(convert, 1, 257)) == ["token_ids[1]"]
    with pytest.raises(ModelNotFound):
        convert(model="other")


def test_a_cancellation_names_a_request():
    assert validate.request_id(admin_pb2.CancelRequest(request_id="r")) == "r"
    assert list(violations(validate.request_id, admin_pb2.CancelRequest())) == ["request_id"]


# ------------------------------------------------------------------------------------------- special tokens, parts


def test_special_tokens_are_not_added_to_token_ids():
    assert generation(token_ids={"ids": [1, 2]}, add_special_tokens=False).add_special_tokens is False
    assert refused(token_ids={"ids": [1]}, addSpecialTokens=True) == {
        "add_special_tokens": "is not for token_ids, which are used verbatim"
    }
    for wanted in (True, False):
        assert generation(text="a", add_special_tokens=wanted).add_special_tokens is wanted
    assert generation(text="a").add_special_tokens is None


def test_a_message_may_have_parts_instead_of_content():
    parts = {"role": "ROLE_USER", "contentParts": ["What is", "TTFT?"]}
    prompt = generation(**chat(parts)).prompt
    assert prompt.messages == [{"role": "user", "content": ["What is", "TTFT?"]}]
    assert list(refused(**chat(parts | {"content": "a"}))) == ["chat.messages[0].content_parts"]


def test_the_beginning_of_an_answer_does_not_go_with_a_continued_one():
    both = chat(USER, ASSISTANT, continueFinalMessage=True, addGenerationPrompt=True)
    assert refused(**both) == {"chat.add_generation_prompt": "cannot be true with continue_final_message"}
    for wanted in (None, False):
        one = chat(USER, ASSISTANT, continueFinalMessage=True, addGenerationPrompt=wanted)
        prompt = generation(**one).prompt
        assert prompt.add_generation_prompt is wanted


def test_special_tokens_of_a_conversation_are_text_unless_asked_for():
    for wanted in (False, True):
        one = chat(USER, parseSpecialTokens=wanted)
        prompt = generation(**one).prompt
        assert prompt.parse_special_tokens is wanted


# ------------------------------------------------------------------------------------- tools and reasoning

HELLO = [{"role": "ROLE_USER", "content": "hi"}]
ADD = {"name": "add", "parametersJson": '{"type": "object"}'}


def chat_with(**fields):
    return {"chat": {"messages": HELLO, **fields}}


def test_tools_and_their_choice_reach_the_engines_terms():
    choice = {"mode": "TOOL_CHOICE_MODE_REQUIRED", "names": ["add"]}
    tools = [{**ADD, "strict": True}, {"name": "now"}]
    use = generation(**chat_with(tools=tools, toolChoice=choice)).prompt.tool_use
    assert [(tool.name, tool.parameters, tool.is_strict) for tool in use.tools] == [
        ("add", {"type": "object"}, True),
        ("now", None, False),
    ]
    assert use.choice == ToolChoice(Choosing.REQUIRED, frozenset(["add"]))
    # A certain one is called once.
    assert use.parallel is False
    assert generation(**chat_with(tools=tools, toolChoice=choice, parallelToolCalls=True)).prompt.tool_use.parallel
    assert generation(**chat_with(tools=tools)).prompt.tool_use.parallel


@pytest.mark.parametrize(
    ("fields", "path", "told"),
    [
        ({"tools": [ADD, ADD]}, "chat.tools[1].name", "is that of tools[0] too"),
        ({"tools": [{"name": ""}]}, "chat.tools[0].name", "must have 1 to 128 letters"),
        ({"tools": [{"name": "a b"}]}, "chat.tools[0].name", "must have 1 to 128 letters"),
        ({"tools": [{"name": "f", "parametersJson": "{"}]}, "chat.tools[0].parameters_json", "is not JSON"),
        ({"tools": [{"name": "f", "parametersJson": "[]"}]}, "chat.tools[0].parameters_json", "must be a JSON object"),
        (
            {"tools": [{"name": "f", "parametersJson": '{"type": "array"}'}]},
            "chat.tools[0].parameters_json",
            "must be the schema of an object",
        ),
        ({"tools": [{"name": f"f{i}"} for i in range(129)]}, "chat.tools", "has 129 entries; at most 128 are allowed"),
        ({"toolChoice": {"mode": "TOOL_CHOICE_MODE_AUTO"}}, "chat.tool_choice", "is for requests with tools"),
        ({"parallelToolCalls": False}, "chat.parallel_tool_calls", "is for requests with tools"),
        (
            {"tools": [ADD], "toolChoice": {}},
            "chat.tool_choice.mode",
            "0 is not allowed; allowed: TOOL_CHOICE_MODE_NONE",
        ),
        (
            {"tools": [ADD], "toolChoice": {"mode": "TOOL_CHOICE_MODE_AUTO", "names": ["sub"]}},
            "chat.tool_choice.names[0]",
            "'sub' is not among the tools",
        ),
        (
            {"tools": [ADD], "toolChoice": {"mode": "TOOL_CHOICE_MODE_NONE", "names": ["add"]}},
            "chat.tool_choice.names",
            "are not for TOOL_CHOICE_MODE_NONE",
        ),
        (
            {"messages": [{"role": "ROLE_USER", "content": "x", "reasoning": "y"}]},
            "chat.messages[0].reasoning",
            "is for ROLE_ASSISTANT only",
        ),
        (
            {"messages": [{"role": "ROLE_ASSISTANT", "toolCalls": [{"name": "f", "argumentsJson": "[]"}]}]},
            "chat.messages[0].tool_calls[0].arguments_json",
            "must be a JSON object",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_told(fields, path, told):
    found = refused(chat={"messages": HELLO, **fields})
    assert path in found
    assert told in found[path]


@pytest.mark.parametrize(
    ("fields", "violations"),
    [
        ({"output": {"parse": True}}, {"output.parse": "is for chat only"}),
        ({"stopping": {"maxReasoningTokens": 0}}, {"stopping.max_reasoning_tokens": "is for chat only"}),
        (
            {**chat_with(), "output": {"parse": True, "keepSpecialTokens": True}},
            {"output.parse": "is not for output.keep_special_tokens"},
        ),
        (
            {**chat_with(), "output": {"parse": True, "omitText": True}},
            {"output.parse": "is not for output.omit_text"},
        ),
    ],
)
def test_parts_are_told_of_a_conversations_text_alone(fields, violations):
    assert refused(**fields) == violations


def test_what_is_wanted_of_the_output_reaches_the_engine():
    asked = generation(
        **chat_with(),
        output={"parse": True},
        stopping={"maxReasoningTokens": 7},
        constraint={"regex": "a", "fromStart": True},
    )
    assert asked.wanted == Wanted(Constraint(ConstraintKind.REGEX, "a"), is_from_start=True, parse=True)
    assert asked.params.max_reasoning_tokens == 7
