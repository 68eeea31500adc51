"""`nanoserve adapters`, and --adapter of the commands that make requests."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import pytest
from nanoserve_client.v1 import admin_pb2, model_pb2
from scripted_server import RichStatus, Script

ADAPTERS = admin_pb2.ListAdaptersResponse(
    adapters=[
        admin_pb2.Adapter(
            name="pirate",
            revision="0123456789abcdef",
            path="/adapters/pirate",
            rank=8,
            bytes=3 << 20,
            residency=admin_pb2.ADAPTER_RESIDENCY_ACTIVE,
            pinned=True,
            running=12,
            waiting=3,
        ),
        admin_pb2.Adapter(
            name="german", revision="fedcba9876543210", rank=16, bytes=1024, residency=admin_pb2.ADAPTER_RESIDENCY_DISK
        ),
    ],
    memory_bytes=3 << 20,
    memory_limit_bytes=2 << 30,
    slots=16,
)
MODELS = model_pb2.ListModelsResponse(
    models=[
        model_pb2.Model(name="tiny"),
        *(model_pb2.Model(name=name, base_model="tiny") for name in ("german", "new", "pirate")),
    ]
)


def answer(request, _context):
    match request:
        case model_pb2.ListModelsRequest():
            return MODELS
        case admin_pb2.ListAdaptersRequest():
            return ADAPTERS
        case admin_pb2.LoadAdapterRequest():
            return admin_pb2.LoadAdapterResponse(adapter=ADAPTERS.adapters[0])
        case admin_pb2.UnloadAdapterRequest():
            return admin_pb2.UnloadAdapterResponse()


@dataclass
class Scripted:
    target: str
    script: Script

    @property
    def asked(self):
        """What it was asked for besides its models, which every command looks at first."""
        return [each for each in self.script.requests if not isinstance(each, model_pb2.ListModelsRequest)]


@pytest.fixture
def server():
    script = Script(unary=answer)
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
    script.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Scripted(f"127.0.0.1:{port}", script)
    server.stop(grace=None).wait()


@pytest.fixture
def adapters(command, server):
    return lambda *arguments: command("adapters", *arguments, "--target", server.target)


# --------------------------------------------------------------------------------------------- the operator's


def test_list_shows_all_with_those_that_nobody_asked_for(adapters):
    done = adapters("list")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "NAME    WHERE           RANK  MEMORY  RUNNING  WAITING  REVISION\n"
        "german  disk              16   1 KiB        0        0  fedcba987654\n"
        "new     never read         -       -        -        -  -\n"
        "pirate  active, pinned     8   3 MiB       12        3  0123456789ab\n"
        "3 adapters, 3 MiB of 2 GiB of memory, 16 slots\n"
    )


def test_load(adapters, server):
    done = adapters("load", "pirate", "v2", "--pinned", "--replace")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "pirate is served: rank 8, 3 MiB, revision 0123456789ab, from /adapters/pirate\n"
    adapters("load", "pirate")
    assert server.asked == [
        admin_pb2.LoadAdapterRequest(name="pirate", path="v2", pinned=True, replace=True),
        admin_pb2.LoadAdapterRequest(name="pirate"),
    ]


def test_unload(adapters, server):
    done = adapters("unload", "pirate", "--drain", "0.5")
    assert (done.returncode, done.stdout) == (0, "pirate is served no more\n")
    [request] = server.asked
    assert (request.name, request.drain_timeout.ToMilliseconds()) == ("pirate", 500)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "what is to be done? list, load, unload"),
        (["load"], "load needs the NAME of an adapter"),
        (["unload"], "unload needs the NAME of an adapter"),
        (["list", "pirate"], "NAME would change nothing"),
        (["unload", "pirate", "v2"], "PATH would change nothing"),
        (["unload", "pirate", "--replace", "--pinned"], "--pinned, --replace would change nothing"),
        (["load", "pirate", "--drain", "3"], "--drain would change nothing"),
        (["unload", "pirate", "--drain", "3601"], "it must be 0 to 3600"),
        (["replace", "pirate"], "invalid choice: 'replace'"),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_refused_and_nothing_is_done(adapters, server, arguments, why):
    done = adapters(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr
    assert server.asked == []


def test_what_the_server_refuses_is_told(adapters, server):
    def refuse(request, context):
        if isinstance(request, model_pb2.ListModelsRequest):
            return MODELS
        context.abort_with_status(RichStatus(grpc.StatusCode.PERMISSION_DENIED, "AdminService takes an admin key"))
        return None

    server.script.unary = refuse
    done = adapters("load", "pirate")
    assert done.returncode == 2
    assert done.stderr.endswith("PERMISSION_DENIED: AdminService takes an admin key\n")


# ------------------------------------------------------------------------------------------------- of requests


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_the_adapter_that_answers(command, server, name):
    done = command(name, "--target", server.target, "--adapter", "pirate", stdin="hi\n")
    assert (done.returncode, done.stdout) == (0, "Hello\n")
    [request] = server.asked
    assert request.adapter == "pirate"


@pytest.mark.parametrize("name", ["generate", "chat"])
@pytest.mark.parametrize("given", ["=x", "pirate=", "a=b,c=d", "a,b", ""])
def test_a_flag_that_names_none_or_several_is_refused(command, server, name, given):
    done = command(name, "--target", server.target, "--adapter", given, stdin="hi\n")
    assert done.returncode == 2
    assert "NAME or NAME=PATH, of one adapter" in done.stderr
    assert server.asked == []


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_a_folder_is_not_for_a_server_elsewhere(command, server, name):
    done = command(name, "--target", server.target, "--adapter", "pirate=./pirate", stdin="hi\n")
    assert done.returncode == 2
    assert "--adapter would change nothing: --target says that another process serves" in done.stderr


def test_the_help_says_how_the_two_forms_differ(command):
    for name in ("generate", "chat"):
        text = " ".join(command(name, "--help").stdout.split())
        assert "--adapter NAME[=PATH] The LoRA adapter that answers." in text
    assert "--adapter TEXT NAME=PATH of a PEFT folder to load at the start" in " ".join(
        command("serve", "--help").stdout.split()
    )
