"""Variables of a scheduler make `train` write nothing, write twice or double the batch.

Whoever trains inside a batch job has RANK, WORLD_SIZE, OMPI_* or PMI_* in the environment, of this
run or left by another. Exactly one process writes the adapter, or the command is refused.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.cli import main
from propulsion_export.errors import UnavailableError, UsageError
from propulsion_export.training import TrainOptions, train
from propulsion_export.training.processes import Processes, check_joined, read_processes

OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MEET = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
PROGRAM = "from propulsion_export.cli import main; main()"

left = pytest.mark.parametrize(
    ("variables", "named"),
    [
        pytest.param({"RANK": "1"}, ["RANK=1", "WORLD_SIZE"], id="rank"),
        pytest.param({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "RANK"], id="size"),
        pytest.param({"LOCAL_RANK": "3"}, ["LOCAL_RANK=3", "WORLD_SIZE"], id="local-rank"),
        pytest.param({"OMPI_COMM_WORLD_RANK": "1"}, ["OMPI_COMM_WORLD_RANK=1"], id="open-mpi-rank"),
        pytest.param({"PMI_SIZE": "2"}, ["PMI_SIZE=2", "RANK"], id="pmi-size"),
        pytest.param(
            dict(zip(TORCH, "012", strict=True)) | MEET,
            ["WORLD_SIZE=1", "LOCAL_RANK=2"],
            id="local",
        ),
        pytest.param(
            dict(zip(TORCH, "220", strict=True)) | MEET,
            ["RANK=2", "WORLD_SIZE=2"],
            id="rank-beyond",
        ),
        pytest.param(dict(zip(TORCH, "020", strict=True)), ["MASTER_ADDR"], id="no-address"),
        pytest.param(
            {"RANK": "0"} | dict(zip(OPEN_MPI, "121", strict=True)) | MEET,
            ["RANK=0", "OMPI_COMM_WORLD_RANK=1"],
            id="mpi-and-an-old-rank",
        ),
        pytest.param({"WORLD_SIZE": "four"}, ["WORLD_SIZE is 'four'"], id="word"),
        pytest.param({"MV2_COMM_WORLD_RANK": ""}, ["MV2_COMM_WORLD_RANK is ''"], id="empty"),
    ],
)


@left
@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "accelerator"])
def test_variables_that_fit_no_launch_are_refused_by_name(variables, named, on_cpu):
    with pytest.raises(UsageError) as refused:
        read_processes(variables, on_cpu=on_cpu)

    assert all(name in str(refused.value) for name in named)
    assert "unset" in str(refused.value).lower()


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "accelerator"])
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "-1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        dict(zip(OPEN_MPI, "010", strict=True)),
        dict(zip(PMI, "010", strict=True)) | {"RANK": "0"},
    ],
    ids=lambda variables: ",".join(variables) or "none",
)
def test_variables_of_a_single_process_are_one_process(variables, on_cpu):
    processes = read_processes(variables, on_cpu=on_cpu)

    assert (processes.count, processes.is_main, processes.grouped) == (1, True, False)
    partial = set(variables) & set(TORCH) and not set(TORCH) <= set(variables)
    assert bool(processes.note) == bool(partial and variables != {"LOCAL_RANK": "-1"})


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "accelerator"])
def test_torchruns_variables_count_where_mpi_started_it(on_cpu):
    variables = dict(zip(TORCH, "582", strict=True)) | dict(zip(PMI, "120", strict=True)) | MEET

    assert read_processes(variables, on_cpu=on_cpu) == Processes(8, 5, 2, grouped=True)


def test_processes_of_mpi_train_together_on_cpus_and_are_refused_elsewhere():
    variables = dict(zip(OPEN_MPI, "121", strict=True)) | MEET

    assert read_processes(variables, on_cpu=True) == Processes(2, 1, 1, grouped=True)
    with pytest.raises(UsageError, match=r"OMPI_COMM_WORLD_SIZE=2.*without RANK.*torchrun"):
        read_processes(variables, on_cpu=False)


def test_what_accelerate_sees_must_be_what_was_started():
    class State:
        num_processes, process_index = 1, 0

    check_joined(State, Processes())
    with pytest.raises(UnavailableError, match="process 1 of 2 was started, accelerate sees"):
        check_joined(State, Processes(2, 1, 1, grouped=True))


@pytest.fixture(scope="module", name="base")
def make_base(tiny_model, tiny_checkpoint, tmp_path_factory):
    """Without dropout, so that two processes train what one trains."""
    directory = tmp_path_factory.mktemp("base") / "bert"
    shutil.copytree(tiny_checkpoint("bert", "feature-extraction"), directory)
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_model("bert", "feature-extraction", **settings).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", name="data")
def make_data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"text": f"{word} {other}", "label": label}
        for label, word in (("one", "ba"), ("two", "ce"))
        for other in ("di", "fa", "gi", "ha", "ki", "la", "me", "ni")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module", name="alone")
def make_alone(base, data, tmp_path_factory):
    """The adapter that one process trains, without any of these variables."""
    output = tmp_path_factory.mktemp("alone") / "adapter"
    options = TrainOptions(
        validation=data, epochs=1, batch_size=8, learning_rate=5e-3, head_only=False
    )
    train(base, data, output, options=options)
    return output


@pytest.fixture(name="words")
def make_words(base, data, tmp_path):
    """A training's arguments."""
    words = ["train", "-m", base, "-d", data, "--validation", data, "-o", tmp_path / "out"]
    options = ["--epochs", 1, "--batch-size", 8, "--learning-rate", "5e-3", "--no-head-only"]
    return [str(word) for word in (*words, *options)]


def exit_code(words):
    with pytest.raises(SystemExit) as done:
        main(words)
    return done.value.code


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "4"},
        {"OMPI_COMM_WORLD_RANK": "1"},
        {"ACCELERATE_USE_CPU": "perhaps"},
    ],
    ids=lambda variables: ",".join(variables),
)
def test_train_refuses_them_before_any_work(variables, words, tmp_path, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert exit_code(words) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert next(iter(variables)) in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "variables",
    [{"LOCAL_RANK": "0"}, dict(zip(OPEN_MPI, "010", strict=True))],
    ids=["local-rank", "mpirun-n-1"],
)
def test_a_single_process_writes_the_adapter(
    variables, words, alone, tmp_path, monkeypatch, capsys
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert exit_code(words) == 0

    assert weights_of(tmp_path / "out") == weights_of(alone)
    assert ("LOCAL_RANK=0 without" in capsys.readouterr().err) == ("LOCAL_RANK" in variables)
    assert {name: os.environ.get(name) for name in variables} == variables
    assert not torch.distributed.is_initialized()


def test_two_processes_of_mpi_share_the_batch_and_one_writes(words, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}

    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words, "--json"],
            env=os.environ | meet | dict(zip(OPEN_MPI, (rank, "2", rank), strict=True)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    printed = [process.communicate(timeout=110)[0] for process in started]

    assert [process.returncode for process in started] == [0, 0]
    assert json.loads(printed[0])["adapter"] == str(tmp_path / "out")
    assert printed[1] == ""
    one, two = Adapter.read(alone), Adapter.read(tmp_path / "out")
    for path, scale in one.scales.items():
        assert two.scales[path].values == pytest.approx(scale.values, abs=1e-5)
        assert (scale.values != 1).any()


def weights_of(directory):
    return (directory / "adapter_model.safetensors").read_bytes()
