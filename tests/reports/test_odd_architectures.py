"""Architectures that were exported wrongly, or failed after all the work with a raw message."""

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from tiny_models import LABELS, make_random_adapter, save_tokenizer

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.base_model.block_attention import check_one_attention
from propulsion_export.base_model.caches import check_cache
from propulsion_export.base_model.eos_pooling import _MODEL_TYPES, pools_at_eos
from propulsion_export.base_model.loading import BaseModel, load_base
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import AdapterError, BaseModelError, DataError, ToolError
from propulsion_export.graph.build import build_bank, build_switchable
from propulsion_export.graph.eos_pooling import _last, reading_own_eos
from propulsion_export.graph.files import write_graphs
from propulsion_export.graph.passes.float32_detours import ComputeInFloat32
from propulsion_export.graph.sample_inputs import trace_inputs
from propulsion_export.graph.sample_outputs import check_computable
from propulsion_export.graph.scaled import check_unused
from propulsion_export.graph.trace import _refuse_bounded, _refuse_fixed
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.pytorch import torch_candidate
from propulsion_export.scaling.attach import attached
from propulsion_export.serving.session import Session

NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
ENCODER_DECODER = TOKENS | {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 40,
    "init_std": 0.3,
    "decoder_start_token_id": 3,
}
T5 = TOKENS | {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
LLAMA = TOKENS | {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 160,
}
SETTINGS = {
    "Bart": ENCODER_DECODER,
    "MBart": ENCODER_DECODER,
    "T5": T5,
    "UMT5": T5,
    "Falcon": TOKENS
    | {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_hidden_size": 20,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "new_decoder_architecture": False,
    },
    "Funnel": {
        "vocab_size": 100,
        "block_sizes": [1, 1],
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 20,
        "num_decoder_layers": 1,
    },
    "Lfm2": LLAMA
    | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 4},
    "MiniMax": LLAMA
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "Llama": LLAMA,
    "SqueezeBert": {
        "vocab_size": 100,
        "hidden_size": 16,
        "embedding_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 40,
        "q_groups": 1,
        "k_groups": 1,
        "v_groups": 1,
        "initializer_range": 0.3,
    },
    "XGLM": TOKENS
    | {
        "d_model": 16,
        "ffn_dim": 20,
        "num_layers": 1,
        "attention_heads": 2,
        "max_position_embeddings": 160,
    },
}


