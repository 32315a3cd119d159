"""An output appears when it is whole, with ordinary modes, or nothing changes."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from outputs import ADAPTER, content_of, ours

from propulsion_export.artifacts import staging as output
from propulsion_export.artifacts.staging import replace_file, staged_directory


def test_the_output_appears_only_when_it_is_whole(tmp_path):
    out = tmp_path / "new" / "out"

    with staged_directory(out, marker=ADAPTER) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "a").write_bytes(b"1")
        assert not out.exists()
        assert staged.parent == out.parent
        assert staged.name.startswith(".")

    assert content_of(out) == {"deep/a": b"1"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_nothing_and_the_old_content(tmp_path, error, force):
    out = tmp_path / "out"
    if force:
        ours(out)
    before = content_of(tmp_path)

    def work():
        with staged_directory(out, force=force, marker=ADAPTER) as staged:
            (staged / "half").write_bytes(b"1")
            raise error

    with pytest.raises(error):
        work()

    assert content_of(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([out] if force else [])


def test_an_interrupt_between_the_two_renames_gives_the_old_back(tmp_path, monkeypatch):
    out = ours(tmp_path / "out")
    real = Path.rename
    calls = []

    def rename(self, target):
        calls.append(self.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(KeyboardInterrupt),
        staged_directory(out, force=True, marker=ADAPTER) as staged,
    ):
        (staged / "new").write_bytes(b"1")

    assert calls[0] == "out"
    assert content_of(out) == {"adapter_config.json": b"{}", "weights": b"old"}
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_directory_is_filled_without_force(tmp_path):
    out = tmp_path / "out"
    out.mkdir()

    with staged_directory(out, marker=ADAPTER) as staged:
        (staged / "a").write_bytes(b"1")

    assert content_of(tmp_path) == {"out/a": b"1"}


def test_a_link_to_a_directory_is_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")

    with staged_directory(tmp_path / "out", marker=ADAPTER) as staged:
        (staged / "a").write_bytes(b"1")

    assert content_of(tmp_path / "elsewhere") == {"a": b"1"}
    assert (tmp_path / "out").is_symlink()


def test_files_and_directories_have_ordinary_modes(tmp_path):
    old = os.umask(0o022)
    try:
        with staged_directory(tmp_path / "out", marker=ADAPTER) as staged:
            replace_file(staged / "a", b"1")
            (staged / "b").write_bytes(b"1")
    finally:
        os.umask(old)

    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "out/a", "out/b")]
    assert [oct(mode) for mode in modes] == ["0o755", "0o644", "0o644"]


def test_a_strict_umask_is_respected(tmp_path):
    old = os.umask(0o077)
    try:
        with staged_directory(tmp_path / "out", marker=ADAPTER) as staged:
            replace_file(staged / "a", b"1")
    finally:
        os.umask(old)

    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "out/a")]
    assert [oct(mode) for mode in modes] == ["0o700", "0o600"]


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    """Else a power cut could leave the name without the content."""
    out, flushed = tmp_path / "out", []

    def fsync(descriptor):
        assert not out.exists()
        flushed.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(output.os, "fsync", fsync)
    with staged_directory(out, marker=ADAPTER) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "a").write_bytes(b"1")
        (staged / "link").symlink_to("gone")

    paths = [out, out / "deep", out / "deep" / "a"]
    assert sorted(flushed) == sorted(path.stat().st_ino for path in paths)


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_that_a_writer_made_private_are_opened_to_readers(umask, rights, tmp_path):
    before = os.umask(umask)
    try:
        with staged_directory(tmp_path / "out", marker=ADAPTER) as directory:
            safetensors.numpy.save_file({"scale": np.ones(2)}, directory / "one.safetensors")
            assert (directory / "one.safetensors").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)

    assert (tmp_path / "out" / "one.safetensors").stat().st_mode & 0o777 == rights
