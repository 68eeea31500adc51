"""What the output must be: from the names of OpenAI and vLLM to the contract's constraint, and its outcome back."""

import json

import grpc
import pytest
from google.rpc import error_details_pb2
from nanoserve_client import Delta
from nanoserve_client.progress import Progress
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_gateway.answer import to_json
from nanoserve_gateway.chat import ChatAnswer
from nanoserve_gateway.completions import CompletionAnswer
from nanoserve_gateway.fields import CHAT, COMPLETIONS, RESPONSES
from nanoserve_gateway.responses import ResponseAnswer
from nanoserve_gateway.schema import BadRequest
from openai.types.chat import ChatCompletionChunk
from scripted_server import RichStatus, delta, finished, started

SCHEMA = {"type": "object", "properties": {"é": {"enum": [None, 1]}}, "required": ["é"]}
TEXT = json.dumps(SCHEMA)
NO_CONSTRAINT = pb.GenerateRequest()


def chat(**fields):
    messages = [{"role": "user", "content": "hi"}]
    return ChatAnswer(CHAT.parse({"model": "m", "messages": messages, **fields}))


def completion(**fields):
    return CompletionAnswer(COMPLETIONS.parse({"model": "m", "prompt": "hi", **fields}))


def response(**fields):
    return ResponseAnswer(RESPONSES.parse({"model": "m", "input": "hi", **fields}), None, lambda _: None)


def of_schema(**fields):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **fields}}}


def of_text(**fields):
    return {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, **fields}}}


# ------------------------------------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    ("make", "given"), [(chat, of_schema), (response, of_text)], ids=["response_format", "text.format"]
)
def test_a_schema_is_enforced_if_it_is_strict_and_else_relaxed(make, given):
    for strict, relaxed in ((True, False), (False, True), (None, True)):
        assert make(**given(strict=strict)).requests[0].constraint == pb.Constraint(json_schema=TEXT, relaxed=relaxed)
    assert make(**given()).requests[0].constraint.relaxed


def test_json_object_is_no_schema():
    for answer in (chat(response_format={"type": "json_object"}), response(text={"format": {"type": "json_object"}})):
        assert answer.requests[0].constraint == pb.Constraint(json_object=True)


@pytest.mark.parametrize("given", [{}, {"response_format": {"type": "text"}}, {"response_format": None}], ids=str)
def test_without_a_format_there_is_no_constraint(given):
    assert not chat(**given).requests[0].HasField("constraint")


STRUCTURED = [
    ({"json": SCHEMA}, pb.Constraint(json_schema=TEXT)),
    ({"json": TEXT}, pb.Constraint(json_schema=TEXT)),
    ({"json_object": True}, pb.Constraint(json_object=True)),
    ({"regex": "[ab]+"}, pb.Constraint(regex="[ab]+")),
    ({"choice": ["a", "b"]}, pb.Constraint(choices=pb.Choices(texts=["a", "b"]))),
    ({"grammar": 'start: "a"'}, pb.Constraint(grammar='start: "a"')),
]


@pytest.mark.parametrize("make", [chat, completion, response])
@pytest.mark.parametrize(("given", "constraint"), STRUCTURED, ids=[str(given) for given, _ in STRUCTURED])
def test_what_bears_a_name_of_vllms_is_never_relaxed(make, given, constraint):
    others = {
        "disable_any_whitespace": False,
        "whitespace_pattern": None,
        "json_object": given.get("json_object", False),
    }
    for structured in (given, {**others, **given}):
        assert make(structured_outputs=structured).requests[0].constraint == constraint


@pytest.mark.parametrize("make", [chat, completion])
def test_vllms_older_names_mean_the_same(make):
    for given, constraint in STRUCTURED:
        [(name, value)] = given.items()
        if name != "json_object":
            fields = {f"guided_{name}": value, "guided_decoding_backend": "auto"}
            assert make(**fields).requests[0].constraint == constraint


def test_every_prompt_has_the_constraint():
    requests = completion(prompt=["a", [5]], guided_regex="a").requests
    assert [request.constraint.regex for request in requests] == ["a", "a"]


@pytest.mark.parametrize(
    ("make", "fields", "param", "other"),
    [
        (chat, {**of_schema(), "guided_regex": "a"}, "response_format.json_schema.schema", "guided_regex"),
        (
            chat,
            {"response_format": {"type": "json_object"}, "structured_outputs": {"json": SCHEMA}},
            "response_format",
            "structured_outputs.json",
        ),
        (
            completion,
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs.regex",
            "structured_outputs.choice",
        ),
        (completion, {"guided_json": {}, "guided_choice": []}, "guided_json", "guided_choice"),
        (
            response,
            {**of_text(), "structured_outputs": {"regex": "a"}},
            "text.format.schema",
            "structured_outputs.regex",
        ),
    ],
)
def test_of_two_constraints_both_are_named(make, fields, param, other):
    with pytest.raises(BadRequest) as caught:
        make(**fields)
    [violation] = caught.value.violations
    assert violation.param == param
    assert other in violation.message


