"""A resumed training ends with the same adapter as an uninterrupted one."""

import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from propulsion_export.errors import UsageError
from propulsion_export.training import train

# Trains as the tests do, and waits after each epoch until it is killed.
PROGRAM = """
import sys, time
from pathlib import Path
from propulsion_export.training import TrainOptions, train

base, data, validation, output = sys.argv[1:]
options = TrainOptions(
    validation=Path(validation), epochs=3, batch_size=16, learning_rate=5e-3, head_only=False
)

def progress(fraction, message):
    print(message, flush=True)
    time.sleep(60 * message.startswith("epoch"))

train(base, data, output, options=options, progress=progress)
"""


def weights_of(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


def interrupt_at(start):
    def progress(fraction, message):
        if message.startswith(start):
            raise KeyboardInterrupt

    return progress


@pytest.fixture(name="dropout_base")
def make_dropout_base(save_base, tmp_path):
    """With dropout, the state of the random numbers has to come back too."""
    return save_base(tmp_path / "base", hidden_dropout_prob=0.2)


@pytest.fixture(name="interrupted")
def make_interrupted(dropout_base, texts, options, tmp_path):
    """Where training stopped after its first of three epochs."""
    options = replace(options, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train(
            dropout_base,
            texts,
            tmp_path / "out",
            options=options,
            progress=interrupt_at("epoch 1 of 3"),
        )
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


def test_a_resumed_training_gives_the_adapter_of_an_uninterrupted_one(
    interrupted, dropout_base, texts, options, tmp_path
):
    options = replace(options, epochs=3)
    messages = []
    resumed = train(
        dropout_base,
        texts,
        interrupted,
        options=replace(options, resume=True),
        progress=lambda fraction, message: messages.append(message),
    )
    whole = train(dropout_base, texts, tmp_path / "whole", options=options)

    assert not any(message.startswith("epoch 1") for message in messages)
    assert weights_of(interrupted) == weights_of(tmp_path / "whole")
    assert resumed.metrics["epochs"] == whole.metrics["epochs"]
    assert resumed.notes == ()
    assert not list(tmp_path.glob(".*"))


def test_a_resumed_early_stop_remembers_its_patience(dropout_base, texts, options, tmp_path):
    options = replace(options, epochs=8, early_stopping=2, learning_rate=1e-9)
    options = replace(options, head_learning_rate=1e-9)  # the accuracy never rises
    stopped = train(dropout_base, texts, tmp_path / "whole", options=options)
    with pytest.raises(KeyboardInterrupt):
        train(
            dropout_base,
            texts,
            tmp_path / "early",
            options=options,
            progress=interrupt_at("epoch 2 of 8"),
        )

    resumed = train(dropout_base, texts, tmp_path / "early", options=replace(options, resume=True))

    assert len(stopped.metrics["epochs"]) == 3
    assert resumed.metrics["epochs"] == stopped.metrics["epochs"]
    assert resumed.metrics["kept_epoch"] == 1
    assert weights_of(tmp_path / "early") == weights_of(tmp_path / "whole")


def test_without_resume_an_old_checkpoint_is_ignored(
    interrupted, dropout_base, texts, options, tmp_path
):
    options = replace(options, seed=5, epochs=1)
    train(dropout_base, texts, interrupted, options=options)
    train(dropout_base, texts, tmp_path / "fresh", options=options)

    assert weights_of(interrupted) == weights_of(tmp_path / "fresh")
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_of_another_run_is_refused_and_kept(
    interrupted, dropout_base, texts, held_out_texts, options
):
    options = replace(options, epochs=3, resume=True)
    kept = interrupted.with_name(".out.checkpoints")

    with pytest.raises(
        UsageError, match=r"left by a run with degree 15, expected 5;.* seed 0, expected 1"
    ):
        train(dropout_base, texts, interrupted, options=replace(options, seed=1, degree=5))
    with pytest.raises(UsageError, match="left by a run with data "):
        train(dropout_base, held_out_texts, interrupted, options=options)

    assert [path.name for path in kept.glob("checkpoint-*")] == ["checkpoint-6"]


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(
    dropout_base, texts, options, tmp_path
):
    options = replace(options, epochs=1)
    result = train(dropout_base, texts, tmp_path / "out", options=replace(options, resume=True))
    train(dropout_base, texts, tmp_path / "plain", options=options)

    assert result.notes == ("There was no checkpoint to resume, so the training started afresh.",)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")


def test_a_checkpoint_that_was_not_finished_is_passed_over(
    interrupted, dropout_base, texts, options, tmp_path
):
    """A kill while epoch 2 was being written leaves a directory without its last file."""
    torn = interrupted.with_name(".out.checkpoints") / "checkpoint-12"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"torn")
    (torn / "trainer_state.json").write_text('{"epoch": ')
    options = replace(options, epochs=3)
    train(dropout_base, texts, interrupted, options=replace(options, resume=True))
    train(dropout_base, texts, tmp_path / "whole", options=options)

    assert weights_of(interrupted) == weights_of(tmp_path / "whole")


def test_an_interruption_before_the_first_epoch_leaves_nothing(
    dropout_base, texts, options, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        train(
            dropout_base,
            texts,
            tmp_path / "out",
            options=options,
            progress=interrupt_at("step 2 of"),
        )

    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_checkpoints_hold_no_frozen_weights(interrupted, dropout_base):
    (checkpoint,) = interrupted.with_name(".out.checkpoints").glob("checkpoint-*")
    names = {path.name for path in checkpoint.iterdir()}

    assert "training_args.bin" not in names
    adapter = checkpoint / "adapter_model.safetensors"
    assert adapter.stat().st_size < (dropout_base / "model.safetensors").stat().st_size / 5


def test_a_killed_training_can_be_resumed(dropout_base, texts, held_out_texts, options, tmp_path):
    arguments = [dropout_base, texts, held_out_texts, tmp_path / "out"]
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 1 of 3"):
                process.send_signal(signal.SIGKILL)

    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()

    options = replace(options, epochs=3)
    train(dropout_base, texts, tmp_path / "out", options=replace(options, resume=True))
    train(dropout_base, texts, tmp_path / "whole", options=options)

    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))
