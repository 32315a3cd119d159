"""Adapters of one layer of two channels, for commands that run no model."""

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.fingerprint import Fingerprint

BASE = Fingerprint("float32", {"weight": (0.5,) * 8})


def write_adapter(directory, fingerprint=BASE, path="dense"):
    directory.mkdir()
    scales = {path: Scale(np.array([2.5, -3.0]))}
    Adapter(directory.name, scales, fingerprint=fingerprint).write(directory)
    return directory
