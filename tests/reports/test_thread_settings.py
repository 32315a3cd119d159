"""OMP_NUM_THREADS that is no number, or one core, stops or breaks a command.

A container's settings give words, lists, fractions or huge numbers, and may allow a single core;
every command computes the same as with one thread, or refuses in one line.
"""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import onnx_ir as ir
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.cli import main
from propulsion_export.errors import UsageError
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.serving.session import Session
from propulsion_export.training import TrainOptions, train
from propulsion_export.training.processes import Processes, read_processes

SETTINGS = ["abc", "", "0", "-1", "1.5", "4,2", " 2 ", "40000", "99999999999", "٣"]
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[n, 4] x) => (float[n, 4] y) {
    y = Softmax (x)
}
"""
GROUP = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
TRAINING = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from propulsion_export.cli import main
main()
"""


@pytest.mark.parametrize("threads", SETTINGS)
def test_onnx_runtime_computes_the_same_with_any_setting(threads, tmp_path, monkeypatch):
    ir.save(ir.from_onnx_text(GRAPH), tmp_path / "model.onnx")
    x = np.linspace(-3, 3, 400, dtype=np.float32).reshape(-1, 4)
    expected = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    warnings.filterwarnings("ignore", "OMP_NUM_THREADS is .* the number of cores")

    found = onnxruntime_runner(tmp_path / "model.onnx")({"x": x})["y"]

    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("threads", ["abc", "", "1.5", "4,2"])
def test_what_accelerate_cannot_read_is_refused_for_several_processes(threads):
    with pytest.raises(UsageError, match=r"OMP_NUM_THREADS is .* expected a whole number"):
        read_processes(GROUP | {"OMP_NUM_THREADS": threads}, on_cpu=True)

    assert read_processes({"OMP_NUM_THREADS": threads}, on_cpu=True) == Processes()


@pytest.mark.parametrize("threads", ["1", "0", " 2 "])
def test_numbers_are_taken_for_several_processes(threads):
    assert read_processes(GROUP | {"OMP_NUM_THREADS": threads}, on_cpu=True).count == 2


def test_training_on_one_core_is_the_same_with_any_setting(tiny_checkpoint, tmp_path):
    """The other training has this process's cores and setting."""
    base, data = tiny_checkpoint("bert", "feature-extraction"), tmp_path / "data.jsonl"
    rows = [{"text": f"{word} di", "label": word} for word in ("ba", "ce")] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["-m", base, "-d", data, "--validation", data, "--epochs", "1", "--no-head-only"]

    done = subprocess.run(
        [sys.executable, "-c", TRAINING, "train", *words, "-o", tmp_path / "one-core"],
        env=os.environ | {"OMP_NUM_THREADS": "abc"},
        capture_output=True,
        text=True,
        check=False,
    )
    options = TrainOptions(validation=data, epochs=1, head_only=False)
    train(base, data, tmp_path / "here", options=options)

    assert done.returncode == 0, done.stderr
    one, other = Adapter.read(tmp_path / "one-core"), Adapter.read(tmp_path / "here")
    for path, scale in one.scales.items():
        assert other.scales[path].values == pytest.approx(scale.values, abs=1e-5)
        assert (scale.values != 1).any()


COUNTING = """
import os, sys
from propulsion_export import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as done:
    assert not done.code, done.code
import torch
a = torch.ones(600, 600)
(a + a) @ a
print(torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], len(os.listdir("/proc/self/task")))
"""
HUGE = ["100000", "+100000", "4294967296", "4294967298", "9" * 30, "9" * 5000, "100000,2"]


@pytest.mark.parametrize("threads", HUGE, ids=lambda threads: threads[:20])
def test_more_threads_than_cores_are_told_and_not_started(threads):
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, "doctor", "--json"],
        env=os.environ | {"OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    cores = os.cpu_count()
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"OMP_NUM_THREADS is {threads[:17]}")
    assert line.endswith(f"and {cores}, the number of cores, is used instead")
    computing, told, started = map(int, done.stdout.splitlines()[-1].split())
    assert computing <= cores
    assert told == cores
    assert started < 10 * cores + 10


def test_quiet_commands_and_numbers_that_fit_are_not_told(monkeypatch, capsys):
    for threads, words in (("100000", ["doctor", "-q"]), (str(os.cpu_count()), ["doctor"])):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        with pytest.raises(SystemExit):
            main(words)
        assert capsys.readouterr().err == ""


def test_a_session_in_python_is_told_by_a_warning(banked, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")

    with pytest.warns(UserWarning, match="OMP_NUM_THREADS is 100000, and .* is used instead"):
        Session(banked)
