"""Files and folders are whole or absent, and a full disk says what to do."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mmalign.files import full_disk_explained, staged, write_file


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_staged_moves_whole_entries_or_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with staged(folder) as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("1")
        (part / "b").write_text("2")
    assert sorted(path.name for path in folder.iterdir()) == ["b", "sub"]
    with staged(folder) as part:
        (part / "sub").mkdir()
        (part / "sub" / "c").write_text("3")
    assert [path.name for path in (folder / "sub").iterdir()] == ["c"] and (folder / "b").read_text() == "2"
    with pytest.raises(KeyError), staged(folder) as part:
        (part / "b").write_text("broken")
        raise KeyError
    assert sorted(path.name for path in folder.iterdir()) == ["b", "sub"] and (folder / "b").read_text() == "2"
    with pytest.raises(KeyError), staged(tmp_path / "new") as part:
        raise KeyError
    assert not (tmp_path / "new").exists()


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(RuntimeError, match="something else"), full_disk_explained(tmp_path / "kept"):
        raise RuntimeError("something else")
    with pytest.raises(PermissionError), full_disk_explained(tmp_path / "kept"):
        raise PermissionError(errno.EACCES, "no")
    assert (tmp_path / "kept").exists()


def test_text_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError):
        write_file(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"
