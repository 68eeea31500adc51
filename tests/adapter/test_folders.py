"""Which folders may be read, and for whom."""

import pytest

from nanoserve.adapter.folders import CONFIG, AdapterFolders, parse_choice
from nanoserve.errors import AdapterNotFound, InvalidRequest


@pytest.fixture
def root(tmp_path):
    """root/a, root/team/b, root/empty, and a folder outside of it."""
    for name in ("root/a", "root/team/b", "outside/x", "root/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / CONFIG).touch()
    (tmp_path / "root/empty").mkdir()
    (tmp_path / "root/file").touch()
    (tmp_path / "root/.hidden").mkdir()
    (tmp_path / "root/.hidden" / CONFIG).touch()
    return tmp_path / "root"


def test_names_under_the_root_are_those_that_can_be_read(root):
    folders = AdapterFolders(root, "model")
    assert sorted(folders.names()) == ["a"]
    assert folders.find("team/b") == root / "team/b"
    assert not folders.has("empty")
    assert list(AdapterFolders(None, "model").names()) == []
    assert list(AdapterFolders(root / "gone", "model").names()) == []


def test_links_are_followed_inside_the_root_and_refused_out_of_it(root):
    (root / "inside").symlink_to("a")
    (root / "out").symlink_to("../outside/x")
    (root / "linked").mkdir()
    (root / "linked" / CONFIG).symlink_to(root.parent / "outside/x" / CONFIG)
    folders = AdapterFolders(root, "model")
    assert sorted(folders.names()) == ["a", "inside"]
    for name in ("out", "linked"):
        with pytest.raises(AdapterNotFound):
            folders.find(name)
        with pytest.raises(InvalidRequest, match="not under the folder of --adapters"):
            folders.resolve("x", name)
    assert folders.resolve("x", "inside") == root / "a"


@pytest.mark.parametrize("path", ["..", "../outside/x", "/", "/etc", "a/../../outside/x", ".", "a/.."])
def test_a_path_that_leaves_the_root_is_refused(root, path):
    with pytest.raises(InvalidRequest) as caught:
        AdapterFolders(root, "model").resolve("x", path)
    assert caught.value.violations[0].field == "path"


def test_a_path_is_relative_to_the_root_or_absolute_or_as_the_name(root):
    folders = AdapterFolders(root, "model")
    for path in ("a", str(root / "a"), "team/../a", ""):
        assert folders.resolve("a", path) == root / "a"
    for path in ("nowhere", "file"):
        with pytest.raises(AdapterNotFound):
            folders.resolve("a", path)
    with pytest.raises(InvalidRequest, match="NUL"):
        folders.resolve("a", "a\0b")
    with pytest.raises(InvalidRequest, match="--adapters"):
        AdapterFolders(None, "model").resolve("a", "a")


@pytest.mark.parametrize(
    "name", ["model", "", ".", "..", "../a", "a/", "/a", "a//b", "a/../a", "a\n", "a b", "é", "x" * 129]
)
def test_a_name_that_may_not_be_is_refused_and_not_found(root, name):
    folders = AdapterFolders(root, "model")
    with pytest.raises(InvalidRequest) as caught:
        folders.check_name(name)
    assert caught.value.violations[0].field == "name"
    with pytest.raises(AdapterNotFound):
        folders.find(name)


@pytest.mark.parametrize("name", ["a", "team/b", "A.b:c_d-1", "x" * 128, "_x", "-"])
def test_a_name_that_may_be(name):
    AdapterFolders(None, "model").check_name(name)


def test_the_choice_of_the_command_line():
    assert {k: str(v) for k, v in parse_choice("a=x/y, b=z=1").items()} == {"a": "x/y", "b": "z=1"}
    for wrong in ("", "a", "a=", "=x", "a=x,a=y", "a=x,"):
        with pytest.raises(ValueError, match=r"NAME=PATH|twice"):
            parse_choice(wrong)
