"""Two processes that share a batch, or the model too, train the adapter that one trains."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.training import train

PROGRAM = """
import json
import sys
from pathlib import Path
from propulsion_export.training import TrainOptions, train

for training in json.loads(sys.argv[1]):
    task, base, data, validation, output, steps = training
    options = TrainOptions(
        task=task,
        validation=Path(validation),
        epochs=2,
        batch_size=16,
        learning_rate=5e-3,
        gradient_accumulation_steps=steps,
    )
    train(base, data, output, options=options, progress=lambda fraction, message: print(message))
"""


def history_of(directory):
    return json.loads((directory / "metrics.json").read_text(encoding="utf-8"))["epochs"]


def base_loss_of(directory):
    return json.loads((directory / "metrics.json").read_text(encoding="utf-8")).get("base_loss")


@pytest.fixture(name="data_of")
def make_data_of(texts, held_out_texts, tagged_rows, write_jsonl, passages, tmp_path):
    """By task, training and validation data; sentences of unequal length share batches."""
    for row in tagged_rows[::3]:
        row["tokens"], row["labels"] = row["tokens"][:2], row["labels"][:2]
    tagged = write_jsonl(tmp_path / "tagged.jsonl", tagged_rows)
    return {
        "text-classification": (texts, held_out_texts),
        "token-classification": (tagged, tagged),
        "text-generation": (passages, passages),
        "text2text-generation": (passages, passages),
    }


@pytest.fixture(name="base_of")
def make_base_of(tiny_checkpoint, tiny_model, tmp_path):
    """A function: a checkpoint of this kind, without dropout."""

    def base_of(kind):
        shutil.copytree(tiny_checkpoint(kind), tmp_path / kind)
        tiny_model(kind, **WITHOUT_DROPOUT.get(kind, {})).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return base_of


WITHOUT_DROPOUT = {"t5": {"dropout_rate": 0.0}}
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    # `--cpu` would start one process only; on a machine without a GPU this is how two are had.
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ),
    "fsdp": ("accelerate.commands.launch", "--main_process_port=0"),
}


@pytest.mark.parametrize(
    ("launcher", "trainings"),
    [
        ("accelerate", [("text-classification", None, 1), ("text-generation", "llama", 2)]),
        ("torchrun", [("token-classification", None, 1), ("text2text-generation", "t5", 1)]),
    ],
    ids=["accelerate", "torchrun"],
)
def test_two_processes_train_the_adapter_of_one(
    launcher, trainings, tiny_base, base_of, data_of, options, tmp_path
):
    """Neither a batch shared by processes nor one gone through in parts changes a vector.

    A launch takes longer than a training, so each has two.
    """
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    bases = {task: base_of(kind) if kind else tiny_base for task, kind, _ in trainings}
    arguments = [
        (task, str(bases[task]), *map(str, data_of[task]), str(tmp_path / "two" / task), steps)
        for task, _, steps in trainings
    ]

    finished = launch_two(launcher, tmp_path / "program.py", json.dumps(arguments))

    assert finished.returncode == 0, finished.stderr
    for task in bases:
        data, validation = data_of[task]
        alone = replace(options, task=task, validation=validation, head_only=True)
        train(bases[task], data, tmp_path / "one" / task, options=alone)
        assert_same(tmp_path / "one" / task, tmp_path / "two" / task)
    # Both processes call back, the first tells.
    assert finished.stdout.count("epoch 2 of 2") == len(trainings)
    assert finished.stdout.count("wrote") == len(trainings)
    assert not list(tmp_path.rglob(".*"))


def assert_same(one, two):
    """Two trainings gave the same adapter in the same way."""
    first, second = Adapter.read(one), Adapter.read(two)
    assert first.scales.keys() == second.scales.keys() != set()
    assert first.modules.keys() == second.modules.keys()
    for path, scale in first.scales.items():
        assert second.scales[path].values == pytest.approx(scale.values, abs=1e-5)
        assert (scale.values != 1).any()
    for name, values in first.modules.items():
        assert second.modules[name] == pytest.approx(values, abs=1e-5)
    # Adam hides a loss that is averaged wrongly, its history does not.
    assert history_of(two) == [pytest.approx(epoch, rel=1e-4) for epoch in history_of(one)]
    assert base_loss_of(two) == pytest.approx(base_loss_of(one))


FSDP = """
distributed_type: FSDP
mixed_precision: "no"
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
"""
# Stops after its first epoch as if killed, unless it resumes; says what its weights are.
FSDP_PROGRAM = """
import os
import sys
from pathlib import Path

import torch
import transformers
from accelerate.state import DistributedType, PartialState
from propulsion_export.training import TrainOptions, train

base, data, output, dtype, resume = sys.argv[1:]

# accelerate 1.15 shards on accelerators alone; on CPUs it would make DDP of it without a word.
torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)

def look(trainer, *arguments, start=transformers.Trainer.train, **more):
    start(trainer, *arguments, **more)
    print({type(weight).__name__ for weight in trainer.model.parameters()})

transformers.Trainer.train = look

def progress(fraction, message):
    print(message, flush=True)
    if message.startswith("epoch 1") and resume == "0":
        os._exit(9)

options = TrainOptions(
    task="text-generation",
    validation=Path(data),
    epochs=2,
    batch_size=16,
    learning_rate=5e-3,
    dtype=dtype,
    resume=resume == "1",
)
train(base, data, output, options=options, progress=progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_shared_out_by_fsdp_is_trained_stopped_and_resumed(
    dtype, tiny_checkpoint, passages, options, tmp_path
):
    base, output = tiny_checkpoint("llama"), tmp_path / "two"
    (tmp_path / "fsdp.yaml").write_text(FSDP, encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(FSDP_PROGRAM, encoding="utf-8")

    stopped, finished = (
        launch_two("fsdp", program, base, passages, output, dtype, resume) for resume in (0, 1)
    )

    assert stopped.returncode != 0
    assert finished.returncode == 0, finished.stderr
    assert "epoch 1" not in finished.stdout
    assert finished.stdout.count("{'DTensor'}") == 2  # every weight is shared out
    options = replace(
        options, task="text-generation", validation=passages, dtype=dtype, head_only=True
    )
    train(base, passages, tmp_path / "one", options=options)
    one, two = Adapter.read(tmp_path / "one"), Adapter.read(output)
    for path, scale in one.scales.items():
        assert two.scales[path].values == pytest.approx(scale.values, abs=1e-5)
        assert (scale.values != 1).any()
    assert two.fingerprint == one.fingerprint
    assert base_loss_of(output) == pytest.approx(base_loss_of(tmp_path / "one"))


def launch_two(launcher, program, *arguments):
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    config = []
    if launcher == "fsdp":
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
        config = ["--config_file", program.with_name("fsdp.yaml")]
    command = ["-m", *LAUNCHERS[launcher], *config, program, *arguments]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
