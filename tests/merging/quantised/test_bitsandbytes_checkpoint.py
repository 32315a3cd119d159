"""A checkpoint that bitsandbytes quantised, merged, loads and computes what the adapter does."""

import json

import numpy as np
import pytest

from merged_files import read_base, write_merged
from propulsion_export.merging.quantised.bitsandbytes import find

torch = pytest.importorskip("torch", reason="the models are torch's")
transformers = pytest.importorskip("transformers", reason="it loads what was merged")
pytest.importorskip("bitsandbytes", reason="the judge of its own layout")

IDS = torch.arange(1, 25).reshape(2, 12)
# Of the largest logit. 4-bit layers compute in float32, 8-bit ones from int8 activations.
CLOSE = {"8": 1e-2, "nf4": 2e-5, "nf4-nested": 2e-5, "fp4": 2e-5}


def quantisation(kind):
    if kind == "8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant=kind.endswith("nested"),
    )


def load(directory, **more):
    """In training mode, where 4-bit layers compute in float32; there is no dropout."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, device_map="cpu", dtype=torch.float32, **more
    )
    return model.train().requires_grad_(False)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.double().numpy()


def attach(model, scales):
    """Multiply the outputs of each module."""
    for path, scale in scales.items():
        factor = torch.from_numpy(scale).float()
        model.get_submodule(path).register_forward_hook(
            lambda _, __, output, factor=factor: output * factor
        )


def distance(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, tiny_model):
    """A Llama's checkpoint by kind, and random scales for its quantised modules."""

    def make(kind):
        base = tmp_path_factory.mktemp(kind)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        tiny_model("llama", **sizes).save_pretrained(base / "float")
        load(base / "float", quantization_config=quantisation(kind)).save_pretrained(base / kind)
        return base / kind, scales_of(base / kind)

    made = {}
    return lambda kind: made[kind] if kind in made else made.setdefault(kind, make(kind))


def scales_of(directory, seed=3):
    chooser = np.random.default_rng(seed)
    layout = read_base(find, directory)
    model = load(directory)
    widths = {
        path: module.out_features for path, module in model.named_modules() if layout.has(path)
    }
    return {
        path: chooser.uniform(0.5, 1.5, width) * chooser.choice([1, 1, 1, -1], width)
        for path, width in widths.items()
    }


@pytest.mark.parametrize("kind", CLOSE)
def test_a_merged_checkpoint_computes_what_the_adapter_does(quantised, tmp_path, kind):
    base, scales = quantised(kind)
    assert len(scales) == 14
    attached = load(base)
    attach(attached, scales)
    expected = logits(attached)

    write_merged(read_base(find, base), base, tmp_path / "merged", scales)

    assert distance(logits(load(tmp_path / "merged")), expected) < CLOSE[kind]
    assert distance(logits(load(base)), expected) > 0.3


@pytest.mark.parametrize("kind", CLOSE)
def test_scales_of_other_outputs_are_seen(quantised, tmp_path, kind):
    base, scales = quantised(kind)
    attached = load(base)
    attach(attached, scales)
    path = "model.layers.1.mlp.down_proj"

    write_merged(
        read_base(find, base), base, tmp_path / "merged", scales | {path: scales[path][::-1]}
    )

    assert distance(logits(load(tmp_path / "merged")), logits(attached)) > 5 * CLOSE[kind]


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4"])
def test_the_kernels_of_inference_take_negative_absmax(quantised, tmp_path, kind):
    # In evaluation mode, CPUs with AVX512-BF16 pack the weights anew and compute in bfloat16.
    base, scales = quantised(kind)
    attached = load(base).eval()
    attach(attached, scales)

    write_merged(read_base(find, base), base, tmp_path / "merged", scales)

    assert distance(logits(load(tmp_path / "merged").eval()), logits(attached)) < 6e-2


@pytest.mark.parametrize("setting", [False, True])
def test_layers_that_nobody_scaled_stay_nested(quantised, tmp_path, setting):
    base, scales = quantised("nf4-nested")
    some = {path: scale for path, scale in scales.items() if path.endswith("q_proj")}
    attached = load(base)
    attach(attached, some)

    write_merged(read_base(find, base), base, tmp_path / "merged", some)
    say_double(tmp_path / "merged", setting)

    merged = load(tmp_path / "merged")
    nested = {path: merged.get_submodule(path).weight.quant_state.nested for path in scales}
    assert nested == {path: path not in some for path in scales}
    assert distance(logits(merged), logits(attached)) < CLOSE["nf4-nested"]


def say_double(directory, setting):
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is False
    config["quantization_config"]["bnb_4bit_use_double_quant"] = setting
    (directory / "config.json").write_text(json.dumps(config))
