"""PyTorch's side of a bisection has the precision that the verdict has measured."""

import ml_dtypes
import numpy as np
import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.loading import load_base
from propulsion_export.parity.bisect.sides import GraphRun, torch_sides

NO_ADAPTER = Adapter("none", scales={})


def test_what_transformers_keeps_in_float32_stays_there(tiny_checkpoint):
    base = load_base(str(tiny_checkpoint("t5")), task="text2text-generation")

    list(torch_sides(base, [], NO_ADAPTER, "float16"))

    dtypes = {name: each.dtype for name, each in base.model.named_parameters()}
    assert {dtypes[name] for name in dtypes if ".wo." in name} == {torch.float32}
    assert dtypes["shared.weight"] == torch.float16


def test_a_cache_in_bfloat16_is_fed_to_both_sides(tiny_checkpoint):
    base = load_base(str(tiny_checkpoint("llama")), task="text-generation")
    cache = {
        f"past_key_values.{layer}.{kind}": np.ones((1, 2, 1, 8), ml_dtypes.bfloat16)
        for layer in (0, 1)
        for kind in ("key", "value")
    }
    step = {name: np.full((1, 1), 1) for name in ("input_ids", "position_ids")}
    feeds = {**step, "attention_mask": np.ones((1, 2), np.int64), **cache}

    ((_, oracle, reference),) = torch_sides(
        base, [GraphRun("model.onnx", feeds, {}, None)], NO_ADAPTER, "bfloat16"
    )

    assert oracle.keys() == reference.keys()
    assert oracle["lm_head", 0].output.shape == (1, 1, 100)
