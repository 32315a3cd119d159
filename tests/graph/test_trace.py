"""A traced model computes what torch computes, at every size, and shows every scale by its name."""

import copy
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.errors import ToolError, UnavailableError
from propulsion_export.graph.files import write_graph, write_graphs
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.cache import NameCache
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.graph.passes.dimensions import NameDimensions
from propulsion_export.graph.passes.packing import PackInitializers
from propulsion_export.graph.sample_inputs import input_names, trace_inputs, trace_prompt
from propulsion_export.graph.signature import signature
from propulsion_export.graph.trace import (
    _refuse_fixed,
    trace,
    trace_decoder,
    trace_encoder_decoder,
)
from propulsion_export.parity.inputs import decoder_inputs, parity_inputs, with_decoder_tokens
from propulsion_export.runners.decoding import (
    CausalModel,
    EncoderDecoder,
    pad_left,
    recomputing,
    replaying,
    row_by_row,
)
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.pytorch import torch_decoder_runner, torch_runner
from propulsion_export.runners.reference import reference_runner
from propulsion_export.scaling.attach import BUFFERS, attached, initializer_name
from propulsion_export.scaling.fold.model import fold_

SLOW = pytest.mark.slow  # each trace takes about four seconds
KINDS = ["bert", "roberta", "deberta-v2", "albert"]
MORE_KINDS = ["distilbert", "electra", "mpnet"]
CASES = [
    *(pytest.param(kind, "text-classification", id=kind) for kind in KINDS),
    *(pytest.param(kind, "text-classification", id=kind, marks=SLOW) for kind in MORE_KINDS),
    pytest.param("bert", "fill-mask", id="bert-fill-mask"),
    pytest.param("bert", "token-classification", id="bert-tokens", marks=SLOW),
    pytest.param("bert", "question-answering", id="bert-answers", marks=SLOW),
    pytest.param("bert", "feature-extraction", id="bert-features", marks=SLOW),
    pytest.param("roberta", "fill-mask", id="roberta-fill-mask", marks=SLOW),
    pytest.param("distilbert", "question-answering", id="distilbert-answers", marks=SLOW),
    pytest.param("deberta-v2", "token-classification", id="deberta-tokens", marks=SLOW),
    pytest.param("albert", "feature-extraction", id="albert-features", marks=SLOW),
]


def names_of(model):
    return input_names(type(model), model.config)


def traced(model, **options):
    program = trace(model, trace_inputs(names_of(model), model.config), **options)
    NameDimensions()(program)
    return program


def batches(model):
    return parity_inputs(names_of(model), model.config, seed=5)


