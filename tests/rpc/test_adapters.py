"""Adapters over a channel: requests that name one, and the operator's calls."""

import grpc
import pytest
from fake_engine import FakeEngine
from nanoserve_client.v1 import admin_pb2, admin_pb2_grpc, model_pb2
from nanoserve_client.v1 import generation_pb2 as pb

from nanoserve.adapter.folders import NAME_RULE
from nanoserve.config import ServerConfig
from nanoserve.errors import AdapterInUse, AdapterInvalid, AdapterMemoryFull
from nanoserve.rpc.server import Server

NO_NAMES = [
    "",
    "../x",
    "a/../b",
    "/etc",
    "a/",
    "a//b",
    ".hidden",
    "a\nb",
    "a\x00",
    "a\x1b[2J",
    "tenant a",
    "é",
    "x" * 129,
]


@pytest.fixture
async def adapters(served):
    """A server with one adapter in memory, and one on the disk."""
    await served.engine.load_adapter("pirate")
    served.engine.adapter_names["team/german"] = None
    return served


async def started(call) -> pb.Started:
    events = [event async for event in call]
    return events[0].started


# ------------------------------------------------------------------------------------------------ Generate


@pytest.mark.parametrize(
    "named",
    [
        {"adapter": "pirate"},
        {"model": "pirate"},
        {"model": "fake", "adapter": "pirate"},
        {"model": "pirate", "adapter": "pirate"},
    ],
    ids=str,
)
async def test_an_adapter_is_named_by_adapter_or_by_model(adapters, named):
    begin = await started(adapters.generation.Generate(pb.GenerateRequest(text="hi", **named)))
    assert (begin.model, begin.adapter, begin.adapter_revision) == ("fake", "pirate", "digest-of-pirate")
    assert adapters.engine.calls[-1]["adapter"] == "pirate"


@pytest.mark.parametrize("named", [{}, {"model": "fake"}], ids=str)
async def test_a_request_that_names_none_gets_the_model_as_it_is(adapters, named):
    begin = await started(adapters.generation.Generate(pb.GenerateRequest(text="hi", **named)))
    assert (begin.model, begin.adapter, begin.adapter_revision) == ("fake", "", "")
    assert adapters.engine.calls[-1]["adapter"] == ""


async def test_an_adapter_on_the_disk_can_be_asked_for(adapters):
    begin = await started(adapters.generation.Generate(pb.GenerateRequest(text="hi", model="team/german")))
    assert (begin.adapter, begin.adapter_revision) == ("team/german", "digest-of-the-disk")


async def test_two_different_adapters_are_refused_by_field(adapters, failure_of):
    request = pb.GenerateRequest(text="hi", model="pirate", adapter="team/german", n=0)
    failure = await failure_of(adapters.generation.Generate(request))
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
    assert failure.violations["adapter"] == "must be that of `model`, 'pirate', which is an adapter too"
    assert "n" in failure.violations
    assert not adapters.engine.calls


