"""The documentation as code: what it shows is run, what it names exists, and where it links there is something.

What a block's language says, on pages as readers see them and in more words than they see:

    sh           run by bash, in an empty folder
    sh fails     the same, and must not end with exit code 0
    python       run; the blocks of one page share their variables
    text exact   the output of the block before, to the letter
    text shape   the same, but every number may be another one
    all others   not checked

The addresses 127.0.0.1:50051 and 127.0.0.1:8000 are those of one server with the built-in model, which all pages
share. It computes in float32, where the text of an answer does not depend on what else runs. 127.0.0.1:10000 is an
Envoy before it, and 127.0.0.1:9901 that Envoy's own surface.
"""

import ast
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from envoy_process import fronting
from serve_process import free_port, serving

import nanoserve

ROOT = Path(__file__).parent.parent
SOURCE = Path(nanoserve.__file__).parent
BIN = Path(sys.executable).parent
INDEX = ROOT / "docs" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ADDRESS = "127.0.0.1:50051"
HTTP_ADDRESS = "127.0.0.1:8000"
EDGE = "127.0.0.1:10000"
EDGE_ADMIN = "127.0.0.1:9901"
BLOCK_S = 60
RUN = ("sh", "sh fails", "python")

# A block's first line -> why no test runs it.
NOT_RUN = {
    "make serve": "serves until it is stopped; the pages' server is what it starts",
    "make envoy": "the same; the pages' Envoy is what it starts",
    "make envoy SERVERS=several-servers.yaml": "the same; tests/gateway/envoy/ does what the page says of it",
    "docker run --rm -p 127.0.0.1:16686:16686 -p 127.0.0.1:4317:4317 jaegertracing/jaeger:2.5.0": (
        "a container; tests/observability/test_tracing.py has a collector of its own"
    ),
    "python3 -m venv phoenix && phoenix/bin/pip install arize-phoenix": "a hundred packages, and serves",
    "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317 OTEL_METRICS_EXPORTER=none make serve": "serves",
    ".venv/bin/nanoserve serve --grpc-port 50052 --http-port 8001": "the same",
    "make check": "runs all tests, this one too",
    ".venv/bin/nanoserve serve Qwen/Qwen3-0.6B --kv-memory 4GiB": "downloads a model",
    """grpcurl -plaintext -d '{"chat": {"messages": [{"role": "ROLE_USER", "content": "What is TTFT?"}]}}' \\""": (
        "no package of Python's, so not among the development tools"
    ),
}

# Runs the blocks of a page one after the other: {"code", "page", "line"} in, what it printed out.
DRIVER = """
import contextlib, io, json, sys, traceback
answers, variables = sys.stdout, {"__name__": "__main__"}
for line in sys.stdin:
    block = json.loads(line)
    printed, error = io.StringIO(), None
    # Empty lines before it: tracebacks name the page's own lines.
    code = "\\n" * block["line"] + block["code"]
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, block["page"], "exec"), variables)
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps({"printed": printed.getvalue(), "error": error}), file=answers, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced part of a page."""

    # Of its fence, counted from 1.
    line: int
    language: str
    text: str

    @property
    def first_line(self) -> str:
        return self.text.splitlines()[0]


def blocks_of(page: Path) -> Iterator[Block]:
    fence, start, info, lines = "", 0, "", []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if not fence and (match := re.fullmatch(r"(```+)(.*)", line)):
            (fence, info), start, lines = match.groups(), number, []
        elif fence and line == fence:
            yield Block(start, info.strip(), "".join(f"{each}\n" for each in lines))
            fence = ""
        elif fence:
            lines.append(line)
    assert not fence, f"{name_of(page)}:{start}: a block that does not end"


