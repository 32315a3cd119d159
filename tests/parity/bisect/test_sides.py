"""PyTorch's side of a bisection has the precision that the verdict has measured."""

import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.loading import load_base
from propulsion_export.parity.bisect.sides import torch_sides


def test_what_transformers_keeps_in_float32_stays_there(tiny_checkpoint):
    base = load_base(str(tiny_checkpoint("t5")), task="text2text-generation")

    list(torch_sides(base, [], Adapter("none", scales={}), "float16"))

    dtypes = {name: each.dtype for name, each in base.model.named_parameters()}
    assert {dtypes[name] for name in dtypes if ".wo." in name} == {torch.float32}
    assert dtypes["shared.weight"] == torch.float16
