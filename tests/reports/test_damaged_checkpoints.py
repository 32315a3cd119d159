"""A damaged checkpoint gives a traceback, "interrupted", or without a word another adapter.

Whoever resumes after a full disk or a crash gets the adapter of an uninterrupted run, from the
checkpoint before if the last is damaged, or one line that names the damaged files.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.numpy import load_file, save_file

from propulsion_export.cli import main
from propulsion_export.errors import AdapterError, BaseModelError, UsageError
from propulsion_export.training import TrainOptions, train

KEPT = ".out.checkpoints"


@pytest.fixture(scope="module", name="base")
def make_base(tiny_checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "bert"
    shutil.copytree(tiny_checkpoint("bert", "feature-extraction"), directory)
    return directory


@pytest.fixture(scope="module", name="data")
def make_data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"text": f"{word} {other}", "label": label}
        for label, word in (("one", "ba"), ("two", "ce"))
        for other in ("di", "fa", "gi", "ha")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module", name="options")
def make_options(data):
    return TrainOptions(
        validation=data, epochs=3, batch_size=4, learning_rate=5e-3, head_only=False
    )


@pytest.fixture(scope="module", name="patient")
def make_patient(options):
    """The accuracy never rises, so the first epoch is the best."""
    small = replace(options, learning_rate=1e-9, head_learning_rate=1e-9)
    return replace(small, epochs=9, early_stopping=4)


def stop(base, data, output, options, message):
    """Train until a message starts so; the checkpoints stay."""

    def progress(fraction, text):
        if text.startswith(message):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, data, output, options=options, progress=progress)
    return output.with_name(KEPT)


@pytest.fixture(scope="module", name="stopped")
def make_stopped(base, data, options, tmp_path_factory):
    """Stopped after the second of three epochs."""
    return stop(base, data, tmp_path_factory.mktemp("run") / "out", options, "epoch 2 of 3")


@pytest.fixture(scope="module", name="stopped_early")
def make_stopped_early(base, data, patient, tmp_path_factory):
    """Stopped after four epochs, of which the first was the best."""
    return stop(base, data, tmp_path_factory.mktemp("run") / "out", patient, "epoch 4 of 9")


@pytest.fixture(scope="module", name="whole")
def make_whole(base, data, options, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    train(base, data, output, options=options)
    return weights_of(output)


def weights_of(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def remove(file):
    file.unlink()


def change(file):
    """Another value where the file stays readable."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def replace_by_directory(file):
    file.unlink()
    file.mkdir()


def test_two_checkpoints_stay_and_the_best_ones_they_name(stopped, stopped_early):
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert sorted(path.name for path in stopped_early.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-6",
        "checkpoint-8",
    ]


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        (truncate, "optimizer.pt"),
        (remove, "scheduler.pt"),
        (empty, "rng_state.pth"),
        (change, "adapter_model.safetensors"),
        (remove, "adapter_config.json"),
        (truncate, "trainer_state.json"),
        (remove, "digests.json"),
        (truncate, "digests.json"),
        (replace_by_directory, "rng_state.pth"),
    ],
)
def test_a_damaged_latest_checkpoint_is_passed_over_and_named(
    harm, file, stopped, whole, base, data, options, tmp_path
):
    shutil.copytree(stopped, tmp_path / KEPT)
    harm(tmp_path / KEPT / "checkpoint-4" / file)

    resumed = train(base, data, tmp_path / "out", options=replace(options, resume=True))

    (note,) = resumed.notes
    assert "checkpoint-4" in note
    assert file in note
    assert note.endswith("continued from checkpoint-2.")
    assert resumed.metrics["notes"] == [note]
    assert weights_of(tmp_path / "out") == whole
    assert not list(tmp_path.glob(".*"))


def test_undamaged_ones_are_continued_without_a_word(stopped, whole, base, data, options, tmp_path):
    shutil.copytree(stopped, tmp_path / KEPT)
    messages = []

    resumed = train(
        base,
        data,
        tmp_path / "out",
        options=replace(options, resume=True),
        progress=lambda fraction, message: messages.append(message),
    )

    assert resumed.notes == ()
    assert weights_of(tmp_path / "out") == whole
    assert not any(message.startswith("epoch 2") for message in messages)


