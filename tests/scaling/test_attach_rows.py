"""A model that computes every row of a batch with its own adapter, against each row alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.layout import (
    pack,
    plan_layout,
    to_row,
    width_of,
)
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.artifacts.tensor_names import MODULES_INPUT, ROWS_INPUT
from propulsion_export.errors import UsageError
from propulsion_export.scaling.attach import attached
from propulsion_export.scaling.attach_rows import attached_rows

ENCODERS = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet")
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]])


def layout_of(model, adapters):
    order = [name for name, _ in model.named_modules()]
    order += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return plan_layout(adapters, order)


def rows_of(model, adapters, layout):
    """The adapters' rows of a bank, what an adapter does not have being the base model's."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    defaults = {}
    for packed, slots in layout.items():
        values = np.ones(sum(slot.length for slot in slots), np.float32)
        for slot in slots if packed != "propulsion_scales" else ():
            name = slot.path if packed == MODULES_INPUT else f"{slot.path}.bias"
            values[slot.offset : slot.offset + slot.length] = parameters[name].numpy().reshape(-1)
        defaults[packed] = values
    packed = [to_row(pack(adapter, layout, defaults), layout) for adapter in adapters]
    return torch.from_numpy(np.stack(packed))


def adapters_of(model, random_adapter, **options):
    return [random_adapter(model, seed, f"a{seed}", **options) for seed in (1, 2, 3)]


def logits(model, tokens, **more):
    with torch.inference_mode():
        return next(iter(model(input_ids=tokens, **more).values()))


def each_alone(model, adapters):
    """Row i with adapter i, in a batch of its own."""
    found = []
    for row, adapter in enumerate(adapters):
        with attached(model, adapter):
            found.append(logits(model, TOKENS[row : row + 1]))
    return torch.cat(found)


def assert_each_row_is_what_it_is_alone(model, adapters, tolerance=1e-6):
    layout = layout_of(model, adapters)
    rows = rows_of(model, adapters, layout).to(model.dtype)

    with attached_rows(model, layout):
        mixed = logits(model, TOKENS, **{ROWS_INPUT: rows})

    alone = each_alone(model, adapters)
    torch.testing.assert_close(mixed, alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [*ENCODERS, "gpt2", "llama", "opt", "bloom", "phi3"])
def test_every_row_is_what_it_is_alone_with_its_adapter(kind, tiny_model, random_adapter):
    model = tiny_model(kind).double()
    adapters = adapters_of(model, random_adapter, head=kind in ENCODERS)
    assert_each_row_is_what_it_is_alone(model, adapters, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_rows_differ_and_their_order_counts(kind, tiny_model, random_adapter):
    model = tiny_model(kind)
    adapters = adapters_of(model, random_adapter)
    layout = layout_of(model, adapters)
    rows = rows_of(model, adapters, layout)

    with attached_rows(model, layout):
        mixed = logits(model, TOKENS, **{ROWS_INPUT: rows})
        turned = logits(model, TOKENS, **{ROWS_INPUT: rows.roll(1, 0)})

    assert ((mixed - turned).abs().amax(dim=(-1)) > 1e-3).all()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta"])
def test_trained_biases_are_each_rows_own(kind, tiny_model, random_adapter):
    model = tiny_model(kind).double()
    adapters = adapters_of(model, random_adapter, biases=True)
    assert_each_row_is_what_it_is_alone(model, adapters)


def test_a_trained_norm_is_each_rows_own(tiny_model, random_adapter):
    model = tiny_model("bert").double()
    name = "bert.embeddings.LayerNorm"
    adapters = [
        replace(
            adapter,
            modules={
                f"{name}.{part}": np.random.default_rng(seed).normal(size=32).astype(np.float32)
                for part in ("weight", "bias")
            },
        )
        for seed, adapter in enumerate(adapters_of(model, random_adapter))
    ]
    assert_each_row_is_what_it_is_alone(model, adapters)


def test_scales_of_inputs_are_each_rows_own(tiny_model, random_adapter):
    model = tiny_model("bert").double()
    path = "bert.encoder.layer.0.output.dense"
    adapters = [
        replace(
            adapter,
            scales={path: Scale(np.random.default_rng(seed).uniform(0.5, 2, 37), "input")},
        )
        for seed, adapter in enumerate(adapters_of(model, random_adapter))
    ]
    assert_each_row_is_what_it_is_alone(model, adapters)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_tokens_laid_end_to_end_keep_their_rows(kind, tiny_model, random_adapter):
    """A mixture's router computes [batch * tokens, experts]."""
    model = tiny_model(kind)
    router = next(path for path, _ in model.named_modules() if path.endswith("mlp.gate"))
    adapters = adapters_of(model, random_adapter, only="self_attn")
    layout = layout_of(model, adapters)
    seen = []
    hook = model.get_submodule(router).register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].shape)
    )
    rows = rows_of(model, adapters, layout)

    with attached_rows(model, layout):
        mixed = logits(model, TOKENS, **{ROWS_INPUT: rows})
    hook.remove()

    assert seen[0][0] == TOKENS.numel()
    torch.testing.assert_close(mixed, each_alone(model, adapters), rtol=1e-4, atol=1e-4)


