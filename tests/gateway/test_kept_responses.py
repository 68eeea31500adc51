"""Responses that are kept: found, continued, cancelled and forgotten, in front of a scripted server."""

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import pytest
from nanoserve_client.v1 import model_pb2
from nanoserve_gateway import conversations
from scripted_gateway import scripted_gateway
from scripted_server import RichStatus, hello, overloaded, started

WAIT_S = 30


def silent(_request, context):
    gone = threading.Event()
    context.add_callback(gone.set)
    yield started()
    assert gone.wait(WAIT_S)


def until(holds):
    for _ in range(WAIT_S * 50):
        if holds():
            return
        threading.Event().wait(0.02)
    raise AssertionError("it never held")


def create(gateway, text="hi", **fields):
    return gateway.http.post("/v1/responses", json={"model": "tiny", "input": text, **fields})


def status_of(gateway, id):
    return gateway.http.get(f"/v1/responses/{id}").status_code


def last_conversation(gateway):
    return [message.content for message in gateway.script.requests[-1].chat.messages]


def test_a_response_is_found_listed_and_forgotten_by_its_own_key_alone(scripted):
    mine, other = {"authorization": "Bearer a"}, {"authorization": "Bearer b"}
    made = scripted.http.post("/v1/responses", json={"model": "tiny", "input": "hi"}, headers=mine).json()
    url = f"/v1/responses/{made['id']}"
    assert scripted.http.get(url, headers=mine).json() == made
    [item] = scripted.http.get(f"{url}/input_items", headers=mine).json()["data"]
    assert item["content"] == [{"type": "input_text", "text": "hi"}]
    for method, path in (("GET", url), ("DELETE", url), ("POST", f"{url}/cancel"), ("GET", f"{url}/input_items")):
        assert scripted.http.request(method, path, headers=other).status_code == 404
    continued = {"model": "tiny", "input": "and", "previous_response_id": made["id"]}
    assert scripted.http.post("/v1/responses", json=continued, headers=other).status_code == 400
    assert scripted.http.post("/v1/responses", json=continued, headers=mine).status_code == 200
    assert [m.content for m in scripted.script.requests[-1].chat.messages] == ["hi", "Hello", "and"]
    assert scripted.http.post(f"{url}/cancel", headers=mine).status_code == 400
    assert scripted.http.delete(url, headers=mine).json()["deleted"]
    assert scripted.http.get(url, headers=mine).status_code == 404


def test_a_key_owns_its_responses_however_its_scheme_is_written(scripted):
    body = {"model": "tiny", "input": "hi"}
    made = scripted.http.post("/v1/responses", json=body, headers={"authorization": "Bearer a"}).json()
    for scheme, status in (("bearer", 200), ("BEARER ", 200), ("Basic", 404), ("", 404)):
        headers = {"authorization": f"{scheme} a".strip()}
        assert scripted.http.get(f"/v1/responses/{made['id']}", headers=headers).status_code == status


