"""Both clients and adapters: requests that name one, and the operator's calls."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from nanoserve_client import AdapterResidency, NanoserveError
from nanoserve_client.v1 import admin_pb2, model_pb2
from nanoserve_client.v1 import generation_pb2 as pb
from scripted_server import delta, finished, started

PIRATE = admin_pb2.Adapter(
    name="pirate",
    revision="abc",
    path="/adapters/pirate",
    rank=8,
    bytes=4096,
    residency=admin_pb2.ADAPTER_RESIDENCY_HOST,
    pinned=True,
    running=1,
    waiting=2,
)


async def test_a_request_names_an_adapter_and_its_result_says_which_revision(face, server):
    def generate(request, _context):
        yield started(adapter=request.adapter, adapter_revision="abc")
        yield delta(text="Arr", token_ids=(1,), finish_reason=pb.FINISH_REASON_EOS)
        yield finished(1)

    server.script.generate = generate
    client = face.connect(server.target)
    for send in (client.chat, client.generate):
        result = await face.call(send("Hello", adapter="pirate").result)
        assert (result.started.model, result.started.adapter, result.started.adapter_revision) == (
            "tiny",
            "pirate",
            "abc",
        )
    result = await face.call(client.chat("Hello").result)
    assert result.started.adapter == ""
    assert [request.adapter for request in server.script.requests] == ["pirate", "pirate", ""]


async def test_adapters_are_among_the_models(face, server):
    models = [model_pb2.Model(name="tiny"), model_pb2.Model(name="pirate", base_model="tiny", lora_rank=8)]
    server.script.unary = lambda _request, _context: model_pb2.ListModelsResponse(models=models)
    listed = await face.call(face.connect(server.target).list_models)
    assert [(each.name, each.base_model, each.lora_rank) for each in listed] == [("tiny", "", 0), ("pirate", "tiny", 8)]


async def test_load(face, server):
    server.script.unary = lambda _request, _context: admin_pb2.LoadAdapterResponse(adapter=PIRATE)
    client = face.connect(server.target, api_key="admin")
    loaded = await face.call(client.load_adapter, "pirate", "v2", pinned=True, replace=True, request_id="mine")
    assert (loaded.name, loaded.revision, loaded.path, loaded.rank) == ("pirate", "abc", "/adapters/pirate", 8)
    assert (loaded.bytes, loaded.pinned, loaded.running, loaded.waiting) == (4096, True, 1, 2)
    assert loaded.residency is AdapterResidency.HOST
    await face.call(client.load_adapter, "pirate")
    assert server.script.requests == [
        admin_pb2.LoadAdapterRequest(name="pirate", path="v2", pinned=True, replace=True),
        admin_pb2.LoadAdapterRequest(name="pirate"),
    ]
    assert server.script.metadata[0]["x-request-id"] == "mine"
    assert server.script.metadata[0]["authorization"] == "Bearer admin"


async def test_unload(face, server):
    server.script.unary = lambda _request, _context: admin_pb2.UnloadAdapterResponse()
    client = face.connect(server.target)
    assert await face.call(client.unload_adapter, "pirate") is None
    await face.call(client.unload_adapter, "pirate", drain_timeout=0.5)
    await face.call(client.unload_adapter, "pirate", drain_timeout=0)
    assert server.script.requests == [
        admin_pb2.UnloadAdapterRequest(name="pirate"),
        admin_pb2.UnloadAdapterRequest(name="pirate", drain_timeout=Duration(nanos=500_000_000)),
        admin_pb2.UnloadAdapterRequest(name="pirate", drain_timeout=Duration()),
    ]


async def test_list(face, server):
    later = admin_pb2.Adapter(name="later", residency=99)  # type: ignore[arg-type]
    server.script.unary = lambda _request, _context: admin_pb2.ListAdaptersResponse(
        adapters=[later, PIRATE], memory_bytes=4096, memory_limit_bytes=2**31, slots=16
    )
    listed = await face.call(face.connect(server.target).list_adapters)
    assert [each.name for each in listed.adapters] == ["later", "pirate"]
    assert [each.residency for each in listed.adapters] == [AdapterResidency.UNKNOWN, AdapterResidency.HOST]
    assert (listed.memory_bytes, listed.memory_limit_bytes, listed.slots) == (4096, 2**31, 16)


async def test_a_name_that_is_taken(face, server):
    def refuse(_request, context):
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it has other weights")

    server.script.unary = refuse
    with pytest.raises(NanoserveError, match="it has other weights") as caught:
        await face.call(face.connect(server.target).load_adapter, "pirate")
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
