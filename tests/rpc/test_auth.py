"""Who may call: API keys, TLS and mTLS, and what an operator reads when a file is bad."""

import hashlib

import grpc
import pytest
from authority import Authority
from failure import failure
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from nanoserve_client.v1 import admin_pb2, generation_pb2_grpc, model_pb2
from nanoserve_client.v1 import generation_pb2 as pb

from nanoserve.config import ConfigError, ServerConfig
from nanoserve.observer import Observer, Observers
from nanoserve.rpc.server import Server

OK, UNAUTHENTICATED, DENIED = "OK", "UNAUTHENTICATED", "PERMISSION_DENIED"


@pytest.fixture
async def serve():
    """Starts servers; returns the port of each."""
    servers = []

    async def start(**config) -> int:
        server = Server(ServerConfig(grpc_port=0, **config), FakeEngine())
        servers.append(server)
        return await server.start()

    yield start
    for server in servers:
        await server.stop()


@pytest.fixture
def key_files(tmp_path):
    ordinary, admin = tmp_path / "keys", tmp_path / "admin-keys"
    ordinary.write_text("# people\nalice-key\n\n  bob-key  # until June\n")
    admin.write_text("admin-key\n")
    return {"api_keys": ordinary, "admin_keys": admin}


async def call(channel, service: str, authorization: str | None) -> str:
    """The status that a call of one method of the service gets."""
    metadata = (("authorization", authorization),) if authorization is not None else ()
    try:
        if service == "generation":
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            async for _ in stub.Generate(pb.GenerateRequest(text="x"), metadata=metadata):
                pass
        elif service == "model":
            method = channel.unary_unary("/nanoserve.v1.ModelService/ListModels")
            await method(model_pb2.ListModelsRequest().SerializeToString(), metadata=metadata)
        elif service == "admin":
            method = channel.unary_unary("/nanoserve.v1.AdminService/GetStats")
            await method(admin_pb2.GetStatsRequest().SerializeToString(), metadata=metadata)
        elif service == "health":
            stub = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest(), metadata=metadata)
        else:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
            async for _ in stub.ServerReflectionInfo(iter(asked), metadata=metadata):
                pass
    except grpc.aio.AioRpcError as error:
        return failure(error).reason
    return OK


@pytest.mark.parametrize("files", [(), ("api_keys",), ("admin_keys",), ("api_keys", "admin_keys")])
@pytest.mark.parametrize(
    ("authorization", "who"),
    [
        (None, "nobody"),
        ("Bearer alice-key", "ordinary"),
        ("bearer bob-key", "ordinary"),
        ("Bearer admin-key", "admin"),
        ("Bearer mallory-key", "nobody"),
        ("Bearer alice-ke", "nobody"),
        ("Bearer ", "nobody"),
        ("Basic alice-key", "nobody"),
        ("alice-key", "nobody"),
        ("Bearer # people", "nobody"),
    ],
)
async def test_the_matrix_of_keys_and_services(serve, key_files, files, authorization, who):
    port = await serve(**{name: key_files[name] for name in files})
    # A key of a file that was not given is nobody's.
    if (who == "ordinary" and "api_keys" not in files) or (who == "admin" and "admin_keys" not in files):
        who = "nobody"
    data = OK if who != "nobody" or "api_keys" not in files else UNAUTHENTICATED
    admin = {"nobody": UNAUTHENTICATED, "ordinary": DENIED, "admin": OK}[who] if files else OK
    expected = {"generation": data, "model": data, "admin": admin, "health": OK, "reflection": OK}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert {service: await call(channel, service, authorization) for service in expected} == expected


