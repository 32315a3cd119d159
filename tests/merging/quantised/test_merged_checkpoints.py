"""Checkpoints that bitsandbytes and torchao quantised, merged, load and compute as the adapter."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models are torch's")
transformers = pytest.importorskip("transformers", reason="it loads what was merged")
pytest.importorskip("bitsandbytes", reason="the judge of its own layout")
quantization = pytest.importorskip("torchao.quantization", reason="the judge of its own layout")

from propulsion_export.adapters.adapter import Adapter  # noqa: E402
from propulsion_export.adapters.scales import Scale  # noqa: E402
from propulsion_export.base_model.fingerprint import Fingerprint  # noqa: E402
from propulsion_export.merging.quantised.weights import fingerprint_of_quantised  # noqa: E402
from propulsion_export.pipeline import merge as pipeline  # noqa: E402
from quantised_checkpoints import read  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def bitsandbytes(**settings):
    return lambda: transformers.BitsAndBytesConfig(**settings)


def torchao(config, **settings):
    return lambda: transformers.TorchAoConfig(getattr(quantization, config)(**settings))


GROUPS = quantization.PerGroup(32)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS = {
    "bitsandbytes-8": bitsandbytes(load_in_8bit=True),
    "nf4": bitsandbytes(**NF4),
    "nf4-nested": bitsandbytes(**NF4, bnb_4bit_use_double_quant=True),
    "fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "fp4-bfloat16-storage": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-int8-groups": torchao("Int8WeightOnlyConfig", granularity=GROUPS),
    "torchao-int8-dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-int4-unpacked": torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=GROUPS
    ),
    "torchao-float8": torchao("Float8WeightOnlyConfig"),
}
# Of the largest logit. All compute in float32, but some from inputs that they round to int8, where
# the last bit may turn the scale; `test_torchao` compares single layers closely.
CLOSE = {"bitsandbytes-8": 5e-2, "torchao-int8-dynamic": 5e-2}
FOUR_BITS = ["nf4", "nf4-nested", "fp4"]


def load(directory, **more):
    """In training mode, where bitsandbytes computes 4 bits in float32; there is no dropout."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, device_map="cpu", dtype=torch.float32, **more
    )
    return model.train().requires_grad_(False)


def random_scales(directory, seed=3):
    """Scales for every quantised module of a checkpoint, one in four of them negative."""
    layout, tensors = read(directory)
    chooser = np.random.default_rng(seed)
    paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    widths = {path: layout.shape(path)[0] for path in paths if layout.has(path)}
    return {
        path: chooser.uniform(0.5, 1.5, width) * chooser.choice([1, 1, 1, -1], width)
        for path, width in widths.items()
    }


def merge(base, directory, scales, **options):
    """By the command."""
    adapter = Adapter(name="tuned", scales={path: Scale(scales[path]) for path in scales})
    written = directory.with_name(f"{directory.name}-adapter")
    written.mkdir()
    adapter.write(written)
    pipeline.merge(written, directory, model=str(base), task="text-generation", **options)


def attach(model, scales):
    """Multiply the outputs of each module; a scale is not rounded to the weight's integers."""
    for path, scale in scales.items():
        factor = torch.from_numpy(scale).float()
        model.get_submodule(path).register_forward_hook(
            lambda _, __, output, factor=factor: output * factor
        )
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 25).reshape(2, 12)).logits.double().numpy()