def test_a_flattened_linear_is_scaled_by_row():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.nn.Linear(4, 3)

        def forward(self, values):
            return self.inner(values.reshape(-1, 4)).reshape(*values.shape[:-1], 3)

    model = Flat()
    layout = {"propulsion_scales": (Slot("inner", 0, 3, (3,)),)}
    values, rows = torch.randn(2, 5, 4), torch.tensor([[1.0, 2, 3], [-1, 0.5, 4]])
    expected = model(values) * rows[:, None]

    with attached_rows(model, layout):
        found = model(values, **{ROWS_INPUT: rows})

    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 4), (2, 3, 5, 4), (2, 3, 5, 6, 4)])
@pytest.mark.parametrize("side", ["output", "input"])
def test_activations_of_any_rank_are_scaled_by_row(shape, side):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, values):
            return self.inner(values)

    model, values = Wrapped(), torch.randn(shape)
    rows = torch.tensor([[1.0, 2, 3, -4], [-1, 0.5, 4, 8]])
    layout = {"propulsion_scales": (Slot("inner", 0, 4, (4,), side),)}
    each = rows.reshape(2, *[1] * (len(shape) - 2), 4)
    expected = model(values) * each if side == "output" else model(values * each)

    with attached_rows(model, layout):
        found = model(values, **{ROWS_INPUT: rows})

    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 4), (2, 3, 5, 4)])
def test_weights_of_any_rank_of_input_are_each_rows_own(shape):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 3)

        def forward(self, values):
            return self.inner(values)

    model, values = Wrapped(), torch.randn(shape)
    layout = {
        "propulsion_modules": (
            Slot("inner.weight", 0, 12, (3, 4)),
            Slot("inner.bias", 12, 3, (3,)),
        )
    }
    rows = torch.randn(2, 15)
    expected = torch.stack(
        [
            torch.nn.functional.linear(one, row[:12].reshape(3, 4), row[12:])
            for one, row in zip(values, rows, strict=True)
        ]
    )

    with attached_rows(model, layout):
        found = model(values, **{ROWS_INPUT: rows})

    torch.testing.assert_close(found, expected)


def test_without_rows_and_afterwards_the_model_is_the_base_model(tiny_model, random_adapter):
    model = tiny_model("bert")
    adapters = adapters_of(model, random_adapter, biases=True, head=True)
    layout = layout_of(model, adapters)
    expected = logits(model, TOKENS)
    rows = rows_of(model, adapters, layout)

    with attached_rows(model, layout):
        assert torch.equal(logits(model, TOKENS), expected)
        logits(model, TOKENS, **{ROWS_INPUT: rows})
        assert torch.equal(logits(model, TOKENS), expected)

    assert torch.equal(logits(model, TOKENS), expected)
    assert not any(
        {"forward", "disentangled_attention_bias"} & module.__dict__.keys()
        for module in model.modules()
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_after_a_failure_the_model_is_the_base_model(tiny_model, random_adapter):
    model = tiny_model("deberta-v2")
    adapters = adapters_of(model, random_adapter)
    layout = layout_of(model, adapters)
    expected = logits(model, TOKENS)

    with pytest.raises(RuntimeError, match="split_with_sizes"), attached_rows(model, layout):
        logits(model, TOKENS, **{ROWS_INPUT: torch.ones(3, width_of(layout) + 1)})

    assert torch.equal(logits(model, TOKENS), expected)


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        ("mixtral", {}, "experts.gate_up_proj: scales experts"),
        ("deberta-v2", {"biases": True}, "pos_key_proj.bias: the bias of Linear cannot differ"),
    ],
)
def test_what_cannot_differ_by_row_is_refused_by_name(
    kind, options, found, tiny_model, random_adapter
):
    model = tiny_model(kind)
    adapters = adapters_of(model, random_adapter, **options)

    with (
        pytest.raises(UsageError, match=found) as refusal,
        attached_rows(model, layout_of(model, adapters)),
    ):
        pass

    assert "--mode switchable" in str(refusal.value)


def test_shared_projections_of_positions_are_refused_by_name(tiny_model, random_adapter):
    model = tiny_model("deberta-v2", share_att_key=True)
    layout = layout_of(model, adapters_of(model, random_adapter))

    with (
        pytest.raises(UsageError, match=r"query_proj: projects relative positions too"),
        attached_rows(model, layout),
    ):
        pass


def test_a_saved_embedding_is_refused_by_name(tiny_model, random_adapter):
    model = tiny_model("bert")
    name = "bert.embeddings.word_embeddings.weight"
    adapter = replace(random_adapter(model), modules={name: np.ones((100, 32), np.float32)})

    with (
        pytest.raises(UsageError, match="the weight of Embedding cannot differ"),
        attached_rows(model, layout_of(model, [adapter])),
    ):
        pass


def test_an_output_without_rows_is_refused_by_name():
    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 3)

        def forward(self, values):
            return self.inner(values.transpose(0, 1))

    layout = {"propulsion_scales": (Slot("inner", 0, 3, (3,)),)}
    model = Turned()
    with (
        attached_rows(model, layout),
        pytest.raises(UsageError, match=r"inner: computes \[5, 2, 3\] for a batch of 2"),
    ):
        model(torch.ones(2, 5, 4), **{ROWS_INPUT: torch.ones(2, 3)})
