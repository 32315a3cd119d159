from pathlib import Path

import numpy as np
import pytest
import torch

from propulsion_export.base_model.tensor_files import DTYPES, StoredTensor
from propulsion_export.errors import AdapterError
from propulsion_export.merging.changes import Scaled
from propulsion_export.merging.products import Products
from propulsion_export.scaling.layer_rules import narrowed

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def products_of(values, factors, dtype, to=None):
    stored = StoredTensor(Path("none"), 0, values.shape, dtype)
    return Products(Scaled(stored, np.asarray(factors, np.float64), to))


def folded(values, factors, dtype, to=None):
    """What the fold over torch computes."""
    stored = torch.from_numpy(values.view(np.uint8).reshape(-1)).view(TORCH[dtype])
    wide = stored.reshape(values.shape).double() * torch.from_numpy(factors)
    return narrowed(wide, TORCH[to or dtype]).contiguous().view(torch.uint8).numpy().reshape(-1)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("to", [None, *TORCH])
def test_products_are_those_of_the_fold(dtype, to):
    chooser = np.random.default_rng(0)
    values = chooser.normal(size=(7, 33)).astype(DTYPES[dtype])
    factors = chooser.normal(size=(7, 1))

    products = products_of(values, factors, dtype, to).block(values.tobytes(), 0)

    np.testing.assert_array_equal(products, folded(values, factors, dtype, to))


def test_a_product_that_is_not_finite_is_refused_with_its_place():
    values = np.ones((3, 4), np.float16)
    values[1, 2] = 60000
    products = products_of(values, np.full((3, 1), 2.0), "F16")

    with pytest.raises(AdapterError, match=r"^\[1, 2\]: 60000.0 times the scale 2.0 is not finite"):
        products.block(values[1:].tobytes(), 4)
