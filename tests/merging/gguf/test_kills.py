"""A killed merge leaves nothing that looks finished."""

import os
import signal
import subprocess
import sys

import numpy as np
from merged_gguf import toy

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.pipeline.merge_gguf import merge_gguf


def test_a_killed_merge_leaves_the_whole_file_or_none(saved, tmp_path):
    file, _ = toy(tmp_path)
    values = np.random.default_rng(0).uniform(0.5, 1.5, 96)
    adapter = saved(Adapter("tuned", {"model.layers.0.mlp.up_proj": Scale(values)}))
    whole = merge_gguf(adapter, tmp_path / "whole.gguf", model=str(file)).read_bytes()
    output = tmp_path / "merged.gguf"
    # A write of the file waits, so that the kill comes in the middle of it.
    program = (
        "import time\nfrom pathlib import Path\n"
        "from propulsion_export.merging.gguf import writing\n"
        "from propulsion_export.pipeline.merge_gguf import merge_gguf\n"
        "plain = writing.write_all\n"
        "def slow(target, content):\n    plain(target, content)\n    print('.', flush=True)\n"
        "    time.sleep(5)\n"
        "writing.write_all = slow\n"
        f"merge_gguf({str(adapter)!r}, Path({str(output)!r}), model={str(file)!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()

    assert not output.exists()
    assert list(tmp_path.glob(".merged.gguf.partial-*"))
    merge_gguf(adapter, output, model=str(file))
    assert output.read_bytes() == whole
    assert not list(tmp_path.glob(".*partial*"))
