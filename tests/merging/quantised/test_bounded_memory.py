"""New scales of quantised layers are in memory one tensor after the other."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.tensor_files import stored_tensors
from propulsion_export.merging.changes import all_changes
from propulsion_export.merging.files import plan_files
from propulsion_export.merging.plan import Plan
from propulsion_export.merging.quantised.layouts import find_layout
from propulsion_export.merging.verifying import verify_output
from propulsion_export.merging.writing import Output, write_outputs

OUTPUTS, INPUTS = 512, 2048
LARGE = 64 * 1024  # what a layer's new scales have at least, in bytes
SMALL = LARGE // 8
LAYERS = (16, 80)  # both more than are read ahead; their difference is far above what varies


def nested_nf4():
    blocks = OUTPUTS * INPUTS // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [OUTPUTS, INPUTS]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "weight": torch.zeros((OUTPUTS * INPUTS // 2, 1), dtype=torch.uint8),
        "weight.absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        "weight.nested_absmax": torch.rand(blocks // 256),
        "weight.nested_quant_map": torch.linspace(-1, 1, 256),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": text,
    }


def fp8():
    return {
        "weight": torch.zeros((OUTPUTS, INPUTS)).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.rand(OUTPUTS // 128, INPUTS // 32),
    }


def block():
    return {
        "weight": torch.zeros((OUTPUTS, INPUTS)).to(torch.float8_e4m3fn),
        "weight_scale": torch.rand(OUTPUTS // 128, INPUTS // 32),
    }


def exponents():
    return {
        "weight_packed": torch.zeros((OUTPUTS, INPUTS // 2), dtype=torch.uint8),
        "weight_scale": torch.full((OUTPUTS, INPUTS // 8), 127, dtype=torch.uint8),
    }


def compressed(**weights):
    group = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


FORMS = {
    "nf4-nested": (nested_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 32]}),
    "block": (block, compressed(num_bits=8, strategy="block", block_structure=[128, 32])),
    "mxfp4": (exponents, compressed(num_bits=4, strategy="group", group_size=8)),
}


def written(directory, form, layers):
    """Bytes that a plan keeps for a number of layers, and those that writing takes beside them."""
    make, config = FORMS[form]
    directory.mkdir()
    modules = {f"model.layers.{number}.up": make() for number in range(layers)}
    save_file(
        {f"{path}.{name}": value for path, each in modules.items() for name, value in each.items()},
        directory / "model.safetensors",
    )
    tensors = stored_tensors(directory / "model.safetensors")
    layout = find_layout(config, tensors)
    scales = {path: np.full(OUTPUTS, 2.0) for path in modules}
    tracemalloc.start()
    changes = {}
    for path in modules:
        changes |= layout.scaled(path, scales[path])
    kept = tracemalloc.get_traced_memory()[0]
    every = all_changes(tensors, changes)
    plan = Plan("tuned", "base", every, {name: name for name in every}, True)
    files = plan_files(plan, Checkpoint("base", tensors))
    (directory / "out").mkdir()
    output = Output(directory / "out", plan, files)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    (digests,) = write_outputs([output])
    verify_output(output, digests)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    found = stored_tensors(directory / "out" / "model.safetensors")
    new = sum(found[name].size for name in changes if name in found)
    return kept, peak, new


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_layers(form, tmp_path):
    torch.manual_seed(0)
    written(tmp_path / "first", form, 1)  # imports and caches

    few, more = (written(tmp_path / str(layers), form, layers) for layers in LAYERS)

    added = LAYERS[1] - LAYERS[0]
    assert (more[2] - few[2]) / added >= LARGE
    assert (more[0] - few[0]) / added < SMALL
    # Reading is ahead of writing by what the threads' turns make it: a few tensors, of any count.
    assert more[1] - few[1] < (more[2] - few[2]) / 2
