"""From fields to the contract's request, and from its stream to OpenAI's objects: however it is cut, joined chunks are
the answer that is not streamed."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanoserve_client.progress import Progress
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_gateway.answer import to_json
from nanoserve_gateway.chat import ChatAnswer
from nanoserve_gateway.completions import CompletionAnswer
from nanoserve_gateway.errors import problem_of
from nanoserve_gateway.fields import CHAT, COMPLETIONS, RESPONSES
from nanoserve_gateway.responses import ResponseAnswer
from nanoserve_gateway.schema import BadRequest
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseTextDeltaEvent
from scripted_server import finished, started

MESSAGES = [{"role": "user", "content": "hi"}]
FINISHES = [pb.FINISH_REASON_EOS, pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_CONTEXT]


def chat(**fields):
    return ChatAnswer(CHAT.parse({"model": "m", "messages": MESSAGES, **fields}))


def completion(**fields):
    return CompletionAnswer(COMPLETIONS.parse({"model": "m", "prompt": "hi", **fields}))


def response(previous=None, **fields):
    kept = []
    answer = ResponseAnswer(RESPONSES.parse({"model": "m", "input": "hi", **fields}), previous, kept.append)
    return answer, kept


# ---------------------------------------------------------------------------------------------------- requests


def test_every_option_reaches_its_place():
    fields = {"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "frequency_penalty": 1.0, "seed": 5}
    fields |= {"presence_penalty": -1.0, "repetition_penalty": 2.0, "logit_bias": {"7": -3}, "stop": "x", "n": 2}
    fields |= {"max_tokens": 9, "min_tokens": 2, "stop_token_ids": [4], "ignore_eos": True, "priority": -3}
    [request] = completion(**fields, cache_salt="s", logprobs=4).requests
    sampling = pb.Sampling(temperature=0.5, top_p=0.5, top_k=3, min_p=0.25, frequency_penalty=1, presence_penalty=-1)
    sampling.MergeFrom(pb.Sampling(repetition_penalty=2, seed=5, logit_bias={7: -3}))
    stopping = pb.Stopping(max_tokens=9, min_tokens=2, strings=["x"], token_ids=[4], ignore_eos=True)
    assert request == pb.GenerateRequest(
        model="m",
        text="hi",
        n=2,
        priority=-3,
        sampling=sampling,
        stopping=stopping,
        output=pb.OutputOptions(logprobs=4),
        cache=pb.CacheOptions(salt="s"),
    )


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
        pb.ChatMessage(role=pb.ROLE_USER, content="ab"),
        pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(id="c1", name="f", arguments_json="{}")]),
        pb.ChatMessage(role=pb.ROLE_TOOL, content="t", tool_call_id="c1"),
    ]


@pytest.mark.parametrize(
    ("prompt", "kinds"),
    [("a", ["text"]), ([1, 2], ["token_ids"]), (["a", "b"], ["text"] * 2), ([[1], [2]], ["token_ids"] * 2)],
)
def test_every_kind_of_prompt(prompt, kinds):
    assert [request.WhichOneof("prompt") for request in completion(prompt=prompt).requests] == kinds


def test_instructions_come_first_and_history_before_the_input():
    first, kept = response()
    first.whole([results(("ab", FINISHES[0]))])
    second, _ = response(kept[0], input="more", instructions="be brief", previous_response_id=first.id)
    texts = [(m.role, m.content) for m in second.requests[0].chat.messages]
    assert texts == [
        (pb.ROLE_SYSTEM, "be brief"),
        (pb.ROLE_USER, "hi"),
        (pb.ROLE_ASSISTANT, "ab"),
        (pb.ROLE_USER, "more"),
    ]


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (chat, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"stream_options": {"include_usage": True}}, "stream_options"),
        (completion, {"prompt": ["a"] * 129}, "prompt"),
        (completion, {"prompt": [1], "echo": True, "stream": True}, "echo"),
        (response, {"include": ["file_search_call.results"]}, "include"),
        (response, {"top_logprobs": 2}, "top_logprobs"),
        (response, {"background": True, "stream": True}, "background"),
        (response, {"background": True, "store": False}, "background"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(make, fields, param):
    with pytest.raises(BadRequest) as caught:
        make(**fields)
    assert [violation.param for violation in caught.value.violations] == [param]


# ---------------------------------------------------------------------------------------------------- answers


def token(number, text, top=()):
    return pb.TokenLogprob(token_id=number, token=text, logprob=-number, rank=1, top=top)


def events_of(pieces, cuts):
    """Deltas of one sequence: text and tokens advance by their own cuts. pieces: (index, text, reason)."""
    events = []
    for index, text, reason in pieces:
        tokens = [token(1 + number, c.encode()) for number, c in enumerate(text)]
        marks = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
        for begin, end in itertools.pairwise(marks):
            events.append(pb.Delta(index=index, text=text[begin:end], logprobs=tokens[begin:end]))
            events[-1].token_ids.extend(t.token_id for t in tokens[begin:end])
        # A last delta may bring a reason alone.
        events.append(pb.Delta(index=index, finish_reason=reason))
    return events


def run(events, answer):
    """The frames of a stream, and its result."""
    progress = Progress(None)
    progress.take(started())
    parts = [b"".join(answer.begin([progress.started]))]
    deltas = (progress.take(pb.GenerateResponse(delta=event)) for event in events)
    parts += [b"".join(answer.delta(0, delta)) for delta in deltas]
    progress.take(finished(3))
    progress.end()
    parts.append(b"".join(answer.end([progress.result()])))
    return frames_of(b"".join(parts)), progress.result()


def results(*sequences):
    return run(events_of([(i, text, reason) for i, (text, reason) in enumerate(sequences)], []), chat())[1]


def frames_of(body):
    datas = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


SEQUENCES = st.lists(st.tuples(st.text(max_size=8), st.sampled_from(FINISHES)), min_size=1, max_size=3)
CUTS = st.lists(st.integers(0, 8), max_size=4)


@settings(deadline=None)
@given(SEQUENCES, CUTS, st.booleans(), st.randoms())
def test_chunks_of_a_chat_join_to_the_answer_however_they_are_cut(sequences, cuts, has_logprobs, random):
    fields = {"n": len(sequences), "logprobs": has_logprobs, "return_token_ids": True}
    frames, result = run(shuffled(sequences, cuts, random), chat(**fields, stream=True))
    whole = json.loads(to_json(chat(**fields).whole([result])))
    assert frames.pop() == "[DONE]"
    joined = {}
    for chunk in frames:
        ChatCompletionChunk.model_validate(chunk)
        [choice] = chunk["choices"]
        index = choice["index"]
        if index not in joined:
            assert choice["delta"] == {"role": "assistant", "content": ""}
            joined[index] = {"text": "", "logprobs": [], "token_ids": [], "reasons": []}
            continue
        joined[index]["text"] += choice["delta"].get("content", "")
        joined[index]["logprobs"] += (choice.get("logprobs") or {}).get("content", [])
        joined[index]["token_ids"] += choice["token_ids"]
        joined[index]["reasons"] += filter(None, [choice.get("finish_reason")])
    for choice in whole["choices"]:
        assert joined.pop(choice["index"]) == {
            "text": choice["message"]["content"],
            "logprobs": choice["logprobs"]["content"] if has_logprobs else [],
            "token_ids": choice["token_ids"],
            "reasons": [choice["finish_reason"]],
        }
    assert not joined


@settings(deadline=None)
@given(SEQUENCES, CUTS, st.randoms())
def test_chunks_of_a_completion_join_to_the_answer_however_they_are_cut(sequences, cuts, random):
    fields = {"n": len(sequences), "logprobs": 0}
    frames, result = run(shuffled(sequences, cuts, random), completion(**fields, stream=True))
    whole = json.loads(to_json(completion(**fields).whole([result])))
    assert frames.pop() == "[DONE]"
    joined = [{"text": "", "reasons": [], "offsets": [], "tokens": []} for _ in sequences]
    for chunk in frames:
        [choice] = chunk["choices"]
        place = joined[choice["index"]]
        place["text"] += choice["text"]
        place["reasons"] += filter(None, [choice["finish_reason"]])
        if choice["logprobs"]:
            place["offsets"] += choice["logprobs"]["text_offset"]
            place["tokens"] += choice["logprobs"]["tokens"]
    assert joined == [
        {
            "text": choice["text"],
            "reasons": [choice["finish_reason"]],
            "offsets": choice["logprobs"]["text_offset"],
            "tokens": choice["logprobs"]["tokens"],
        }
        for choice in whole["choices"]
    ]


@settings(deadline=None)
@given(st.tuples(st.text(max_size=8), st.sampled_from(FINISHES)), CUTS)
def test_events_of_a_response_join_to_the_answer_however_they_are_cut(sequence, cuts):
    fields = {"include": ["message.output_text.logprobs"], "return_token_ids": True}
    streamed, kept = response(**fields, stream=True)
    frames, result = run(events_of([(0, *sequence)], cuts), streamed)
    whole = json.loads(to_json(response(**fields)[0].whole([result])))
    assert [frame["sequence_number"] for frame in frames] == list(range(len(frames)))
    last = frames[-1]
    assert last["type"] == f"response.{whole['status']}"
    assert unlabelled(last["response"]) == unlabelled(whole)
    assert json.loads(to_json(kept[0].response)) == last["response"]
    events = [frame for frame in frames if frame["type"] == "response.output_text.delta"]
    deltas = [ResponseTextDeltaEvent.model_validate(event).delta for event in events]
    assert "".join(deltas) == sequence[0] == last["response"]["output"][0]["content"][0]["text"]


def shuffled(sequences, cuts, random):
    """The deltas of several sequences mixed, each sequence's in order."""
    queues = [events_of([(i, text, reason)], cuts) for i, (text, reason) in enumerate(sequences)]
    order = [queue for queue in queues for _ in queue]
    random.shuffle(order)
    return [queue.pop(0) for queue in order]


