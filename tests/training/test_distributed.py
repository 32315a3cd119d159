"""Two processes that share a batch train the adapter that one process trains."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from propulsion_export.adapter import Adapter
from propulsion_export.training import train

PROGRAM = """
import sys
from pathlib import Path
from propulsion_export.training import TrainOptions, train

base, data, validation, output = sys.argv[1:]
options = TrainOptions(validation=Path(validation), epochs=2, batch_size=16, learning_rate=5e-3)
train(base, data, output, options=options, progress=lambda fraction, message: print(message))
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=2"],
}


def history_of(directory):
    return json.loads((directory / "metrics.json").read_text(encoding="utf-8"))["epochs"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_the_adapter_of_one(
    launcher, tiny_base, texts, held_out_texts, options, tmp_path
):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    arguments = [program, tiny_base, texts, held_out_texts, tmp_path / "two"]
    finished = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    train(tiny_base, texts, tmp_path / "one", options=replace(options, head_only=True))

    one, two = Adapter.read(tmp_path / "one"), Adapter.read(tmp_path / "two")
    for path, scale in one.scales.items():
        assert two.scales[path].values == pytest.approx(scale.values, abs=1e-5)
        assert (scale.values != 1).any()
    for name, values in one.modules.items():
        assert two.modules[name] == pytest.approx(values, abs=1e-5)
    # Adam hides a loss that is averaged wrongly, its history does not.
    assert history_of(tmp_path / "two") == [
        pytest.approx(epoch, rel=1e-4) for epoch in history_of(tmp_path / "one")
    ]
    # Both processes call back, the first tells.
    assert finished.stdout.count("epoch 2 of 2") == 1
    assert finished.stdout.count("wrote") == 1
    assert not list(tmp_path.glob(".*"))
