"""A failure of a mixture of experts says where rounding chooses between experts."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from propulsion_export.base_model.loading import BaseModel
from propulsion_export.parity.cases import judge
from propulsion_export.parity.diagnosis import judge_own_error
from propulsion_export.parity.evidence import Evidence
from propulsion_export.parity.forwards import compute_whole
from propulsion_export.parity.inputs import decoder_inputs
from propulsion_export.parity.oracle import compute_oracle
from propulsion_export.parity.own_error import ceiling_of
from propulsion_export.parity.ties import Ties, first_ties, routers_of

FIRST, SECOND = (f"model.layers.{layer}.mlp.gate" for layer in range(2))


def told_of(model, adapter, dtype):
    """The checks of PyTorch itself where an artifact errs by a tenth of its outputs."""
    base = BaseModel(model, "tiny", "text-generation", frozenset(), frozenset(), ())
    manifest = SimpleNamespace(mode="folded", dtype=dtype, kind="onnx", layout={})
    artifact = SimpleNamespace(manifest=manifest, feeds=lambda name: {})
    batches, compute = decoder_inputs(model.config, seed=0), compute_whole("cpu")
    subjects = compute_oracle(artifact, base, [adapter], batches, lambda *_: None, steps=4)
    wrong = iter([{n: v * 1.1 for n, v in one.items()} for one in subjects[0].oracle])

    def candidate(feeds):
        return next(wrong, subjects[0].oracle[0])

    evidence = Evidence(artifact, base, [adapter], batches, subjects, candidate, compute, 0)
    checks = judge(subjects, batches, candidate, dtype, ceiling_of(model.config, dtype))
    return [check.detail for check in judge_own_error(evidence, checks)]


def routers(model):
    return [model.get_submodule(path) for path in (FIRST, SECOND)]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_experts_that_are_level_are_told(kind, tiny_model, random_adapter):
    model = tiny_model(kind)
    with torch.no_grad():
        for gate in routers(model)[1:]:
            gate.weight.copy_(gate.weight[:1].expand_as(gate.weight))

    (told,) = told_of(model, random_adapter(model), "float32")

    assert f"unstable in float32: in {SECOND}, rounding chooses the experts of " in told
    assert told.endswith("others than PyTorch.")


def test_a_mistake_is_no_tie(tiny_model, random_adapter):
    model = tiny_model("mixtral")

    assert not told_of(model, random_adapter(model), "float32")


def test_experts_are_level_in_16_bits_and_not_in_float32(tiny_model, random_adapter):
    model = tiny_model("mixtral")
    torch.manual_seed(0)
    with torch.no_grad():
        for gate in routers(model):
            rows = gate.weight[:1].expand_as(gate.weight)
            gate.weight.copy_(rows + 1e-2 * torch.randn_like(rows))

    adapter = random_adapter(model)

    assert not told_of(model, adapter, "float32")
    (told,) = told_of(model, adapter, "bfloat16")
    assert f"unstable in bfloat16: in {FIRST}, rounding chooses the experts of " in told
    assert told.endswith("Export in float32.")


def test_a_model_without_experts_has_no_routers(tiny_model):
    assert routers_of(tiny_model("llama")) == {}
    assert routers_of(tiny_model("mixtral")) == {FIRST: 2, SECOND: 2}


class Corrected(nn.Module):
    """A router whose choice does not follow from its logits alone."""

    def __init__(self):
        super().__init__()
        self.top_k, self.weight = 1, nn.Parameter(torch.zeros(2, 2))
        self.e_score_correction_bias = torch.zeros(2)


def test_a_router_that_corrects_its_logits_is_left_out():
    assert routers_of(nn.Sequential(Corrected())) == {}


def test_ties_are_counted_at_the_first_router_that_has_them():
    clear, level = torch.tensor([[4.0, 2.0, 1.0]]), torch.tensor([[4.0, 1.01, 1.0]])
    exact = {"a": clear.double(), "b": level.double(), "c": level.double()}
    own = {path: values + 0.01 for path, values in exact.items()}

    assert first_ties({"a": 2, "b": 2, "c": 2}, [(exact, own)] * 3) == Ties("b", 3, 3)
    assert first_ties({"a": 2}, [(exact, own)]) is None
    assert first_ties({"b": 3}, [(exact, own)]) is None  # all experts compute
