"""The live view's data: who may read it, what is in it, and how it ends."""

import json
import re
import threading

import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from nanoserve_client.v1 import admin_pb2
from nanoserve_gateway import live
from scripted_gateway import scripted_gateway
from servers import ADMIN, USERS

FILES = ("/", "/live/style.css", "/live/page.js", "/live/draw.js")
TIMEOUT_S = 30


def events(lines):
    """(event, value) of each server-sent event."""
    name = None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def endless(_request, context):
    while context.is_active():
        yield admin_pb2.WatchEngineResponse(stats=admin_pb2.GetStatsResponse(running=7, uptime=Duration(seconds=1)))


# ------------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize("path", FILES)
def test_the_page_needs_nothing_from_elsewhere(scripted, path):
    answer = scripted.http.get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.[\w/.-]+", answer.text)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", answer.text)
    assert not scripted.script.requests


def test_every_file_that_the_page_names_is_served(scripted):
    named = set(re.findall(r'"(/live/[\w.]+\.(?:js|css))"', "".join(scripted.http.get(path).text for path in FILES)))
    assert named == set(FILES) - {"/"}


# ------------------------------------------------------------------------------------------------- who may read


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({}, True),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
    ],
)
@pytest.mark.parametrize("path", ["/live/events", "/live/explain?id=x"])
def test_no_other_page_may_read_it_whoever_may_call_the_api(headers, may, path):
    with scripted_gateway(cors_origins=("*",)) as gateway:
        gateway.script.watch = endless
        gateway.script.unary = lambda _request, _context: admin_pb2.ExplainRequestResponse(
            timelines=[admin_pb2.RequestTimeline()]
        )
        with gateway.http.stream("GET", path, headers=headers) as answer:
            assert answer.status_code == (200 if may else 403)
        assert bool(gateway.script.requests) == may


def test_the_page_itself_sends_an_origin_of_its_own(scripted):
    scripted.script.watch = endless
    with scripted.http.stream("GET", "/live/events", headers={"origin": scripted.url}) as answer:
        assert answer.status_code == 200


def test_with_keys_it_takes_an_admin_key(guarded):
    with httpx.Client(base_url=guarded.url, timeout=TIMEOUT_S) as http:
        for path in ("/live/events", "/live/explain?id=x"):
            for key, status in ((None, 401), ("wrong", 401), (USERS[0], 403), ("b\xe4d", 401)):
                headers = {} if key is None else {"authorization": f"Bearer {key}".encode("latin-1")}
                answer = http.get(path, headers=headers)
                assert answer.status_code == status
                assert set(answer.json()) == {"error"}
        admin = {"authorization": f"Bearer {ADMIN}"}
        assert http.get("/live/explain?id=x", headers=admin).status_code == 404
        with http.stream("GET", "/live/events", headers=admin) as answer:
            assert answer.status_code == 200
            name, value = next(events(answer.iter_lines()))
        assert name == "snapshot"
        assert value["stats"]["blocks"] > 0
        # Anyone may load the page, which tells nothing.
        assert http.get("/").status_code == 200


# --------------------------------------------------------------------------------------------------- what is in it


def test_a_request_shows_in_the_events_without_its_text(served):
    prompt = "Xylophones quarrel behind Zanzibar"
    body = {"model": "nanoserve-builtin", "prompt": prompt, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=served.url, timeout=TIMEOUT_S) as http:
        done = threading.Event()

        def generate():
            with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "mine"}) as answer:
                for _ in answer.iter_lines():
                    if done.is_set():
                        return

        thread = threading.Thread(target=generate)
        with http.stream("GET", "/live/events") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-cache"
            lines = []
            incoming = events(line for line in answer.iter_lines() if lines.append(line) or True)
            assert next(incoming)[0] == "snapshot"
            thread.start()
            for _, value in incoming:
                mine = [each for each in value["sequences"] if each["id"] == "mine" and each["phase"] == "decode"]
                if mine and any(part[0] == mine[0]["number"] for step in value["steps"] for part in step["parts"]):
                    break
        done.set()
        thread.join(TIMEOUT_S)
        assert mine[0]["blocks"]
        everything = "".join(lines) + http.get("/live/explain?id=mine").text
        assert "prefilled" in everything
        assert "Xylo" not in everything
        assert "Zanzibar" not in everything
        assert http.get("/live/explain?id=mine").json()["timelines"][0]["id"] == "mine"
        missing = http.get("/live/explain?id=unknown")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
        assert http.get("/live/explain").status_code == 400


def test_guesses_are_in_the_events(scripted):
    part = admin_pb2.StepPart(
        request_number=4, index=1, start=11, tokens=1, sampled=True, draft_tokens=3, accepted_draft_tokens=2
    )
    snapshot = admin_pb2.WatchEngineResponse(
        stats=admin_pb2.GetStatsResponse(draft_acceptance_ratio=0.75), steps=[admin_pb2.StepSnapshot(parts=[part])]
    )
    scripted.script.watch = lambda _request, _context: iter([snapshot])
    with scripted.http.stream("GET", "/live/events") as answer:
        _, value = next(events(answer.iter_lines()))
    assert value["stats"]["acceptance_ratio"] == 0.75
    assert value["steps"][0]["parts"] == [[4, 1, 11, 1, 0, 3, 2]]


def test_a_reader_who_leaves_ends_the_watch(scripted):
    scripted.script.watch = endless
    with scripted.http.stream("GET", "/live/events") as answer:
        assert next(events(answer.iter_lines()))[1]["stats"]["running"] == 7
    assert scripted.script.ended.wait(TIMEOUT_S)


def test_when_the_server_goes_the_last_event_says_so(scripted):
    scripted.script.watch = endless
    with scripted.http.stream("GET", "/live/events") as answer:
        incoming = events(answer.iter_lines())
        next(incoming)
        threading.Thread(target=scripted.stop_server).start()
        last = list(incoming)[-1]
    assert last[0] == "problem"
    assert last[1]["error"]["message"]


def test_a_server_that_is_not_there_is_a_status(scripted):
    scripted.stop_server()
    assert scripted.http.get("/live/events").status_code == 503


def test_ids_become_ranges():
    assert list(live._ranges(())) == []
    assert list(live._ranges((5,))) == [(5, 1)]
    assert list(live._ranges((0, 1, 2, 5, 7, 8))) == [(0, 3), (5, 1), (7, 2)]


def test_a_sequence_names_its_adapter(scripted):
    def watch(_request, _context):
        sequences = [admin_pb2.SequenceSnapshot(request_id="mine", adapter=name) for name in ("pirate", "")]
        yield admin_pb2.WatchEngineResponse(sequences=sequences)
        threading.Event().wait(0.1)

    scripted.script.watch = watch
    with scripted.http.stream("GET", "/live/events") as answer:
        name, value = next(events(answer.iter_lines()))
    assert name == "snapshot"
    assert [each["adapter"] for each in value["sequences"]] == ["pirate", ""]
