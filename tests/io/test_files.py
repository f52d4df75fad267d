"""Files and folders that appear whole, whatever fails on the way."""

import os
import stat

import pytest

from rlrr_kernels.io import files
from rlrr_kernels.io.files import is_temporary, replace_folder, write_atomically, write_folder

OLD, NEW = {"a": b"old a", "b": b"old b"}, {"a": b"new a", "c": b"new c"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail_at(monkeypatch, count, lasting=False):
    """Let the ``count``-th of the steps that can fail raise, and all later ones if ``lasting``."""
    calls = iter(range(1, 1000))

    def wrapped(step):
        def run(*arguments):
            call = next(calls)
            if call == count or (lasting and call > count):
                raise OSError("disk full")
            return step(*arguments)

        return run

    for name in ("replace", "rename", "fsync"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for step in (1, 2):
        with monkeypatch.context() as patch:
            fail_at(patch, step)
            with pytest.raises(OSError, match="disk full"):
                write_atomically(path, b"new")
        assert content(tmp_path) == {"a": b"old"}
    write_atomically(path, b"new")
    assert content(tmp_path) == {"a": b"new"}


def test_files_and_folders_get_the_usual_permissions(tmp_path):
    write_atomically(tmp_path / "a", b"x")
    write_folder(tmp_path / "folder", {"a": b"x"})
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "a").write_bytes(b"x")
    for got in ("a", "folder/a"):
        assert stat.S_IMODE((tmp_path / got).stat().st_mode) == stat.S_IMODE((tmp_path / "usual/a").stat().st_mode)
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert content(tmp_path) == {"target": b"precious", "link": b"new"}


def test_a_new_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    for step in range(1, 5):  # two files, the folder, its rename
        with monkeypatch.context() as patch:
            fail_at(patch, step)
            with pytest.raises(OSError, match="disk full"):
                write_folder(tmp_path / "x", NEW)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").mkdir()
    write_folder(tmp_path / "x", NEW)
    assert content(tmp_path / "x") == NEW


def test_a_folder_with_content_or_a_file_is_not_written_over(tmp_path):
    write_folder(tmp_path / "x", OLD)
    (tmp_path / "file").write_bytes(b"y")
    for name in ("x", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists"):
            write_folder(tmp_path / name, NEW)
    assert sorted(os.listdir(tmp_path)) == ["file", "x"]
    assert content(tmp_path / "x") == OLD


def test_a_folder_is_replaced_or_stays_as_it_was(tmp_path, monkeypatch):
    write_folder(tmp_path / "x", OLD)
    for step in range(1, 6):  # two files, the folder, two renames
        with monkeypatch.context() as patch:
            fail_at(patch, step)
            with pytest.raises(OSError, match="disk full"):
                replace_folder(tmp_path / "x", NEW)
        assert content(tmp_path / "x") == OLD
        assert os.listdir(tmp_path) == ["x"]
    replace_folder(tmp_path / "x", NEW)
    assert content(tmp_path / "x") == NEW
    assert os.listdir(tmp_path) == ["x"]


def test_the_old_folder_is_somewhere_whole_even_if_nothing_can_be_renamed_any_more(tmp_path, monkeypatch):
    write_folder(tmp_path / "x", OLD)
    with monkeypatch.context() as patch:
        fail_at(patch, 5, lasting=True)
        with pytest.raises(OSError, match="disk full"):
            replace_folder(tmp_path / "x", NEW)
    assert OLD in [content(folder) for folder in tmp_path.iterdir()]


def test_what_a_crash_leaves_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "unlink", lambda path: None)  # killed before it could clean up
    with monkeypatch.context() as patch:
        fail_at(patch, 1)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(tmp_path / "a.json", b"new")
    (left,) = os.listdir(tmp_path)
    assert is_temporary(left, "a.json")
    assert not is_temporary(left, "b.json")
    assert not is_temporary("a.json", "a.json")