async def test_a_refusal_is_dressed_and_reads_no_message(serve, key_files):
    port = await serve(**key_files)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream = channel.stream_stream("/nanoserve.v1.GenerationService/Generate")(
            metadata=(("x-request-id", "r-1"),), timeout=20
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # without ever writing a request
            await stream.read()
    refusal = failure(caught.value)
    assert refusal.code == grpc.StatusCode.UNAUTHENTICATED
    assert refusal.details["RequestInfo"].request_id == "r-1"
    assert refusal.initial_metadata == {}


async def test_a_method_that_does_not_exist_needs_a_key_too(serve, key_files):
    port = await serve(**key_files)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/nanoserve.v1.AdminService/Nothing")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"")
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"", metadata=(("authorization", "Bearer admin-key"),))
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_refused_call_is_told_to_observers_with_a_method_that_there_is(key_files):
    """Metrics make labels of methods: callers without a key must not invent them."""
    told = []
    observer = Observer()
    observer.call_ended = lambda call: told.append((call.method, call.code))
    server = Server(ServerConfig(grpc_port=0, **key_files), FakeEngine(), observers=Observers(observer))
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in ("AdminService/GetStats", "AdminService/Nothing", "Nobody/Knows"):
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(f"/nanoserve.v1.{method}")(b"")
    await server.stop()
    assert told == [
        ("nanoserve.v1.AdminService/GetStats", UNAUTHENTICATED),
        ("_OTHER", UNAUTHENTICATED),
        ("_OTHER", UNAUTHENTICATED),
    ]


async def test_the_engine_sees_a_digest_of_the_key_alone(key_files):
    engine = FakeEngine()
    server = Server(ServerConfig(grpc_port=0, **key_files), engine)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await call(channel, "generation", "Bearer alice-key") == OK
    await server.stop()
    assert engine.calls[0]["cache_salt"] == hashlib.sha256(b"alice-key").hexdigest() + ":"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "has no key"),
        ("# only comments\n", "has no key"),
        ("good\ntwo words\n", "line 2"),
        ("clé\n", "line 1"),
    ],
)
async def test_a_bad_key_file_stops_the_start_with_one_line(tmp_path, content, message):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Server(ServerConfig(grpc_port=0, api_keys=path), FakeEngine())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "two words" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- TLS


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path, "good")


async def status_over_tls(port: int, root, client=None) -> str:
    pems = [path.read_bytes() for path in reversed(client)] if client else [None, None]
    credentials = grpc.ssl_channel_credentials(root.read_bytes(), *pems)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        try:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return OK


async def test_tls_serves_those_who_trust_the_certificate(serve, authority, tmp_path):
    cert, key = authority.issue("server")
    port = await serve(tls_cert=cert, tls_key=key)
    assert await status_over_tls(port, authority.ca) == OK
    assert await status_over_tls(port, Authority(tmp_path, "evil").ca) == "UNAVAILABLE"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_mtls_serves_only_certificates_of_the_client_ca(serve, authority, tmp_path):
    evil = Authority(tmp_path, "evil")
    cert, key = authority.issue("server")
    port = await serve(tls_cert=cert, tls_key=key, tls_client_ca=authority.ca)
    assert await status_over_tls(port, authority.ca, authority.issue("client")) == OK
    assert await status_over_tls(port, authority.ca) == "UNAVAILABLE"
    assert await status_over_tls(port, authority.ca, evil.issue("client")) == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("no key", "--tls-cert and --tls-key go together"),
        ("no cert", "--tls-cert and --tls-key go together"),
        ("ca alone", "--tls-client-ca needs --tls-cert and --tls-key"),
        ("missing cert", "No such file"),
        ("missing ca", "No such file"),
        ("garbage cert", "do not work"),
        ("garbage key", "do not work"),
        ("garbage ca", "does not work"),
        ("foreign key", "do not work"),
        ("encrypted key", "do not work"),
    ],
)
async def test_bad_tls_files_stop_the_start_with_one_line(authority, tmp_path, broken, message):
    cert, key = authority.issue("server")
    encrypted = authority.issue("secret", b"password")
    garbage, missing = tmp_path / "garbage", tmp_path / "missing"
    garbage.write_text("garbage")
    files = {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.ca}
    files |= {
        "no key": {"tls_key": None},
        "no cert": {"tls_cert": None},
        "ca alone": {"tls_cert": None, "tls_key": None},
        "missing cert": {"tls_cert": missing},
        "missing ca": {"tls_client_ca": missing},
        "garbage cert": {"tls_cert": garbage},
        "garbage key": {"tls_key": garbage},
        "garbage ca": {"tls_client_ca": garbage},
        "foreign key": {"tls_key": authority.issue("other")[1]},
        "encrypted key": {"tls_cert": encrypted[0], "tls_key": encrypted[1]},
    }[broken]
    with pytest.raises(ConfigError, match=message) as caught:
        Server(ServerConfig(grpc_port=0, **files), FakeEngine())
    assert "\n" not in str(caught.value)
