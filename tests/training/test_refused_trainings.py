"""Trainings that are refused: data, options, outputs, and losses that diverge."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

import propulsion_export.training.loop as loop_module
from propulsion_export.errors import DataError, UsageError
from propulsion_export.training import TrainOptions, train


def test_bad_data_is_refused_before_the_model_is_looked_at(write_jsonl, options, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}])

    with pytest.raises(DataError, match="has no column 'label'"):
        train(tmp_path / "no-model", data, tmp_path / "out" / "deep", options=options)

    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_validation_label_that_training_lacks_is_refused(
    write_jsonl, tiny_base, texts, options, tmp_path
):
    rows = [{"text": "a", "label": "food"}, {"text": "b", "label": "plant"}]
    options = replace(options, validation=write_jsonl(tmp_path / "validation.jsonl", rows))

    with pytest.raises(DataError, match=r"validation.jsonl: the labels 'plant' do not occur"):
        train(tiny_base, texts, tmp_path / "out", options=options)

    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_is_refused_and_leaves_nothing(
    tiny_base, texts, options, tmp_path
):
    options = replace(options, degree=55, learning_rate=1e3)

    with pytest.raises(UsageError, match=r"diverged: the loss is (nan|inf).* lower --learning"):
        train(tiny_base, texts, tmp_path / "out", options=options)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "what"), [("loss", "loss"), ("eval_mean_loss", "validation loss")]
)
def test_a_number_of_the_log_that_is_not_finite_is_a_divergence(options, name, what, value):
    watch = loop_module.Watch(options, lambda share, message: None)

    with pytest.raises(UsageError, match=f"diverged: the {what} is {value} at step 3"):
        watch.on_log(None, SimpleNamespace(global_step=3), None, {"eval_accuracy": 1, name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "fill-mask"}, "--task is 'fill-mask', expected text-classification or token-"),
        (
            {"gradient_accumulation_steps": 0},
            "--gradient-accumulation-steps is 0, expected 1 or more",
        ),
        ({"packing": True}, "--packing is True, expected none for --task text-classification"),
        (
            {"task": "text2text-generation", "packing": True},
            "--packing is True, expected none for --task text2text-generation",
        ),
        (
            {"task": "text-generation", "head_learning_rate": 1.0},
            "--head-learning-rate is 1.0, expected none for --task text-generation",
        ),
        ({"epochs": 0}, "--epochs is 0, expected 1 or more"),
        ({"batch_size": 0}, "--batch-size is 0, expected 1 or more"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0, expected above 0"),
        ({"head_learning_rate": -1.0}, "--head-learning-rate is -1.0, expected above 0"),
        ({"degree": 0}, "--degree is 0, expected a positive number"),
        ({"max_length": 2}, "--max-length is 2, expected 3 or more"),
        ({"seed": -1}, "--seed is -1, expected 0 to 2**32 - 1"),
        ({"seed": 2**32}, "--seed is 4294967296, expected 0 to 2**32 - 1"),
        ({"early_stopping": 0}, "--early-stopping is 0, expected 1 or more"),
        ({"dtype": "float16"}, "--dtype is 'float16', expected float32 or bfloat16"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        TrainOptions(**changes)


def test_a_batch_that_processes_cannot_share_is_refused(
    tiny_base, texts, options, tmp_path, monkeypatch
):
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "localhost"}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))

    with pytest.raises(UsageError, match="--batch-size is 16, expected a multiple of the 3"):
        train(tiny_base, texts, tmp_path / "out", options=options)
