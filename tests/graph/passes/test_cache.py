"""What a decoder reads and keeps has the names and the order that its clients know."""

import onnx_ir as ir
import pytest

from propulsion_export.graph.passes.cache import NameCache

FLOAT = ir.TensorType(ir.DataType.FLOAT)
SELF = "cache.self_attention_cache.layers"
CROSS = "cache.cross_attention_cache.layers"


def graph(inputs, outputs):
    """A graph by names, which ONNX's text cannot hold dots in.

    Each output is named with what it is a sum of; an output of nothing else is that input itself.
    """
    values = {name: ir.Value(name=name, type=FLOAT, shape=ir.Shape([2])) for name in inputs}
    nodes, made = [], []
    for name, (first, *others) in outputs.items():
        if name == first:
            made.append(values[name])
            continue
        node = ir.node("Sum", [values[part] for part in (first, *others)])
        node.outputs[0].name, node.outputs[0].type = name, FLOAT
        nodes.append(node)
        made.append(node.outputs[0])
    body = ir.Graph(list(values.values()), made, nodes=nodes, opset_imports={"": 20}, name="main")
    return ir.Model(body, ir_version=10)


def decoder(**changes):
    """As the exporter traces a causal language model: the cache is not last."""
    caches = [f"layers.{layer}.{kind}s" for layer in (0, 1) for kind in ("key", "value")]
    inputs = ["position_ids", *(f"input.cache.{name}" for name in caches), "attention_mask"]
    outputs = {
        f"output.cache.{name}": (f"input.cache.{name}", "input_ids", "position_ids")
        for name in caches
    }
    logits = {"logits": ("input_ids", "attention_mask", *inputs[1:5])}
    return graph([*inputs, "input_ids"], logits | outputs | changes)


def first_step():
    inputs = ["attention_mask", "decoder_input_ids", "encoder_outputs.last_hidden_state"]
    outputs = {"logits": tuple(inputs), "encoder_last_hidden_state": (inputs[2],)}
    for kind in ("keys", "values"):
        outputs[f"{SELF}.0.{kind}"] = ("decoder_input_ids", inputs[2])
        outputs[f"{CROSS}.0.{kind}"] = ("encoder_outputs.last_hidden_state",)
    return graph(inputs, outputs)


def later_step(*, returned=False, hidden_read=False):
    """Its cross-attention reads what the first step made; `returned` as the very input, or not."""
    hidden = "encoder_outputs.last_hidden_state"
    inputs = ["attention_mask", "decoder_input_ids", hidden]
    caches = [f"{which}.0.{kind}" for which in (SELF, CROSS) for kind in ("keys", "values")]
    inputs += [f"input.{name}" for name in caches]
    read = inputs if hidden_read else [name for name in inputs if name != hidden]
    outputs = {"logits": tuple(read), "encoder_last_hidden_state": (hidden, hidden)}
    for name in caches:
        if name.startswith(SELF):
            outputs[f"output.{name}"] = (f"input.{name}", "decoder_input_ids")
        elif returned:
            outputs[f"input.{name}"] = (f"input.{name}",)
        else:
            outputs[f"output.{name}"] = (f"input.{name}", f"input.{name}")
    return graph(inputs, outputs)


def names(values):
    return [value.name for value in values]


def test_cache_of_a_decoder_is_named_by_layer_and_comes_after_the_other_inputs():
    model = decoder()

    result = NameCache()(model)

    caches = ["0.key", "0.value", "1.key", "1.value"]
    assert names(model.graph.inputs) == [
        "input_ids", "attention_mask", "position_ids",
        *(f"past_key_values.{name}" for name in caches),
    ]  # fmt: skip
    assert names(model.graph.outputs) == ["logits", *(f"present.{name}" for name in caches)]
    assert result.modified


def test_layers_from_ten_on_keep_their_numbers_and_order():
    caches = [f"layers.{layer}.{kind}s" for layer in range(12) for kind in ("key", "value")]
    model = graph(
        ["input_ids", *(f"input.cache.{name}" for name in caches)],
        {f"output.cache.{name}": (f"input.cache.{name}", "input_ids") for name in caches},
    )

    NameCache()(model)

    assert names(model.graph.inputs)[-4:] == [
        "past_key_values.10.key", "past_key_values.10.value",
        "past_key_values.11.key", "past_key_values.11.value",
    ]  # fmt: skip
    assert names(model.graph.outputs)[-1] == "present.11.value"


def test_first_step_of_a_decoder_reads_the_encoder_and_returns_both_caches():
    model = first_step()

    NameCache()(model)

    assert names(model.graph.inputs) == [
        "input_ids", "encoder_attention_mask", "encoder_hidden_states"
    ]  # fmt: skip
    assert names(model.graph.outputs) == [
        "logits",
        "present.0.decoder.key", "present.0.decoder.value",
        "present.0.encoder.key", "present.0.encoder.value",
    ]  # fmt: skip


@pytest.mark.parametrize("returned", [False, True], ids=["copied", "passed-through"])
def test_later_step_returns_its_own_cache_only_and_no_longer_asks_for_the_encoder(returned):
    model = later_step(returned=returned)

    NameCache()(model)

    assert names(model.graph.inputs) == [
        "input_ids", "encoder_attention_mask",
        "past_key_values.0.decoder.key", "past_key_values.0.decoder.value",
        "past_key_values.0.encoder.key", "past_key_values.0.encoder.value",
    ]  # fmt: skip
    assert names(model.graph.outputs) == [
        "logits", "present.0.decoder.key", "present.0.decoder.value"
    ]  # fmt: skip
    # What was computed for dropped outputs is gone with them.
    assert len(list(model.graph)) == 3


def test_later_step_that_reads_the_encoders_output_keeps_asking_for_it():
    model = later_step(hidden_read=True)

    NameCache()(model)

    assert names(model.graph.inputs)[2] == "encoder_hidden_states"


def test_attention_mask_of_a_decoder_without_an_encoder_keeps_its_name():
    model = decoder()

    NameCache()(model)

    assert "encoder_attention_mask" not in names(model.graph.inputs)


def test_other_names_that_hold_a_traced_one_stay():
    kept = "my.cache.layers.0.keys"
    model = decoder(**{kept: ("input_ids", "input_ids")})

    NameCache()(model)

    assert kept in names(model.graph.outputs)


def without_output(model, name):
    (value,) = [value for value in model.graph.outputs if value.name == name]
    model.graph.outputs.remove(value)
    return model


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            lambda: without_output(decoder(), "output.cache.layers.1.values"), id="not-returned"
        ),
        pytest.param(
            lambda: without_output(later_step(), f"output.{SELF}.0.keys"), id="of-the-decoder"
        ),
        pytest.param(lambda: graph(["input_ids"], {"logits": ("input_ids",)}), id="no-cache"),
        pytest.param(
            lambda: graph(
                ["input_ids", "input.cache.layers.0.keys"], {"logits": ("input_ids",) * 2}
            ),
            id="none-returned",
        ),
    ],
)
def test_cache_that_goes_in_and_does_not_come_out_is_refused(model):
    with pytest.raises(ir.passes.PostconditionError, match=r"the cache goes in as .* comes out as"):
        NameCache()(model())


def test_cache_that_comes_out_in_another_order_is_refused():
    model = decoder()
    value = model.graph.outputs.pop(1)
    model.graph.outputs.append(value)

    with pytest.raises(ir.passes.PostconditionError, match="the cache goes in as"):
        NameCache()(model)
