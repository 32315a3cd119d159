"""Training moves the vectors and the head, the same way again, and writes what they are."""

import json
import logging
import re
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from trained_adapters import metrics_of, peft_reads_an_old_name, weights_of

import propulsion_export.training.loop as loop_module
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.errors import UsageError
from propulsion_export.training import TrainOptions, train
from propulsion_export.training.checkpoint_digests import in_order
from propulsion_export.training.classifying import ClassifierRun
from propulsion_export.training.data import read_examples


@pytest.fixture(name="trained", scope="session")
def make_trained(tiny_base, texts, held_out_texts, tmp_path_factory):
    """One adapter that several tests look at."""
    options = TrainOptions(
        validation=held_out_texts, epochs=3, batch_size=16, learning_rate=5e-3, train_bias=True
    )
    return train(tiny_base, texts, tmp_path_factory.mktemp("out") / "topics", options=options)


@peft_reads_an_old_name
def test_peft_loads_the_adapter_and_reproduces_the_validation_accuracy(
    trained, tiny_base, held_out_texts, options
):
    labels = trained.metrics["labels"]
    auto = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(tiny_base, num_labels=len(labels))
    model = peft.PeftModel.from_pretrained(base, trained.directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    examples = read_examples(held_out_texts, options.columns)

    inputs = tokenizer([example.text for example in examples], padding=True, return_tensors="pt")
    guesses = [labels[index] for index in model(**inputs).logits.argmax(-1)]

    right = sum(guess == example.label for guess, example in zip(guesses, examples, strict=True))
    assert right / len(examples) == pytest.approx(trained.metrics["validation_accuracy"])


def test_the_adapter_knows_its_labels_task_and_base(trained, tiny_base):
    adapter = Adapter.read(trained.directory)

    assert adapter.labels == ("animal", "food", "place")
    assert adapter.task == "text-classification"
    assert adapter.base == str(tiny_base.resolve())
    assert adapter.fingerprint is not None


def test_vectors_biases_and_head_are_trained_and_no_frozen_weight_is_saved(trained, tiny_base):
    adapter = Adapter.read(trained.directory)
    frozen = load_file(tiny_base / "model.safetensors")

    still = [path for path, scale in adapter.scales.items() if (scale.values == 1).all()]
    assert still == []
    assert set(adapter.modules) == {"classifier.weight", "classifier.bias"}
    for path, bias in adapter.biases.items():
        assert (bias != frozen[f"{path.removeprefix('bert.')}.bias"].numpy()).any()
    saved = load_file(trained.directory / "adapter_model.safetensors")
    assert [name for name in saved if "base_layer" in name] == []


def test_metrics_count_what_the_adapter_holds_and_follow_the_epochs(trained):
    metrics, adapter = metrics_of(trained.directory), Adapter.read(trained.directory)

    assert metrics == trained.metrics
    assert metrics["trainable_parameters"] == {
        "vectors": adapter.size,
        "biases": sum(bias.size for bias in adapter.biases.values()),
        "head": 3 * 32 + 3,
    }
    assert [entry["epoch"] for entry in metrics["epochs"]] == [1, 2, 3]
    assert metrics["epochs"][2]["train_loss"] < metrics["epochs"][0]["train_loss"]
    assert metrics["train_loss"] == metrics["epochs"][2]["train_loss"]
    assert metrics["rows"] == {"train": 96, "validation": 30}
    assert metrics["head_only_accuracy"] > 1 / 3
    assert metrics["seed"] == 0
    assert metrics["versions"]["peft"] == peft.__version__


def test_an_epochs_loss_does_not_depend_on_how_often_it_is_logged(
    tiny_base, texts, options, tmp_path, monkeypatch
):
    options = replace(options, batch_size=14)  # 7 steps an epoch
    often = train(tiny_base, texts, tmp_path / "often", options=options).metrics
    monkeypatch.setattr(loop_module, "_CURVE_POINTS", 3)  # after every second step
    seldom = train(tiny_base, texts, tmp_path / "seldom", options=options).metrics

    for left, right in zip(often["epochs"], seldom["epochs"], strict=True):
        assert left == pytest.approx(right, rel=1e-5)


def test_the_directory_holds_what_it_should_and_no_checkpoint_is_left(trained):
    names = {file.name for file in trained.directory.iterdir()}

    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss-curve.png",
        "metrics.json",
    }
    assert [path.name for path in trained.directory.parent.iterdir()] == ["topics"]