def test_the_items_of_a_response_come_in_pages(scripted):
    items = [{"role": "user", "content": str(number)} for number in range(25)]
    made = scripted.http.post("/v1/responses", json={"model": "tiny", "input": items}).json()

    def page(**query):
        answer = scripted.http.get(f"/v1/responses/{made['id']}/input_items", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def texts(listed):
        return [int(item["content"][0]["text"]) for item in listed["data"]]

    first = page()
    assert (texts(first), first["has_more"]) == (list(range(24, 4, -1)), True)
    rest = page(after=first["last_id"])
    assert (texts(rest), rest["has_more"]) == ([4, 3, 2, 1, 0], False)
    assert (rest["first_id"], rest["last_id"]) == (rest["data"][0]["id"], rest["data"][-1]["id"])
    assert texts(page(order="asc", limit=2)) == [0, 1]
    end = page(order="asc", after=first["first_id"])
    assert (end["data"], end["first_id"], end["has_more"]) == ([], None, False)


def test_a_response_to_no_new_input_has_no_items(scripted):
    body = {"model": "tiny", "input": [], "instructions": "Say hello."}
    made = scripted.http.post("/v1/responses", json=body).json()
    assert scripted.http.get(f"/v1/responses/{made['id']}/input_items").json()["data"] == []


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("", "stream=true", "stream"),
        ("", "stream=perhaps", "stream"),
        ("", "starting_after=3", "starting_after"),
        ("", "stream=true&starting_after=-1", "starting_after"),
        ("", "include[]=message.output_text.logprobs", "include"),
        ("/input_items", "limit=0", "limit"),
        ("/input_items", "limit=101", "limit"),
        ("/input_items", "limit=many", "limit"),
        ("/input_items", "limit=1&limit=2", "limit"),
        ("/input_items", "order=random", "order"),
        ("/input_items", "after=nothing", "after"),
        ("/input_items", "input=x", "input"),
    ],
)
def test_a_parameter_of_a_query_is_served_or_refused_by_name(scripted, path, query, param):
    made = scripted.http.post("/v1/responses", json={"model": "tiny", "input": "hi"}).json()
    answer = scripted.http.get(f"/v1/responses/{made['id']}{path}?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_response_that_is_written_on_a_thread_is_kept_when_it_comes(scripted, monkeypatch):
    monkeypatch.setattr("nanoserve_gateway.app.LARGE_NUM_LOGPROBS", 0)
    for _ in range(20):
        assert status_of(scripted, create(scripted).json()["id"]) == 200


def test_a_streamed_response_is_kept_and_one_that_says_no_is_not(scripted):
    for is_kept in (True, False):
        body = {"model": "tiny", "input": "hi", "stream": True, "store": is_kept}
        lines = scripted.http.post("/v1/responses", json=body).text.splitlines()
        last = json.loads([line for line in lines if line.startswith("data: ")][-1].removeprefix("data: "))
        found = scripted.http.get(f"/v1/responses/{last['response']['id']}")
        assert found.status_code == (200 if is_kept else 404)


def test_room_for_responses_is_bounded_and_the_least_used_goes():
    with scripted_gateway(max_stored_responses=2) as gateway:

        def make():
            return gateway.http.post("/v1/responses", json={"model": "tiny", "input": "hi"}).json()["id"]

        def status(id):
            return gateway.http.get(f"/v1/responses/{id}").status_code

        first, second = make(), make()
        assert status(first) == 200
        third = make()
        assert [status(id) for id in (first, second, third)] == [200, 404, 200]


def hold_after_start(scripted):
    """The server's answers go on after their start when the event is set."""
    go_on = threading.Event()

    def generate(request, context):
        yield started()
        assert go_on.wait(WAIT_S)
        yield from itertools.islice(hello(request, context), 1, None)

    scripted.script.generate = generate
    return go_on


def test_a_response_in_the_background_answers_at_once_and_is_there_when_it_ended(scripted):
    go_on = hold_after_start(scripted)
    body = {"model": "tiny", "input": "hi", "background": True}
    made = scripted.http.post("/v1/responses", json=body).json()
    assert (made["status"], made["output"]) == ("queued", [])
    until(lambda: scripted.http.get(f"/v1/responses/{made['id']}").json()["status"] == "in_progress")
    continued = scripted.http.post("/v1/responses", json={**body, "previous_response_id": made["id"]})
    assert "in_progress" in continued.json()["error"]["message"]
    go_on.set()
    until(lambda: scripted.http.get(f"/v1/responses/{made['id']}").json()["status"] == "completed")


def test_a_queued_response_names_the_served_model_if_its_request_names_none(scripted):
    go_on = hold_after_start(scripted)
    served = model_pb2.ListModelsResponse(models=[model_pb2.Model(name="tiny")])
    scripted.script.unary = lambda _request, _context: served
    made = scripted.http.post("/v1/responses", json={"input": "hi", "background": True}).json()
    assert (made["status"], made["model"]) == ("queued", "tiny")
    go_on.set()
    until(lambda: scripted.http.get(f"/v1/responses/{made['id']}").json()["status"] == "completed")


def test_a_response_in_the_background_can_be_cancelled(scripted):
    scripted.script.generate = silent
    made = scripted.http.post("/v1/responses", json={"model": "tiny", "input": "hi", "background": True}).json()
    cancelled = scripted.http.post(f"/v1/responses/{made['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert scripted.script.ended.wait(WAIT_S)
    assert scripted.http.get(f"/v1/responses/{made['id']}").json()["status"] == "cancelled"


def test_two_who_cancel_at_once_hear_the_same(scripted):
    scripted.script.generate = silent
    made = scripted.http.post("/v1/responses", json={"model": "tiny", "input": "hi", "background": True}).json()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: httpx.post(f"{scripted.url}/v1/responses/{made['id']}/cancel"), range(2)))
    assert [answer.json()["status"] for answer in answers] == ["cancelled"] * 2
    assert scripted.script.ended.wait(WAIT_S)