def assert_same(found, expected, mask, tolerance):
    """Positions that the mask hides hold nothing anybody reads."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        visible = mask == 1 if values.shape[:2] == mask.shape else slice(None)
        one, other = found[name].astype(np.float64)[visible], values[visible]
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def scales_in(program):
    endings = tuple(f".{name}" for name in BUFFERS.values())
    return {name for name in program.graph.initializers if name.endswith(endings)}


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_switchable_graph_computes_what_torch_computes(
    kind, task, tiny_model, random_adapter, tmp_path
):
    """Every scale becomes an input; other sizes than the traced ones; no adapter is the base."""
    model = tiny_model(kind, task)
    placed = random_adapter(model, seed=1)
    asked = random_adapter(model, seed=2)
    with attached(model, placed):
        program = traced(model)
    assert scales_in(program) == {f"{path}.propulsion_scale" for path in placed.scales}
    slots, offset = {}, 0
    for path, scale in placed.scales.items():
        size = scale.values.size
        slots[f"{path}.propulsion_scale"] = Slot(path, offset, size, (size,))
        offset += size
    PackInitializers("scales", slots)(program)
    program = optimise(program)
    SetDefaults({"scales": np.ones(offset, np.float32)})(program)
    path = write_graph(program, tmp_path)

    run = onnxruntime_runner(path)
    feeds = np.concatenate([scale.values for scale in asked.scales.values()]).astype(np.float32)
    inputs = batches(model)
    found = [run(batch | {"scales": feeds}) for batch in inputs]
    found_base = [run(batch) for batch in inputs]

    expected_base = [torch_runner(model)(batch) for batch in inputs]
    with attached(model, asked):
        expected = [torch_runner(model)(batch) for batch in inputs]
    for batch, *pair, one, other in zip(
        inputs, found, expected, found_base, expected_base, strict=True
    ):
        assert_same(*pair, batch["attention_mask"], 1e-4)
        assert_same(one, other, batch["attention_mask"], 1e-4)
        assert not np.allclose(next(iter(pair[1].values())), next(iter(other.values())), rtol=0.1)
    inputs, outputs = signature(program)
    assert [spec.name for spec in inputs] == [*names_of(model), "scales"]
    assert {spec.shape for spec in inputs[:-1]} == {("batch", "sequence")}
    for spec in outputs:
        assert spec.shape[0] == "batch"
        assert {d for d in spec.shape if isinstance(d, str)} <= {"batch", "sequence"}


def test_equal_scales_are_not_merged_into_one_initializer(tiny_bert, random_adapter):
    model = tiny_bert(num_hidden_layers=1)
    paths = random_adapter(model).scales
    halves = {path: Scale(np.full(s.values.size, 0.5)) for path, s in paths.items()}

    with attached(model, Adapter("halves", halves)):
        found = scales_in(traced(model))

    assert found == {f"{path}.propulsion_scale" for path in halves}


def test_input_side_scales_trained_biases_and_heads_are_initializers_by_name(
    tiny_bert, random_adapter
):
    model = tiny_bert(num_hidden_layers=1)
    drawn = random_adapter(model, embeddings=False, biases=True, head=True)
    wide = "bert.encoder.layer.0.output.dense"
    inside = np.random.default_rng(0).uniform(0.5, 1.5, 37)
    adapter = Adapter(
        "a", {**drawn.scales, wide: Scale(inside, "input")}, drawn.biases, drawn.modules
    )

    with attached(model, adapter):
        initializers = traced(model).graph.initializers

    np.testing.assert_array_equal(
        initializers[f"{wide}.propulsion_input_scale"].const_value.numpy(),
        inside.astype(np.float32),
    )
    for path, bias in adapter.biases.items():
        np.testing.assert_array_equal(initializers[f"{path}.bias"].const_value.numpy(), bias)
    for name, values in adapter.modules.items():
        np.testing.assert_array_equal(initializers[name].const_value.numpy(), values)


def test_folded_graph_has_the_nodes_of_the_base_export(tiny_bert, random_adapter):
    model = tiny_bert(num_hidden_layers=1)
    base = optimise(traced(model))
    adapter = random_adapter(model, biases=True)
    fold_(model, adapter)

    folded = optimise(traced(model))

    def operators(program):
        return sorted(node.op_type for node in program.graph)

    assert operators(folded) == operators(base)
    assert [v.name for v in folded.graph.inputs] == [v.name for v in base.graph.inputs]


@pytest.mark.parametrize("opset", [18, pytest.param(23, marks=SLOW)])
def test_opset_asked_for_is_that_of_the_graph(opset, tiny_bert, tmp_path):
    model = tiny_bert(num_hidden_layers=1)

    program = optimise(traced(model, opset=opset))

    assert program.opset_imports[""] == opset
    batch = batches(model)[0]
    found = onnxruntime_runner(write_graph(program, tmp_path))(batch)
    assert_same(found, torch_runner(model)(batch), batch["attention_mask"], 1e-4)


def rounded_outputs(model, adapter, dtype, batch):
    model = copy.deepcopy(model).to(dtype)
    with attached(model, adapter):
        return torch_runner(model)(batch)


def graph_in(dtype, model, adapter, directory):
    with attached(model.to(dtype), adapter):
        return write_graph(optimise(traced(model)), directory)


def test_float16_graph_runs_in_onnxruntime(tiny_bert, random_adapter, tmp_path):
    model = tiny_bert(num_hidden_layers=1)
    adapter, batch = random_adapter(model), batches(model)[0]
    exact = rounded_outputs(model, adapter, torch.float64, batch)["logits"]

    path = graph_in(torch.float16, model, adapter, tmp_path)

    found = onnxruntime_runner(path)(batch)["logits"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-2 * np.abs(exact).max())


def test_bfloat16_graph_is_unavailable_in_onnxruntime_and_right_in_the_reference(
    tiny_bert, random_adapter, tmp_path
):
    model = tiny_bert(num_hidden_layers=1)
    adapter, batch = random_adapter(model), batches(model)[0]
    exact = rounded_outputs(model, adapter, torch.float64, batch)["logits"]

    path = graph_in(torch.bfloat16, model, adapter, tmp_path)

    with pytest.raises(UnavailableError, match="no bfloat16 kernels"):
        onnxruntime_runner(path)
    found = reference_runner(path)(batch)["logits"]
    assert str(found.dtype) == "bfloat16"
    found = found.astype(np.float64)
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.1 * np.abs(exact).max())


class Unexportable(nn.Module):
    config = transformers.PretrainedConfig()

    def forward(self, input_ids):
        if input_ids.sum() > 3:  # depends on the data
            return {"y": input_ids}
        return {"y": -input_ids}


def test_a_model_that_branches_on_the_values_of_a_batch_is_named():
    with pytest.raises(ToolError, match="Unexportable: its code branches on the values of a batch"):
        trace(Unexportable(), {"input_ids": np.ones((3, 11), np.int64)})


def test_trace_leaves_the_model_as_it_was(tiny_bert):
    model = tiny_bert(num_hidden_layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = batches(model)[0]
    expected = torch_runner(model)(batch)["logits"]

    program = traced(model)

    assert isinstance(program, ir.Model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(torch_runner(model)(batch)["logits"], expected)


# Decoders

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


# Encoder-decoders


@pytest.mark.slow  # three traces, half a minute
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_graphs_of_an_encoder_decoder_compute_what_torch_does(
    kind, tiny_model, random_adapter, tmp_path
):
    model = tiny_model(kind)
    adapter = random_adapter(model, seed=1)
    with attached(model, adapter):
        programs = trace_encoder_decoder(model, trace_inputs(names_of(model), model.config))
    assert list(programs) == list(ENCODER_DECODER_FILES)
    wanted = {initializer_name(path, scale.side) for path, scale in adapter.scales.items()}
    found = {name: scales_in(program) for name, program in programs.items()}
    assert set().union(*found.values()) == wanted
    assert all(len(scales) > 4 for scales in found.values())
    for name in ENCODER_DECODER_FILES[1:]:
        NameCache()(programs[name])
    programs = {name: finished(program) for name, program in programs.items()}
    write_graphs(programs, tmp_path)
    encode, first, later = (onnxruntime_runner(tmp_path / name) for name in programs)

    def decode(feeds):
        return (later if "past_key_values.0.decoder.key" in feeds else first)(feeds)

    graph = EncoderDecoder(encode, decode, model.config.decoder_start_token_id)

    batches = with_decoder_tokens(
        parity_inputs(names_of(model), model.config, seed=5), model.config, seed=5
    )
    for batch in batches:
        with attached(model, adapter):
            expected = torch_runner(model)(batch)["logits"]
        for way in (replaying, recomputing):
            np.testing.assert_allclose(way(graph)(batch)[LOGITS], expected, rtol=1e-3, atol=1e-4)
        assert np.abs(torch_runner(model)(batch)["logits"] - expected).max() > 0.1
    for program in programs.values():
        assert_all_vary(program)


def finished(program):
    NameDimensions()(program)
    return optimise(program)


def assert_all_vary(program):
    for spec in signature(program)[0]:
        length = 2 if spec.name.startswith("past_key_values.") else 1
        assert spec.shape[0] == "batch"
        assert isinstance(spec.shape[length], str)


@pytest.mark.slow  # three traces, half a minute
def test_encoder_decoder_that_would_end_at_once_is_traced_all_the_same(tiny_model):
    """As one that was trained to answer with a single token does."""
    model = tiny_model("t5")
    inputs = trace_inputs(names_of(model), model.config)
    said = model.generate(
        torch.from_numpy(inputs["input_ids"]), do_sample=False, max_new_tokens=1, min_new_tokens=1
    )
    model.generation_config.eos_token_id = sorted({int(token) for token in said[:, 1]})

    assert list(trace_encoder_decoder(model, inputs)) == list(ENCODER_DECODER_FILES)
    assert "forward" not in vars(model)


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
