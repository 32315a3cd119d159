"""Training moves the vectors and the head, the same way again, and leaves all or nothing."""

import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import propulsion_export.training.loop as loop_module
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.errors import BaseModelError, DataError, UsageError
from propulsion_export.training import TrainOptions, train
from propulsion_export.training.checkpoint_digests import in_order
from propulsion_export.training.classifying import ClassifierRun
from propulsion_export.training.data import read_examples

# PEFT reads the old name; training itself is quiet about it.
peft_reads_an_old_name = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def weights_of(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


def metrics_of(directory):
    return json.loads((directory / "metrics.json").read_text(encoding="utf-8"))


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


def test_gradient_checkpointing_gives_the_same_adapter_within_rounding(
    tiny_base, texts, options, tmp_path
):
    train(tiny_base, texts, tmp_path / "plain", options=options)
    options = replace(options, gradient_checkpointing=True)
    train(tiny_base, texts, tmp_path / "checkpointed", options=options)

    plain, checkpointed = Adapter.read(tmp_path / "plain"), Adapter.read(tmp_path / "checkpointed")
    for path, scale in plain.scales.items():
        assert scale.values == pytest.approx(checkpointed.scales[path].values, abs=1e-5)


def test_on_a_bfloat16_base_vectors_and_head_train_in_float32(tiny_base, texts, options, tmp_path):
    options = replace(options, dtype="bfloat16", learning_rate=1e-4, train_bias=True)

    train(tiny_base, texts, tmp_path / "out", options=options)

    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # A step of 1e-4 is lost beside 1 in bfloat16.
    assert all((tensor != 1).any() for tensor in tensors.values())


def test_a_part_that_the_checkpoint_lacks_is_trained_saved_and_in_the_notes(
    save_base, texts, options, tmp_path
):
    base = save_base(tmp_path / "base", pooler=False)
    for dtype in ("float32", "bfloat16"):
        changed = replace(options, head_only=True, dtype=dtype)
        result = train(base, texts, tmp_path / dtype, options=changed)

        adapter = Adapter.read(tmp_path / dtype)
        assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= set(adapter.modules)
        assert "bert.pooler.dense" not in adapter.scales
        assert result.metrics["head_only_accuracy"] is None
        assert "has no bert.pooler.dense" in result.notes[0]


def test_a_head_for_other_classes_is_replaced(save_base, texts, options, tmp_path):
    save_base(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=7
    )
    model.save_pretrained(tmp_path / "seven")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "seven")

    train(tmp_path / "seven", texts, tmp_path / "out", options=options)

    assert Adapter.read(tmp_path / "out").modules["classifier.weight"].shape == (3, 32)


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        pytest.param(
            lambda vocabulary: transformers.RobertaForSequenceClassification(
                transformers.RobertaConfig(
                    vocab_size=vocabulary,
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=32,
                    max_position_embeddings=40,
                    pad_token_id=0,
                )
            ),
            {"classifier"},
            id="roberta",
        ),
        pytest.param(
            lambda vocabulary: transformers.DistilBertForSequenceClassification(
                transformers.DistilBertConfig(
                    vocab_size=vocabulary, dim=16, n_layers=1, n_heads=2, hidden_dim=32
                )
            ),
            {"classifier", "pre_classifier"},
            id="distilbert",
        ),
        pytest.param(
            lambda vocabulary: transformers.GPT2ForSequenceClassification(
                transformers.GPT2Config(
                    vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, pad_token_id=0
                )
            ),
            {"score"},
            id="gpt2",
        ),
    ],
)
def test_the_head_is_found_whatever_it_is_called(save_base, make, heads, texts, options, tmp_path):
    base = save_base(tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    make(len(tokenizer)).save_pretrained(base)

    metrics = train(
        base, texts, tmp_path / "out", options=replace(options, head_only=True, epochs=1)
    ).metrics

    assert set(metrics["trained_modules"]) == heads
    saved = Adapter.read(tmp_path / "out").modules
    assert {name.split(".")[0] for name in saved} == heads
    assert 0 <= metrics["head_only_accuracy"] <= 1


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


class Interrupt:
    """Ctrl-C as soon as a message starts so."""

    def __init__(self, start):
        self.start = start
        self.messages = []

    def __call__(self, fraction, message):
        self.messages.append((fraction, message))
        if message.startswith(self.start):
            raise KeyboardInterrupt


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


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent", "does not exist"), ("empty", "has no config.json, expected")],
)
def test_a_base_model_that_cannot_be_loaded_is_one_line(name, reason, texts, options, tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(BaseModelError) as caught:
        train(tmp_path / name, texts, tmp_path / "out", options=options)

    assert re.match(rf"{re.escape(str(tmp_path / name))}: {reason}", str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("share", [0.5, 0.0001])
def test_a_truncated_base_model_is_one_line(share, save_base, texts, options, tmp_path):
    base = save_base(tmp_path / "base")
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    with pytest.raises(BaseModelError) as caught:
        train(base, texts, tmp_path / "out", options=options)

    assert str(caught.value).startswith(f"{base}: cannot be loaded (")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_a_long_text_is_cut_to_the_positions_there_are(
    kind, tiny_checkpoint, write_jsonl, tmp_path
):
    rows = [{"text": " ".join([word] * 500), "label": word} for word in ("ba", "ko") * 4]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    options = TrainOptions(validation=data, epochs=1, batch_size=8, head_only=False)

    trained = train(tiny_checkpoint(kind), data, tmp_path / "out", options=options)

    assert trained.metrics["max_length"] == 38  # of 40 positions


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
