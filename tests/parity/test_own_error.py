"""PyTorch's own error has a ceiling; where it is beyond, the verdict fails and says why."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import KINDS
from torch import nn

from kinds import DECODERS, ENCODER_DECODERS, EXPERTS
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.graph.sample_inputs import input_names, padded_left, random_batch
from propulsion_export.parity.by_layer import compute_by_layer
from propulsion_export.parity.cases import judge
from propulsion_export.parity.comparison import FACTOR, UNIT_ROUNDOFF, compare
from propulsion_export.parity.diagnosis import judge_own_error
from propulsion_export.parity.evidence import Evidence
from propulsion_export.parity.forwards import compute_whole
from propulsion_export.parity.inputs import decoder_inputs, parity_inputs, with_decoder_tokens
from propulsion_export.parity.oracle import compute_oracle
from propulsion_export.parity.own_error import (
    CONSTANT,
    LARGEST_SHARE,
    additions_of,
    ceiling_of,
    largest_error,
)
from propulsion_export.runners.decoding import replaying
from propulsion_export.runners.pytorch import torch_candidate
from propulsion_export.scaling.attach import attached

SWITCH = 16
LONGROPE = {
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 2.0, 3.0],
        "rope_theta": 10000.0,
    },
}


def task_of(kind):
    if kind in ENCODER_DECODERS:
        return "text2text-generation"
    return "text-generation" if kind in DECODERS else "text-classification"


def inputs_of(base):
    config = base.model.config
    if base.task == "text-generation":
        return decoder_inputs(config, seed=0)
    if base.task == "text2text-generation":
        names = ("input_ids", "attention_mask")
        return with_decoder_tokens(parity_inputs(names, config, seed=0), config, seed=0)
    return parity_inputs(input_names(type(base.model), config), config, seed=0)


def no_draft(prompt, steps):
    shape = len(prompt["input_ids"]), steps
    return np.full(shape, 7), np.ones(shape)


def evidence_of(model, kind, adapters, dtype, batches=None, compute=None):
    """What a verdict on a folded artifact in `dtype` is based on, without the artifact."""
    base = BaseModel(model, "tiny", task_of(kind), frozenset(), frozenset(), ())
    manifest = SimpleNamespace(mode="folded", dtype=dtype, kind="onnx", layout={})
    artifact = SimpleNamespace(manifest=manifest, feeds=lambda name: {})
    batches, compute = batches or inputs_of(base), compute or compute_whole("cpu")
    subjects = compute_oracle(
        artifact, base, adapters, batches, lambda *_: None, steps=4, draft=no_draft, compute=compute
    )
    return Evidence(artifact, base, adapters, batches, subjects, lambda feeds: feeds, compute, 0)


def judged(evidence, candidate, *, ceiling=True):
    """The checks of the case parity and those of PyTorch itself."""
    dtype = evidence.artifact.manifest.dtype
    most = ceiling_of(evidence.base.model.config, dtype) if ceiling else None
    checks = judge(evidence.subjects, evidence.batches, candidate, dtype, most)
    parity = [check for check in checks if check.case == "parity"]
    return parity, list(judge_own_error(evidence, parity))


def as_pytorch(evidence):
    """A candidate that computes what PyTorch itself computes."""
    outputs = iter(evidence.subjects[0].reference)
    rest = evidence.subjects[0].oracle
    return lambda feeds: next(outputs, {name: v[:1] for name, v in rest[0].items()})


DENSE = [kind for kind in (*KINDS, *DECODERS, *ENCODER_DECODERS) if kind not in EXPERTS]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", DENSE)
def test_right_model_is_not_condemned(kind, dtype, tiny_model, random_adapter):
    """And PyTorch's error is far from the ceiling: rounding of another machine passes too."""
    model = tiny_model(kind)
    evidence = evidence_of(model, kind, [random_adapter(model)], dtype)

    for subject in evidence.subjects:
        errors = compare(
            evidence.batches, subject.oracle, subject.reference, subject.reference, dtype,
            ceiling_of(model.config, dtype),
        )  # fmt: skip
        assert all(2 * one.reference_error < one.explained for one in errors)
        assert subject.padding_effect is None


def test_ceiling_grows_with_depth_and_unit_and_ends_where_zeros_would_pass():
    errors = {
        (dtype, n): largest_error(2.0, dtype=dtype, additions=n)
        for dtype in UNIT_ROUNDOFF
        for n in (4, 16)
    }

    assert errors["float32", 4] == 2.0 * CONSTANT * 2 * 2.0**-24
    assert errors["float32", 16] == 2 * errors["float32", 4]
    assert errors["bfloat16", 16] == 2.0 * LARGEST_SHARE / FACTOR
    assert all(FACTOR * error <= 2.0 for error in errors.values())


@pytest.mark.parametrize(("kind", "expected"), [("bert", 4), ("gpt2", 4), ("t5", 10), ("bart", 10)])
def test_additions_are_those_of_the_layers(kind, expected, tiny_model):
    assert additions_of(tiny_model(kind).config) == expected


def rows_on_two_sides(config):
    """Batches whose rows are shorter and longer than the switch, padded on the left."""
    chooser = np.random.default_rng(0)
    names = ("input_ids", "attention_mask")
    return tuple(
        padded_left(random_batch(names, config, lengths, chooser))
        for lengths in ((10, 20, 14, 24), (9, 12, 30, 22), (11, 28, 8, 16), (13, 15, 26, 18))
    )


@pytest.fixture
def switching(tiny_model, random_adapter):
    model = tiny_model("phi3", **{"max_position_embeddings": 64} | LONGROPE)
    adapter = random_adapter(model)
    return evidence_of(model, "phi3", [adapter], "float32", rows_on_two_sides(model.config))