def test_the_optimiser_decays_nothing_and_gives_the_head_its_own_rate(
    tiny_base, texts, options, tmp_path, monkeypatch
):
    seen = []

    class Spy(torch.optim.AdamW):
        def __init__(self, groups, **settings):
            super().__init__(groups, **settings)
            seen.extend(dict(group) for group in self.param_groups)

    monkeypatch.setattr(loop_module.torch.optim, "AdamW", Spy)
    train(tiny_base, texts, tmp_path / "out", options=replace(options, train_bias=True, epochs=1))

    assert [group["weight_decay"] for group in seen] == [0, 0, 0]
    assert [group["lr"] for group in seen] == [5e-3, 5e-3, 1e-2]
    assert [sum(p.numel() for p in group["params"]) for group in seen] == [576, 480, 99]


def test_a_channel_without_gradient_keeps_its_one(save_base, texts, options, tmp_path):
    base = save_base(tmp_path / "base")
    model = transformers.BertModel.from_pretrained(base)
    value = model.encoder.layer[0].attention.self.value
    with torch.no_grad():
        value.weight[5] = 0  # the channel gives 0, whatever it is multiplied by
        value.bias[5] = 0
    model.save_pretrained(base)

    train(base, texts, tmp_path / "out", options=options)

    scales = Adapter.read(tmp_path / "out").scales
    ones = scales["bert.encoder.layer.0.attention.self.value"].values == 1
    assert ones.tolist() == [channel == 5 for channel in range(32)]


def test_a_seed_gives_the_same_adapter_and_another_seed_another(
    save_base, texts, options, tmp_path
):
    base = save_base(tmp_path / "base", hidden_dropout_prob=0.1)
    options = replace(options, validation=None)
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        train(base, texts, tmp_path / name, options=replace(options, seed=seed))

    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "again")
    assert weights_of(tmp_path / "first") != weights_of(tmp_path / "other")
    first = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert first == again


def test_training_the_head_alone_changes_nothing_in_the_adapter(
    tiny_base, texts, options, tmp_path
):
    train(tiny_base, texts, tmp_path / "without", options=options)
    train(tiny_base, texts, tmp_path / "with", options=replace(options, head_only=True))

    assert weights_of(tmp_path / "without") == weights_of(tmp_path / "with")
    assert metrics_of(tmp_path / "without")["head_only_accuracy"] is None


def test_without_a_validation_file_a_tenth_is_held_out_and_said(
    tiny_base, texts, options, tmp_path
):
    options = replace(options, validation=None, epochs=1)

    metrics = train(tiny_base, texts, tmp_path / "out", options=options).metrics

    assert metrics["rows"] == {"train": 87, "validation": 9}
    assert (
        metrics["validation_data"] == "a tenth of each class of train.jsonl, held out with seed 0"
    )


def test_token_classification_learns_which_words_are_nouns(
    tiny_base, tagged_rows, write_jsonl, tmp_path
):
    data = write_jsonl(tmp_path / "data.jsonl", tagged_rows)
    options = TrainOptions(task="token-classification", epochs=4, batch_size=16, learning_rate=5e-3)

    metrics = train(tiny_base, data, tmp_path / "out", options=options).metrics

    adapter = Adapter.read(tmp_path / "out")
    assert adapter.task == "token-classification"
    assert adapter.labels == ("filler", "noun")
    assert metrics["validation_accuracy"] > 0.75  # three words of four are fillers
    assert metrics["head_only_accuracy"] > 0.5


