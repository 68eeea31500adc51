"""From the contract's stream to OpenAI's objects: however it is cut, joined chunks are the answer that is not
streamed."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanoserve_client import Delta, Started, TokenLogprob
from nanoserve_client.progress import Progress
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_gateway.answer import to_json
from nanoserve_gateway.chat import ChatAnswer
from nanoserve_gateway.completions import CompletionAnswer
from nanoserve_gateway.errors import problem_of
from nanoserve_gateway.fields import CHAT, COMPLETIONS, RESPONSES
from nanoserve_gateway.responses import ResponseAnswer
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


def token(number, text, top=()):
    return pb.TokenLogprob(token_id=number, token=text, logprob=-number, rank=1, top=top)


def events_of(pieces, cuts):
    """Deltas of one sequence: text and tokens advance by their own cuts. pieces: (index, text, reason)."""
    events = []
    for index, text, reason in pieces:
        tokens = [token(1 + number, c.encode()) for number, c in enumerate(text)]
        marks = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
        for begin, end in itertools.pairwise(marks):
            part = text[begin:end]
            events.append(pb.Delta(index=index, text=part, content=part, logprobs=tokens[begin:end]))
            events[-1].token_ids.extend(t.token_id for t in tokens[begin:end])
        # A last delta may bring a reason alone.
        events.append(pb.Delta(index=index, finish_reason=reason))
    return events


def run(events, answer):
    """The frames of a stream, and its result."""
    progress = Progress(None, is_parsed=answer.requests[0].output.parse)
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
        is_end = choice["finish_reason"] is not None
        assert choice["delta"].keys() == (set() if is_end else {"content"})
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
        assert choice["finish_reason"] is None or choice["text"] == ""
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


def test_parts_of_a_response_stay_parts_when_they_are_remembered():
    parts = [{"type": "input_text", "text": "What is"}, {"type": "input_text", "text": "TTFT?"}]
    first, kept = response(input=[{"role": "user", "content": parts}])
    first.whole([results(("ab", FINISHES[0]))])
    second, _ = response(kept[0], input="more", previous_response_id=first.id)
    for answer in (first, second):
        assert answer.requests[0].chat.messages[0].content_parts == ["What is", "TTFT?"]
    assert kept[0].items[0]["content"] == parts


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


def test_usage_comes_in_a_chunk_without_choices():
    events = events_of([(0, "ab", FINISHES[0])], [])
    frames, _ = run(events, chat(stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = frames
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 7
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert {chunk["usage"] for chunk in chunks} == {None}


@pytest.mark.parametrize("make", [chat, completion])
def test_usage_so_far_is_in_every_chunk(make):
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames, _ = run(events_of([(0, "ab", FINISHES[0])], [1]), make(stream=True, stream_options=options, n=1))
    *chunks, last, _done = frames
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-3:] == [1, 2, 2]
    assert {chunk["usage"]["prompt_tokens"] for chunk in (*chunks, last)} == {4}
    assert all(usage["total_tokens"] == 4 + usage["completion_tokens"] for usage in (c["usage"] for c in chunks))


# ------------------------------------------------------------------------------------ log-probabilities and tokens


PROMPT_TOKENS = [pb.TokenLogprob(token_id=5, token=b"A"), token(6, b"B", [token(3, b"D"), token(4, b"C")])]


def run_with_prompt(answer, text="c", num_choices=1):
    """The frames of a stream to a prompt of PROMPT_TOKENS, and its result, as the application makes them."""
    progress = Progress(None)
    progress.take(started())
    body = b"".join(answer.begin([progress.started]))
    progress.take(pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(tokens=PROMPT_TOKENS)))
    answer.prompts[0].logprobs = progress.prompt_logprobs
    for event in events_of([(i, text, FINISHES[2]) for i in range(num_choices)], []):
        body += b"".join(answer.delta(0, progress.take(pb.GenerateResponse(delta=event))))
    progress.take(finished(1))
    progress.end()
    return frames_of(body), progress.result()


ECHOED = {
    "tokens": ["A", "B", "c"],
    "token_logprobs": [None, -6.0, -1.0],
    "top_logprobs": [None, {"D": -3.0, "B": -6.0}, {"c": -1.0}],
    "text_offset": [0, 1, 2],
}


def test_echo_gives_the_prompt_and_its_logprobs():
    answer = completion(prompt=[5, 6], echo=True, logprobs=1)
    assert answer.requests[0].output.prompt_logprobs == 1
    [choice] = json.loads(to_json(answer.whole([run_with_prompt(answer)[1]])))["choices"]
    assert choice["text"] == "ABc"
    assert choice["logprobs"] == ECHOED


@pytest.mark.parametrize("prompt", ["AB", [5, 6]])
@pytest.mark.parametrize("logprobs", [1, None])
def test_a_streamed_echo_comes_before_what_follows_it(prompt, logprobs):
    answer = completion(prompt=prompt, echo=True, logprobs=logprobs, stream=True, n=2)
    frames, _ = run_with_prompt(answer, num_choices=2)
    joined = [{"text": "", **{name: [] for name in ECHOED}} for _ in range(2)]
    for chunk in frames:
        [choice] = chunk["choices"]
        place = joined[choice["index"]]
        place["text"] += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            place[name] += values
    told = ECHOED if logprobs is not None else {name: [] for name in ECHOED}
    assert joined == [{"text": "ABc", **told}] * 2


def test_of_several_prompts_each_is_echoed_as_it_was_given():
    answer = completion(prompt=["AB", [5, 6]], echo=True, stream=True)
    assert [request.output.HasField("prompt_logprobs") for request in answer.requests] == [False, True]
    starts = [Started.of(started().started)] * 2
    texts = [frame["choices"][0] for frame in frames_of(b"".join(answer.begin(starts)))]
    assert [(choice["index"], choice["text"]) for choice in texts] == [(0, "AB")]
    answer.prompts[1].logprobs = [TokenLogprob.of(each) for each in PROMPT_TOKENS]
    late = frames_of(b"".join(answer.delta(1, Delta.of(pb.Delta(text="c")))))
    assert [(frame["choices"][0]["index"], frame["choices"][0]["text"]) for frame in late] == [(1, "AB"), (1, "c")]


PROMPT_LOGPROBS = [
    None,
    {
        "6": {"logprob": -6.0, "rank": 1, "decoded_token": "B"},
        "3": {"logprob": -3.0, "rank": 1, "decoded_token": "D"},
        "4": {"logprob": -4.0, "rank": 1, "decoded_token": "C"},
    },
]


def test_logprobs_of_the_prompt_are_by_token_id_as_vllm_has_them():
    answer = chat(prompt_logprobs=2)
    assert json.loads(to_json(answer.whole([run_with_prompt(answer)[1]])))["prompt_logprobs"] == PROMPT_LOGPROBS
    # Asked for twice, with different numbers of alternatives, each is told as it was asked for.
    answer = completion(prompt=[5, 6], echo=True, logprobs=1, prompt_logprobs=2)
    assert answer.requests[0].output.prompt_logprobs == 2
    [choice] = json.loads(to_json(answer.whole([run_with_prompt(answer)[1]])))["choices"]
    assert choice["prompt_logprobs"] == PROMPT_LOGPROBS
    assert choice["logprobs"] == ECHOED


def logprobs_of(make, tokens, **fields):
    """What an answer says of these tokens, streamed and not."""
    delta = pb.Delta(logprobs=tokens, token_ids=[t.token_id for t in tokens], finish_reason=FINISHES[0])
    frames, result = run([delta], make(**fields, stream=True))
    [streamed] = [f["choices"][0]["logprobs"] for f in frames[:-1] if f["choices"][0].get("logprobs")]
    whole = json.loads(to_json(make(**fields).whole([result])))["choices"][0]["logprobs"]
    return streamed, whole


def test_the_drawn_token_stands_among_its_alternatives_and_the_likelier_of_one_name_stays():
    top = [token(1, b"a"), token(2, b"b"), token(3, b"a")]
    tokens = [token(9, b"z", top[:2]), token(1, b"a", top[:2]), token(5, b"z"), token(3, b"a", top)]
    for told in logprobs_of(completion, tokens, logprobs=3):
        assert told["top_logprobs"] == [
            {"a": -1.0, "b": -2.0, "z": -9.0},
            {"a": -1.0, "b": -2.0},
            {"z": -5.0},
            {"a": -1.0, "b": -2.0},
        ]


def test_tokens_that_are_no_text_are_told_apart():
    top = [token(1, b"\xe2\x82"), token(2, b"\xac"), token(3, b" \xff")]
    tokens = [token(1, b"\xe2\x82", top), token(2, b"\xac"), token(4, b"x")]
    for told in logprobs_of(completion, tokens, logprobs=3):
        assert told["tokens"] == ["bytes:\\xe2\\x82", "bytes:\\xac", "x"]
        assert list(told["top_logprobs"][0]) == ["bytes:\\xe2\\x82", "bytes:\\xac", "bytes: \\xff"]
        # Of the one character that the first two make.
        assert told["text_offset"] == [0, 0, 1]


def test_tokens_may_be_named_by_their_ids():
    tokens = [token(9, b"z", [token(1, b"a")])]
    for told in logprobs_of(completion, tokens, logprobs=1, return_tokens_as_token_ids=True):
        assert told["tokens"] == ["token_id:9"]
        assert told["top_logprobs"] == [{"token_id:1": -1.0, "token_id:9": -9.0}]
    for told in logprobs_of(chat, tokens, logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True):
        [entry] = told["content"]
        assert (entry["token"], entry["bytes"]) == ("token_id:9", [122])
        assert [other["token"] for other in entry["top_logprobs"]] == ["token_id:1"]


def test_a_chunk_of_tokens_whose_text_is_still_to_come_has_an_empty_text():
    answer = chat(stream=True, logprobs=True)
    [frame] = frames_of(b"".join(answer.delta(0, Delta.of(pb.Delta(logprobs=[token(1, b"\xf0")], token_ids=[1])))))
    assert frame["choices"][0]["delta"] == {"content": ""}
    assert not list(chat(stream=True).delta(0, Delta.of(pb.Delta(token_ids=[1]))))


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({"finish_reason": pb.FINISH_REASON_STOP, "stop_string": "x"}, "x"),
        ({"finish_reason": pb.FINISH_REASON_STOP, "stop_token_id": 0}, 0),
        ({"finish_reason": pb.FINISH_REASON_EOS, "stop_token_id": 2}, None),
        ({"finish_reason": pb.FINISH_REASON_LENGTH}, None),
    ],
)
def test_what_ended_a_choice_is_told(make, end, reason):
    frames, result = run([pb.Delta(text="a", content="a", **end)], make(stream=True))
    whole = json.loads(to_json(make().whole([result])))
    for choice in (frames[-2]["choices"][0], whole["choices"][0]):
        assert choice["stop_reason"] == reason


def test_token_ids_of_the_prompt_come_with_those_of_the_answer():
    fields = {"return_token_ids": True}
    for make, place in ((chat, lambda chunk: chunk), (completion, lambda chunk: chunk["choices"][0])):
        frames, result = run_told(make(**fields, stream=True), [5, 6])
        assert [place(frame).get("prompt_token_ids") for frame in frames[:2]] == [[5, 6], None]
        whole = make(**fields)
        whole.prompts[0].token_ids = [5, 6]
        assert place(json.loads(to_json(whole.whole([result]))))["prompt_token_ids"] == [5, 6]


def run_told(answer, token_ids):
    [prompt] = answer.prompts
    assert prompt.is_told
    prompt.token_ids = token_ids
    return run(events_of([(0, "a", FINISHES[0])], []), answer)


def test_token_ids_that_were_given_are_known():
    prompts = completion(prompt=["a", [5, 6]], return_token_ids=True).prompts
    assert [prompt.token_ids for prompt in prompts] == [None, [5, 6]]
    assert not any(prompt.is_told for prompt in (*completion().prompts, *chat().prompts))


def test_what_is_never_made_may_be_asked_for():
    include = ["reasoning.encrypted_content", "web_search_call.action.sources"]
    assert response(include=include)[0].requests == response()[0].requests


def test_a_failed_stream_of_a_response_ends_with_error_and_failed():
    answer, kept = response(stream=True)
    frames = frames_of(b"".join(answer.fail(problem_of(ValueError("x")))))
    assert [frame["type"] for frame in frames] == ["error", "response.failed"]
    assert kept[0].response.status == "failed"
