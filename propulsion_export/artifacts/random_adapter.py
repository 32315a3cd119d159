"""An adapter with random values in every slot of a layout."""

from collections.abc import Mapping

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array, Scale
from propulsion_export.artifacts.layout import Layout
from propulsion_export.artifacts.tensor_names import BIASES_INPUT, MODULES_INPUT, SCALES_INPUT


def random_adapter(layout: Layout, name: str, *, seed: int) -> Adapter:
    """An adapter with a random value for every element of every slot.

    Scales are uniform in [0.5, 1.5); biases and saved modules are normal with deviation 0.2.
    """
    generator = np.random.default_rng(seed)
    scales = {
        slot.path: Scale(generator.uniform(0.5, 1.5, slot.shape), slot.side)
        for slot in layout.get(SCALES_INPUT, ())
    }

    def trained(packed: str) -> Mapping[str, Array]:
        slots = layout.get(packed, ())
        return {slot.path: generator.normal(0, 0.2, slot.shape) for slot in slots}

    return Adapter(
        name=name, scales=scales, biases=trained(BIASES_INPUT), modules=trained(MODULES_INPUT)
    )
