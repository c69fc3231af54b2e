"""Results on disk: written whole or not at all, found again, removed when nobody comes back for them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbray.errors import ObjectLostError
from nbray.events import SavedName
from nbray.store import saved
from nbray.store.saved import Header


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """A file with the bytes of a value behind 100 others."""
    path = tmp_path / "arena"
    path.write_bytes(bytes(100) + bytes(range(256)) * 10)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def save(
    directory: str,
    source: int,
    *names: str,
    session: str = "book",
    kept: bool = False,
    size: int = 2560,
    when: float | None = None,
) -> str:
    crc = saved.checksum(source, 100, size)
    found = [SavedName(name, "In[3] - abc k-1", 5, 10, b"origin") for name in names]
    header = Header(
        session, found, 3, size, crc, kept, "default", "3.11", time.time() if when is None else when
    )
    path = os.path.join(saved.folder(directory, session), f"{'-'.join(names)}{saved.SUFFIX}")
    saved.write(path, header, source, 100)
    saved.supersede(directory, header, path)
    return path


def found(directory: str, session: str = "book") -> list[list[str]]:
    return [[name.name for name in one.header.names] for one in saved.find(directory, session)]


def test_what_is_written_is_found_and_read(tmp_path: Path, source: int) -> None:
    save(str(tmp_path), source, "a", "b")
    save(str(tmp_path), source, "a", session="another")
    (one,) = saved.find(str(tmp_path), "book")
    assert [name.name for name in one.header.names] == ["a", "b"]
    assert one.header.names[0].origin == b"origin"
    assert saved.read(one) == bytes(range(256)) * 10
    assert len(saved.find(str(tmp_path))) == 2
    assert saved.find(str(tmp_path / "nowhere")) == []


def test_only_this_user_can_read_it(tmp_path: Path, source: int) -> None:
    path = save(str(tmp_path), source, "a")
    assert os.stat(path).st_mode & 0o077 == 0
    assert os.stat(os.path.dirname(path)).st_mode & 0o077 == 0


def test_a_damaged_file_is_told(tmp_path: Path, source: int) -> None:
    path = Path(save(str(tmp_path), source, "a"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (one,) = saved.find(str(tmp_path), "book")
    with pytest.raises(ObjectLostError, match="is not what was written"):
        saved.read(one)
    path.write_bytes(content[:-100])
    with pytest.raises(ObjectLostError, match="is not what was written"):
        saved.read(one)
    path.unlink()
    with pytest.raises(ObjectLostError, match="cannot be read"):
        saved.read(one)


def test_what_is_no_saved_value_is_left_out(tmp_path: Path, source: int) -> None:
    path = Path(save(str(tmp_path), source, "a"))
    (path.parent / f"junk{saved.SUFFIX}").write_bytes(b"junk")
    (path.parent / "notes.txt").write_text("mine")
    assert found(str(tmp_path)) == [["a"]]


def test_what_others_could_have_written_is_left_out(tmp_path: Path, source: int) -> None:
    path = Path(save(str(tmp_path), source, "a"))
    (one,) = saved.find(str(tmp_path), "book")
    path.chmod(0o666)
    assert found(str(tmp_path)) == []
    with pytest.raises(ObjectLostError, match="others can write"):
        saved.read(one)
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert found(str(tmp_path)) == []


def test_a_value_that_ends_early_leaves_no_file(tmp_path: Path, source: int) -> None:
    with pytest.raises(OSError, match="end too early"):
        save(str(tmp_path), source, "a", size=9999)
    assert found(str(tmp_path)) == []
    assert os.listdir(saved.folder(str(tmp_path), "book")) == []


def test_newer_values_of_the_same_names_replace_older_ones_but_not_kept_ones(
    tmp_path: Path, source: int
) -> None:
    save(str(tmp_path), source, "a")
    save(str(tmp_path), source, "b", kept=True)
    save(str(tmp_path), source, "b", "c")
    save(str(tmp_path), source, "a", "b")
    assert sorted(found(str(tmp_path))) == [["a", "b"], ["b"], ["b", "c"]]
    assert [saved.is_kept(one.path) for one in saved.find(str(tmp_path), "book")].count(True) == 1


def test_what_nobody_comes_back_for_is_removed(tmp_path: Path, source: int) -> None:
    old = time.time() - (saved.UNCLAIMED_DAYS + 1) * 86400
    save(str(tmp_path), source, "old", when=old)
    save(str(tmp_path), source, "kept", kept=True, when=old)
    save(str(tmp_path), source, "new")
    save(str(tmp_path), source, "alone", session="another", when=old)
    saved.expire(str(tmp_path))
    assert sorted(found(str(tmp_path))) == [["kept"], ["new"]]
    assert not os.path.exists(saved.folder(str(tmp_path), "another"))