def prose_of(page: Path) -> str:
    return re.sub(r"^(```+).*?^\1$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_run(block: Block) -> bool:
    return block.language in RUN and block.first_line not in NOT_RUN


# ---------------------------------------------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def addresses():
    http_address = f"127.0.0.1:{free_port()}"
    with serving("--dtype", "float32", "--http-port", http_address.partition(":")[2]) as server:
        yield {ADDRESS: server.address, HTTP_ADDRESS: http_address}


@pytest.fixture(scope="module")
def envoy(addresses):
    ports = {int(shown.rpartition(":")[2]): int(real.rpartition(":")[2]) for shown, real in addresses.items()}
    with fronting(ports) as envoy:
        envoy.wait_until_healthy(1)
        yield envoy


class Runner:
    """Runs the blocks of one page, as a reader would who has a server."""

    def __init__(self, page: Path, addresses: dict[str, str], folder: Path) -> None:
        """`addresses`: for each that the pages show, the one that it has in this test."""
        self._page = page
        self._addresses = addresses
        self._folder = folder
        self._environment = {**os.environ, "TERM": "dumb", "COLUMNS": "120"}
        self._python: subprocess.Popen[str] | None = None

    def run(self, block: Block) -> str:
        """What the block prints."""
        code = block.text.replace(".venv/bin/", f"{BIN}/")
        for shown, real in self._addresses.items():
            code = code.replace(shown, real)
        printed = self._run_python(block, code) if block.language == "python" else self._run_shell(block, code)
        for shown, real in self._addresses.items():
            printed = printed.replace(real, shown)
        return printed

    def _run_shell(self, block: Block, code: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=BLOCK_S,
        )
        has_failed = done.returncode != 0
        assert has_failed == (block.language == "sh fails"), f"{self._at(block)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def _run_python(self, block: Block, code: str) -> str:
        if self._python is None:
            self._python = subprocess.Popen(
                [sys.executable, "-c", DRIVER],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        self._python.stdin.write(json.dumps({"code": code, "page": str(self._page), "line": block.line}) + "\n")
        self._python.stdin.flush()
        # A block that never ends must not hold up the tests.
        watchdog = threading.Timer(BLOCK_S, self._python.kill)
        watchdog.start()
        line = self._python.stdout.readline()
        watchdog.cancel()
        assert line, f"{self._at(block)}: ended the process, or took more than {BLOCK_S} s"
        answer = json.loads(line)
        assert answer["error"] is None, f"{self._at(block)}\n{answer['error']}"
        return str(answer["printed"])

    def _at(self, block: Block) -> str:
        return f"{name_of(self._page)}:{block.line}"

    def close(self) -> None:
        if self._python is not None:
            self._python.kill()
            self._python.communicate()


@pytest.mark.parametrize("page", [p for p in PAGES if any(map(is_run, blocks_of(p)))], ids=name_of)
def test_blocks_do_what_the_page_shows(page, addresses, tmp_path, request):
    if EDGE in page.read_text():
        envoy = request.getfixturevalue("envoy")
        addresses = {**addresses, EDGE: f"127.0.0.1:{envoy.port}", EDGE_ADMIN: envoy.admin_address}
    runner = Runner(page, addresses, tmp_path)
    printed = None
    try:
        for block in blocks_of(page):
            if block.language in RUN:
                printed = runner.run(block) if is_run(block) else None
            elif block.language in ("text exact", "text shape"):
                assert printed is not None, f"{name_of(page)}:{block.line}: the output of nothing"
                is_exact = block.language == "text exact"
                shown, got = (block.text, printed) if is_exact else (shape_of(block.text), shape_of(printed))
                assert got.rstrip() == shown.rstrip(), f"{name_of(page)}:{block.line}"
    finally:
        runner.close()


def shape_of(output: str) -> str:
    """What stays of it when every number may be another one, and as long as it likes."""
    return re.sub(r"[ ]+", " ", re.sub(r"\d+(\.\d+)?", "0", output))


def test_what_is_not_run_is_still_there():
    shown = {block.first_line for page in PAGES for block in blocks_of(page) if block.language == "sh"}
    assert NOT_RUN.keys() <= shown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_have_a_language_that_is_known(page):
    known = {*RUN, "", "text", "text exact", "text shape", "json", "toml", "proto"}
    assert {block.language for block in blocks_of(page)} <= known


# ------------------------------------------------------------------------------------------------- what is named


def symbols_of(path: Path) -> set[str]:
    """Names defined in a file: functions, classes and constants, and those inside of classes as Class.name."""
    return set(_defined(ast.parse(path.read_text()).body, ""))


def _defined(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        match node:
            case ast.ClassDef():
                yield prefix + node.name
                yield from _defined(node.body, f"{prefix}{node.name}.")
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield prefix + node.name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name
            case ast.Assign(targets=targets):
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_symbols_exist(page):
    for file, symbol in re.findall(r"([\w./-]+\.py)::([\w.]*\w)", page.read_text()):
        path = next((folder / file for folder in (SOURCE, ROOT) if (folder / file).is_file()), None)
        assert path is not None, f"{name_of(page)} names {file}, which is not there"
        assert symbol in symbols_of(path), f"{name_of(page)} names {symbol}, which is not in {file}"


# ------------------------------------------------------------------------------------------------- where it links


def links_of(page: Path) -> list[str]:
    """Targets inside of the repository."""
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose_of(page))
    return [target for target in targets if not target.startswith(("https://", "http://"))]


def anchors_of(page: Path) -> set[str]:
    """Of its headings, by GitHub's rule."""
    titles = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links_of(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{name_of(page)}: {link}"


def test_every_page_stands_in_the_index():
    linked = {(INDEX.parent / link.partition("#")[0]).resolve() for link in links_of(INDEX)}
    assert set(INDEX.parent.rglob("*.md")) - {INDEX} <= linked


# --------------------------------------------------------------------------------------- what is made from the code


@pytest.mark.parametrize("page", ["flags", "protos", "errors", "rest"])
def test_reference_pages_match_the_code(page):
    command = [sys.executable, str(ROOT / "tools" / "generate_reference.py"), page, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
