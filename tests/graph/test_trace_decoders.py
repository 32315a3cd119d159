"""A traced decoder computes what torch computes, by steps, behind thousands of tokens."""

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from traced_graphs import scales_in

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.errors import ToolError
from propulsion_export.graph.files import write_graph
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.cache import NameCache
from propulsion_export.graph.passes.dimensions import NameDimensions
from propulsion_export.graph.sample_inputs import trace_inputs, trace_prompt
from propulsion_export.graph.signature import signature
from propulsion_export.graph.trace import _refuse_fixed, trace, trace_decoder
from propulsion_export.parity.inputs import decoder_inputs
from propulsion_export.runners.decoding import (
    CausalModel,
    pad_left,
    recomputing,
    replaying,
    row_by_row,
)
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.pytorch import torch_decoder_runner, torch_runner
from propulsion_export.scaling.attach import attached, initializer_name

DECODERS = ["llama", "gpt2"]
# Rotary positions go as far as the configuration says, learned ones as far as their table.
LONG = {"llama": {"max_position_embeddings": 4096}}


@pytest.fixture(scope="session")
def traced_decoder(tiny_model, random_adapter, tmp_path_factory):
    """`traced_decoder(kind)`: a decoder, an adapter for it, and the graph of both, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            model = tiny_model(kind, **LONG.get(kind, {}))
            adapter = random_adapter(model, seed=1)
            with attached(model, adapter):
                program = trace_decoder(model, trace_prompt(model.config))
            raw = [(value.name, value.shape) for value in program.graph.inputs]
            scales = scales_in(program)
            NameCache()(program)
            NameDimensions()(program)
            program = optimise(program)
            path = write_graph(program, tmp_path_factory.mktemp(kind))
            inputs, outputs = signature(program)
            made[kind] = SimpleNamespace(
                model=model, adapter=adapter, raw=raw, scales=scales, inputs=inputs,
                outputs=outputs, graph=CausalModel(onnxruntime_runner(path), inputs), path=path,
            )  # fmt: skip
        return made[kind]

    return make


def tokens_of(rows, length):
    """Rows of random tokens, all but the first a little shorter, padded on the left."""
    chooser = np.random.default_rng(length)
    lengths = [max(1, length - 2 * row) for row in range(rows)]
    return pad_left([chooser.integers(5, 100, each) for each in lengths], 0)


def expected_logits(decoder, batch, *, adapter=True):
    with attached(decoder.model, decoder.adapter if adapter else Adapter("none", {})):
        return recomputing(CausalModel(torch_decoder_runner(decoder.model)))(batch)[LOGITS]


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize(
    ("rows", "past", "new"),
    [(1, 0, 1), (1, 0, 9), (3, 0, 7), (1, 9, 1), (5, 6, 1), (4, 20, 5), (2, 1, 30), (1, 120, 2)],
    ids=lambda value: str(value),
)
def test_graph_of_a_decoder_computes_what_torch_does_at_any_size(
    kind, rows, past, new, traced_decoder
):
    decoder = traced_decoder(kind)
    batch = tokens_of(rows, past + new)
    opening = decoder.graph.open(batch)
    state = opening.decoder.start(rows)
    if past:
        _, state = opening.decoder.step(state, opening.tokens[:, :past], opening.mask[:, :past])

    found, state = opening.decoder.step(state, opening.tokens[:, past:], opening.mask[:, past:])

    expected = expected_logits(decoder, batch)[:, past:]
    visible = batch["attention_mask"][:, past:] == 1
    np.testing.assert_allclose(found[visible], expected[visible], rtol=1e-3, atol=1e-4)
    assert {values.shape[2] for values in state.cache.values()} == {past + new}
    base = expected_logits(decoder, batch, adapter=False)[:, past:]
    assert np.abs(found - base)[visible].max() > 0.1


def test_graph_of_a_decoder_goes_on_behind_thousands_of_tokens(traced_decoder):
    decoder = traced_decoder("llama")
    batch = tokens_of(2, 2003)
    opening = decoder.graph.open(batch)
    start = opening.decoder.start(2)
    _, state = opening.decoder.step(start, opening.tokens[:, :2000], opening.mask[:, :2000])

    found, _ = opening.decoder.step(state, opening.tokens[:, 2000:])

    expected = expected_logits(decoder, batch)[:, 2000:]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    # What was read first is not forgotten.
    changed = {name: np.array(values) for name, values in state.cache.items()}
    changed["past_key_values.0.value"][:, :, :1000] += 1
    other, _ = opening.decoder.step(type(state)(state.mask, changed), opening.tokens[:, 2000:])
    assert np.abs(other - found).max() > 1e-2


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_reads_by_steps_what_it_reads_at_once_and_row_by_row(kind, traced_decoder):
    decoder = traced_decoder(kind)
    for batch in decoder_inputs(decoder.model.config, seed=3):
        stepped = replaying(decoder.graph)(batch)[LOGITS]
        apart = row_by_row(recomputing(decoder.graph))(batch)[LOGITS]

        visible = batch["attention_mask"] == 1
        at_once = recomputing(decoder.graph)(batch)[LOGITS]
        np.testing.assert_allclose(stepped[visible], at_once[visible], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(stepped[visible], apart[visible], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_every_dimension_of_a_decoder_that_varies_is_traced_so(kind, traced_decoder):
    decoder = traced_decoder(kind)

    for name, shape in decoder.raw:
        varying = (0, 2) if "cache" in name else (0, 1)
        assert all(not isinstance(shape[axis], int) for axis in varying), name
        assert all(not str(shape[axis]).isdigit() for axis in varying), name
        if "cache" in name:
            heads = {"llama": 2, "gpt2": 4}[kind]
            assert [str(shape[axis]) for axis in (1, 3)] == [str(heads), "8"]
    names = {"batch", "sequence", "past_sequence", "total_sequence"}
    shapes = [spec.shape for spec in (*decoder.inputs, *decoder.outputs)]
    assert {size for shape in shapes for size in shape if isinstance(size, str)} == names


@pytest.mark.parametrize("kind", DECODERS)
def test_every_scale_of_a_decoder_is_an_initializer_by_name(kind, traced_decoder):
    decoder = traced_decoder(kind)

    assert decoder.scales == {
        initializer_name(path, scale.side, scale.values.ndim)
        for path, scale in decoder.adapter.scales.items()
    }
    assert len(decoder.scales) > 8


def test_dimension_that_the_exporter_fixed_is_refused_by_name():
    def program(shape):
        cache = ir.Value(
            name="cache.0", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)
        )
        return ir.Model(ir.Graph([cache], [cache], nodes=[], opset_imports={"": 20}), ir_version=10)

    _refuse_fixed(program(["s1", 2, "s2", 8]), "Model", {})
    for shape in (["s1", 2, 11, 8], ["s1", 2, "11", 8], [3, 2, "s2", 8]):
        with pytest.raises(
            ToolError, match=r"Model: cache.0 is traced as .* that varies"
        ) as caught:
            _refuse_fixed(program(shape), "Model", {})
        assert "\n" not in str(caught.value)


def test_model_that_does_not_generate_is_refused_in_one_line(tiny_bert):
    model = tiny_bert(num_hidden_layers=1)

    with pytest.raises(ToolError, match=r"Bert\w+: cannot be traced \(\w+: .+") as caught:
        trace_decoder(model, trace_prompt(model.config))

    assert "\n" not in str(caught.value)


def test_refusal_while_the_steps_are_captured_is_one_line(tiny_model, monkeypatch):
    model = tiny_model("llama")

    def refuse(**_):
        raise RuntimeError("no room for a cache\nand more lines")

    monkeypatch.setattr(model, "generate", refuse)

    with pytest.raises(
        ToolError,
        match=r"^LlamaForCausalLM: cannot be traced \(RuntimeError: no room for a cache\)",
    ) as caught:
        trace_decoder(model, trace_prompt(model.config))
    assert "\n" not in str(caught.value)


def test_decoder_is_traced_whatever_its_generation_settings_and_left_as_it_was(tiny_model):
    """Every token that it would say first ends a text; it samples; it keeps no cache."""
    model = tiny_model("llama", num_hidden_layers=1)
    prompt = trace_prompt(model.config)
    ending = torch_runner(model)(prompt)["logits"][:, -1].argmax(-1)
    model.generation_config.update(
        do_sample=True, temperature=0.3, num_beams=4, max_length=5, use_cache=False,
        eos_token_id=sorted({int(token) for token in ending}), return_dict_in_generate=True,
    )  # fmt: skip
    settings = model.generation_config.to_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    program = trace_decoder(model, prompt)
    NameCache()(program)

    assert [value.name for value in program.graph.outputs] == [
        "logits", "present.0.key", "present.0.value"
    ]  # fmt: skip
    assert model.generation_config.to_dict() == settings
    assert "forward" not in vars(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_decoder_under_a_classifiers_head_returns_no_cache(tiny_model):
    config = tiny_model("gpt2").config
    model = transformers.GPT2ForSequenceClassification(config).eval()

    program = trace(model, trace_inputs(("input_ids", "attention_mask"), config))

    assert [value.name for value in program.graph.outputs] == ["logits"]


def test_of_further_inputs_only_the_batch_has_to_vary():
    def program(shape):
        rows = ir.Value(name="rows", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        return ir.Model(ir.Graph([rows], [rows], nodes=[], opset_imports={"": 20}), ir_version=10)

    shapes = {"rows": {0: "auto"}}
    _refuse_fixed(program(["s1", 522]), "Model", shapes)
    with pytest.raises(ToolError, match=r"rows is traced as .* dimension 0 that varies"):
        _refuse_fixed(program([3, 522]), "Model", shapes)
