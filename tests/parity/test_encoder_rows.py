"""The truth of an encoder is every row alone, unless the model itself depends on padding."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import KINDS, TASKS

from propulsion_export.base_model.loading import BaseModel
from propulsion_export.graph.sample_inputs import input_names, with_one_eos
from propulsion_export.parity.alone import PaddingChangesRowsError
from propulsion_export.parity.cases import judge
from propulsion_export.parity.comparison import hidden_positions
from propulsion_export.parity.diagnosis import judge_padding_effect
from propulsion_export.parity.encoder_rows import grouped_rows, length_of
from propulsion_export.parity.forwards import precision
from propulsion_export.parity.inputs import parity_inputs
from propulsion_export.parity.oracle import compute_oracle
from propulsion_export.runners.decoding import alone
from propulsion_export.runners.pytorch import torch_candidate
from propulsion_export.scaling.attach import attached

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 37, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


def oracle(model, task, adapters, batches=None):
    base = BaseModel(model, "tiny", task, frozenset(), frozenset(), ())
    config = model.config
    batches = batches or parity_inputs(input_names(type(model), config), config, seed=0)
    manifest = SimpleNamespace(mode="folded", dtype="float32", kind="onnx", layout={})
    artifact = SimpleNamespace(manifest=manifest, feeds=lambda name: {})
    return base, batches, compute_oracle(artifact, base, adapters, batches, lambda *_: None)


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kind", "task"), [*((kind, TASKS[0]) for kind in KINDS), *(("bert", t) for t in TASKS[1:])]
)
def test_truth_is_that_of_every_row_alone(kind, task, tiny_model, random_adapter):
    adapter = random_adapter(tiny_model(kind, task))
    base, batches, (subject,) = oracle(tiny_model(kind, task), task, [adapter])

    assert subject.padding_effect is None
    base.model.double()
    with precision(torch.float64), attached(base.model, adapter):
        run = torch_candidate(base.model, task)
        for batch, found in zip(batches, subject.oracle, strict=True):
            for row, real in enumerate(batch["attention_mask"] == 1):
                for name, expected in run(alone(batch, row)).items():
                    values = found[name][row : row + 1]
                    has_positions = values.shape[1:2] == real.shape
                    assert close(values[:, real] if has_positions else values, expected)
                    assert values.dtype == np.float64


def test_outputs_have_the_shapes_of_the_padded_batches(tiny_model, random_adapter):
    """Also where a row is as long as there are classes."""
    model = tiny_model("bert", "token-classification")
    batch = parity_inputs(input_names(type(model), model.config), model.config, seed=0)[0]
    batch = {name: np.repeat(values[:, :8], 2, axis=0)[:4] for name, values in batch.items()}
    batch["attention_mask"] = (np.arange(8) < np.array([[3], [8], [3], [5]])).astype(np.int64)

    _, batches, (subject,) = oracle(
        model, "token-classification", [random_adapter(model)], (batch,)
    )

    assert subject.oracle[0]["logits"].shape == (4, 8, 3)
    hidden = hidden_positions("logits", batches, subject.oracle)[0]
    assert (subject.oracle[0]["logits"][hidden] == 0).all()
    assert (subject.oracle[0]["logits"][~hidden] != 0).all()


def test_model_whose_padding_leaks_is_found(tiny_model, random_adapter):
    model = tiny_model("bert")
    adapter = random_adapter(model)
    _, _, (right,) = oracle(tiny_model("bert"), "text-classification", [adapter])
    _, _, (subject,) = oracle(leaking(model), "text-classification", [adapter])

    assert right.padding_effect is None
    assert subject.padding_effect > 1e-3
    assert not close(subject.oracle[0]["logits"], right.oracle[0]["logits"])


def leaking(model):
    """The model, its first layer mixing all positions, hidden ones too."""

    def leak(module, arguments, output):
        return output + 0.1 * output.mean(1, keepdim=True)

    model.base_model.encoder.layer[0].attention.output.register_forward_hook(leak)
    return model


def convbert():
    from transformers import ConvBertConfig, ConvBertForSequenceClassification

    torch.manual_seed(0)
    config = ConvBertConfig(**SIZES, embedding_size=32, conv_kernel_size=3, head_ratio=2)
    return ConvBertForSequenceClassification(config).eval().requires_grad_(False)


def test_model_that_depends_on_padding_is_told_so_and_not_condemned(random_adapter):
    model = convbert()
    adapter = random_adapter(model)
    base, batches, (subject,) = oracle(model, "text-classification", [adapter])
    base.model.float()

    def candidate(feeds):
        with attached(base.model, adapter):
            return torch_candidate(base.model, base.task)(feeds)

    checks = judge([subject], batches, candidate, "float32")
    (told,) = judge_padding_effect(SimpleNamespace(subjects=[subject], base=base))

    assert subject.padding_effect > 1e-6
    assert {check.case for check in checks} == {"parity", "effect"}
    assert all(check.passed for check in checks)
    assert told.passed
    assert f"{subject.padding_effect:.3g}" in told.detail


def test_nothing_is_told_of_a_model_that_does_not(tiny_model, random_adapter):
    model = tiny_model("bert")
    base, _, subjects = oracle(model, "text-classification", [random_adapter(model)])

    assert not list(judge_padding_effect(SimpleNamespace(subjects=subjects, base=base)))


def test_classifier_that_pools_at_the_end_runs_each_row_alone(random_adapter):
    from transformers import BartConfig, BartForSequenceClassification

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=37,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=37, num_labels=3,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3, init_std=0.2,
    )  # fmt: skip
    model = BartForSequenceClassification(config).eval().requires_grad_(False)
    names = ("input_ids", "attention_mask")
    batches = tuple(with_one_eos(each, config) for each in parity_inputs(names, config, seed=0))

    adapter = random_adapter(model)
    base, _, (subject,) = oracle(model, "text-classification", [adapter], batches)

    assert subject.padding_effect is None
    base.model.double()
    with precision(torch.float64), attached(base.model, adapter):
        run = torch_candidate(base.model, base.task)
        for row in range(4):
            expected = run(alone(batches[0], row))["logits"]
            assert close(subject.oracle[0]["logits"][row : row + 1], expected)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [([1, 1, 0], 2), ([0, 1, 0], 2), ([0, 0, 1], 3), ([1, 0, 1], 3), ([0, 0, 0], 3)],
)
def test_only_padding_behind_a_row_is_left_out(mask, expected):
    assert length_of(np.array(mask)) == expected


def test_rows_of_one_length_run_together():
    batches = [
        {"input_ids": np.arange(12).reshape(3, 4), "attention_mask": mask}
        for mask in (np.array([[1, 1, 0, 0], [1] * 4, [1, 1, 0, 0]]), np.ones((3, 4), np.int64))
    ]

    together, single = (grouped_rows(batches, together=each) for each in (True, False))

    shapes = [forward.pieces[0]["input_ids"].shape for forward in together.forwards]
    assert shapes == [(2, 2), (4, 4)]
    assert len(single.forwards) == 6


def test_difference_is_measured_over_what_is_visible():
    batch = {"input_ids": np.zeros((1, 3)), "attention_mask": np.array([[1, 1, 0]])}
    rows = grouped_rows([batch], together=True)
    found = [{"x": np.array([[1.0, 2.0]])}]

    (same,) = rows.outputs(found, {"x": np.array([[1.0, 2.0, 9.0]])})
    with pytest.raises(PaddingChangesRowsError) as raised:
        rows.outputs(found, {"x": np.array([[1.0, 2.5, 9.0]])})

    assert np.array_equal(same["x"], [[1.0, 2.0, 0.0]])
    assert raised.value.effect == 0.5
