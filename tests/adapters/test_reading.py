"""Directories of Propulsion and of (IA)^3 are read as effective scales."""

import math

import numpy as np
import pytest
import torch
from adapter_files import CONFIG, DENSE, PREFIX, QUERY, WEIGHTS, tensors_of, write
from peft import IA3Config, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.fingerprint import Fingerprint

# Propulsion


def test_a_propulsion_directory_is_read_as_effective_scales(tmp_path):
    tensors = tensors_of() | {
        f"{PREFIX}{QUERY}.propulsion_bias": np.array([0.1, 0.2, -0.3], np.float32),
        f"{PREFIX}classifier.weight": np.array([[1.0, 2.0], [3.0, 4.0]], np.float16),
        f"{PREFIX}embeddings.base_layer.weight": np.ones((2, 2), np.float32),
    }

    adapter = Adapter.read(write(tmp_path / "topic", tensors=tensors))

    assert adapter.name == "topic"
    assert set(adapter.scales) == {QUERY, DENSE}
    np.testing.assert_array_equal(adapter.scales[QUERY].values, [3.375, -0.125, 8.0])
    np.testing.assert_array_equal(adapter.scales[DENSE].values, [1 / 64, 27.0])
    assert {scale.values.dtype for scale in adapter.scales.values()} == {np.dtype(np.float64)}
    assert {scale.side for scale in adapter.scales.values()} == {"output"}
    np.testing.assert_array_equal(adapter.biases[QUERY], np.array([0.1, 0.2, -0.3], np.float32))
    assert set(adapter.biases) == {QUERY}
    assert set(adapter.modules) == {"classifier.weight"}
    np.testing.assert_array_equal(adapter.modules["classifier.weight"], [[1, 2], [3, 4]])
    assert adapter.base == "some/base"
    assert adapter.task == "text-classification"
    assert adapter.labels == ("no", "yes")
    assert adapter.fingerprint == Fingerprint("float32", {"weight": (0.5,) * 8})
    assert adapter.size == 5


def test_the_power_is_taken_in_float64(tmp_path):
    z = np.array([1.1, 0.9, -1.07], np.float32)

    adapter = Adapter.read(write(tmp_path, {"degree": 15}, tensors_of({QUERY: z})))

    expected = [math.pow(float(value), 15) for value in z]
    np.testing.assert_allclose(adapter.scales[QUERY].values, expected, rtol=1e-15)
    assert (adapter.scales[QUERY].values != (z**15).astype(np.float64)).any()


def test_a_fractional_degree_of_positive_vectors_is_read(tmp_path):
    vectors = {QUERY: np.array([0.0, 4.0, 2.25], np.float32)}

    adapter = Adapter.read(write(tmp_path, {"degree": 0.5}, tensors_of(vectors)))

    np.testing.assert_array_equal(adapter.scales[QUERY].values, [0.0, 2.0, 1.5])


def test_what_the_directory_does_not_say_is_none(tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "PROPULSION", "degree": 2}')
    save_file(tensors_of(), tmp_path / WEIGHTS)

    adapter = Adapter.read(tmp_path, "mine")

    assert adapter.name == "mine"
    assert (adapter.base, adapter.task, adapter.labels, adapter.fingerprint) == (None,) * 4


def test_a_head_in_bfloat16_is_read(tmp_path):
    write(tmp_path)
    tensors = {key: torch.from_numpy(values) for key, values in tensors_of().items()}
    head = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    save_torch_file(tensors | {f"{PREFIX}classifier.weight": head}, tmp_path / WEIGHTS)

    values = Adapter.read(tmp_path).modules["classifier.weight"]

    np.testing.assert_array_equal(values.astype(np.float32), [[1.5, -2.0]])


def test_reading_changes_nothing_on_disk(tmp_path):
    before = {path.name: path.read_bytes() for path in write(tmp_path).iterdir()}

    Adapter.read(tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(load_file(tmp_path / WEIGHTS)) == set(tensors_of())


# (IA)^3


class Tiny(nn.Module):
    """One module of each side, and a layer kind PEFT shapes its vectors for differently."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(4, 6)
        self.mlp = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)
        self.config = {"model_type": "custom"}

    def forward(self, inputs, scales=None):
        def module(name, values):
            scale = (scales or {}).get(name)
            ours = torch.from_numpy(scale.values).float() if scale else None
            if scale and scale.side == "input":
                values = values * ours
            values = getattr(self, name)(values)
            return values * ours if scale and scale.side == "output" else values

        return module("out", torch.tanh(module("mlp", torch.tanh(module("attention", inputs)))))


@pytest.mark.parametrize("feedforward", [["mlp", "out"], ["mlp"], "ml.", None], ids=str)
def test_an_ia3_adapter_of_peft_gives_pefts_outputs(tmp_path, feedforward):
    torch.manual_seed(0)
    base, inputs = Tiny(), torch.randn(5, 4)
    plain = base(inputs).detach()
    wanted = base.state_dict()
    config = IA3Config(
        target_modules=["attention", "mlp", "out"],
        feedforward_modules=feedforward or [],
        init_ia3_weights=False,
    )
    peft_model = get_peft_model(base, config)
    for name, parameter in peft_model.named_parameters():
        if "ia3_l" in name:
            nn.init.uniform_(parameter, 0.3, 2.0)
    expected = peft_model(inputs).detach()
    peft_model.save_pretrained(tmp_path)

    adapter = Adapter.read(tmp_path)

    other = Tiny()
    other.load_state_dict(wanted)
    torch.testing.assert_close(other(inputs, adapter.scales).detach(), expected)
    assert not torch.allclose(plain, expected, rtol=1e-2)
    inputs_of = {path for path, scale in adapter.scales.items() if scale.side == "input"}
    assert inputs_of == set(["mlp"] if feedforward == "ml." else feedforward or [])
    assert {path: scale.values.size for path, scale in adapter.scales.items()} == {
        "attention": 6,
        "mlp": 6 if "mlp" in inputs_of else 8,
        "out": 8 if "out" in inputs_of else 3,
    }


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3), (1, 3, 1, 1)], ids=str)
def test_ia3_vectors_of_every_layer_kind_are_flattened(tmp_path, shape):
    vectors = {QUERY: np.array([1.5, -2.0, 3.0], np.float32).reshape(shape)}
    write(tmp_path, {"peft_type": "IA3"}, tensors_of(vectors, "ia3_l"))

    scale = Adapter.read(tmp_path).scales[QUERY]

    np.testing.assert_array_equal(scale.values, [1.5, -2.0, 3.0])