def make(kind, head, **settings):
    """A seeded random model with biases and norms that are random too."""
    config = getattr(transformers, f"{kind}Config")(**SETTINGS[kind] | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{head}")(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def checkpoint(tmp_path, write_adapter):
    """`checkpoint(kind, head, task)`: a base model and an adapter for it on disk."""

    def save(kind, head, task, **settings):
        base = tmp_path / "base"
        model = make(kind, head, **settings)
        model.save_pretrained(base)
        save_tokenizer(base, generative=task == "text-generation")
        made = make_random_adapter(model, 1, "one", task=task)
        positive = {path: Scale(np.abs(s.values)) for path, s in made.scales.items()}
        found = fingerprint_of_model(model)
        adapter = replace(made, scales=positive, base=str(base), fingerprint=found)
        return base, write_adapter(adapter, tmp_path / "one")

    return save


def tokens(*rows):
    """Rows padded on the right with 0, and their mask."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}


def tensors(batch):
    return {name: torch.from_numpy(values) for name, values in batch.items()}


# One module on two sides; modules that a task does not use.

READ, DEAD, HEAD = (
    "transformer.embeddings.word_embeddings",
    "transformer.pooler.dense",  # SqueezeBERT computes it, and returns it for no tokens
    "classifier",
)


@pytest.fixture(scope="module")
def squeeze():
    """A token classifier, a Propulsion adapter and an (IA)^3 adapter that share two modules."""
    model = make("SqueezeBert", "ForTokenClassification", **NAMES)
    chooser = np.random.default_rng(0)

    def scales(paths, side):
        return {path: Scale(chooser.uniform(0.3, 1.7, 16), side) for path in paths}

    outputs = scales((READ, DEAD), "output")
    outputs[HEAD] = Scale(chooser.uniform(0.3, 1.7, 3), "output")
    propulsion = Adapter("propulsion", outputs)
    return model, propulsion, Adapter("ia3", scales((DEAD, HEAD), "input"))


def base_of(model, task="token-classification"):
    return BaseModel(model, "tiny", task, frozenset(), frozenset(), LABELS)


def expected_of(model, adapter, inputs):
    with attached(model, adapter), torch.inference_mode():
        return model(**tensors(inputs)).logits.numpy()


BATCH = tokens([2, 7, 8, 9, 3], [2, 10, 3])


def with_types(batch):
    return batch | {"token_type_ids": np.zeros_like(batch["input_ids"])}


def test_adapters_on_both_sides_of_a_module_share_a_switchable_graph(squeeze, tmp_path):
    model, propulsion, ia3 = squeeze
    adapters, inputs = [propulsion, ia3], with_types(BATCH)

    built = build_switchable(base_of(model), adapters, adapters, torch.float32, opset=20)

    write_graphs(built.programs, tmp_path)
    run = onnxruntime_runner(tmp_path / "model.onnx")
    for adapter in adapters:
        found = run(inputs | built.feeds[adapter.name])["logits"]
        np.testing.assert_allclose(found, expected_of(model, adapter, inputs), atol=1e-5)
    base = expected_of(model, Adapter("base", {}), inputs)
    np.testing.assert_allclose(run(inputs)["logits"], base, atol=1e-5)
    sides = {(s.path, s.side) for s in built.layout["propulsion_scales"]}
    assert {(HEAD, "input"), (HEAD, "output"), (DEAD, "input"), (DEAD, "output")} <= sides


@pytest.mark.slow
def test_adapters_on_both_sides_of_a_module_share_a_bank(squeeze, tmp_path):
    model, propulsion, ia3 = squeeze
    adapters, inputs = [propulsion, ia3], with_types(BATCH)

    built = build_bank(base_of(model), adapters, adapters, torch.float32, opset=20)

    write_graphs(built.programs, tmp_path)
    rows = [np.concatenate(list(built.feeds[a.name].values())) for a in adapters]
    feeds = {"propulsion_bank": np.stack(rows), "adapter_ids": np.array([1, 0])}
    found = onnxruntime_runner(tmp_path / "model.onnx")(inputs | feeds)["logits"]
    for row, adapter in enumerate((ia3, propulsion)):
        expected = expected_of(model, adapter, inputs)[row]
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_a_bank_adapter_whose_scales_all_do_nothing_is_refused_by_name(squeeze):
    model, propulsion, _ = squeeze
    idle = replace(propulsion, scales={DEAD: propulsion.scales[DEAD]})

    with pytest.raises(AdapterError, match=r"pooler\.dense: does not act on the output"):
        build_bank(base_of(model), [idle], [idle], torch.float32, opset=20)


def test_a_lost_tensor_that_acts_is_still_an_error(squeeze):
    model, propulsion, _ = squeeze
    lengths = [scale.values.size for scale in propulsion.scales.values()]
    slots = tuple(
        Slot(path, sum(lengths[:index]), lengths[index], (lengths[index],), "output")
        for index, path in enumerate(propulsion.scales)
    )
    layout = {"propulsion_scales": slots}
    read, dead, _ = slots

    check_unused(base_of(model), layout, {"propulsion_scales": [dead]})
    with pytest.raises(AdapterError, match=r"pooler\.dense: does not act on the output"):
        check_unused(base_of(model), {"propulsion_scales": (dead,)}, {"propulsion_scales": [dead]})
    with pytest.raises(ToolError, match=r"word_embeddings.propulsion_scale: is in no traced graph"):
        check_unused(base_of(model), layout, {"propulsion_scales": [read, dead]})


# Classifiers that read the end-of-sequence token.


def test_every_classifier_of_transformers_that_reads_its_last_eos_is_known():
    import inspect

    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES,
    )

    readers = [
        kind
        for kind, name in CLASSES.items()
        if isinstance(name, str)
        and "eos_mask" in inspect.getsource(getattr(transformers, name).forward)
    ]

    assert sorted(readers) == sorted(_MODEL_TYPES)


@pytest.mark.parametrize("kind", ["Bart", "T5", "MBart", "UMT5"])
def test_each_row_is_read_at_its_own_last_eos(kind):
    model = make(kind, "ForSequenceClassification", **NAMES)
    rows = [[7, 8, 9, 10, 3], [11, 3], [12, 3, 13, 3]]
    alone = [model(**tensors(tokens(row))).logits for row in rows]

    with torch.inference_mode(), reading_own_eos(model):
        own = [model(**tensors(tokens(row))).logits for row in rows]
        # transformers itself refuses a batch with the third, which has two of these tokens.
        together = model(**tensors(tokens(*rows[:2]))).logits

    np.testing.assert_allclose(torch.cat(own), torch.cat(alone), atol=1e-6)
    np.testing.assert_allclose(together, torch.cat(alone[:2]), atol=1e-5)
    after = model(**tensors(tokens(rows[0]))).logits
    np.testing.assert_array_equal(after, alone[0])  # nothing is left behind


def test_rows_with_different_numbers_of_eos_do_not_mix():
    states = torch.arange(24.0).reshape(2, 4, 3)
    chosen = torch.tensor([[True, False, True, True], [False, True, False, False]])

    np.testing.assert_array_equal(_last(states, chosen), torch.stack([states[0, 3], states[1, 1]]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_a_graph_that_reads_eos_passes_parity_and_answers_texts(checkpoint, tmp_path, kind, mode):
    _, adapter = checkpoint(kind, "ForSequenceClassification", "text-classification", **NAMES)

    export_onnx([adapter], tmp_path / "out", mode=mode, untie=mode == "folded")

    assert check_parity(tmp_path / "out").passed
    rows = tokens([7, 8, 9, 10, 3], [11, 3], [12, 3, 13, 3])
    artifact = Artifact.read(tmp_path / "out")
    run = onnxruntime_runner(tmp_path / "out" / "model.onnx")
    feeds = {} if mode == "folded" else artifact.feeds("one")
    feeds |= {"adapter_ids": np.repeat(feeds["adapter_ids"], 3)} if mode == "bank" else {}
    base = load_base(str(tmp_path / "base"), task="text-classification")
    with attached(base.model, Adapter.read(adapter)):
        expected = torch_candidate(base.model, base.task)(rows)["logits"]
    np.testing.assert_allclose(run(rows | feeds)["logits"], expected, atol=1e-4)


def test_a_text_without_eos_has_no_class(checkpoint, tmp_path):
    base, adapter = checkpoint("T5", "ForSequenceClassification", "text-classification", **NAMES)
    merge(adapter, tmp_path / "merged", untie=True)
    # A tokenizer that was saved without its template puts no token behind a text.
    file = base / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    merge(adapter, tmp_path / "without", untie=True)

    labels = [
        reply.prediction["label"]
        for reply in Session(tmp_path / "merged")(["ba be", "ba be bi [SEP] bo"])
    ]

    assert set(labels) <= set(LABELS)
    with pytest.raises(DataError, match="'ba be': has no end-of-sequence token"):
        Session(tmp_path / "without")(["ba be"])


# Lengths that a trace fixes.


def program(shape, ranges=""):
    value = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(shape))
    graph = ir.Graph([value], [value], nodes=[], opset_imports={"": 20})
    graph.metadata_props["pkg.torch.export.ExportedProgram.range_constraints"] = ranges
    return ir.Model(graph, ir_version=9)


@pytest.mark.parametrize("shape", [["s1", 11], [3, "s2"], ["s1", "8*s2"]])
def test_a_fixed_length_and_a_multiple_are_no_length_that_varies(shape):
    with pytest.raises(ToolError, match="input_ids is traced as"):
        _refuse_fixed(program(shape), "Model", {"input_ids": {0: None, 1: None}})


@pytest.mark.parametrize(
    ("ranges", "found"),
    [
        ("{s1: VR[2, int_oo], s2: VR[9, int_oo]}", "9 to inf"),
        ("{s1: VR[2, int_oo], s2: VR[2, 16]}", "2 to 16"),
        ("{s1: VR[2, int_oo], s2: VR[2, 40]}", None),
        ("{s1: VR[2, int_oo], s2: VR[3, int_oo]}", None),
        ("", None),
    ],
)
def test_a_graph_of_one_branch_is_refused(ranges, found):
    model = make("SqueezeBert", "Model")

    if found is None:
        _refuse_bounded(program(["s1", "s2"], ranges), model, ["input_ids"])
        return
    with pytest.raises(ToolError, match=f"SqueezeBertModel: is traced for {found} tokens"):
        _refuse_bounded(program(["s1", "s2"], ranges), model, ["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_funnel_which_pools_lengths_is_refused_while_exporting(checkpoint, tmp_path, head):
    task = "text-classification" if head.startswith("ForSeq") else "token-classification"
    _, adapter = checkpoint("Funnel", head, task, **NAMES)

    with pytest.raises(ToolError, match=f"Funnel{head}: input_ids is traced as"):
        export_onnx([adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# An oracle in float64.


def test_a_model_that_fills_its_mask_with_the_lowest_float64_has_an_oracle(checkpoint, tmp_path):
    _, adapter = checkpoint("XGLM", "ForCausalLM", "text-generation")
    merge(adapter, tmp_path / "merged", untie=True)

    report = check_parity(tmp_path / "merged")

    assert report.passed
    assert torch.get_default_dtype() is torch.float32


def test_a_model_without_float64_is_refused_in_words(checkpoint, tmp_path, monkeypatch):
    _, adapter = checkpoint("Llama", "ForCausalLM", "text-generation")
    merge(adapter, tmp_path / "merged", untie=True)
    forward = transformers.LlamaModel.forward

    def only_float32(self, *arguments, **named):
        if self.embed_tokens.weight.dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return forward(self, *arguments, **named)

    monkeypatch.setattr(transformers.LlamaModel, "forward", only_float32)

    with pytest.raises(BaseModelError, match=r"LlamaForCausalLM: does not run in float64 .*Double"):
        check_parity(tmp_path / "merged")


# Precisions that a graph brings along.

STRAY = """
<ir_version: 9, opset_import: ["" : 20]>
graph (float[n, 2] x, float[2] slopes) => (float[n, 2] y, bool[n, 2] z) {
    low = Cast <to = 16> (x)
    slope = Cast <to = 16> (slopes)
    product = Mul (low, slope)
    total = Sub (product, slope)
    z = Less (total, low)
    y = Cast <to = 1> (total)
}
"""


def test_bfloat16_inside_a_float32_graph_is_computed_as_torch_does(tmp_path):
    model = ir.from_onnx_text(STRAY)
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.BFLOAT16 if value.dtype is None else value.dtype

    ComputeInFloat32()(model)

    write_graphs({"model.onnx": model}, tmp_path)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 100
    slopes = torch.tensor([0.25, 0.0039])
    found = onnxruntime_runner(tmp_path / "model.onnx")({"x": x.numpy(), "slopes": slopes.numpy()})
    low, slope = x.bfloat16(), slopes.bfloat16()
    expected = low * slope - slope
    np.testing.assert_array_equal(found["y"], expected.float().numpy())
    np.testing.assert_array_equal(found["z"], (expected < low).numpy())
    kept = [node for node in model.graph if node.op_type in ("Mul", "Sub", "Less")]
    assert {v.dtype for node in kept for v in node.inputs} == {ir.DataType.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
@pytest.mark.parametrize("kind", ["Falcon", "XGLM"])
def test_decoders_with_odd_positions_pass_parity(checkpoint, tmp_path, kind, mode):
    _, adapter = checkpoint(kind, "ForCausalLM", "text-generation")

    export_onnx([adapter], tmp_path / "out", mode=mode, untie=mode == "folded")

    assert check_parity(tmp_path / "out").passed


# Caches of another kind, and inputs that are not enough.


@pytest.mark.parametrize("kind", ["Lfm2", "MiniMax"])
def test_a_cache_of_other_states_is_refused_before_any_work(checkpoint, tmp_path, kind):
    _, adapter = checkpoint(kind, "ForCausalLM", "text-generation")

    with pytest.raises(
        BaseModelError, match=rf"{kind}ForCausalLM: keeps a state .*\(LinearAttentionLayer\)"
    ):
        export_onnx([adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cache_of_keys_and_values_is_accepted():
    check_cache(make("Llama", "ForCausalLM"))
    check_cache(make("Falcon", "ForCausalLM"))


def test_t5_for_features_is_refused_before_any_work(checkpoint, tmp_path):
    base, _ = checkpoint("T5", "ForSequenceClassification", "text-classification", **NAMES)

    with pytest.raises(
        BaseModelError, match="T5Model does not run on input_ids and attention_mask alone"
    ):
        export_onnx([], tmp_path / "out", model=str(base), task="feature-extraction")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "head", "found"),
    [
        ("T5", "EncoderModel", "is a T5EncoderModel, a part of T5Model"),
        ("UMT5", "EncoderModel", "is a UMT5EncoderModel, a part of UMT5Model"),
    ],
)
def test_an_encoder_saved_alone_is_called_that(checkpoint, tmp_path, kind, head, found):
    _, adapter = checkpoint(kind, head, "feature-extraction")

    for command in (merge, lambda a, output: export_onnx([a], output)):
        with pytest.raises(BaseModelError, match=found):
            command(adapter, tmp_path / "out")


@pytest.mark.parametrize("kind", ["BigBird", "BigBirdPegasus"])
def test_attention_that_changes_with_the_length_is_refused_by_name(kind):
    config = getattr(transformers, f"{kind}Config")(max_position_embeddings=2048)
    assert config.attention_type == "block_sparse"

    with pytest.raises(BaseModelError, match=r"base: attends to blocks .* of more than 704 tokens"):
        check_one_attention(config, "base")
    config.attention_type = "original_full"
    check_one_attention(config, "base")
    check_one_attention(getattr(transformers, f"{kind}Config")(max_position_embeddings=512), "base")


def test_a_model_that_reads_characters_is_refused_by_name():
    with pytest.raises(BaseModelError, match="CanineConfig: has no vocab_size"):
        trace_inputs(("input_ids", "attention_mask"), transformers.CanineConfig())


@pytest.mark.parametrize(
    ("kind", "head", "task"),
    [
        ("Bart", "Model", "feature-extraction"),
        ("Bart", "ForSequenceClassification", "text-classification"),
        ("T5", "ForTokenClassification", "token-classification"),
    ],
)
def test_models_that_their_inputs_suffice_for_are_accepted(kind, head, task):
    model = make(kind, head)

    check_computable(base_of(model, task))

    assert pools_at_eos(model.config, task) == (task == "text-classification")