def test_who_forgets_a_response_in_the_background_ends_it(scripted):
    scripted.script.generate = silent
    made = scripted.http.post("/v1/responses", json={"model": "tiny", "input": "hi", "background": True}).json()
    assert scripted.http.delete(f"/v1/responses/{made['id']}").json()["deleted"]
    assert scripted.script.ended.wait(WAIT_S)
    assert scripted.http.get(f"/v1/responses/{made['id']}").status_code == 404


def test_a_response_in_the_background_is_queued_until_the_service_begins(scripted, monkeypatch):
    monkeypatch.setattr(conversations, "QUEUED_AFTER_S", 0.05)
    begin = threading.Event()

    def generate(request, context):
        assert begin.wait(WAIT_S)
        yield from hello(request, context)

    scripted.script.generate = generate
    made = create(scripted, background=True).json()
    assert made["status"] == scripted.http.get(f"/v1/responses/{made['id']}").json()["status"] == "queued"
    begin.set()
    until(lambda: scripted.http.get(f"/v1/responses/{made['id']}").json()["status"] == "completed")


def test_a_queued_response_can_be_cancelled_and_one_that_is_refused_late_has_failed(scripted, monkeypatch):
    monkeypatch.setattr(conversations, "QUEUED_AFTER_S", 0.05)
    refuse = threading.Event()

    def generate(_request, context):
        gone = threading.Event()
        context.add_callback(gone.set)
        while not (refuse.is_set() or gone.wait(0.01)):
            pass
        context.abort_with_status(overloaded(1000))
        yield

    scripted.script.generate = generate
    cancelled, refused = (create(scripted, background=True).json()["id"] for _ in range(2))
    assert scripted.http.post(f"/v1/responses/{cancelled}/cancel").json()["status"] == "cancelled"
    refuse.set()
    until(lambda: scripted.http.get(f"/v1/responses/{refused}").json()["status"] == "failed")
    assert "queue is full" in scripted.http.get(f"/v1/responses/{refused}").json()["error"]["message"]


def test_a_response_in_the_background_that_is_refused_at_once_is_a_refusal(scripted):
    def generate(_request, context):
        context.abort_with_status(overloaded(1000))
        yield

    scripted.script.generate = generate
    for is_streamed in (False, True):
        assert create(scripted, background=True, stream=is_streamed).status_code == 429


def events_of(lines):
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def stream_of(gateway, id, **query):
    answer = gateway.http.get(f"/v1/responses/{id}", params={"stream": "true", **query})
    assert answer.status_code == 200, answer.text
    return events_of(answer.text.splitlines())


def test_a_stream_in_the_background_goes_on_without_its_reader_and_is_read_again(scripted):
    go_on = hold_after_start(scripted)
    body = {"model": "tiny", "input": "hi", "background": True, "stream": True}
    with scripted.http.stream("POST", "/v1/responses", json=body) as answer:
        id = events_of([next(line for line in answer.iter_lines() if line.startswith("data: "))])[0]["response"]["id"]
    assert status_of(scripted, id) == 200
    go_on.set()
    events = stream_of(scripted, id)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "queued", "in_progress"]
    assert kinds[-1] == "completed"
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]
    assert events[-1]["response"] == scripted.http.get(f"/v1/responses/{id}").json()
    assert stream_of(scripted, id, starting_after=4) == events[5:]
    assert stream_of(scripted, id, starting_after=1000) == []


def test_a_stream_in_the_background_gives_signs_of_life_and_ends_when_it_is_cancelled():
    with scripted_gateway(keep_alive_s=0.05) as gateway:
        gateway.script.generate = silent
        body = {"model": "tiny", "input": "hi", "background": True, "stream": True}
        with gateway.http.stream("POST", "/v1/responses", json=body) as answer:
            lines = answer.iter_lines()
            id = events_of([next(line for line in lines if line.startswith("data: "))])[0]["response"]["id"]
            assert ": keep-alive" in lines
            assert httpx.post(f"{gateway.url}/v1/responses/{id}/cancel").json()["status"] == "cancelled"
            assert not [line for line in lines if "completed" in line]
        assert gateway.script.ended.wait(WAIT_S)
        assert stream_of(gateway, id)[-1]["type"] == "response.in_progress"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stream_that_is_kept_takes_room(is_streamed):
    with scripted_gateway(max_stored_bytes=15_000) as gateway:
        ids = []
        for _ in range(4):
            answer = create(gateway, background=True, stream=is_streamed)
            made = events_of(answer.text.splitlines())[-1]["response"] if is_streamed else answer.json()
            ids.append(made["id"])
            until(lambda id=made["id"]: gateway.http.get(f"/v1/responses/{id}").json()["status"] == "completed")
        assert [status_of(gateway, id) for id in ids] == [404 if is_streamed else 200, 200, 200, 200]


