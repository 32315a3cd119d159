"""A merge that is killed, or whose disk is full, leaves nothing that looks finished."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.pipeline.merge import MergeOptions, merge_adapters

first, second, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
out, options = Path("out"), MergeOptions(force=True)

def weights(directory):
    return {f.name: f.read_bytes() for f in sorted(directory.rglob("*.safetensors*"))}

right, seconds = [], []
for number, adapters in enumerate(([first], [first, second])):
    start = time.monotonic()
    merge_adapters(adapters, Path(f"right-{number}"), options)
    seconds.append(time.monotonic() - start)
    right.append(weights(Path(f"right-{number}")))

random.seed(0)
found = {"absent": 0, "complete": 0, "wrong": 0, "begun": 0}
for number in range(count):
    if number % 3 == 0:
        shutil.rmtree(out, ignore_errors=True)
    child = os.fork()
    if child == 0:
        merge_adapters([[first], [first, second]][number % 2], out, options)
        os._exit(0)
    time.sleep(random.uniform(0, 1.2 * min(seconds)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found["begun"] += any(Path().glob(".out.partial-*"))
    if not out.exists():
        found["absent"] += 1
        continue
    places = [out] if (out / "propulsion.json").exists() else sorted(out.iterdir())
    for place in places:
        Artifact.read(place)
    found["complete" if weights(out) in right else "wrong"] += 1
merge_adapters([first], out, options)
found["left"] = [path.name for path in Path().glob(".out*")]
found["seconds"] = seconds
print(json.dumps(found))
"""
FULL = """
import resource, sys
from pathlib import Path
from propulsion_export.errors import UsageError
from propulsion_export.pipeline.merge import MergeOptions, merge_adapters

resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    merge_adapters(sys.argv[1:], Path("out"), MergeOptions())
except UsageError as error:
    print(error)
print(sorted(path.name for path in Path().iterdir()))
"""


@pytest.fixture
def adapters(tmp_path, tiny_model, write_adapter, positive_adapter):
    """Two adapters of a Llama that is large enough to be interrupted."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 8000}
    model = tiny_model("llama", **sizes)
    model.save_pretrained(tmp_path / "base", max_shard_size="5MB")
    found = []
    for name in ("one", "two"):
        adapter = positive_adapter(model, name=name, only="mlp" if name == "one" else "self_attn")
        adapter = replace(
            adapter,
            base=str(tmp_path / "base"),
            fingerprint=fingerprint_of_model(model),
            task="text-generation",
        )
        found.append(write_adapter(adapter, tmp_path / name))
    (tmp_path / "work").mkdir()
    return found


def run(program, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_after_each_kill_the_output_is_absent_or_right(count, adapters, tmp_path):
    found = json.loads(run(KILLS, *adapters, count, cwd=tmp_path / "work"))

    assert found["wrong"] == 0
    assert found["absent"] + found["complete"] == count
    assert found["begun"] > count // 10  # of these, files were half written
    assert found["left"] == []


def test_a_full_disk_leaves_nothing(adapters, tmp_path):
    said = run(FULL, *adapters, cwd=tmp_path / "work").splitlines()

    assert "the file may not grow that large; nothing was written" in said[0]
    assert said[1] == "[]"
