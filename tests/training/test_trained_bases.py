"""What a base model may be like: its precision, its head, its length, or not there."""

import re
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.errors import BaseModelError
from propulsion_export.training import TrainOptions, train


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
