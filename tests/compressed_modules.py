"""Weights that compressed-tensors' own library quantises and packs."""

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

# Format, and the arguments of its weights; groups and blocks are small, as the modules are.
FORMS = {
    "int8-channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-asymmetric": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8-tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "int8-group": ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 8}),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 8]},
    ),
    "int4-group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8}),
    "int4-channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int4-tensor": ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
    "int4-asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False},
    ),
    "int3-asymmetric": (
        "pack-quantized",
        {"num_bits": 3, "strategy": "group", "group_size": 8, "symmetric": False},
    ),
}
FP4 = {
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
    ),
}


def quantised(form, weight, dtype=torch.float32):
    """A weight compressed by the library: its tensors by last name, and its scheme."""
    kind, arguments = {**FORMS, **FP4}[form]
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kind)
    low, high = _ranges(weight, args)
    state = {"weight": weight.to(dtype)}
    if form == "nvfp4":
        state["weight_global_scale"] = torch.tensor([448 * 6 / float(weight.abs().max())])
        state["weight_scale"] = (high / 6 * state["weight_global_scale"]).to(dtype)
    elif form == "mxfp4":
        state["weight_scale"] = torch.exp2(torch.floor(torch.log2(high)) - 2).to(dtype)
    else:
        scale, zero = calculate_qparams(low, high, args)
        state |= {"weight_scale": scale.to(dtype), "weight_zero_point": zero}
    return BaseCompressor.get_value_from_registry(kind).compress(state, scheme), scheme


def _ranges(weight, args):
    """The smallest and largest weight that share a scale."""
    outputs, inputs = weight.shape
    match args.strategy:
        case "tensor":
            low, high = weight.amin().reshape(1), weight.amax().reshape(1)
        case "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "block":
            rows, columns = args.block_structure
            padded = torch.nn.functional.pad(weight, (0, -inputs % columns, 0, -outputs % rows))
            blocks = padded.reshape(-(-outputs // rows), rows, -1, columns)
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        case _:
            groups = weight.reshape(outputs, -1, args.group_size)
            low, high = groups.amin(2), groups.amax(2)
    if args.type == "float" and args.num_bits == 4:
        return low, torch.maximum(low.abs(), high.abs())
    return low, high


def config_of(scheme):
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump()},
        "ignore": ["lm_head"],
    }
