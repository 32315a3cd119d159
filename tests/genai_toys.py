"""Tiny language models as onnxruntime-genai's builder exports them, with Propulsion's scales.

A stand-in that needs no exporter of ours: each scale is a Mul behind the node of its module path,
and those of q, k and v are one Mul behind the packed projection.

| fixture | gives |
|---|---|
| `genai_world` | `genai_world(kind)`: a base model and two adapters, `one` and `two`, on disk |
| `genai_artifact` | `genai_artifact(kind, mode)`: an artifact of both; copy it before changing it |

KINDS are llama, gemma2 and qwen3 (a layer with a window of 8), lfm2 (a convolution) and hunyuan
(positions are an input). 64 channels, 2 layers, 100 tokens, 160 positions.
"""

import re
import shutil
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
from tiny_models import save_tokenizer
from worlds import World

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.layout import pack, plan_layout, to_row, width_of
from propulsion_export.artifacts.manifest import AdapterEntry, BaseEntry, Manifest
from propulsion_export.artifacts.tensor_names import SCALES_INPUT

_SIZES = {
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
}
_SETTINGS = {
    "llama": ("Llama", {}),
    "gemma2": (
        "Gemma2",
        # A tied head would repeat the last token for ever.
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    ),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "hunyuan": ("HunYuanDenseV1", {}),
}
KINDS = tuple(_SETTINGS)
# Names of modules that the builder calls otherwise.
_NODES = {
    "self_attn.out_proj": "attn/o_proj",
    "feed_forward.w1": "mlp/gate_proj",
    "feed_forward.w2": "mlp/down_proj",
    "feed_forward.w3": "mlp/up_proj",
}
_PACKED = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="session")
def genai_world(shared, positive_adapter, write_adapter):
    @cache
    def make(kind):
        def fill(root):
            from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

            model = make_model(kind)
            model.save_pretrained(root / "base")
            save_tokenizer(root / "base", generative=True)
            for seed, name in ((1, "one"), (2, "two")):
                made = positive_adapter(model, seed, name, task="text-generation", embeddings=False)
                base, fingerprint = str(root / "base"), fingerprint_of_model(model)
                write_adapter(replace(made, base=base, fingerprint=fingerprint), root / name)

        root = shared(f"genai-world-{kind}", fill)
        return World(
            root=root,
            base=root / "base",
            one=root / "one",
            two=root / "two",
            make_model=partial(make_model, kind),
        )

    return make


@pytest.fixture(scope="session")
def genai_artifact(genai_world, shared):
    @cache
    def make(kind, mode="switchable"):
        world = genai_world(kind)

        def fill(root):
            built = shared(f"genai-graph-{kind}", partial(build, world.base))
            write_artifact(world, built, mode, root / mode)

        return shared(f"genai-{kind}-{mode}", fill) / mode

    return make


