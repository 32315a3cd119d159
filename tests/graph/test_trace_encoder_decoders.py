"""The three graphs of an encoder-decoder compute what torch computes."""

import numpy as np
import pytest
import torch
from traced_graphs import names_of, scales_in

from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.graph.files import write_graphs
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.cache import NameCache
from propulsion_export.graph.passes.dimensions import NameDimensions
from propulsion_export.graph.sample_inputs import trace_inputs
from propulsion_export.graph.signature import signature
from propulsion_export.graph.trace import trace_encoder_decoder
from propulsion_export.parity.inputs import parity_inputs, with_decoder_tokens
from propulsion_export.runners.decoding import EncoderDecoder, recomputing, replaying
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.pytorch import torch_runner
from propulsion_export.scaling.attach import attached, initializer_name


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
