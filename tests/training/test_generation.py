"""Decoders and encoder-decoders learn to write, and are compared with their own base model."""

import json
import math
import re
import shutil
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import propulsion_export.training.loop as loop_module
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.cli import main
from propulsion_export.errors import BaseModelError, DataError, UsageError
from propulsion_export.training import TrainOptions, train
from propulsion_export.training.checkpoint_digests import in_order
from propulsion_export.training.generating import DecoderRun

KINDS = ("gpt2", "llama")


def weights_of(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


def scales_of(directory):
    return {path: scale.values for path, scale in Adapter.read(directory).scales.items()}


def interrupt_at(start):
    def progress(fraction, message):
        if message.startswith(start):
            raise KeyboardInterrupt

    return progress


def mean_loss(model, tokenizer, rows):
    """Of the responses and their ends, counted by hand, one row at a time."""
    total = count = 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *response, tokenizer.eos_token_id]])
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0].double().log_softmax(-1)
        for place in range(len(prompt), ids.shape[1]):
            total -= float(chances[place - 1, ids[0, place]])
            count += 1
    return total / count


@pytest.fixture(name="without_padding")
def make_without_padding(tiny_checkpoint, tmp_path):
    """A GPT-2 whose tokenizer has no padding token, as the real one."""
    shutil.copytree(tiny_checkpoint("gpt2"), tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    return tmp_path / "base"


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_learns_to_respond(
    kind, packing, tiny_checkpoint, passages, generation, make_passages, tmp_path
):
    options = replace(generation, packing=packing, epochs=4, batch_size=4)
    metrics = train(tiny_checkpoint(kind), passages, tmp_path / "out", options=options).metrics

    auto, tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    base, words = (part.from_pretrained(tiny_checkpoint(kind)) for part in (auto, tokenizer))
    assert metrics["base_loss"] == pytest.approx(mean_loss(base, words, make_passages(18, 2)))
    assert metrics["validation_loss"] < metrics["base_loss"] / 2
    losses = [entry["train_loss"] for entry in metrics["epochs"]]
    assert losses == sorted(losses, reverse=True)
    perplexity = math.exp(metrics["validation_loss"])
    assert metrics["validation_perplexity"] == pytest.approx(perplexity)
    # A PEFT user gets what was measured.
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    again = mean_loss(model, words, make_passages(18, 2))
    assert again == pytest.approx(metrics["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_learns_to_respond(
    kind, tiny_checkpoint, passages, generation, tmp_path
):
    options = replace(generation, task="text2text-generation", epochs=4, batch_size=4)
    metrics = train(tiny_checkpoint(kind), passages, tmp_path / "out", options=options).metrics

    assert metrics["validation_loss"] < metrics["base_loss"] / 2
    adapter = Adapter.read(tmp_path / "out")
    assert adapter.task == "text2text-generation"
    assert any(path.startswith("encoder") or ".encoder." in path for path in adapter.scales)
    assert adapter.modules == {}


def test_texts_are_learnt_whole(tiny_checkpoint, make_passages, write_jsonl, generation, tmp_path):
    rows = [{"text": f"{row['prompt']} {row['response']}"} for row in make_passages(48, 1)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)

    options = replace(generation, validation=None, epochs=4, batch_size=4)
    metrics = train(tiny_checkpoint("llama"), data, tmp_path / "out", options=options).metrics

    assert metrics["rows"] == {"train": 43, "validation": 5}
    assert metrics["validation_data"] == "a tenth of the rows of data.jsonl, held out with seed 0"
    # Everything is but [CLS].
    words = sum(len(row["text"].split()) + 1 for row in rows)
    assert sum(metrics["tokens"].values()) == words
    assert metrics["validation_loss"] < metrics["base_loss"] / 1.5


def test_the_adapter_has_vectors_alone_and_says_what_it_is_for(
    tiny_checkpoint, passages, generation, tmp_path
):
    result = train(tiny_checkpoint("gpt2"), passages, tmp_path / "out", options=generation)

    adapter = Adapter.read(tmp_path / "out")
    assert adapter.task == "text-generation"
    assert (adapter.modules, adapter.labels) == ({}, None)
    assert "lm_head" not in adapter.scales
    assert all((scale.values != 1).any() for scale in adapter.scales.values())
    assert result.metrics["trainable_parameters"] == {
        "vectors": adapter.size,
        "biases": 0,
        "head": 0,
    }
    assert result.notes == ()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(name.endswith("propulsion_z") for name in saved)


def test_the_base_models_loss_is_without_trained_biases(
    tiny_checkpoint, passages, generation, tmp_path
):
    losses = []
    for train_bias in (False, True):
        options = replace(generation, train_bias=train_bias)
        output = tmp_path / str(train_bias)
        losses.append(
            train(tiny_checkpoint("gpt2"), passages, output, options=options).metrics["base_loss"]
        )

    assert losses[0] == losses[1]
    assert len(Adapter.read(tmp_path / "True").biases) == 8


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_steps_that_are_accumulated_give_the_adapter_of_one_step(
    packing, tiny_checkpoint, passages, generation, tmp_path
):
    generation = replace(generation, packing=packing, max_length=12)
    for steps in (1, 4):
        options = replace(generation, gradient_accumulation_steps=steps)
        train(tiny_checkpoint("llama"), passages, tmp_path / str(steps), options=options)

    whole, parts = scales_of(tmp_path / "1"), scales_of(tmp_path / "4")
    for path, values in whole.items():
        assert parts[path] == pytest.approx(values, abs=1e-5)
        assert (values != 1).any()
    histories = [
        json.loads((tmp_path / steps / "metrics.json").read_text())["epochs"] for steps in "14"
    ]
    assert histories[0] == [pytest.approx(entry, rel=1e-5) for entry in histories[1]]


def test_a_step_of_unequal_parts_is_the_mean_over_its_tokens(
    tiny_checkpoint, write_jsonl, generation, tmp_path
):
    """One row with a short response and one with a long one: no mean of two means."""
    rows = [{"prompt": "ba", "response": "ce"}, {"prompt": "di", "response": "ko " * 20}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    options = replace(generation, batch_size=2, epochs=1, validation=data)
    for steps in (1, 2):
        changed = replace(options, gradient_accumulation_steps=steps)
        result = train(tiny_checkpoint("llama"), data, tmp_path / str(steps), options=changed)

        assert result.metrics["train_loss"] == pytest.approx(result.metrics["base_loss"])


def test_on_a_bfloat16_base_vectors_and_optimiser_are_float32(
    tiny_checkpoint, passages, generation, tmp_path, monkeypatch
):
    made = []

    class Spy(torch.optim.AdamW):
        def __init__(self, groups, **settings):
            super().__init__(groups, **settings)
            made.append(self)

    monkeypatch.setattr(loop_module.torch.optim, "AdamW", Spy)
    seen = set()
    measure = DecoderRun.after_training

    def look(self):
        seen.update(p.dtype for p in self.model.parameters() if not p.requires_grad)
        measure(self)

    monkeypatch.setattr(DecoderRun, "after_training", look)
    options = replace(generation, dtype="bfloat16", epochs=4, batch_size=4)

    metrics = train(tiny_checkpoint("llama"), passages, tmp_path / "out", options=options).metrics

    (optimiser,) = made
    held = [value for state in optimiser.state.values() for value in state.values()]
    assert len(held) > 3
    assert {value.dtype for value in held} == {torch.float32}
    assert seen == {torch.bfloat16}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert metrics["validation_loss"] < metrics["base_loss"] / 2


def test_without_a_padding_token_the_end_is_still_learnt(
    without_padding, tiny_checkpoint, passages, generation, tmp_path
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(without_padding)
    assert tokenizer.pad_token is None
    lacking = train(without_padding, passages, tmp_path / "lacking", options=generation).metrics
    having = train(tiny_checkpoint("gpt2"), passages, tmp_path / "having", options=generation)

    assert lacking["tokens"] == having.metrics["tokens"]
    assert lacking["base_loss"] == having.metrics["base_loss"]
    assert scales_of(tmp_path / "lacking").keys() == scales_of(tmp_path / "having").keys()
    assert weights_of(tmp_path / "lacking") == weights_of(tmp_path / "having")


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(
    tiny_checkpoint, passages, generation, tmp_path
):
    shutil.copytree(tiny_checkpoint("gpt2"), tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base", padding_side="left")
    tokenizer.save_pretrained(tmp_path / "base")

    train(tmp_path / "base", passages, tmp_path / "left", options=generation)
    train(tiny_checkpoint("gpt2"), passages, tmp_path / "right", options=generation)

    assert weights_of(tmp_path / "left") == weights_of(tmp_path / "right")


def test_a_seed_gives_the_same_adapter_and_another_seed_another(
    tiny_checkpoint, passages, generation, tmp_path
):
    generation = replace(generation, validation=None, packing=True)
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        options = replace(generation, seed=seed)
        train(tiny_checkpoint("llama"), passages, tmp_path / name, options=options)

    assert weights_of(tmp_path / "first") == weights_of(tmp_path / "again")
    assert weights_of(tmp_path / "first") != weights_of(tmp_path / "other")


def test_a_resumed_training_gives_the_adapter_of_an_uninterrupted_one(
    tiny_checkpoint, passages, generation, tmp_path
):
    base = tiny_checkpoint("gpt2")
    options = replace(generation, epochs=3, gradient_accumulation_steps=2)
    stop = interrupt_at("epoch 1 of 3: validation perplexity")
    with pytest.raises(KeyboardInterrupt):
        train(base, passages, tmp_path / "out", options=options, progress=stop)
    resumed = train(base, passages, tmp_path / "out", options=replace(options, resume=True))
    whole = train(base, passages, tmp_path / "whole", options=options)

    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert resumed.metrics["epochs"] == whole.metrics["epochs"]
    assert resumed.metrics["base_loss"] == whole.metrics["base_loss"]
    assert resumed.notes == ()
    assert not list(tmp_path.glob(".*"))


def test_early_stopping_goes_by_the_validation_loss(
    tiny_checkpoint, passages, generation, tmp_path, monkeypatch
):
    losses = iter([2.0, 1.0, 2.5, 1.5, 3.0])  # the last is the base model's
    scored = replace(
        DecoderRun.objective,
        scores=lambda _: {"mean_loss": next(losses), "perplexity": 9.0},
    )
    monkeypatch.setattr(DecoderRun, "objective", scored)

    options = replace(generation, epochs=5, early_stopping=2)
    metrics = train(tiny_checkpoint("gpt2"), passages, tmp_path / "best", options=options).metrics

    assert [entry["validation_loss"] for entry in metrics["epochs"]] == [2.0, 1.0, 2.5, 1.5]
    assert (metrics["kept_epoch"], metrics["validation_loss"]) == (2, 1.0)
    assert metrics["base_loss"] == 3.0
    losses = iter([2.0, 1.0])
    options = replace(generation, epochs=5)
    with pytest.raises(KeyboardInterrupt):
        train(
            *(tiny_checkpoint("gpt2"), passages, tmp_path / "second"),
            options=options,
            progress=interrupt_at("epoch 2"),
        )
    checkpoint = in_order(tmp_path / ".second.checkpoints")[0]
    assert weights_of(checkpoint) == weights_of(tmp_path / "best")


def test_gradient_checkpointing_gives_the_same_adapter_within_rounding(
    tiny_checkpoint, passages, generation, tmp_path
):
    for name, saving in (("plain", False), ("saving", True)):
        options = replace(generation, gradient_checkpointing=saving, placement="attention")
        train(tiny_checkpoint("llama"), passages, tmp_path / name, options=options)

    plain, saving = scales_of(tmp_path / "plain"), scales_of(tmp_path / "saving")
    for path, values in plain.items():
        assert saving[path] == pytest.approx(values, abs=1e-5)


def test_rows_that_do_not_fit_are_in_the_notes(tiny_checkpoint, write_jsonl, generation, tmp_path):
    short = {"prompt": "ba", "response": "ce"}
    rows = [{"prompt": "ba " * 9, "response": "ce"}, {"prompt": "ba", "response": "ce " * 9}]
    training = write_jsonl(tmp_path / "training.jsonl", [*rows, short, short])
    validation = write_jsonl(tmp_path / "validation.jsonl", [rows[1], short])

    options = replace(generation, max_length=8, validation=validation)
    notes = train(tiny_checkpoint("gpt2"), training, tmp_path / "out", options=options).notes

    assert notes == (
        "1 of 4 training rows are left out: their prompt leaves nothing to learn in 8 tokens.",
        "1 of 4 training rows are cut to 8 tokens.",
        "1 of 2 validation rows are cut to 8 tokens.",
    )
    options = replace(options, validation=write_jsonl(tmp_path / "full.jsonl", rows[:1] * 2))
    with pytest.raises(DataError, match=r"^2 validation rows: every prompt fills the 8 tokens"):
        train(tiny_checkpoint("gpt2"), training, tmp_path / "again", options=options)


def test_packing_tells_how_full_the_blocks_are(tiny_checkpoint, passages, generation, tmp_path):
    options = replace(generation, packing=True, max_length=16)

    result = train(tiny_checkpoint("gpt2"), passages, tmp_path / "out", options=options)

    (note,) = result.notes
    found = re.fullmatch(
        r"48 training rows are in (\d+) blocks of 16 tokens, (\d+)% full; a batch counts blocks\.",
        note,
    )
    assert int(found[1]) < 48 / 1.3
    assert int(found[2]) > 80


def test_the_card_and_the_curve_are_about_losses(tiny_checkpoint, passages, generation, tmp_path):
    metrics = train(
        tiny_checkpoint("llama"), passages, tmp_path / "out", options=generation
    ).metrics

    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation\n" in card
    assert "metrics:\n- perplexity\n" in card
    assert (
        f"Validation loss {metrics['validation_loss']:.4f} a token, perplexity "
        f"{metrics['validation_perplexity']:.4f} (epoch 2), against {metrics['base_loss']:.4f} and "
        f"{metrics['base_perplexity']:.4f} for the base model." in card
    )
    assert "AutoModelForCausalLM.from_pretrained(" in card
    assert not re.search("accuracy|[Ll]abel|task head|num_labels", card)
    assert (tmp_path / "out" / "loss-curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_that_diverges_is_refused_and_leaves_nothing(
    tiny_checkpoint, passages, generation, tmp_path
):
    options = replace(generation, degree=55, learning_rate=1e3)

    with pytest.raises(
        UsageError, match=r"diverged: the (validation perplexity|loss) is (nan|inf)"
    ) as caught:
        train(tiny_checkpoint("gpt2"), passages, tmp_path / "out", options=options)

    assert str(caught.value).endswith("Choose a lower --learning-rate.")
    assert list(tmp_path.iterdir()) == []


def remove_end_token(base):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(base)


def remove_head(base):
    transformers.AutoModel.from_pretrained(base).save_pretrained(base)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        pytest.param(
            "llama",
            remove_end_token,
            "its tokenizer has no end-of-sequence token, expected",
            id="no-end",
        ),
        pytest.param(
            "llama",
            remove_head,
            "lm_head.weight is not in the checkpoint, expected for LlamaForCausalLM. Nothing",
            id="no-head",
        ),
        pytest.param("t5", None, "cannot be loaded (Unrecognized configuration", id="t5"),
    ],
)
def test_what_is_no_language_model_is_refused(
    kind, change, message, tiny_checkpoint, passages, generation, tmp_path
):
    shutil.copytree(tiny_checkpoint(kind), tmp_path / "base")
    if change:
        change(tmp_path / "base")

    with pytest.raises(BaseModelError, match=re.escape(f"base: {message}")):
        train(tmp_path / "base", passages, tmp_path / "out", options=generation)

    assert not (tmp_path / "out").exists()


def test_an_encoder_that_would_copy_is_refused(
    tiny_model, tiny_checkpoint, passages, generation, tmp_path
):
    tiny_model("bert", "fill-mask").save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoint("gpt2")).save_pretrained(
        tmp_path / "base"
    )

    with pytest.raises(BaseModelError, match="BertLMHeadModel sees the tokens that it has to"):
        train(tmp_path / "base", passages, tmp_path / "out", options=generation)


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_a_model_that_lets_packed_passages_leak_is_refused(
    kind, tiny_checkpoint, passages, generation, tmp_path
):
    options = replace(generation, packing=True)

    with pytest.raises(BaseModelError, match="cannot keep the passages of a block apart"):
        train(tiny_checkpoint(kind), passages, tmp_path / "out", options=options)
    train(tiny_checkpoint(kind), passages, tmp_path / "out", options=generation)


def test_a_batch_that_accumulated_steps_cannot_share_is_refused(
    tiny_checkpoint, passages, generation, tmp_path, monkeypatch
):
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    options = replace(generation, gradient_accumulation_steps=3)

    with pytest.raises(UsageError, match="multiple of the 2 processes x 3 accumulated steps"):
        train(tiny_checkpoint("gpt2"), passages, tmp_path / "out", options=options)


def test_the_command_trains_and_prints_the_base_models_loss(
    tiny_checkpoint, passages, tmp_path, capsys
):
    words = ["train", "-m", tiny_checkpoint("llama"), "-d", passages, "-o", tmp_path / "out"]
    options = ["--task", "text-generation", "--epochs", 1, "--packing", "--max-length", 32]
    more = ["--gradient-accumulation-steps", 2, "--batch-size", 4, "--learning-rate", "5e-3"]

    with pytest.raises(SystemExit) as done:
        main([str(word) for word in [*words, *options, *more]])

    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(r"held-out loss \d\.\d{4}, perplexity .* \(base model \d\.\d{4}, ", printed)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["options"]["gradient_accumulation_steps"] == 2


def test_a_comparison_with_the_head_alone_is_refused_where_there_is_no_head():
    with pytest.raises(UsageError, match="--head-only is False, expected no value for --task text"):
        TrainOptions(task="text-generation", head_only=False)