@pytest.mark.parametrize("structured", [{}, {"json_object": False}, {"json": None, "disable_fallback": False}], ids=str)
def test_structured_outputs_without_a_constraint_are_refused(structured):
    with pytest.raises(BadRequest, match="structured_outputs: one of json, json_object, regex, choice, grammar"):
        completion(structured_outputs=structured)


# ------------------------------------------------------------------------------------------------ what is refused

PLACES = [
    ("/v1/chat/completions", of_schema(strict=True), "constraint.json_schema", "response_format.json_schema.schema"),
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}}, "constraint.json_object", "response_format"),
    ("/v1/completions", {"guided_json": SCHEMA}, "constraint.json_schema", "guided_json"),
    ("/v1/completions", {"structured_outputs": {"choice": [""]}}, "constraint.choices", "structured_outputs.choice"),
    ("/v1/responses", of_text(strict=True), "constraint.json_schema", "text.format.schema"),
    ("/v1/responses", {"structured_outputs": {"regex": "("}}, "constraint.regex", "structured_outputs.regex"),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("path", "fields", "ours", "theirs"), PLACES, ids=[theirs for *_, theirs in PLACES])
def test_a_refusal_names_the_callers_field_with_pointer_and_keyword(scripted, path, fields, ours, theirs, is_streamed):
    def refuse(_request, context):
        info = error_details_pb2.ErrorInfo(reason="CONSTRAINT_INVALID", domain="nanoserve")
        info.metadata.update({"violations": "1", "pointer": "/items", "keyword": "uniqueItems"})
        violation = {"field": ours, "description": "/items/uniqueItems cannot be enforced"}
        bad = error_details_pb2.BadRequest(field_violations=[violation])
        context.abort_with_status(RichStatus(grpc.StatusCode.INVALID_ARGUMENT, "no", (info, bad)))
        yield

    scripted.script.generate = refuse
    prompt = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "input": "hi"}
    names = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}
    body = {names[path]: prompt[names[path]], "stream": is_streamed, **fields}
    answer = scripted.http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": f"{theirs}: /items/uniqueItems cannot be enforced",
        "type": "invalid_request_error",
        "param": theirs,
        "code": "constraint_invalid",
    }


# ------------------------------------------------------------------------------------------------ what became of it

UNIQUE = pb.UnenforcedKeyword(pointer="/items", keyword="uniqueItems", why="cannot be enforced")
OUTCOMES = {
    "satisfied": pb.CONSTRAINT_OUTCOME_SATISFIED,
    "truncated": pb.CONSTRAINT_OUTCOME_TRUNCATED,
    "relaxed_ok": pb.CONSTRAINT_OUTCOME_RELAXED_OK,
    "relaxed_violated": pb.CONSTRAINT_OUTCOME_RELAXED_VIOLATED,
}


def run(answer, *outcomes, unenforced=(), cut=(), num_prompts=1):
    """Frames of the stream, and the results, of a server that gives each prompt these sequences, a second prompt in
    reverse. cut: those that end by their limit."""
    all_progress = [Progress(None) for _ in range(num_prompts)]
    for progress in all_progress:
        progress.take(started())
    body = b"".join(answer.begin([progress.started for progress in all_progress]))
    for prompt, progress in enumerate(all_progress):
        for index in range(len(outcomes) or 1):
            reason = pb.FINISH_REASON_LENGTH if index in cut else pb.FINISH_REASON_COMPLETE
            for event in (delta(index, "{", (1,)), delta(index, "}", (2,), finish_reason=reason)):
                body += b"".join(answer.delta(prompt, progress.take(event)))
        values = [OUTCOMES[outcome] for outcome in (outcomes if prompt == 0 else reversed(outcomes))]
        progress.take(finished(2, constraint_outcomes=values, unenforced=unenforced))
        progress.end()
    results = [progress.result() for progress in all_progress]
    body += b"".join(answer.end(results))
    datas = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(data) for data in datas if data != "[DONE]"], results


def whole(answer, results):
    return json.loads(to_json(answer.whole(results)))


