"""An attached model computes what was trained, and afterwards it is the base model again."""

import copy

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kinds import DECODERS
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.errors import AdapterError
from propulsion_export.scaling.attach import attached, initializer_name
from propulsion_export.scaling.layer_rules import folded_parameters, layer_kind, output_width
from propulsion_export.tuning import PropulsionConfig

IDS = torch.tensor([[7, 12, 44, 99, 3], [20, 21, 22, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
# transformers deprecates what PEFT 0.21 reads on every attach; remove with PEFT's next release.
FROM_PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def output(model):
    with torch.no_grad():
        return next(iter(model(input_ids=IDS, attention_mask=MASK).values()))


def linear(rows=3, columns=2, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(columns, rows, **options))


def snapshot(model):
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": [name for name, _ in model.named_buffers()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
        "identities": [id(parameter) for parameter in model.parameters()],
    }


def assert_same_snapshot(one, other):
    assert_close(one.pop("state"), other.pop("state"), rtol=0, atol=0)
    assert one == other


class Scaled(nn.Module):
    """The independent way: the scale written out behind the module."""

    def __init__(self, module, scale):
        super().__init__()
        self.module = module
        self.scale = torch.from_numpy(scale.values).float()

    def forward(self, *arguments):
        return self.module(*arguments) * self.scale


def test_attached_output_is_the_explicit_product():
    model, inputs = linear(), torch.randn(4, 2)
    scale = np.array([0.5, -1.25, 2.0])

    with attached(model, Adapter("a", {"0": Scale(scale)})):
        found = model(inputs)

    layer = model[0]
    assert_close(found, (inputs @ layer.weight.T + layer.bias) * torch.tensor(scale).float())


def test_attached_model_is_the_model_with_products_written_out(tiny_bert, random_adapter):
    model = tiny_bert()
    adapter = random_adapter(model)
    written_out = copy.deepcopy(model)
    for path, scale in adapter.scales.items():
        owner, _, name = path.rpartition(".")
        module = written_out.get_submodule(path)
        setattr(written_out.get_submodule(owner), name, Scaled(module, scale))

    with attached(model, adapter):
        found = output(model)

    assert_close(found, output(written_out), rtol=0, atol=0)
    assert not torch.allclose(found, output(model), rtol=0.1)


def test_input_side_scale_multiplies_what_the_layer_reads():
    model, inputs = linear(3, 2), torch.randn(4, 2)

    with attached(model, Adapter("a", {"0": Scale(np.array([2.0, -0.5]), "input")})):
        found = model(inputs)

    assert_close(found, model(inputs * torch.tensor([2.0, -0.5])))


def test_trained_bias_replaces_the_frozen_one_inside_the_product():
    model, inputs = linear(), torch.randn(4, 2)
    scale, bias = np.array([0.5, -1.25, 2.0]), np.array([3.0, 4.0, 5.0], np.float32)

    with attached(model, Adapter("a", {"0": Scale(scale)}, biases={"0": bias})):
        found = model(inputs)

    inside = inputs @ model[0].weight.T + torch.from_numpy(bias)
    assert_close(found, inside * torch.tensor(scale).float())


def test_saved_head_replaces_the_models(tiny_bert, random_adapter):
    model = tiny_bert()
    adapter = random_adapter(model, head=True, only="no module")

    with attached(model, adapter):
        found = dict(model.classifier.named_parameters())

    expected = {name: adapter.modules[f"classifier.{name}"] for name in ("weight", "bias")}
    assert_close({name: value.numpy() for name, value in found.items()}, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_model_is_restored_bit_for_bit(kind, tiny_model, random_adapter):
    model = tiny_model(kind)
    before, result = snapshot(model), output(model)

    with attached(model, random_adapter(model, biases=True, head=True)):
        changed = output(model)

    assert_same_snapshot(snapshot(model), before)
    assert_close(output(model), result, rtol=0, atol=0)
    assert not torch.equal(changed, result)


def test_model_is_restored_after_an_exception_inside(tiny_bert, random_adapter):
    model = tiny_bert()
    before = snapshot(model)

    with (
        pytest.raises(RuntimeError, match="inside"),
        attached(model, random_adapter(model, biases=True, head=True)),
    ):
        raise RuntimeError("inside")

    assert_same_snapshot(snapshot(model), before)


def test_second_adapter_does_not_see_the_first(tiny_bert, random_adapter):
    model = tiny_bert()
    first, second = random_adapter(model, seed=1), random_adapter(model, seed=2)
    with attached(model, second):
        alone = output(model)

    with attached(model, first):
        pass
    with attached(model, second):
        after = output(model)

    assert_close(after, alone, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_is_rounded_once_to_the_modules_dtype(dtype):
    model = linear(64).to(dtype)
    scale = np.random.default_rng(0).uniform(-2, 2, 64)

    with attached(model, Adapter("a", {"0": Scale(scale)})):
        found = model[0].propulsion_scale.clone()
        result = model(torch.ones(1, 2, dtype=dtype))

    assert found.dtype == result.dtype == dtype
    # Half a unit in the last place; torch and numpy reach the 16-bit types by way of float32.
    unit = torch.finfo(dtype).eps * 2.0 ** np.floor(np.log2(np.abs(scale)))
    assert (np.abs(found.double().numpy() - scale) <= (0.5 + 2**-13) * unit).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_attached_model_computes_in_every_dtype(dtype, tiny_bert, random_adapter):
    model = tiny_bert()
    adapter = random_adapter(model, biases=True, head=True)
    exact = copy.deepcopy(model).double()
    with attached(exact, adapter):
        expected = output(exact)

    model.to(dtype)
    with attached(model, adapter):
        found = output(model)

    assert found.dtype == dtype
    roundoff = torch.finfo(dtype).eps
    assert_close(found.double(), expected, rtol=0, atol=30 * roundoff * float(expected.abs().max()))


class Int8Linear(nn.Linear):
    """A weight of integers, as quantised layers of other libraries have it."""

    def __init__(self):
        super().__init__(3, 4, bias=False)
        integers = torch.arange(12).reshape(4, 3).to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)

    def forward(self, inputs):
        return inputs @ self.weight.to(inputs.dtype).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_on_a_quantised_module_is_not_rounded_to_integers(dtype):
    model = nn.Sequential(Int8Linear(), nn.LayerNorm(4, dtype=dtype))
    scale = np.array([1.5, -0.5, 0.25, 2.0])
    inputs = torch.ones(2, 3, dtype=dtype)
    expected = model[0](inputs) * torch.from_numpy(scale).to(dtype)

    with attached(model, Adapter("tuned", {"0": Scale(scale)})):
        found = model[0](inputs)

    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_all_misfits_are_named_at_once_and_nothing_is_changed(tiny_bert):
    model = tiny_bert()
    before = snapshot(model)
    adapter = Adapter(
        "odd",
        scales={
            "bert.pooler.dense": Scale(np.full(32, 0.5)),
            "bert.nowhere": Scale(np.full(32, 0.5)),
            "bert.encoder.layer.0.output.dense": Scale(np.full(31, 0.5)),
            "bert.encoder.layer.0.intermediate.dense": Scale(np.full(37, 0.5), "input"),
            "bert.encoder": Scale(np.full(32, 0.5)),
            "bert.embeddings.word_embeddings": Scale(np.full(32, 0.5), "input"),
        },
        biases={"bert.embeddings.word_embeddings": np.zeros(32, np.float32)},
        modules={
            "classifier.weight": np.zeros((4, 32), np.float32),
            "score.weight": np.zeros((3, 32), np.float32),
        },
    )

    with pytest.raises(AdapterError) as error, attached(model, adapter):
        pass

    findings = error.value.findings
    assert [finding.split(": ")[1] for finding in findings] == [
        "bert.nowhere",
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder",
        "bert.embeddings.word_embeddings",
        "bert.embeddings.word_embeddings",
        "classifier.weight",
        "score.weight",
    ]
    assert "31 scales, the model 32 outputs" in findings[1]
    assert "37 scales, the model 32 inputs" in findings[2]
    assert_same_snapshot(snapshot(model), before)


@pytest.mark.filterwarnings(FROM_PEFT)
@pytest.mark.parametrize("train_bias", [False, True], ids=["scales", "scales-and-biases"])
def test_attached_adapter_gives_what_the_trained_peft_model_gave(train_bias, tiny_bert, tmp_path):
    config = PropulsionConfig(
        target_modules="all", degree=3, train_bias=train_bias, modules_to_save=["classifier"]
    )
    trained = peft.get_peft_model(tiny_bert(), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
                assert "propulsion" in name or "classifier" in name
    trained.save_pretrained(tmp_path)

    base = tiny_bert()
    adapter = Adapter.read(tmp_path)
    with attached(base, adapter):
        found = output(base)

    assert bool(adapter.biases) == train_bias
    assert_close(found, output(trained), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(trained), output(base), rtol=0.1)


@pytest.mark.filterwarnings(FROM_PEFT)
@pytest.mark.parametrize(
    "feedforward", [["output.dense"], r".*layer\.\d\.output\.dense"], ids=["endings", "regex"]
)
def test_attached_ia3_adapter_gives_what_pefts_own_model_gives(feedforward, tiny_bert, tmp_path):
    targets = r".*(key|value|layer\.\d\.output\.dense)"
    if isinstance(feedforward, list):
        targets = ["key", "value", "output.dense"]
    config = peft.IA3Config(
        target_modules=targets, feedforward_modules=feedforward, task_type="FEATURE_EXTRACTION"
    )
    trained = peft.get_peft_model(tiny_bert(), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "ia3_l" in name:
                parameter.uniform_(0.5, 1.5)
    trained.save_pretrained(tmp_path)

    base = tiny_bert()
    adapter = Adapter.read(tmp_path)
    with attached(base, adapter):
        found = output(base)

    assert {scale.side for scale in adapter.scales.values()} == {"input", "output"}
    assert_close(found, output(trained), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(trained), output(base), rtol=0.05)


def test_scale_on_an_embedding_that_is_never_called_is_refused(tiny_model):
    model, path = tiny_model("deberta-v2"), "deberta.encoder.rel_embeddings"
    attaching = attached(model, Adapter("a", {path: Scale(np.full(32, 0.5))}))

    with pytest.raises(AdapterError, match="reads its weight without calling it"), attaching:
        pass
    with attached(model, Adapter("a", {path: Scale(np.ones(32))})):
        pass


# Generative models

MIXTURES = pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
EXPERTS = "model.layers.0.mlp.experts"


def logits(model):
    inputs = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


@pytest.mark.parametrize("kind", [*DECODERS, "t5", "bart"])
def test_every_scale_is_a_buffer_whose_name_follows_from_its_path(kind, tiny_model, random_adapter):
    model = tiny_model(kind)
    adapter = random_adapter(model, tied=True)
    before, frozen = snapshot(model), logits(model)

    with attached(model, adapter):
        buffers = dict(model.named_buffers())
        changed = logits(model)

    for path, scale in adapter.scales.items():
        found = buffers[initializer_name(path, scale.side, scale.values.ndim)]
        assert_close(found.numpy(), scale.values.astype(np.float32))
    assert_same_snapshot(snapshot(model), before)
    assert torch.equal(logits(model), frozen)
    assert not torch.allclose(changed, frozen, rtol=0.05)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
def test_exported_program_has_every_scale_as_a_buffer_of_its_own(kind, tiny_model, random_adapter):
    model = tiny_model(kind)
    adapter = random_adapter(model, only="layers.0")

    with attached(model, adapter):
        program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False})
        expected = logits(model)

    names = {initializer_name(path, s.side, s.values.ndim) for path, s in adapter.scales.items()}
    assert names <= set(program.graph_signature.inputs_to_buffers.values())
    found = program.module()(input_ids=IDS, use_cache=False).logits
    assert_close(found, expected)


@MIXTURES
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_attached_experts_compute_with_their_scaled_weights(
    kind, implementation, tiny_model, random_adapter
):
    model = tiny_model(kind)
    adapter = random_adapter(model, only="experts")
    written_out = copy.deepcopy(model)
    for path, scale in adapter.scales.items():
        weight = written_out.get_parameter(path)
        weight.copy_(weight * torch.from_numpy(scale.values).float()[:, :, None])
    model.set_experts_implementation(implementation)
    written_out.set_experts_implementation(implementation)

    with attached(model, adapter):
        found = logits(model)

    assert len(adapter.scales) == 4
    assert_close(found, logits(written_out), rtol=0, atol=0)
    assert not torch.allclose(found, logits(model), rtol=0.05)


@MIXTURES
def test_scaled_weight_of_experts_is_gone_when_their_forward_fails(
    kind, tiny_model, random_adapter
):
    model = tiny_model(kind)
    experts = model.get_submodule(EXPERTS)
    with attached(model, random_adapter(model)):
        with pytest.raises((TypeError, AttributeError)):
            experts(None, None, None)
        assert "gate_up_proj" not in vars(experts)


@pytest.mark.parametrize(
    ("path", "scale", "match"),
    [
        (f"{EXPERTS}.down_proj", Scale(np.ones(32)), r"shape \[32\], the model \[4, 32\]"),
        (f"{EXPERTS}.down_proj", Scale(np.ones((2, 32))), r"\[2, 32\], the model \[4, 32\]"),
        (f"{EXPERTS}.down_proj", Scale(np.ones((4, 32)), "input"), "an? input scale cannot act"),
        (f"{EXPERTS}.up_proj", Scale(np.ones((4, 32))), "the model has no such module"),
        (EXPERTS, Scale(np.ones(32)), "MixtralExperts: there is no rule"),
        ("model.layers.0.mlp.gate", Scale(np.ones(4)), "MixtralTopKRouter: there is no rule"),
        ("model.layers.0.mlp.gate.weight", Scale(np.ones((4, 32))), "cannot act on this parameter"),
        ("model.norm", Scale(np.ones((1, 32))), r"has \[1, 32\] scales, the model 32 outputs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_scales_that_do_not_fit_experts_are_refused(path, scale, match, tiny_model):
    attaching = attached(tiny_model("mixtral"), Adapter("a", {path: scale}))

    with pytest.raises(AdapterError, match=match), attaching:
        pass


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "t5", "bart", "opt"])
def test_scales_on_norms_fold_to_what_is_attached(kind, tiny_model):
    """Those of query and key, and those that multiply by 1 + weight, too."""
    model = tiny_model(kind).double()
    chooser = np.random.default_rng(0)
    scales = {
        path: Scale(chooser.uniform(0.5, 1.5, output_width(module)))
        for path, module in model.named_modules()
        if layer_kind(module) == "norm"
    }
    adapter = Adapter("norms", scales)
    with attached(model, adapter):
        expected = logits(model)
    frozen = logits(model)

    for path, scale in scales.items():
        module = model.get_submodule(path)
        for name, values in folded_parameters(module, torch.from_numpy(scale.values)).items():
            setattr(module, name, nn.Parameter(values))

    assert any("q_norm" in path for path in scales) == (kind in ("qwen3", "gemma3"))
    # Norms compute in fp32 whatever they are given.
    assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(frozen, expected, rtol=0.05)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("bart", {"scale_embedding": True}), ("opt", {}), ("gemma3", {})],
    ids=["bart", "opt", "gemma3"],
)
def test_scales_on_embeddings_with_a_factor_or_an_offset_fold_exactly(
    kind, options, tiny_model, random_adapter
):
    model = tiny_model(kind, **options).double()
    adapter = random_adapter(model, tied=True, only="embed")
    with attached(model, adapter):
        expected = logits(model)
    head = copy.deepcopy(model.get_output_embeddings())
    frozen = logits(model)

    for path, scale in adapter.scales.items():
        module = model.get_submodule(path)
        folded = folded_parameters(module, torch.from_numpy(scale.values))["weight"]
        module.weight = nn.Parameter(folded)
    model.set_output_embeddings(head)

    assert len(adapter.scales) == {"bart": 4, "opt": 2, "gemma3": 1}[kind]
    assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(frozen, expected, rtol=0.05)


@pytest.mark.parametrize(("kind", "path"), [("t5", "shared"), ("bart", "model.shared")])
def test_scale_on_the_embedding_that_only_keeps_a_weight_is_refused(kind, path, tiny_model):
    attaching = attached(tiny_model(kind), Adapter("a", {path: Scale(np.full(32, 0.5))}))

    with pytest.raises(AdapterError, match="would have no effect"), attaching:
        pass