def with_scales_doubled(evidence, count):
    """A candidate of PyTorch in float32 whose adapter has doubled scales."""
    (adapter,) = evidence.adapters
    path, scale = next(iter(adapter.scales.items()))
    values = scale.values.copy()
    values[:count] *= 2
    wrong = replace(adapter, scales=adapter.scales | {path: Scale(values)})

    def run(feeds):
        with attached(evidence.base.model, wrong):
            return replaying(torch_candidate(evidence.base.model, evidence.base.task))(feeds)

    return run


def test_rows_on_two_sides_of_a_switch_do_not_widen_the_tolerance(switching):
    candidate = with_scales_doubled(switching, 10)

    (blind,), _ = judged(switching, candidate, ceiling=False)
    (parity,), (condemned,) = judged(switching, candidate)

    assert blind.passed
    assert not parity.passed
    assert not condemned.passed
    assert condemned.case == "PyTorch"
    assert "Phi3ForCausalLM gives another function in a padded batch, in float64" in (
        condemned.detail
    )


def test_the_same_model_below_its_switch_is_judged(tiny_model, random_adapter):
    model = tiny_model("phi3", **{"max_position_embeddings": 64} | LONGROPE)
    evidence = evidence_of(model, "phi3", [random_adapter(model)], "float32")

    (right,), condemned = judged(evidence, with_scales_doubled(evidence, 0))
    (wrong,), _ = judged(evidence, with_scales_doubled(evidence, 10))

    assert right.passed
    assert not condemned
    assert not wrong.passed


def overflowing_t5(tiny_model):
    """A T5 whose attention leaves the range of float16; its norms bring it back."""
    model = tiny_model("t5")
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.v.weight.mul_(30)
    attention.o.weight.mul_(2e4)
    return model


def test_overflow_is_named_by_module_and_dtype(tiny_model, random_adapter):
    model = overflowing_t5(tiny_model)
    evidence = evidence_of(model, "t5", [random_adapter(model)], "float16")

    (parity,), (condemned,) = judged(evidence, as_pytorch(evidence))

    assert not parity.passed
    assert "overflows in float16, first in encoder.block.0.layer.0.SelfAttention.o" in (
        condemned.detail
    )


def test_weight_that_overflows_is_named(tiny_model, random_adapter):
    model = tiny_model("bert")
    model.bert.encoder.layer[1].output.dense.weight.mul_(1e6)
    evidence = evidence_of(model, "bert", [random_adapter(model)], "float16")

    _, (condemned,) = judged(evidence, as_pytorch(evidence))

    assert "its weight bert.encoder.layer.1.output.dense.weight is not finite" in condemned.detail


def test_the_same_t5_is_judged_in_bfloat16(tiny_model, random_adapter):
    model = overflowing_t5(tiny_model)
    evidence = evidence_of(model, "t5", [random_adapter(model)], "bfloat16")

    (parity,), condemned = judged(evidence, as_pytorch(evidence))

    assert parity.passed
    assert not condemned


class Cancelling(nn.Module):
    """The identity, but for what rounding loses of it."""

    def forward(self, x):
        return (x + 1e4) - 1e4


@pytest.mark.parametrize("compute", [compute_whole, compute_by_layer])
def test_instability_is_named_by_the_module_that_brings_it(compute, tiny_model, random_adapter):
    model = tiny_model("llama")
    adapter = random_adapter(model)
    norm = model.model.layers[1].input_layernorm
    model.model.layers[1].input_layernorm = nn.Sequential(norm, Cancelling())
    renamed = {
        p.replace("layers.1.input_layernorm", "layers.1.input_layernorm.0"): s
        for p, s in adapter.scales.items()
    }
    adapter = replace(adapter, scales=renamed)
    evidence = evidence_of(model, "llama", [adapter], "float32", compute=compute("cpu"))

    (parity,), (condemned,) = judged(evidence, as_pytorch(evidence))

    assert parity.outputs[0].allowed == parity.outputs[0].explained
    assert not parity.passed
    assert "unstable in float32" in condemned.detail
    assert "in model.layers.1.input_layernorm.1" in condemned.detail


def test_reference_that_is_not_a_number_is_condemned(tiny_model, random_adapter):
    model = tiny_model("llama")
    evidence = evidence_of(model, "llama", [random_adapter(model)], "float32")
    (subject,) = evidence.subjects
    broken = tuple({name: np.full_like(v, np.nan) for name, v in one.items()}
                   for one in subject.reference)  # fmt: skip
    evidence = replace(evidence, subjects=[replace(subject, reference=broken)])

    (parity,), (condemned,) = judged(evidence, as_pytorch(evidence))

    assert not parity.passed
    assert not condemned.passed


def test_nothing_is_recorded_where_the_error_is_explained(tiny_model, random_adapter):
    model = tiny_model("llama")
    evidence = evidence_of(model, "llama", [random_adapter(model)], "float32")

    def refused(*arguments):
        raise AssertionError

    parity, _ = judged(replace(evidence, compute=refused), as_pytorch(evidence))

    assert all(check.passed for check in parity)
    assert torch.get_default_dtype() == torch.float32


def test_the_ceiling_grows_with_the_longest_row_and_no_further_than_the_other_limit():
    of_48 = largest_error(2.0, dtype="float32", additions=4)

    assert largest_error(2.0, dtype="float32", additions=4, length=7) == of_48
    assert largest_error(2.0, dtype="float32", additions=4, length=480) == pytest.approx(10 * of_48)
    assert largest_error(2.0, dtype="float32", additions=4, length=10**7) == 2 * LARGEST_SHARE / 4
