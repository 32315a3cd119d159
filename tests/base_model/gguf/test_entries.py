"""Single entries of parameters, and the step of the grid that each lies on."""

import numpy as np
import pytest
from gguf_files import CONVERTED, quantised, tiny_language_model, write_gguf

from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.gguf.header import read_header
from propulsion_export.base_model.gguf.parameters import Parameters, with_steps
from propulsion_export.base_model.gguf.values import read_step, read_value
from propulsion_export.base_model.gguf.weights import gguf_tensors
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

PLAIN = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ2_0"]
PLAIN += ["Q3_K", "Q5_K", "Q2_K", "TQ1_0", "MXFP4"]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}


@pytest.mark.parametrize("kind", CONVERTED)
def test_parameters_are_found_by_name_without_the_model(kind, tmp_path):
    file = write_gguf(tmp_path / "base.gguf", tiny_language_model(kind), quantisation="Q8_0")
    parameters = Parameters.of(read_header(file))

    for name, tensor in gguf_tensors(str(file)).items():
        found = parameters.find(name)
        if not tensor.names:
            assert found is None
            continue
        whole = tensor.array()
        chooser = np.random.default_rng(0)
        for _ in range(3):
            place = tuple(int(chooser.integers(size)) for size in found.shape)
            assert found[place] == tensor[place] == whole[place], (name, place)


@pytest.mark.parametrize("kind", PLAIN)
def test_numbers_are_about_a_step_from_what_they_were(kind, tmp_path):
    model = tiny_language_model("llama", **WIDE)
    file = write_gguf(tmp_path / "base.gguf", model, quantisation=kind)
    header, name = read_header(file), "blk.0.ffn_up.weight"
    exact = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    places = [(row, (37 * row) % 256) for row in range(0, 512, 4)]

    steps = np.array([read_step(header, name, place) for place in places])
    found = np.array([read_value(header, name, place) for place in places])

    off = np.abs(found - [exact[place] for place in places]) / steps
    assert (steps > 0).all()
    assert (off <= 1.6).all()
    assert off.max() > 0.3  # and it is not much more than a step


def test_the_step_of_plain_numbers_is_none(tmp_path):
    file = write_gguf(tmp_path / "base.gguf", tiny_language_model("llama"), quantisation="F16")

    assert read_step(read_header(file), "blk.0.ffn_up.weight", (0, 0)) == 0
    assert Parameters.of(read_header(file)).fingerprint(["layers.0.mlp.up_proj.weight"]).steps == {}


def test_an_adapter_of_one_quantisation_is_recognised_on_another(tmp_path):
    model = tiny_language_model("llama", **WIDE)
    files = {
        kind: write_gguf(tmp_path / f"{kind}.gguf", model, quantisation=kind)
        for kind in ("Q4_1", "Q6_K")
    }
    known = fingerprint_of_model(model)
    found = {
        kind: Parameters.of(read_header(file)).fingerprint((*known.entries, *known.vectors))
        for kind, file in files.items()
    }
    loaded = Fingerprint(found["Q4_1"].dtype, found["Q4_1"].entries, found["Q4_1"].vectors)

    assert with_steps(loaded, files["Q4_1"]).difference(found["Q6_K"]) is None
    assert loaded.difference(found["Q6_K"])


def test_a_few_entries_may_be_further_and_more_may_not(tmp_path):
    file = write_gguf(
        tmp_path / "base.gguf", tiny_language_model("llama", **WIDE), quantisation="Q4_1"
    )
    known = fingerprint_of_model(tiny_language_model("llama", **WIDE))
    found = Parameters.of(read_header(file)).fingerprint((*known.entries, *known.vectors))
    name = sorted(known.entries)[0]

    def moved(names):
        entries = {
            each: (row[0] + 3 * found.steps[each][0], *row[1:]) if each in names else row
            for each, row in known.entries.items()
        }
        return Fingerprint(known.dtype, entries, known.vectors)

    assert moved([name]).difference(found) is None
    assert moved(list(known.entries)).difference(found)


def test_quantised_gives_the_bytes_of_the_package_where_it_can():
    values = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)

    assert quantised(values, "Q4_K").shape == (2, 144)
    assert quantised(values, "Q8_0").shape == (2, 272)