def distance(ours, theirs):
    """The largest difference, as a part of the largest logit."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def floats(tmp_path_factory, tiny_model):
    directory = tmp_path_factory.mktemp("float")
    tiny_model("llama", **SIZES).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, floats):
    """A Llama's checkpoint by kind."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            load(floats, quantization_config=KINDS[kind]()).save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.mark.parametrize("shards", [None, "30KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_checkpoint_computes_what_the_adapter_does(quantised, tmp_path, kind, shards):
    base, scales = quantised(kind), random_scales(quantised(kind))
    assert len(scales) == 14
    expected = logits(attach(load(base), scales))

    merge(base, tmp_path / "merged", scales, max_shard_size=shards)

    assert distance(logits(load(tmp_path / "merged")), expected) < CLOSE.get(kind, 2e-5)
    assert (tmp_path / "merged/model.safetensors.index.json").is_file() == (shards is not None)
    assert distance(logits(load(base)), expected) > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_other_outputs_are_seen(quantised, tmp_path, kind):
    base, scales = quantised(kind), random_scales(quantised(kind))
    path = "model.layers.1.mlp.down_proj"

    merge(base, tmp_path / "merged", scales | {path: scales[path][::-1]})

    expected = logits(attach(load(base), scales))
    assert distance(logits(load(tmp_path / "merged")), expected) > 0.3


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_the_kernels_of_inference_take_negative_absmax(quantised, tmp_path, kind):
    # In evaluation mode, CPUs with AVX512-BF16 pack the weights anew and compute in bfloat16.
    base, scales = quantised(kind), random_scales(quantised(kind))
    expected = logits(attach(load(base).eval(), scales))

    merge(base, tmp_path / "merged", scales)

    assert distance(logits(load(tmp_path / "merged").eval()), expected) < 6e-2


@pytest.mark.parametrize("setting", [False, True])
def test_layers_that_nobody_scaled_stay_nested(quantised, tmp_path, setting):
    base, scales = quantised("nf4-nested"), random_scales(quantised("nf4-nested"))
    some = {path: scale for path, scale in scales.items() if path.endswith("q_proj")}
    expected = logits(attach(load(base), some))

    merge(base, tmp_path / "merged", some)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is False
    config["quantization_config"]["bnb_4bit_use_double_quant"] = setting
    (tmp_path / "merged/config.json").write_text(json.dumps(config))

    merged = load(tmp_path / "merged")
    nested = {path: merged.get_submodule(path).weight.quant_state.nested for path in scales}
    assert nested == {path: path not in some for path in scales}
    assert distance(logits(merged), expected) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_model_is_recognised(quantised, floats, tiny_model, kind):
    found = fingerprint_of_quantised(*read(quantised(kind)))
    same, other = (
        Fingerprint.of(dict(tiny_model("llama", seed=seed, **SIZES).model.named_parameters()))
        for seed in (0, 1)
    )

    assert same.difference(found) is None
    assert other.difference(found) is not None
    assert set(found.entries) == set(same.entries)
    assert set(found.vectors) == set(same.vectors)


def test_nothing_but_scales_changes(quantised, tmp_path):
    for kind in KINDS:
        base = quantised(kind)
        merge(base, tmp_path / kind, random_scales(base))

        before, after = read(base)[1], read(tmp_path / kind)[1]
        changed = {
            name.rpartition(".")[2]
            for name, stored in after.items()
            if not np.array_equal(*(one[name].read().view(np.uint8) for one in (before, after)))
        }

        assert changed <= {"SCB", "absmax", "bitsandbytes__nf4", "_weight_scale"}, kind
        assert len(changed) > 0


@pytest.mark.slow
def test_a_model_of_135_million_parameters_is_merged_into_nf4(tmp_path):
    """SmolLM2's shape; random weights. What is written out of double quantisation is bounded."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    base = tmp_path / "base"
    load(tmp_path / "float", quantization_config=KINDS["nf4-nested"]()).save_pretrained(base)
    scales = random_scales(base)
    assert len(scales) == 210

    merge(base, tmp_path / "merged", scales)

    expected = logits(attach(load(base), scales))
    assert distance(logits(load(tmp_path / "merged")), expected) < 1e-4
    added = size_of(tmp_path / "merged") - size_of(base)
    blocks = 106_168_320 // 64
    assert 2.7 * blocks < added < 3 * blocks
    merge(base, tmp_path / "other", {path: scale[::-1] for path, scale in scales.items()})
    assert distance(logits(load(tmp_path / "other")), expected) > 0.1


def size_of(directory):
    return (directory / "model.safetensors").stat().st_size
