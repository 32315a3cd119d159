"""A merge into a GGUF file that is killed at any moment leaves the whole file or none."""

import json
import subprocess
import sys

import numpy as np
import pytest
from merged_gguf import toy

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
from propulsion_export.pipeline.merge_gguf import merge_gguf

first, second, file, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
out, right, seconds = Path("out.gguf"), [], []
for adapter in (first, second):
    start = time.monotonic()
    right.append(merge_gguf(adapter, Path("right.gguf"), model=file, force=True).read_bytes())
    seconds.append(time.monotonic() - start)
random.seed(0)
found = {"absent": 0, "complete": 0, "wrong": 0, "begun": 0}
for number in range(count):
    if number % 3 == 0:
        out.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        merge_gguf([first, second][number % 2], out, model=file, force=True, verify=number % 2 == 0)
        os._exit(0)
    time.sleep(random.uniform(0, 1.2 * min(seconds)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found["begun"] += any(Path().glob(".out.gguf.partial-*"))
    if not out.exists():
        found["absent"] += 1
        continue
    found["complete" if out.read_bytes() in right else "wrong"] += 1
merge_gguf(first, out, model=file, force=True)
found["last"] = out.read_bytes() == right[0]
found["left"] = [path.name for path in Path().glob(".*")]
print(json.dumps(found))
"""


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_after_each_kill_the_file_is_absent_or_right(count, saved, tmp_path):
    file, _ = toy(tmp_path, "llama", "Q8_0", hidden_size=512, intermediate_size=2048)
    adapters = []
    for seed in (1, 2):
        values = np.random.default_rng(seed).uniform(0.5, 1.5, 2048)
        paths = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
        adapter = Adapter(f"tuned-{seed}", {path: Scale(values) for path in paths})
        adapters.append(saved(adapter, f"tuned-{seed}"))
    (tmp_path / "work").mkdir()

    done = subprocess.run(
        [sys.executable, "-c", KILLS, *map(str, adapters), str(file), str(count)],
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == 0
    assert found["absent"] + found["complete"] == count
    assert found["begun"] > count // 10  # of these, the file was half written
    assert found["last"]
    assert found["left"] == []