async def test_an_unknown_adapter_is_not_found_and_the_error_says_what_to_do(adapters, failure_of):
    failure = await failure_of(adapters.generation.Generate(pb.GenerateRequest(text="hi", adapter="english")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert "'english'" in failure.message
    assert "ListModels" in failure.message
    resource = failure.details["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("adapter", "english")
    # What other tenants are called is not everybody's business.
    assert "pirate" not in failure.message


async def test_an_unknown_model_is_not_taken_for_an_adapter(adapters, failure_of):
    failure = await failure_of(adapters.generation.Generate(pb.GenerateRequest(text="hi", model="english")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert failure.message == "model 'english' is not served; served: fake; ListModels names adapters too"


@pytest.mark.parametrize("name", [*NO_NAMES[1:], "x" * 2**20], ids=lambda name: repr(name[:20]))
async def test_what_no_adapter_can_be_called_is_refused_before_the_engine_hears_of_it(adapters, failure_of, name):
    failure = await failure_of(adapters.generation.Generate(pb.GenerateRequest(text="hi", adapter=name)))
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT
    assert failure.violations["adapter"].endswith(NAME_RULE)
    assert not adapters.engine.calls


# ------------------------------------------------------------------------------------------------- models


async def test_adapters_are_listed_behind_their_model(adapters):
    model, *listed = (await adapters.model.ListModels(model_pb2.ListModelsRequest())).models
    assert (model.name, model.base_model, model.lora_rank) == ("fake", "", 0)
    assert [(each.name, each.base_model, each.lora_rank) for each in listed] == [
        ("pirate", "fake", 8),
        ("team/german", "fake", 0),
    ]
    assert {each.max_context_tokens for each in listed} == {model.max_context_tokens}


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Tokenize", model_pb2.TokenizeRequest(text="hi")),
        ("Detokenize", model_pb2.DetokenizeRequest(token_ids=[104])),
        ("CheckConstraint", model_pb2.CheckConstraintRequest(constraint=pb.Constraint(regex="a"))),
    ],
)
async def test_every_call_with_a_model_takes_the_name_of_an_adapter(adapters, failure_of, method, request_):
    call = getattr(adapters.model, method)
    usual = await call(request_)
    request_.model = "pirate"
    answer = await call(request_)
    if method != "CheckConstraint":  # it tells times
        assert answer == usual
    request_.model = "english"
    assert (await failure_of(call(request_))).reason == "MODEL_NOT_FOUND"


# --------------------------------------------------------------------------------------------- the operator


async def test_an_adapter_is_loaded_listed_and_unloaded(served, failure_of):
    request = admin_pb2.LoadAdapterRequest(name="pirate", path="v1", pinned=True)
    loaded = (await served.admin.LoadAdapter(request)).adapter
    assert loaded == admin_pb2.Adapter(
        name="pirate",
        revision="digest-of-v1",
        path="/adapters/v1",
        rank=8,
        bytes=4096,
        residency=admin_pb2.ADAPTER_RESIDENCY_ACTIVE,
        pinned=True,
        running=0,
        waiting=2,
    )
    listed = await served.admin.ListAdapters(admin_pb2.ListAdaptersRequest())
    assert list(listed.adapters) == [loaded]
    assert (listed.memory_bytes, listed.memory_limit_bytes, listed.slots) == (4096, 2**20, 16)
    await served.admin.UnloadAdapter(admin_pb2.UnloadAdapterRequest(name="pirate"))
    assert served.engine.unloads == [("pirate", 30.0)]
    failure = await failure_of(served.generation.Generate(pb.GenerateRequest(text="hi", adapter="pirate")))
    assert failure.reason == "ADAPTER_NOT_FOUND"


async def test_other_weights_of_a_name_need_replace(served, failure_of):
    await served.admin.LoadAdapter(admin_pb2.LoadAdapterRequest(name="pirate", path="v1"))
    request = admin_pb2.LoadAdapterRequest(name="pirate", path="v2")
    failure = await failure_of(served.admin.LoadAdapter(request))
    assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_IN_USE")
    request.replace = True
    assert (await served.admin.LoadAdapter(request)).adapter.revision == "digest-of-v2"


async def test_an_adapter_that_is_unloaded_while_it_is_told_of_was_loaded_all_the_same(served):
    load = served.engine.load_adapter

    async def load_and_lose(name, path="", **options):
        info = await load(name, path, **options)
        await served.engine.unload_adapter(name, 0)
        return info

    served.engine.load_adapter = load_and_lose
    loaded = (await served.admin.LoadAdapter(admin_pb2.LoadAdapterRequest(name="pirate"))).adapter
    assert (loaded.name, loaded.residency) == ("pirate", admin_pb2.ADAPTER_RESIDENCY_HOST)


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: repr(name[:20]))
@pytest.mark.parametrize("method", ["LoadAdapter", "UnloadAdapter"])
async def test_a_name_that_none_can_have_is_refused(served, failure_of, method, name):
    request = getattr(admin_pb2, f"{method}Request")(name=name)
    failure = await failure_of(getattr(served.admin, method)(request))
    assert failure.violations["name"].endswith(NAME_RULE)
    assert not served.engine.adapter_names


async def test_an_adapter_cannot_be_called_like_the_model(served, failure_of):
    failure = await failure_of(served.admin.LoadAdapter(admin_pb2.LoadAdapterRequest(name="fake")))
    assert failure.violations == {"name": "'fake' is the model's own name; an adapter needs another"}


@pytest.mark.parametrize("path", ["a\x00b", "a\nb", "x" * 5000], ids=lambda path: repr(path[:20]))
async def test_a_path_that_none_can_have_is_refused(served, failure_of, path):
    failure = await failure_of(served.admin.LoadAdapter(admin_pb2.LoadAdapterRequest(name="a", path=path)))
    assert list(failure.violations) == ["path"]


async def test_how_long_requests_may_take_has_a_range(served, failure_of):
    await served.engine.load_adapter("a")
    for seconds in (-1, 3601):
        request = admin_pb2.UnloadAdapterRequest(name="a")
        request.drain_timeout.FromSeconds(seconds)
        failure = await failure_of(served.admin.UnloadAdapter(request))
        assert failure.violations == {"drain_timeout": f"{seconds} is not allowed; allowed: 0 to 3600"}
    request.drain_timeout.FromMilliseconds(250)
    await served.admin.UnloadAdapter(request)
    assert served.engine.unloads == [("a", 0.25)]


async def test_unknown_names_are_not_found(served, failure_of):
    failure = await failure_of(served.admin.UnloadAdapter(admin_pb2.UnloadAdapterRequest(name="a")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    failure = await failure_of(served.admin.LoadAdapter(admin_pb2.LoadAdapterRequest(name="a", path="gone")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdapterInvalid("a", [f"tensor {i}: has NaN" for i in range(3)]), grpc.StatusCode.INVALID_ARGUMENT),
        (AdapterInUse("a", "is in use"), grpc.StatusCode.FAILED_PRECONDITION),
        (AdapterMemoryFull("a", 2, 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=lambda value: getattr(value, "reason", None),
)
async def test_what_the_engine_refuses_is_told(served, failure_of, error, code):
    async def refuse(*_arguments, **_options):
        raise error

    served.engine.load_adapter = refuse
    failure = await failure_of(served.admin.LoadAdapter(admin_pb2.LoadAdapterRequest(name="a")))
    assert (failure.code, failure.reason) == (code, error.reason)
    assert failure.details["ErrorInfo"].metadata["adapter"] == "a"
    if error.reason == "ADAPTER_INVALID":
        assert failure.details["ErrorInfo"].metadata["violations"] == "3"


# ------------------------------------------------------------------------------------------------ who may


@pytest.mark.parametrize("has_admin_keys", [False, True])
@pytest.mark.parametrize("method", ["LoadAdapter", "UnloadAdapter", "ListAdapters"])
async def test_only_an_admin_key_opens_the_operators_calls(tmp_path, failure_of, method, has_admin_keys):
    """With keys of callers but none of operators, nobody may."""
    ordinary, admin = tmp_path / "keys", tmp_path / "admin-keys"
    ordinary.write_text("alice-key\n")
    admin.write_text("admin-key\n")
    engine = FakeEngine()
    await engine.load_adapter("a")
    server = Server(ServerConfig(grpc_port=0, api_keys=ordinary, admin_keys=admin if has_admin_keys else None), engine)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = getattr(admin_pb2_grpc.AdminServiceStub(channel), method)
        request = getattr(admin_pb2, f"{method}Request")()
        if method != "ListAdapters":
            request.name = "a"

        async def reason(key: str | None) -> str:
            metadata = () if key is None else (("authorization", f"Bearer {key}"),)
            return (await failure_of(call(request, metadata=metadata))).reason

        assert await reason(None) == "UNAUTHENTICATED"
        assert await reason("alice-key") == "PERMISSION_DENIED"
        assert not engine.unloads
        if has_admin_keys:
            await call(request, metadata=(("authorization", "Bearer admin-key"),))
        else:
            assert await reason("admin-key") == "UNAUTHENTICATED"
    await server.stop()
