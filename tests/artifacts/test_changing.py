import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts import locking
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.layout import packed_inputs
from propulsion_export.cli import main
from propulsion_export.errors import (
    AdapterError,
    ArtifactError,
    BaseModelError,
    UsageError,
)
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.serving.session import Session


@pytest.fixture
def copy(switchable, tmp_path):
    return shutil.copytree(switchable, tmp_path / "copy")


def test_an_added_adapter_passes_parity_without_a_new_trace(world, copy):
    graph = (copy / "model.onnx").read_bytes()

    add_adapter(copy, f"four={world.five}")

    report = check_parity(copy)
    assert report.passed, [check.detail for check in report.checks]
    assert ("parity", "four") in {(check.case, check.adapter) for check in report.checks}
    assert (copy / "model.onnx").read_bytes() == graph


def test_replacing_takes_force_and_leaves_no_old_file(world, copy):
    with pytest.raises(UsageError, match="has an adapter 'three' already"):
        add_adapter(copy, f"three={world.five}")

    changed = add_adapter(copy, f"three={world.five}", force=True)

    assert changed.manifest.adapters["three"].digest == Adapter.read(world.five).digest
    assert check_parity(copy).passed
    kept = {path.name for path in (copy / "adapters").iterdir()}
    assert len(kept) == 3
    assert "three.safetensors" not in kept


