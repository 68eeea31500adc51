"""Log lines: one for each RPC at its end, with its ids, for people and for programs, and never what was said."""

import json
import logging

import pytest
from engine_bench import PROMPT
from nanoserve_client import NanoserveError
from watched_server import until, watched

from nanoserve.observability import logs
from nanoserve.observability.access_log import AccessLog

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


class Lines(logging.Handler):
    """What a dressed handler would write."""

    def __init__(self, log_format):
        super().__init__()
        logs.dress(self, log_format, "%(message)s")
        self.all = []

    def emit(self, record):
        self.all.append(self.format(record))


@pytest.fixture
def lines(request):
    handler, logger = Lines(request.param), logging.getLogger("nanoserve")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.all
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("lines", ["json"], indirect=True)
async def test_one_object_for_each_request(lines):
    async with watched(AccessLog()) as (bench, client):
        await client.generate("secret", max_tokens=3, request_id="mine", traceparent=TRACEPARENT).result()
        with pytest.raises(NanoserveError):
            await client.generate("secret", temperature=-1, request_id="wrong").result()
        bench.executor.gate.clear()
        stream = client.generate("secret", request_id="left")
        await until(lambda: bench.engine._streams)
        stream.cancel()
        await until(lambda: len(lines) == 3)
        bench.executor.gate.set()
    good, wrong, left = map(json.loads, lines)
    assert {
        "level": "INFO",
        "rpc": "Generate",
        "code": "OK",
        "request_id": "mine",
        "trace_id": TRACE_ID,
        "phase": "running",
        "prompt_tokens": 6,
        "completion_tokens": 3,
        "finish_reasons": "length",
    }.items() <= good.items()
    assert good["seconds"] >= good["queue_s"] + good["prefill_s"] + good["decode_s"] - 1e-5
    assert (wrong["code"], wrong["reason"], wrong["request_id"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "wrong")
    assert (left["code"], left["phase"], left["request_id"]) == ("CANCELLED", "waiting", "left")
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize("lines", ["human"], indirect=True)
async def test_one_line_for_each_request(lines):
    async with watched(AccessLog()) as (_, client):
        await client.generate(PROMPT, max_tokens=3, request_id="mine", traceparent=TRACEPARENT).result()
        await until(lambda: lines)
    [line] = lines
    assert line.startswith("rpc=Generate code=OK seconds=0.")
    assert line.endswith(f" request_id=mine trace_id={TRACE_ID}")


@pytest.mark.parametrize("lines", ["json"], indirect=True)
async def test_what_is_logged_on_the_way_has_the_ids_too(lines, monkeypatch):
    async with watched(AccessLog()) as (bench, client):
        monkeypatch.setattr(bench.engine, "generate", None)
        with pytest.raises(NanoserveError):
            await client.generate(PROMPT, request_id="mine", traceparent=TRACEPARENT).result()
        await until(lambda: len(lines) == 2)
    unexpected = json.loads(lines[0])
    assert (unexpected["level"], unexpected["request_id"], unexpected["trace_id"]) == ("ERROR", "mine", TRACE_ID)
    assert "TypeError" in unexpected["exception"]


@pytest.mark.parametrize("lines", ["human"], indirect=True)
async def test_other_lines_have_no_ids(lines):
    logging.getLogger("nanoserve.other").info("started")
    assert lines == ["started"]
