"""An adapter's digest says what it computes, and only that."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from adapter_files import DENSE, QUERY, an_adapter

from propulsion_export.adapters.scales import Scale


def test_the_digest_ignores_names_order_and_where_the_adapter_came_from():
    adapter = an_adapter()
    turned = dict(reversed(adapter.scales.items()))

    others = [
        replace(adapter, name="b"),
        an_adapter(scales=turned),
        an_adapter(base="x", task="text-classification", labels=("a",)),
        an_adapter(modules={"head.weight": np.array([[1.0, 2.0]], np.float64)}),
        an_adapter(modules={"head.weight": np.asfortranarray([[1.0, 2.0]])}),
    ]

    assert {other.digest for other in others} == {adapter.digest}
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", adapter.digest)
    assert replace(adapter, name="b").name == "b"


@pytest.mark.parametrize(
    "changes",
    [
        {"scales": {QUERY: Scale(np.array([1.5, 2.0]))}},
        {"scales": {QUERY: Scale(np.array([1.5, 2.0])), DENSE: Scale(np.nextafter([0.5], 1))}},
        {"scales": {QUERY: Scale(np.array([1.5, 2.0])), DENSE: Scale(np.array([0.5]), "input")}},
        {"scales": {QUERY: Scale(np.array([2.0, 1.5])), DENSE: Scale(np.array([0.5]))}},
        {"scales": {QUERY: Scale(np.array([1.5, 2.0])), "other": Scale(np.array([0.5]))}},
        {"biases": {}},
        {"biases": {QUERY: np.array([1.0, 2.5])}},
        {"biases": {DENSE: np.array([1.0, 2.0])}},
        {"modules": {}},
        {"modules": {"head.weight": np.array([[1.0], [2.0]])}},
        {"modules": {"head.weight": np.array([[1.0, 2.5]])}},
        {"modules": {"head.bias": np.array([[1.0, 2.0]])}},
    ],
    ids=lambda value: str(value)[:70],
)
def test_the_digest_changes_with_whatever_changes_the_outputs(changes):
    assert an_adapter(**changes).digest != an_adapter().digest


def test_the_digest_is_computed_once(monkeypatch):
    adapter = an_adapter()
    first = adapter.digest
    monkeypatch.setattr(hashlib, "sha256", None)

    assert adapter.digest == first


def test_the_digest_is_the_one_recorded_before():
    """Artifacts in the field hold digests: how they are made must not change."""
    content = (
        b"scale encoder.0.dense output (1,)\n"
        + np.array([0.5]).tobytes()
        + b"scale encoder.0.query output (2,)\n"
        + np.array([1.5, 2.0]).tobytes()
        + b"bias encoder.0.query  (2,)\n"
        + np.array([1.0, 2.0]).tobytes()
        + b"module head.weight  (1, 2)\n"
        + np.array([1.0, 2.0]).tobytes()
    )

    assert an_adapter().digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_only_an_adapter_that_changes_nothing_is_the_identity():
    ones = {QUERY: Scale(np.ones(2)), DENSE: Scale(np.ones(1), "input")}

    assert an_adapter(scales=ones, biases={}, modules={}).is_identity()
    assert not an_adapter(scales=ones, modules={}).is_identity()
    # A head alone is none of the method's doing.
    assert an_adapter(scales=ones, biases={}).is_identity()
    nearly = ones | {DENSE: Scale(np.nextafter([1.0], 2))}
    assert not an_adapter(scales=nearly, biases={}, modules={}).is_identity()
