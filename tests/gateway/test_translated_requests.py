"""From fields to the contract's request."""

import pytest
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_gateway.chat import ChatAnswer
from nanoserve_gateway.completions import CompletionAnswer
from nanoserve_gateway.fields import CHAT, COMPLETIONS, RESPONSES
from nanoserve_gateway.responses import ResponseAnswer
from nanoserve_gateway.schema import BadRequest

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return ChatAnswer(CHAT.parse({"model": "m", "messages": MESSAGES, **fields}))


def completion(**fields):
    return CompletionAnswer(COMPLETIONS.parse({"model": "m", "prompt": "hi", **fields}))


def response(previous=None, **fields):
    kept = []
    answer = ResponseAnswer(RESPONSES.parse({"model": "m", "input": "hi", **fields}), previous, kept.append)
    return answer, kept


def test_every_option_reaches_its_place():
    fields = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "frequency_penalty": 1.0, "seed": 5}
    fields |= {"presence_penalty": -1.0, "repetition_penalty": 2.0, "logit_bias": {"7": -3}, "stop": "x", "n": 2}
    fields |= {"max_tokens": 9, "min_tokens": 2, "stop_token_ids": [4], "ignore_eos": True, "priority": -3}
    fields |= {"skip_special_tokens": False, "include_stop_str_in_output": True, "add_special_tokens": False}
    [request] = completion(**fields, cache_salt="s", logprobs=4, prompt_logprobs=2).requests
    sampling = pb.Sampling(temperature=0.5, top_p=0.5, top_k=3, min_p=0.25, frequency_penalty=1, presence_penalty=-1)
    sampling.MergeFrom(pb.Sampling(repetition_penalty=2, seed=5, logit_bias={7: -3}))
    stopping = pb.Stopping(max_tokens=9, min_tokens=2, strings=["x"], token_ids=[4], ignore_eos=True)
    stopping.include_match = True
    assert request == pb.GenerateRequest(
        model="m",
        text="hi",
        n=2,
        priority=-3,
        sampling=sampling,
        stopping=stopping,
        output=pb.OutputOptions(logprobs=4, prompt_logprobs=2, keep_special_tokens=True),
        cache=pb.CacheOptions(salt="s"),
        add_special_tokens=False,
    )


def test_options_of_a_conversation_reach_its_place():
    fields = {"chat_template_kwargs": {"enable_thinking": False}, "continue_final_message": True}
    fields |= {"add_generation_prompt": False, "parse_special_tokens": True}
    [request] = chat(**fields, add_special_tokens=True, prompt_logprobs=0).requests
    messages = [pb.ChatMessage(role=pb.ROLE_USER, content="hi")]
    assert request.chat == pb.Chat(
        messages=messages,
        template_kwargs_json='{"enable_thinking": false}',
        continue_final_message=True,
        add_generation_prompt=False,
        parse_special_tokens=True,
    )
    assert request.add_special_tokens
    assert request.output.prompt_logprobs == 0
    assert request.output.HasField("prompt_logprobs")
    answer, _ = response(chat_template_kwargs={"enable_thinking": False})
    assert answer.requests[0].chat.template_kwargs_json == '{"enable_thinking": false}'


@pytest.mark.parametrize("make", [chat, completion, lambda **fields: response(**fields)[0]])
def test_what_is_not_asked_for_is_left_to_the_server(make):
    [request] = make(model=None).requests
    # Of a conversation the parts are told apart.
    output = pb.OutputOptions(parse=make is not completion)
    plain = pb.GenerateRequest(sampling=pb.Sampling(), stopping=pb.Stopping(), output=output, cache=pb.CacheOptions())
    request.ClearField("text")
    request.ClearField("chat")
    assert request == plain


@pytest.mark.parametrize(("fields", "off"), [({"top_k": -1}, ("top_k", 0)), ({"top_p": 0}, ("top_p", 0))])
def test_ends_of_a_range_are_taken(fields, off):
    name, value = off
    sampling = chat(**fields).requests[0].sampling
    assert sampling.HasField(name)
    assert getattr(sampling, name) == value


def test_no_tokens_at_all_may_be_asked_for():
    assert completion(max_tokens=0, echo=True, logprobs=1).requests[0].stopping.HasField("max_tokens")


@pytest.mark.parametrize(("seed", "bits"), [(-1, 2**64 - 1), (-(2**63), 2**63), (0, 0), (2**64 - 1, 2**64 - 1)])
def test_a_negative_seed_has_the_same_bits(seed, bits):
    assert chat(seed=seed).requests[0].sampling.seed == bits


def test_messages_keep_role_name_and_text():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "d", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "t", "tool_call_id": "c1"},
    ]
    assert list(chat(messages=messages).requests[0].chat.messages) == [
        pb.ChatMessage(role=pb.ROLE_DEVELOPER, content="d", name="n"),
        pb.ChatMessage(role=pb.ROLE_USER, content_parts=["a", "b"]),
        pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(id="c1", name="f", arguments_json="{}")]),
        pb.ChatMessage(role=pb.ROLE_TOOL, content="t", tool_call_id="c1"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "text", "text": "a"}], pb.ChatMessage(content="a")),
        ([], pb.ChatMessage(content="")),
        ("", pb.ChatMessage(content="")),
    ],
)
def test_one_part_is_a_text(content, message):
    message.role = pb.ROLE_USER
    assert list(chat(messages=[{"role": "user", "content": content}]).requests[0].chat.messages) == [message]


@pytest.mark.parametrize("silent", [{}, {"content": None}, {"content": []}, {"content": None, "tool_calls": []}])
def test_an_assistant_may_have_said_nothing(silent):
    answer = chat(messages=[*MESSAGES, {"role": "assistant", **silent}, *MESSAGES])
    assert answer.requests[0].chat.messages[1] == pb.ChatMessage(role=pb.ROLE_ASSISTANT, content="")


@pytest.mark.parametrize("arguments", ["", " \n"])
def test_a_call_without_arguments_has_an_empty_object_of_them(arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = chat(messages=[*MESSAGES, {"role": "assistant", "tool_calls": [call]}])
    assert answer.requests[0].chat.messages[1].tool_calls[0].arguments_json == "{}"


@pytest.mark.parametrize(
    ("prompt", "kinds"),
    [
        *[("a", ["text"]), ([1, 2], ["token_ids"]), (["a", "b"], ["text"] * 2), ([[1], [2]], ["token_ids"] * 2)],
        *[(["a", [1]], ["text", "token_ids"]), ([[1], "a"], ["token_ids", "text"])],
    ],
)
def test_every_kind_of_prompt(prompt, kinds):
    assert [request.WhichOneof("prompt") for request in completion(prompt=prompt).requests] == kinds


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (chat, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"stream_options": {"include_usage": True}}, "stream_options"),
        (completion, {"prompt": ["a"] * 129}, "prompt"),
        (chat, {"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        (completion, {"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        (
            completion,
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        (response, {"include": ["reasoning.encrypted_content", "reasoning.thoughts"]}, "include"),
        (response, {"top_logprobs": 2}, "top_logprobs"),
        (response, {"background": True, "store": False}, "background"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(make, fields, param):
    with pytest.raises(BadRequest) as caught:
        make(**fields)
    assert [violation.param for violation in caught.value.violations] == [param]
