"""A folded model computes by itself what the attached one computes with scales."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.rounding import rounded_to_odd
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.scaling.attach import attached
from propulsion_export.scaling.fold.model import fold_
from propulsion_export.scaling.fold.ties import check_untied

IDS = torch.tensor([[7, 12, 44, 99, 3], [20, 21, 22, 8, 9]])
KINDS = ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet"]
EMBEDDINGS = "bert.embeddings.word_embeddings"


def outputs(model):
    with torch.no_grad():
        return {name: v for name, v in model(input_ids=IDS).items() if v is not None}


def outputs_attached(model, adapter):
    model = copy.deepcopy(model)
    with attached(model, adapter):
        return outputs(model)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def refused(model, adapter, error, match, **options):
    before = state(model)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    with pytest.raises(error, match=match) as caught:
        fold_(model, adapter, **options)
    assert_close(state(model), before, rtol=0, atol=0)
    assert getattr(getattr(model, "config", None), "tie_word_embeddings", None) == tied
    return caught.value


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_folded_model_is_the_attached_model(kind, dtype, tolerance, tiny_model, random_adapter):
    model = tiny_model(kind).to(dtype)
    adapter = random_adapter(model, biases=True, head=True)
    expected, base = outputs_attached(model, adapter), outputs(model)

    fold_(model, adapter)

    assert_close(outputs(model), expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(base["logits"], expected["logits"], rtol=0.1)


@pytest.mark.parametrize(
    "task", ["token-classification", "question-answering", "feature-extraction"]
)
def test_folded_model_is_the_attached_model_for_every_task(task, tiny_bert, random_adapter):
    model = tiny_bert(task).double()
    adapter = random_adapter(model, biases=True, head=True)
    expected = outputs_attached(model, adapter)

    fold_(model, adapter)

    assert_close(outputs(model), expected, rtol=1e-12, atol=1e-12)


def test_fold_with_another_adapter_is_not_the_attached_model(tiny_bert, random_adapter):
    model = tiny_bert().double()
    expected = outputs_attached(model, random_adapter(model, seed=1))

    fold_(model, random_adapter(model, seed=2))

    assert not torch.allclose(outputs(model)["logits"], expected["logits"], rtol=0.01)


def test_input_side_scale_is_folded_into_the_columns():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 2)), torch.randn(5, 3)
    scale = np.array([2.0, -0.5, 0.25])
    expected = model(inputs * torch.tensor(scale).float())

    fold_(model, Adapter("a", {"0": Scale(scale, "input")}))

    assert_close(model(inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fold_rounds_the_float64_product_once(dtype, tiny_bert, random_adapter):
    model = tiny_bert()
    adapter = random_adapter(model)
    exact = {
        path: model.get_submodule(path).weight.double()
        * torch.from_numpy(scale.values).reshape(
            (-1, 1) if isinstance(model.get_submodule(path), nn.Linear) else (1, -1)
        )
        for path, scale in adapter.scales.items()
    }

    fold_(model, adapter, dtype=dtype)

    for path, product in exact.items():
        # torch itself goes from float64 to 16 bits by way of float32.
        odd = torch.from_numpy(rounded_to_odd(product.numpy()))
        once = product.to(dtype) if dtype == torch.float32 else odd.to(dtype)
        assert_close(model.get_submodule(path).weight.data, once, rtol=0, atol=0)
    assert {value.dtype for value in model.state_dict().values() if value.ndim == 2} == {dtype}


def test_saved_head_is_rounded_once_to_the_dtype_asked_for(tiny_bert, random_adapter):
    model = tiny_bert().to(torch.bfloat16)
    adapter = random_adapter(model, head=True)

    fold_(model, adapter, dtype=torch.float32)

    head = model.classifier.weight.data
    assert_close(head, torch.from_numpy(adapter.modules["classifier.weight"]), rtol=0, atol=0)


def test_tied_embedding_is_refused_with_the_pair_and_the_cost(tiny_bert, random_adapter):
    model = tiny_bert("fill-mask")

    error = refused(model, random_adapter(model, tied=True), BaseModelError, "shares its weight")

    (finding,) = error.findings
    assert finding.startswith(f"{EMBEDDINGS}: ")
    assert "cls.predictions.decoder.weight" in finding
    assert f"adds {100 * 32 * 4 / 2**20:.1f} MiB" in finding


def test_untied_fold_changes_one_of_the_two_only(tiny_bert, random_adapter):
    model = tiny_bert("fill-mask").double()
    adapter = random_adapter(model, tied=True)
    expected, decoder = outputs_attached(model, adapter), model.cls.predictions.decoder.weight
    before = decoder.clone()

    fold_(model, adapter, untie=True)

    assert_close(outputs(model), expected, rtol=1e-12, atol=1e-12)
    assert_close(model.cls.predictions.decoder.weight.data, before, rtol=0, atol=0)
    assert not torch.allclose(model.bert.embeddings.word_embeddings.weight, before)
    assert model.config.tie_word_embeddings is False


def test_tied_weights_that_nobody_scales_stay_tied(tiny_bert, random_adapter):
    model = tiny_bert("fill-mask")

    fold_(model, random_adapter(model, embeddings=False))

    predictions = model.cls.predictions
    assert predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.config.tie_word_embeddings


def test_saved_head_that_is_tied_to_the_base_is_refused(tiny_bert, random_adapter):
    model = tiny_bert("fill-mask")
    adapter = random_adapter(model, embeddings=False, head=True)
    assert "cls.predictions.decoder.weight" in adapter.modules

    error = refused(model, adapter, BaseModelError, "is shared with")

    assert f"cls.predictions.decoder.weight: is shared with {EMBEDDINGS}" in str(error)


def test_untied_saved_head_is_the_attached_model(tiny_bert, random_adapter):
    model = tiny_bert("fill-mask").double()
    adapter = random_adapter(model, head=True, tied=True)
    expected = outputs_attached(model, adapter)

    fold_(model, adapter, untie=True)

    assert_close(outputs(model), expected, rtol=1e-12, atol=1e-12)


def test_scaled_decoder_leaves_the_embedding_alone(tiny_bert):
    model = tiny_bert("fill-mask").double()
    adapter = Adapter("a", {"cls.predictions.decoder": Scale(np.linspace(-1, 2, 100))})
    refused(model, adapter, BaseModelError, EMBEDDINGS)
    expected = outputs_attached(model, adapter)

    fold_(model, adapter, untie=True)

    assert_close(outputs(model), expected, rtol=1e-12, atol=1e-12)


def test_untying_on_the_meta_device_gives_every_module_its_own_parameter(tiny_bert, random_adapter):
    model = tiny_bert("fill-mask").to("meta")
    model.tie_weights()
    adapter = random_adapter(tiny_bert("fill-mask"), tied=True)

    check_untied(model, adapter, untie=True)

    predictions = model.cls.predictions
    assert predictions.decoder.weight is not model.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is not predictions.bias
    assert predictions.decoder.weight.is_meta


def test_adapter_without_effect_is_refused(tiny_bert, random_adapter):
    model = tiny_bert()
    scales = {
        path: Scale(np.ones(s.values.size)) for path, s in random_adapter(model).scales.items()
    }

    refused(model, Adapter("ones", scales), AdapterError, "changes no weight")


def test_adapter_whose_effect_rounding_removes_is_refused(tiny_bert):
    model = tiny_bert().to(torch.bfloat16)
    adapter = Adapter("tiny", {"bert.pooler.dense": Scale(np.full(32, 1 + 1e-6))})

    refused(model, adapter, AdapterError, "changes no weight")


def test_misfit_is_refused_and_nothing_is_changed(tiny_bert, random_adapter):
    model = tiny_bert()
    good = random_adapter(model)
    adapter = Adapter("odd", {**good.scales, "bert.nowhere": Scale(np.full(3, 2.0))})

    refused(model, adapter, AdapterError, r"bert\.nowhere: the model has no such module")


def test_unfoldable_module_is_refused_and_nothing_is_changed():
    class Odd(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) + inputs

    model = nn.Sequential(nn.Linear(3, 3), Odd(3, 3))
    adapter = Adapter("a", {path: Scale(np.full(3, 2.0)) for path in ("0", "1")})

    refused(model, adapter, BaseModelError, "Odd")


def test_refused_fold_leaves_the_tie(tiny_bert, random_adapter):
    model = tiny_bert("fill-mask")
    scales = random_adapter(model, tied=True).scales
    ones = {path: Scale(np.ones(s.values.size)) for path, s in scales.items()}

    refused(model, Adapter("ones", ones), AdapterError, "changes no weight", untie=True)

    predictions = model.cls.predictions
    assert predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