def test_a_response_in_the_background_that_fails_says_so(scripted):
    def generate(_request, context):
        yield started()
        context.abort_with_status(RichStatus(grpc.StatusCode.INTERNAL, "it failed"))

    scripted.script.generate = generate
    made = scripted.http.post("/v1/responses", json={"model": "tiny", "input": "hi", "background": True}).json()
    until(lambda: scripted.http.get(f"/v1/responses/{made['id']}").json()["status"] == "failed")


# --------------------------------------------------------------------------------------------------- conversations


def chain(gateway, length):
    """Ids of responses of which each continues the one before; inputs are "0", "1", ..."""
    ids = [None]
    for number in range(length):
        answer = create(gateway, str(number), previous_response_id=ids[-1])
        assert answer.status_code == 200, answer.text
        ids.append(answer.json()["id"])
    return ids[1:]


def test_a_long_conversation_keeps_every_turn(scripted):
    ids = chain(scripted, 50)
    assert last_conversation(scripted) == [text for number in range(49) for text in (str(number), "Hello")] + ["49"]
    # From any turn on, as often as one likes.
    assert create(scripted, "else", previous_response_id=ids[1]).status_code == 200
    assert last_conversation(scripted) == ["0", "Hello", "1", "Hello", "else"]


def test_a_conversation_goes_on_without_its_middle(scripted):
    ids = chain(scripted, 5)
    assert scripted.http.delete(f"/v1/responses/{ids[2]}").json()["deleted"]
    assert create(scripted, "and", previous_response_id=ids[4]).status_code == 200
    assert last_conversation(scripted)[4:6] == ["2", "Hello"]
    refused = create(scripted, "and", previous_response_id=ids[2])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "previous_response_id")
    assert f"no response {ids[2]!r} is kept" in refused.json()["error"]["message"]


def test_a_conversation_outlives_its_first_turns_that_made_room():
    with scripted_gateway(max_stored_responses=2) as gateway:
        ids = chain(gateway, 10)
        assert [status_of(gateway, id) for id in ids] == [404] * 8 + [200] * 2
        assert len(last_conversation(gateway)) == 19
        refused = create(gateway, previous_response_id=ids[7])
        assert refused.status_code == 400
        assert "made room for others" in refused.json()["error"]["message"]


def test_two_may_continue_one_response_at_once(scripted):
    [id] = chain(scripted, 1)
    both = threading.Barrier(2)

    def generate(request, context):
        both.wait(WAIT_S)
        yield from hello(request, context)

    scripted.script.generate = generate
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda text: create(scripted, text, previous_response_id=id).json(), ("a", "b")))
    talks = sorted([m.content for m in request.chat.messages] for request in scripted.script.requests[1:])
    assert talks == [["0", "Hello", "a"], ["0", "Hello", "b"]]
    scripted.script.generate = hello
    for text, response in zip(("a", "b"), made, strict=True):
        assert create(scripted, "and", previous_response_id=response["id"]).status_code == 200
        assert last_conversation(scripted) == ["0", "Hello", text, "Hello", "and"]


def refer(gateway, *ids, **headers):
    items = [{"type": "item_reference", "id": id} for id in ids]
    body = {"model": "tiny", "input": [*items, {"role": "user", "content": "and"}]}
    return gateway.http.post("/v1/responses", json=body, headers=headers)


def test_an_item_that_is_kept_may_stand_for_itself(scripted):
    made = create(scripted, [{"role": "user", "content": "hi", "id": "msg_mine"}]).json()
    [answer] = made["output"]
    second = refer(scripted, "msg_mine", answer["id"])
    assert second.status_code == 200, second.text
    assert last_conversation(scripted) == ["hi", "Hello", "and"]
    # And from there again, whatever happens to the first.
    scripted.http.delete(f"/v1/responses/{made['id']}")
    items = scripted.http.get(f"/v1/responses/{second.json()['id']}/input_items?order=asc").json()["data"]
    assert [item["id"] for item in items[:2]] == ["msg_mine", answer["id"]]
    assert refer(scripted, "msg_mine", answer["id"]).status_code == 200