class Interrupt:
    """Ctrl-C as soon as a message starts so."""

    def __init__(self, start):
        self.start = start
        self.messages = []

    def __call__(self, fraction, message):
        self.messages.append((fraction, message))
        if message.startswith(self.start):
            raise KeyboardInterrupt


def test_early_stopping_keeps_the_best_epoch(tiny_base, texts, options, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.6, 0.7, 0.8])
    scored = replace(
        ClassifierRun.objective,
        scores=lambda _: {"accuracy": next(accuracies), "mean_loss": 1.0},
    )
    monkeypatch.setattr(ClassifierRun, "objective", scored)
    options = replace(options, epochs=5)
    metrics = train(
        tiny_base, texts, tmp_path / "best", options=replace(options, early_stopping=2)
    ).metrics

    assert [entry["validation_accuracy"] for entry in metrics["epochs"]] == [0.5, 0.9, 0.6, 0.7]
    assert (metrics["kept_epoch"], metrics["validation_accuracy"]) == (2, 0.9)
    kept = weights_of(tmp_path / "best")
    accuracies = iter([0.5, 0.9, 0.9, 0.9, 0.9])
    interrupted = Interrupt("epoch 2")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, texts, tmp_path / "second", options=options, progress=interrupted)
    checkpoint = in_order(tmp_path / ".second.checkpoints")[0]
    assert weights_of(checkpoint) == kept


def test_progress_rises_to_one_and_tells_every_epoch(tiny_base, texts, options, tmp_path):
    calls = []
    train(
        tiny_base,
        texts,
        tmp_path / "out",
        options=options,
        progress=lambda fraction, message: calls.append((fraction, message)),
    )

    fractions = [fraction for fraction, _ in calls]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    epochs = [message for _, message in calls if message.startswith("epoch")]
    assert len(epochs) == 2
    assert re.fullmatch(r"epoch 2 of 2: validation accuracy [01]\.\d{4}", epochs[1])


def test_training_prints_nothing_and_leaves_the_libraries_as_they_were(
    tiny_base, texts, options, tmp_path, capfd
):
    settings = transformers.utils.logging
    before = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity(logging.INFO)
    train(tiny_base, texts, tmp_path / "out", options=options)

    assert settings.get_verbosity() == logging.INFO
    settings.set_verbosity(before[0])
    assert settings.is_progress_bar_enabled() == before[1]
    assert capfd.readouterr() == ("", "")


@peft_reads_an_old_name
def test_a_token_classification_adapter_predicts_the_same_when_peft_loads_it(
    tiny_base, tagged_rows, write_jsonl, tmp_path
):
    data = write_jsonl(tmp_path / "data.jsonl", tagged_rows)
    options = TrainOptions(
        task="token-classification", validation=data, epochs=1, batch_size=16, head_only=False
    )
    metrics = train(tiny_base, data, tmp_path / "out", options=options).metrics
    auto = transformers.AutoModelForTokenClassification
    base = auto.from_pretrained(tiny_base, num_labels=2)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)

    right = counted = 0
    for row in tagged_rows:
        inputs = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        guesses = model(**inputs).logits[0].argmax(-1).tolist()
        words = inputs.word_ids()
        for word, label in enumerate(row["labels"]):
            right += metrics["labels"][guesses[words.index(word)]] == label
            counted += 1

    assert right / counted == pytest.approx(metrics["validation_accuracy"])


def test_an_output_that_is_not_empty_is_refused_and_replaced_only_with_force(
    trained, tiny_base, texts, options, tmp_path
):
    train(tiny_base, texts, tmp_path / "out", options=options)
    before = weights_of(tmp_path / "out")

    with pytest.raises(UsageError, match="exists and is not empty"):
        train(tiny_base, texts, tmp_path / "out", options=replace(options, seed=1))
    assert weights_of(tmp_path / "out") == before
    train(tiny_base, texts, tmp_path / "out", options=replace(options, seed=1, force=True))
    assert weights_of(tmp_path / "out") != before