def unlabelled(response):
    """Without what differs between two runs."""
    plain = {key: value for key, value in response.items() if key not in ("id", "created_at", "completed_at")}
    return json.loads(json.dumps(plain).replace(response["output"][0]["id"], "ID"))


def test_usage_comes_in_a_chunk_without_choices():
    events = events_of([(0, "ab", FINISHES[0])], [])
    frames, _ = run(events, chat(stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = frames
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 7
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert {chunk["usage"] for chunk in chunks} == {None}


def test_echo_gives_the_prompt_and_its_logprobs():
    answer = completion(prompt=[5, 6], echo=True, logprobs=1)
    assert answer.requests[0].output.prompt_logprobs == 1
    progress = Progress(None)
    progress.take(started())
    first = pb.TokenLogprob(token_id=5, token=b"A")
    prompt = pb.PromptLogprobs(tokens=[first, token(6, b"B", [token(6, b"B")])])
    progress.take(pb.GenerateResponse(prompt_logprobs=prompt))
    for event in events_of([(0, "c", FINISHES[2])], []):
        progress.take(pb.GenerateResponse(delta=event))
    progress.take(finished(1))
    progress.end()
    [choice] = json.loads(to_json(answer.whole([progress.result()])))["choices"]
    assert choice["text"] == "ABc"
    assert choice["logprobs"] == {
        "tokens": ["A", "B", "c"],
        "token_logprobs": [None, -6.0, -1.0],
        "top_logprobs": [None, {"B": -6.0}, {}],
        "text_offset": [0, 1, 2],
    }


def test_a_failed_stream_of_a_response_ends_with_error_and_failed():
    answer, kept = response(stream=True)
    frames = frames_of(b"".join(answer.fail(problem_of(ValueError("x")))))
    assert [frame["type"] for frame in frames] == ["error", "response.failed"]
    assert kept[0].response.status == "failed"
