"""The distribution stands alone: what it imports, what it declares, and what a type checker sees of it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

CLIENT = Path(__file__).resolve().parents[2] / "clients" / "python"


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_import_pulls_in_neither_torch_nor_the_engine():
    done = run("-c", "import nanoserve_client, sys; print(*{name.partition('.')[0] for name in sys.modules})")
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert "nanoserve_client" in modules
    assert not modules & {"torch", "nanoserve", "transformers", "numpy"}


def test_every_import_is_of_the_standard_library_or_declared():
    declared = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[><=]", entry)[0] for entry in declared} == {
        "grpcio",
        "protobuf",
        "googleapis-common-protos",
    }
    allowed = sys.stdlib_module_names | {"grpc", "google", "nanoserve_client"}
    for path in CLIENT.rglob("src/**/*.py"):
        imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert set(imported) <= allowed, path


USES = """
import grpc
from nanoserve_client import AsyncClient, CallOptions, Client, Delta, GenerateOptions, Result
from nanoserve_client.v1 import generation_pb2 as pb
from nanoserve_client.v1 import generation_pb2_grpc


def sync(options: GenerateOptions) -> Result:
    with Client("x") as client, client.generate("x", n=2, stop=["a"], timeout=1.0) as stream:
        delta: Delta = next(stream)
        return client.chat([{"role": "user", "content": delta.text}], **options).result()


async def asynchronous() -> str:
    async with AsyncClient("x") as client:
        async for delta in client.generate([1, 2]):
            return delta.text
        return await client.detokenize([1])


async def stubs(channel: grpc.aio.Channel) -> pb.Started:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    async for response in stub.Generate(pb.GenerateRequest(text="x")):
        return response.started
    raise ValueError
"""

MISUSES = """
from nanoserve_client import AsyncClient, Client

Client("x").generate("x", temprature=1.0)
Client("x").generate("x", max_tokens="ten")
Client("x").generate(5)
Client("x").list_models()[0].nmae
for delta in AsyncClient("x").generate("x"): ...
"""


def test_type_checker_accepts_uses_and_names_every_misuse(tmp_path):
    uses, misuses = tmp_path / "uses.py", tmp_path / "misuses.py"
    uses.write_text(USES)
    misuses.write_text(MISUSES)
    config = tmp_path / "mypy.ini"
    config.write_text(f"[mypy]\nstrict = True\nmypy_path = {CLIENT / 'src'}\nignore_missing_imports = True\n")
    done = run("-m", "mypy", "--config-file", config, "--cache-dir", tmp_path / "cache", uses, misuses)
    lines = re.findall(r"(\w+)\.py:(\d+): error", done.stdout)
    assert lines == [("misuses", str(line)) for line in range(4, 9)], done.stdout