def test_an_item_that_is_gone_or_another_keys_is_not_found(scripted):
    made = create(scripted).json()
    id = made["output"][0]["id"]
    for gone in (refer(scripted, id, authorization="Bearer other"), refer(scripted, "msg_nothing")):
        error = gone.json()["error"]
        assert (gone.status_code, error["param"]) == (404, "input[0]")
    assert "'msg_nothing'" in error["message"]
    scripted.http.delete(f"/v1/responses/{made['id']}")
    assert refer(scripted, id).status_code == 404


def test_who_is_referred_to_is_used():
    with scripted_gateway(max_stored_responses=2) as gateway:
        first, second = create(gateway).json(), create(gateway).json()
        assert refer(gateway, first["output"][0]["id"]).status_code == 200
        assert [status_of(gateway, made["id"]) for made in (first, second)] == [200, 404]


def test_the_tokens_of_what_a_response_would_answer_to_are_counted(scripted):
    made = create(scripted).json()
    scripted.script.unary = lambda _request, _context: model_pb2.TokenizeResponse(token_ids=[1, 2, 3])
    reference = {"type": "item_reference", "id": made["output"][0]["id"]}
    body = {"input": [reference, {"role": "user", "content": "and"}], "instructions": "Be brief."}
    body |= {"previous_response_id": made["id"], "model": "tiny"}
    answer = scripted.http.post("/v1/responses/input_tokens", json=body)
    assert answer.json() == {"object": "response.input_tokens", "input_tokens": 3}
    asked = scripted.script.requests[-1]
    assert asked.model == "tiny"
    assert [message.content for message in asked.chat.messages] == ["Be brief.", "hi", "Hello", "Hello", "and"]
    assert scripted.http.post("/v1/responses/input_tokens", json={"input": "hi", "n": 2}).status_code == 400


# ------------------------------------------------------------------------------------------------------- the room


def test_who_is_continued_or_listed_is_used():
    with scripted_gateway(max_stored_responses=3) as gateway:
        ids = [create(gateway).json()["id"] for _ in range(3)]
        create(gateway, previous_response_id=ids[0], store=False)
        assert gateway.http.get(f"/v1/responses/{ids[1]}/input_items").status_code == 200
        create(gateway)
        assert [status_of(gateway, id) for id in ids] == [200, 200, 404]


def test_large_responses_make_less_room():
    with scripted_gateway(max_stored_bytes=19_500) as gateway:
        small = [create(gateway).json()["id"] for _ in range(3)]
        assert [status_of(gateway, id) for id in small] == [200] * 3
        large = create(gateway, "x" * 18_000).json()["id"]
        assert [status_of(gateway, id) for id in (*small, large)] == [404] * 3 + [200]


def test_what_runs_is_never_put_out():
    with scripted_gateway(max_stored_responses=1) as gateway:
        gateway.script.generate = silent
        runs = create(gateway, background=True).json()["id"]
        gateway.script.generate = hello
        done = create(gateway).json()["id"]
        assert [status_of(gateway, id) for id in (runs, done)] == [200, 404]
        gateway.http.post(f"/v1/responses/{runs}/cancel")
        done = create(gateway).json()["id"]
        assert [status_of(gateway, id) for id in (runs, done)] == [404, 200]


def test_a_streamed_response_is_there_when_it_has_ended_and_not_before(scripted):
    go_on = hold_after_start(scripted)
    body = {"model": "tiny", "input": "hi", "stream": True}
    with scripted.http.stream("POST", "/v1/responses", json=body) as answer:
        lines = answer.iter_lines()
        first = json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))
        url = f"{scripted.url}/v1/responses/{first['response']['id']}"
        for method, path in (("GET", url), ("DELETE", url), ("POST", f"{url}/cancel")):
            refused = httpx.request(method, path)
            assert refused.status_code == 404
            assert "has not ended" in refused.json()["error"]["message"]
        go_on.set()
        assert any("response.completed" in line for line in lines)
    assert scripted.http.get(url).json()["status"] == "completed"


def test_a_streamed_response_that_nobody_read_to_its_end_is_not_kept(scripted):
    scripted.script.generate = silent
    body = {"model": "tiny", "input": "hi", "stream": True}
    with scripted.http.stream("POST", "/v1/responses", json=body) as answer:
        line = next(line for line in answer.iter_lines() if line.startswith("data: "))
        id = json.loads(line.removeprefix("data: "))["response"]["id"]
    assert scripted.script.ended.wait(WAIT_S)
    assert status_of(scripted, id) == 404