@pytest.mark.parametrize(("make", "is_chat"), [(chat, True), (completion, False)])
def test_each_choice_and_the_last_chunk_of_each_tell_the_outcome(make, is_chat):
    fields = {"n": 4, "guided_regex": "a"}
    outcomes = list(OUTCOMES)
    frames, results = run(make(**fields, stream=True), *outcomes, cut=[1])
    choices = whole(make(**fields), results)["choices"]
    assert [choice["constraint_outcome"] for choice in choices] == outcomes
    assert [choice["finish_reason"] for choice in choices] == ["stop", "length", "stop", "stop"]
    assert [choice["stop_reason"] for choice in choices] == [None] * 4
    chunks = [choice for frame in frames for choice in frame["choices"]]
    told = {choice["index"]: choice for choice in chunks if "constraint_outcome" in choice}
    assert [told[index]["constraint_outcome"] for index in range(4)] == outcomes
    # It comes with the reason, and nothing of the choice follows.
    assert all(choice["finish_reason"] for choice in told.values())
    assert [choice["index"] for choice in chunks if choice["finish_reason"]] == list(told) == [0, 1, 2, 3]
    assert all(not choice["finish_reason"] for choice in chunks[:-4])
    if is_chat:
        for frame in frames:
            ChatCompletionChunk.model_validate(frame)


def test_outcomes_of_several_prompts_stand_at_their_choices():
    fields = {"prompt": ["a", "b"], "n": 2, "guided_regex": "a"}
    frames, results = run(completion(**fields, stream=True), "satisfied", "truncated", num_prompts=2)
    wanted = [(0, "satisfied"), (1, "truncated"), (2, "truncated"), (3, "satisfied")]
    for choices in (whole(completion(**fields), results)["choices"], [f["choices"][0] for f in frames[-4:]]):
        assert [(choice["index"], choice["constraint_outcome"]) for choice in choices] == wanted


def test_the_usage_still_comes_last():
    answer = chat(guided_regex="a", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    frames, _ = run(answer, "satisfied")
    assert frames[-1]["choices"] == []
    assert frames[-2]["choices"][0]["constraint_outcome"] == "satisfied"
    assert frames[-2]["usage"]["completion_tokens"] == frames[-1]["usage"]["completion_tokens"] == 2


UNENFORCED = [{"pointer": "/items", "keyword": "uniqueItems", "why": "cannot be enforced"}]


def test_what_was_not_enforced_is_told_of_relaxed_schemas():
    frames, results = run(chat(**of_schema(), stream=True), "relaxed_ok", unenforced=[UNIQUE])
    for choice in (frames[-1]["choices"][0], whole(chat(**of_schema()), results)["choices"][0]):
        assert choice["unenforced"] == UNENFORCED
    # Of a schema that is enforced as a whole there is nothing to tell.
    _, results = run(chat(**of_schema(), stream=True), "satisfied")
    assert "unenforced" not in whole(chat(**of_schema()), results)["choices"][0]


@pytest.mark.parametrize("make", [chat, completion, response])
def test_without_a_constraint_nothing_is_told(make):
    frames, results = run(make(stream=True))
    for text in (json.dumps(frames), json.dumps(whole(make(), results))):
        assert "constraint_outcome" not in text
        assert "unenforced" not in text


def test_a_choice_that_has_to_wait_for_nothing_ends_at_once():
    answer = chat(stream=True)
    event = pb.Delta(text="a", finish_reason=pb.FINISH_REASON_EOS)
    frames = b"".join(answer.delta(0, Delta.of(event))).decode()
    assert '"finish_reason":"stop"' in frames


@pytest.mark.parametrize(
    ("outcome", "status", "details", "cut"),
    [
        ("relaxed_ok", "completed", None, ()),
        ("relaxed_violated", "completed", None, ()),
        ("truncated", "incomplete", {"reason": "max_output_tokens"}, (0,)),
    ],
)
def test_a_response_repeats_its_format_and_tells_the_outcome(outcome, status, details, cut):
    frames, results = run(response(**of_text(strict=None), stream=True), outcome, unenforced=[UNIQUE], cut=cut)
    answer = whole(response(**of_text(strict=None)), results)
    for made in (answer, frames[-1]["response"]):
        assert made["text"] == {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
        assert (made["constraint_outcome"], made["unenforced"]) == (outcome, UNENFORCED)
        assert (made["status"], made["incomplete_details"]) == (status, details)
    assert frames[-1]["type"] == f"response.{status}"
    # Before the end it is not known.
    assert "constraint_outcome" not in frames[0]["response"]
    assert frames[0]["response"]["text"] == answer["text"]


def test_a_response_without_a_format_says_that_it_is_a_text():
    _, results = run(response(stream=True))
    assert whole(response(), results)["text"] == {"format": {"type": "text"}}
