"""A model at a precision has the dtypes that transformers gives it when it loads it so."""

import pytest
import torch
from tiny_models import KINDS
from torch import nn

from kinds import GENERATIVE
from propulsion_export.base_model.dtypes import cast_, dtypes_as_loaded


def dtypes_of(model):
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *GENERATIVE])
def test_dtypes_are_those_that_transformers_loads(kind, dtype, tiny_model, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)

    cast_(model, dtype)

    assert dtypes_of(model) == dtypes_of(loaded)
    for name, value in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wo.weight", torch.float32),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wi.weight", torch.float16),
        ("llama", "model.rotary_emb.inv_freq", torch.float32),
    ],
)
def test_what_transformers_keeps_in_float32_stays(kind, name, expected, tiny_model):
    model = tiny_model(kind)

    cast_(model, torch.float16)

    assert dtypes_of(model)[name] == expected


def test_t5_has_no_float32_in_bfloat16(tiny_model):
    assert set(dtypes_as_loaded(tiny_model("t5"), torch.bfloat16).values()) == {torch.bfloat16}


def test_values_survive_float64(tiny_model):
    """Frequencies of rotary embeddings are no worse after the oracle than before it."""
    model, frequencies = tiny_model("llama"), tiny_model("llama").model.rotary_emb.inv_freq

    cast_(model, torch.float64)
    assert set(dtypes_of(model).values()) == {torch.float64}
    cast_(model, torch.float16)

    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_module_of_no_library_is_cast_whole():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    cast_(model, torch.float16)

    assert set(dtypes_of(model).values()) == {torch.float16}
    assert model[1].num_batches_tracked.dtype == torch.int64