def test_if_all_are_damaged_one_line_says_so_and_nothing_is_lost(
    stopped, base, data, tmp_path, capsys
):
    shutil.copytree(stopped, tmp_path / KEPT)
    truncate(tmp_path / KEPT / "checkpoint-4" / "optimizer.pt")
    remove(tmp_path / KEPT / "checkpoint-2" / "adapter_model.safetensors")
    before = content_of(tmp_path)
    words = ["train", "-m", base, "-d", data, "--validation", data, "-o", tmp_path / "out"]
    options = ["--epochs", 3, "--batch-size", 4, "--learning-rate", "5e-3", "--no-head-only"]

    with pytest.raises(SystemExit) as done:
        main([str(word) for word in (*words, *options, "--resume", "-q")])

    assert done.value.code == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint-4 is damaged or incomplete (optimizer.pt)" in line
    assert "checkpoint-2 is damaged or incomplete (adapter_model.safetensors)" in line
    assert content_of(tmp_path) == before


def content_of(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("harm", [change, remove])
def test_without_the_best_epoch_no_other_weights_are_given(
    harm, stopped_early, base, data, patient, tmp_path
):
    shutil.copytree(stopped_early, tmp_path / KEPT)
    harm(tmp_path / KEPT / "checkpoint-2" / "adapter_model.safetensors")

    with pytest.raises(
        AdapterError, match=r"checkpoint-8 needs the best epoch's .* checkpoint-2 is"
    ):
        train(base, data, tmp_path / "out", options=replace(patient, resume=True))

    assert [path.name for path in tmp_path.iterdir()] == [KEPT]


def test_the_best_epoch_that_disappears_while_training_is_missed(base, data, patient, tmp_path):
    def progress(fraction, message):
        if message.startswith("epoch 5"):  # the last: the fourth without a better one
            shutil.rmtree(tmp_path / KEPT / "checkpoint-2")

    with pytest.raises(AdapterError, match=r"best epoch .* checkpoint-2 has no digests\.json"):
        train(base, data, tmp_path / "out", options=patient, progress=progress)

    assert not (tmp_path / "out").exists()


def test_the_best_epoch_is_found_where_the_checkpoints_were_moved(
    stopped_early, base, data, patient, tmp_path
):
    shutil.copytree(stopped_early, tmp_path / KEPT)

    resumed = train(base, data, tmp_path / "out", options=replace(patient, resume=True))
    train(base, data, tmp_path / "whole", options=patient)

    assert resumed.metrics["kept_epoch"] == 1
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0",
        "basic_ios::clear: iostream error",
    ],
)
def test_a_disk_that_is_full_at_a_checkpoint_is_one_line_and_can_be_continued(
    text, whole, base, data, options, tmp_path, monkeypatch
):
    def save(content, file, **_):
        if "checkpoint-4" in str(file):
            raise RuntimeError(text)
        return real(content, file)

    real = torch.save
    with monkeypatch.context() as full:
        full.setattr(torch, "save", save)
        with pytest.raises(UsageError, match=r"no space left .* continue with --resume\.$"):
            train(base, data, tmp_path / "out", options=options)
    resumed = train(base, data, tmp_path / "out", options=replace(options, resume=True))

    assert "continued from checkpoint-2" in resumed.notes[0]
    assert weights_of(tmp_path / "out") == whole


def replace_bias(base):
    file = base / "model.safetensors"
    weights = load_file(file)
    weights["embeddings.LayerNorm.bias"] = weights["embeddings.LayerNorm.bias"] + 1
    save_file(weights, file, metadata={"format": "pt"})


def replace_dropout(base):
    file = base / "config.json"
    config = json.loads(file.read_text()) | {"hidden_dropout_prob": 0.3}
    file.write_text(json.dumps(config))


def swap_two_words(base):
    file = base / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["di"], words["fa"] = words["fa"], words["di"]
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("changed", [replace_bias, replace_dropout, swap_two_words])
def test_a_base_model_replaced_in_place_is_noticed(changed, base, data, options, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    stop(tmp_path / "base", data, tmp_path / "out", options, "epoch 1 of 3")
    before = content_of(tmp_path / KEPT)
    changed(tmp_path / "base")

    with pytest.raises(BaseModelError, match="are not those that the interrupted run in"):
        train(tmp_path / "base", data, tmp_path / "out", options=replace(options, resume=True))

    assert content_of(tmp_path / KEPT) == before


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [(EOFError("Ran out of input"), 70, "Ran out of input"), (KeyboardInterrupt(), 130, "interr")],
    ids=["end-of-file", "interrupted"],
)
def test_the_end_of_a_file_is_no_interruption(error, code, shown, monkeypatch, capsys):
    from propulsion_export.cli.inspect import command

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(command, "callback", fail)

    with pytest.raises(SystemExit) as done:
        main(["inspect", "."])

    assert done.value.code == code
    printed = capsys.readouterr().err
    assert shown in printed
    assert ("interrupted" in printed) == (code == 130)