def make_model(kind, seed=0):
    """A seeded random model; norms are random too, where a mistake with them would not show."""
    import torch
    import transformers

    name, settings = _SETTINGS[kind]
    config = getattr(transformers, f"{name}Config")(**_SIZES | settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


def build(base, directory, *, precision="fp32", provider="cpu"):
    """Run the builder."""
    import warnings

    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    from propulsion_export.environment.quiet import quiet

    arguments = (None, str(base), str(directory), precision, provider, str(directory / "cache"))
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        create_model(*arguments, **parse_extra_options(*arguments, []))
    shutil.rmtree(directory / "cache", ignore_errors=True)


def write_artifact(world, built, mode, directory):
    """Write an artifact of the builder's graph with the adapters of a world."""
    import onnx_ir as ir
    from safetensors.numpy import save_file

    from propulsion_export.base_model.config import save_config
    from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
    from propulsion_export.environment.machine import tool_versions
    from propulsion_export.graph.files import read_graph, write_graph
    from propulsion_export.graph.signature import signature
    from propulsion_export.pipeline.text_files import TextFiles

    directory.mkdir()
    adapters = [Adapter.read(getattr(world, name), name) for name in ("one", "two")]
    layout = plan_layout(adapters, [name for name, _ in world.model.named_modules()])
    defaults = {SCALES_INPUT: np.ones(width_of(layout), np.float32)}
    feeds = {"base": defaults} | {each.name: pack(each, layout, defaults) for each in adapters}
    graph = ir.external_data.load_to_model(read_graph(built))
    put_scales_(graph, layout, mode, feeds["one"][SCALES_INPUT])
    write_graph(graph, directory)
    shutil.copyfile(built / "genai_config.json", directory / "genai_config.json")
    save_config(world.model, directory, "float32", for_graph=True)
    sources = {name: str(getattr(world, name)) for name in ("one", "two")}
    texts = TextFiles.find(str(world.base), "text-generation", sources, trust_remote_code=False)
    texts.write(directory, no_settings())
    texts.record(directory, no_settings())
    entries = {
        each.name: AdapterEntry(
            each.digest,
            sources[each.name],
            each.size,
            f"adapters/{each.name}.safetensors" if mode == "switchable" else None,
        )
        for each in adapters[: 1 if mode == "folded" else 2]
    }
    if mode == "bank":
        bank = Bank.create(directory, to_row(defaults, layout))
        for name, entry in entries.items():
            bank.add(name, to_row(feeds[name], layout), entry)
    elif mode == "switchable":
        (directory / "adapters").mkdir()
        for name, tensors in feeds.items():
            save_file(tensors, directory / "adapters" / f"{name}.safetensors")
    inputs, outputs = signature(graph)
    manifest = Manifest(
        kind="onnx",
        mode=mode,
        task="text-generation",
        dtype="float32",
        base=BaseEntry(str(world.base), fingerprint_of_model(world.model)),
        adapters={} if mode == "bank" else entries,
        inputs=inputs,
        outputs=outputs,
        layout={} if mode == "folded" else layout,
        tools=tool_versions(),
        exporter="genai",
    )
    Artifact.write(directory, manifest)


def no_settings():
    from propulsion_export.base_model.settings import Settings

    return Settings({})


def put_scales_(graph, layout, mode, folded):
    """Multiply each module's output by its slice of the scales.

    `folded`: values of a constant that takes the place of the input when folded.
    """
    import onnx_ir as ir

    main, slots = graph.graph, layout[SCALES_INPUT]
    width, float32 = width_of(layout), ir.TensorType(ir.DataType.FLOAT)
    nodes, axis = [], 0
    source = ir.Value(name=SCALES_INPUT, type=float32, shape=ir.Shape([width]))
    if mode == "bank":
        bank, ids = (
            ir.Value(name="propulsion_bank", type=float32, shape=ir.Shape(["adapters", width])),
            ir.Value(
                name="adapter_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"])
            ),
        )
        gather = ir.node("Gather", [bank, ids], {"axis": 0})
        (one,) = _constants(main, axes=[1])
        unsqueeze = ir.node("Unsqueeze", [gather.outputs[0], one])
        main.inputs.extend([bank, ids])
        nodes, source, axis = [gather, unsqueeze], unsqueeze.outputs[0], 2
    elif mode == "switchable":
        main.inputs.append(source)
        default = np.ones(width, np.float32)
        source.const_value = ir.tensor(default, name=SCALES_INPUT)
        main.register_initializer(source)
    else:
        source.const_value = ir.tensor(folded, name=SCALES_INPUT)
        main.register_initializer(source)
    groups = _grouped(slots)
    (lengths,) = _constants(main, lengths=[length for _, length in groups])
    split = ir.node("Split", [source, lengths], {"axis": axis}, num_outputs=len(groups))
    for part, (_, length) in zip(split.outputs, groups, strict=True):
        part.type, part.shape = float32, ir.Shape([*([None, 1] if axis else []), length])
    main.insert_before(next(iter(main)), [*nodes, split])
    for part, (name, _) in zip(split.outputs, groups, strict=True):
        _multiply_(main, name, part)


def _grouped(slots):
    """Node names and widths, those of q, k and v together; their slots follow each other."""
    groups = []
    for slot in slots:
        name = _node(slot.path)
        if groups and groups[-1][0] == name:
            groups[-1] = (name, groups[-1][1] + slot.length)
        else:
            groups.append((name, slot.length))
    return groups


def _node(path):
    layer, inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path).groups()
    if inner.rpartition(".")[2] in _PACKED:
        inner = "attn/qkv_proj"
    inner = _NODES.get(inner, inner.replace("self_attn.", "attn.").replace(".", "/"))
    return f"/model/layers.{layer}/{inner}"


def _multiply_(main, name, scale):
    import onnx_ir as ir

    found = [
        node for node in main if re.fullmatch(rf"{re.escape(name)}/(MatMul(_Q\d)?|Add)", node.name)
    ]
    old = found[-1].outputs[0]
    users = list(old.uses())  # before the Mul, which would read itself
    product = ir.node("Mul", [old, scale], name=f"{name}/propulsion")
    new = product.outputs[0]
    new.type, new.shape = old.type, old.shape
    main.insert_after(found[-1], product)
    for user, index in users:
        user.replace_input_with(index, new)


def _constants(main, **numbers):
    import onnx_ir as ir

    values = []
    for name, given in numbers.items():
        tensor = ir.tensor(np.array(given, np.int64), name=f"propulsion.{name}")
        value = ir.Value(
            name=tensor.name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([len(given)]),
        )  # fmt: skip
        main.register_initializer(value)
        values.append(value)
    return values
