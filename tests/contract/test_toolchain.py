"""The contract is clean, its stubs are current, and the checks that say so can fail."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from nanoserve_client.v1 import admin_pb2, generation_pb2, model_pb2

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_contract = load_tool("check_contract")
generate_stubs = load_tool("generate_stubs")


def git(root, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """A git repository on main with the contract in its folder, and no commit."""
    for name in ("protos", "third_party"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    git(tmp_path, "init", "--initial-branch=main")
    return tmp_path


def commit(root):
    git(root, "add", "--all")
    git(root, "commit", "--message=contract")


def edit(root, before, after):
    path = root / "protos" / "nanoserve" / "v1" / "generation.proto"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


# ------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("check", [["lint"], ["format", "--diff", "--exit-code"], ["build"]], ids=lambda c: c[0])
def test_contract_passes(check):
    check_contract.run([check_contract.BUF, *check], ROOT)


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("  // New tokens, those of a stop string or EOS too.\n", "", "should have a non-empty comment"),
        ("FINISH_REASON_EOS = 1", "EOS = 1", 'should be prefixed with "FINISH_REASON_"'),
        ("  uint32 index = 1;", "    uint32 index = 1;", "buf format"),
    ],
    ids=["no comment", "no prefix", "format"],
)
def test_careless_change_is_refused(repository, before, after, complaint):
    edit(repository, before, after)
    tool = [sys.executable, ROOT / "tools" / "check_contract.py", "--root", repository]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert complaint in done.stderr


# ------------------------------------------------------------------------------------------ breaking changes


def test_change_that_breaks_callers_is_refused(repository):
    commit(repository)
    edit(repository, "  uint32 index = 1;", "  uint64 index = 1;")
    with pytest.raises(check_contract.CheckFailed, match='changed type from "uint32" to "uint64"'):
        check_contract.check_breaking(repository, None)


def test_new_field_breaks_nobody(repository):
    commit(repository)
    edit(repository, "  uint32 index = 1;", "  uint32 index = 1;\n  // New.\n  string extra = 99;")
    assert "nothing breaks since" in check_contract.check_breaking(repository, None)


def test_another_baseline_can_be_named(repository):
    commit(repository)
    edit(repository, "  uint32 index = 1;", "  uint64 index = 1;")
    commit(repository)
    assert "nothing breaks since" in check_contract.check_breaking(repository, None)
    with pytest.raises(check_contract.CheckFailed, match="uint64"):
        check_contract.check_breaking(repository, "HEAD~1")


def test_clone_compares_with_the_main_of_its_origin(repository, tmp_path_factory):
    commit(repository)
    clone = tmp_path_factory.mktemp("clone")
    git(clone, "clone", str(repository), ".")
    git(clone, "checkout", "-b", "feature")
    git(clone, "branch", "--delete", "main")
    edit(clone, "  uint32 index = 1;", "  uint64 index = 1;")
    with pytest.raises(check_contract.CheckFailed, match="uint64"):
        check_contract.check_breaking(clone, None)


def test_clone_that_knows_no_main_fails_and_says_what_to_fetch(repository):
    commit(repository)
    git(repository, "branch", "--move", "feature")
    with pytest.raises(check_contract.CheckFailed, match="git fetch origin main:main"):
        check_contract.check_breaking(repository, None)


def test_repository_without_a_commit_says_that_nothing_was_compared(repository):
    assert "has no commit yet" in check_contract.check_breaking(repository, None)


def test_main_without_a_contract_says_that_nothing_was_compared(repository):
    git(repository, "commit", "--allow-empty", "--message=before the contract")
    assert "has no contract" in check_contract.check_breaking(repository, None)


# ---------------------------------------------------------------------------------------------------- stubs


@pytest.fixture(scope="module")
def generated():
    return generate_stubs.generate()


def test_committed_stubs_are_those_of_the_contract(generated):
    assert generate_stubs.differences(generated, generate_stubs.STUBS) == []


def test_stale_missing_and_left_over_stubs_are_noticed(generated, tmp_path):
    generate_stubs.write(generated, tmp_path)
    assert generate_stubs.differences(generated, tmp_path) == []
    (tmp_path / "model_pb2.pyi").write_text("# edited by hand\n")
    (tmp_path / "admin_pb2.py").unlink()
    (tmp_path / "gone_pb2.py").write_text("# of a file that was deleted\n")
    diff = "\n".join(generate_stubs.differences(generated, tmp_path))
    for name in ("model_pb2.pyi", "admin_pb2.py", "gone_pb2.py"):
        assert f"+++ generated/{name}" in diff
    generate_stubs.write(generated, tmp_path)
    assert generate_stubs.differences(generated, tmp_path) == []


@pytest.mark.parametrize("module", [generation_pb2, model_pb2, admin_pb2], ids=lambda m: m.__name__)
def test_each_file_has_one_descriptor_under_its_own_name(module):
    name = f"nanoserve/v1/{module.__name__.removeprefix('nanoserve_client.v1.').removesuffix('_pb2')}.proto"
    assert module.DESCRIPTOR.name == name
    assert descriptor_pool.Default().FindFileByName(name).serialized_pb == module.DESCRIPTOR.serialized_pb
    for message in module.DESCRIPTOR.message_types_by_name:
        # The name that pickle looks for.
        assert getattr(module, message).__module__ == module.__name__


def test_stubs_take_no_name_inside_the_engine():
    assert importlib.util.find_spec("nanoserve.v1") is None
    for path in generate_stubs.STUBS.iterdir():
        if path.is_file():
            assert "from nanoserve." not in path.read_text()
