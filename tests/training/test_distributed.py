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

task, base, data, validation, output = sys.argv[1:]
options = TrainOptions(
    task=task, validation=Path(validation), epochs=2, batch_size=16, learning_rate=5e-3
)
train(base, data, output, options=options, progress=lambda fraction, message: print(message))
"""


def history_of(directory):
    return json.loads((directory / "metrics.json").read_text(encoding="utf-8"))["epochs"]


@pytest.fixture(name="data_of")
def make_data_of(texts, held_out_texts, tagged_rows, write_jsonl, tmp_path):
    """By task, training and validation data; sentences of unequal length share batches."""
    for row in tagged_rows[::3]:
        row["tokens"], row["labels"] = row["tokens"][:2], row["labels"][:2]
    tagged = write_jsonl(tmp_path / "tagged.jsonl", tagged_rows)
    return {
        "text-classification": (texts, held_out_texts),
        "token-classification": (tagged, tagged),
    }


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    # `--cpu` would start one process only; on a machine without a GPU this is how two are had.
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ),
}


@pytest.mark.parametrize(
    ("launcher", "task"),
    [
        ("accelerate", "text-classification"),
        ("torchrun", "token-classification"),
    ],
)
def test_two_processes_train_the_adapter_of_one(
    launcher, task, tiny_base, data_of, options, tmp_path
):
    data, validation = data_of[task]
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    finished = launch_two(
        launcher, tmp_path / "program.py", task, tiny_base, data, validation, tmp_path / "two"
    )
    assert finished.returncode == 0, finished.stderr
    options = replace(options, task=task, validation=validation, head_only=True)
    train(tiny_base, data, tmp_path / "one", options=options)

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


def launch_two(launcher, program, *arguments):
    command = ["-m", *LAUNCHERS[launcher], program]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