def test_a_crash_before_the_manifest_leaves_the_old_state(world, copy, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(Artifact, "with_manifest", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        add_adapter(copy, f"three={world.five}", force=True)

    monkeypatch.undo()
    assert Artifact.read(copy).manifest.adapters["three"].digest == Adapter.read(world.three).digest
    assert all(before[name] == next(copy.rglob(name)).read_bytes() for name in before)


def test_a_removed_adapter_is_gone(copy):
    remove_adapter(copy, "five")

    assert list(Artifact.read(copy).manifest.adapters) == ["three"]
    assert not (copy / "adapters" / "five.safetensors").exists()
    with pytest.raises(UsageError, match="is its only adapter"):
        remove_adapter(copy, "three")
    with pytest.raises(UsageError, match="has no adapter 'nine'"):
        remove_adapter(copy, "nine")


def test_an_adapter_of_another_base_is_refused(world, copy, tmp_path, write_adapter, tiny_model):
    from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

    strange = fingerprint_of_model(tiny_model("bert", "feature-extraction", seed=9))
    write_adapter(replace(Adapter.read(world.three), fingerprint=strange), tmp_path / "stranger")

    with pytest.raises(BaseModelError, match="is not the base model of adapter stranger"):
        add_adapter(copy, tmp_path / "stranger")


def test_a_scale_without_a_slot_is_refused(world, copy, tmp_path, write_adapter):
    adapter = Adapter.read(world.three)
    scale = next(iter(adapter.scales.values()))
    more = replace(adapter, scales={**adapter.scales, "bert.nowhere": scale})
    write_adapter(more, tmp_path / "more")
    before = json.loads((copy / "propulsion.json").read_text())

    with pytest.raises(AdapterError, match=r"bert\.nowhere has shape .* no slot"):
        add_adapter(copy, tmp_path / "more")

    assert json.loads((copy / "propulsion.json").read_text()) == before


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_scales_out_of_range_are_added_only_if_accepted(
    mode, export_world, out_of_range, tmp_path, capsys
):
    directory = shutil.copytree(export_world(mode, "float16"), tmp_path / "half")
    words = ["adapter", "add", str(directory), str(out_of_range)]

    with pytest.raises(SystemExit) as refused:
        main(words)
    assert sorted(Artifact.read(directory).list_adapters()) == ["five", "three"]
    with pytest.raises(SystemExit) as accepted:
        main([*words, "--allow-range"])

    assert (refused.value.code, accepted.value.code) == (2, 0)
    assert "scale 1e+05 of channel 4 becomes inf in float16" in capsys.readouterr().err
    scales = packed_inputs(Artifact.read(directory), "out-of-range")["propulsion_scales"]
    assert np.isinf(scales).sum() == 1


def test_a_folded_artifact_cannot_change_its_adapter(world, folded):
    with pytest.raises(ArtifactError, match="expected a switchable artifact"):
        add_adapter(folded, world.five)


CHANGER = """
import sys
from pathlib import Path
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.layout import packed_inputs
from propulsion_export.cli import main

artifact, adapter, prefix = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
print("ready", flush=True)
sys.stdin.readline()
for number in range(3):
    add_adapter(artifact, f"{prefix}{number}={adapter}")
add_adapter(artifact, f"{prefix}-gone={adapter}")
remove_adapter(artifact, f"{prefix}-gone")
"""


def test_processes_that_change_one_artifact_at_once_lose_nothing(world, copy):
    """Each reads the manifest and writes it again: unlocked, the last one would win."""
    before = {path.name for path in copy.iterdir()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHANGER, copy, world.five, prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for prefix in ("a", "b")
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0

    added = {f"{prefix}{number}" for prefix in "ab" for number in range(3)}
    artifact = Artifact.read(copy)
    assert artifact.manifest.adapters.keys() == {"three", "five"} | added
    for name in added:
        assert artifact.feeds(name)
    assert {path.name for path in copy.iterdir()} == before


def test_a_change_waits_for_the_one_before(world, copy):
    """The lock is the directory's own, held until the manifest is written."""
    program = (
        "import sys; from pathlib import Path; "
        "from propulsion_export.artifacts.changing import remove_adapter; "
        "remove_adapter(Path(sys.argv[1]), 'five')"
    )
    descriptor = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        process = subprocess.Popen([sys.executable, "-c", program, copy])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=4)
        assert "five" in Artifact.read(copy).manifest.adapters
    finally:
        os.close(descriptor)

    assert process.wait(timeout=60) == 0
    assert "five" not in Artifact.read(copy).manifest.adapters


def test_a_lock_that_stays_is_told_and_not_waited_for_without_end(world, copy, monkeypatch):
    monkeypatch.setattr(locking, "_PATIENCE", 0.2)
    descriptor = os.open(copy, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for use in (lambda: remove_adapter(copy, "five"), lambda: Session(copy)):
            with pytest.raises(ArtifactError, match="stays locked for 0 s by another thread"):
                use()
    finally:
        os.close(descriptor)

    remove_adapter(copy, "five")


def test_nothing_is_left_of_an_adapter_whose_manifest_the_disk_does_not_take(
    world, copy, monkeypatch
):
    def full(self, manifest):
        raise UsageError("no space left")

    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "with_manifest", full)
        for name in ("new", "five"):
            with pytest.raises(UsageError, match="no space left"):
                add_adapter(copy, f"{name}={world.three}", force=True)

    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["switchable", "banked"])
def test_an_adapter_of_another_task_is_refused(kind, world, request, tmp_path):
    directory = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    (tmp_path / "other").mkdir()
    replace(Adapter.read(world.three), task="token-classification").write(tmp_path / "other")

    with pytest.raises(AdapterError, match="other: is for token-classification, the artifact for"):
        add_adapter(directory, tmp_path / "other")

    assert sorted(Artifact.read(directory).list_adapters()) == ["five", "three"]


def test_a_directory_is_told_as_text_too(world, copy):
    add_adapter(str(copy), f"new={world.three}")
    remove_adapter(str(copy), "new")

    assert sorted(Artifact.read(copy).list_adapters()) == ["five", "three"]


def test_a_directory_that_is_not_there_is_told(world, tmp_path):
    for change in (
        lambda: add_adapter(tmp_path / "no", world.five),
        lambda: remove_adapter(tmp_path / "no", "five"),
    ):
        with pytest.raises(ArtifactError, match="no: cannot be opened"):
            change()


LEFT = (
    ".propulsion.json.partial-{process}-0123abcd",
    "adapters/.other.safetensors.partial-{process}-0123abcd",
    "adapters/.other.0123456789ab.safetensors.partial-{process}-0123abcd",
    "adapters/.bank.bin.partial-{process}-0123abcd",
    "adapters/.whatever.partial-{process}",
)


@pytest.mark.parametrize("process", ["of the dead", "of this one", "of another"])
@pytest.mark.parametrize("mode", ["switchable", "bank"])
@pytest.mark.parametrize("change", ["add", "remove"])
def test_the_next_change_removes_what_kills_left_half_written(
    change, mode, process, world, export_world, tmp_path
):
    """Process numbers are used again: a container's is 1 every time."""
    numbers = {"of this one": os.getpid(), "of another": os.getppid(), "of the dead": 99_999_999}
    copy = shutil.copytree(export_world(mode), tmp_path / "copy")
    left = [copy / name.format(process=numbers[process]) for name in LEFT]
    for path in left:
        path.write_bytes(b"half")
    kept = [copy / "adapters/.mine", copy / f".report.json.partial-{os.getppid()}-0123abcd"]
    for path in kept:
        path.write_bytes(b"not ours to remove")

    if change == "add":
        add_adapter(copy, f"new={world.three}")
    else:
        remove_adapter(copy, "five")

    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in kept)


KILLED = """
import os, sys
from pathlib import Path
from propulsion_export.artifacts.changing import add_adapter

point, replace = sys.argv[1], Path.replace
def die(self, target):
    if point in str(target):
        os._exit(9)
    return replace(self, target)
Path.replace = die
add_adapter(*sys.argv[2:])
"""


@pytest.mark.parametrize("point", ["new.safetensors", "propulsion.json"])
def test_a_killed_addition_leaves_nothing_after_another_change(point, world, copy):
    words = [sys.executable, "-c", KILLED, point, copy, f"new={world.three}"]
    assert subprocess.run(words, check=False).returncode == 9
    assert list(copy.rglob(".*.partial-*"))

    remove_adapter(copy, "five")

    assert not list(copy.rglob(".*"))
