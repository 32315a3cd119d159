"""Propulsion adapters to production: train, fold or keep switchable, ONNX, engines, parity.

The names below are the public interface. Each is imported when it is first used, so that importing
this package loads no framework; it only tells PEFT, once that is imported, that PROPULSION exists.
"""

import importlib
from typing import TYPE_CHECKING, Any

from propulsion_export.registration import register_with_peft

if TYPE_CHECKING:
    from propulsion_export.adapter import Adapter
    from propulsion_export.artifact import Artifact
    from propulsion_export.choosing import Sampling
    from propulsion_export.engine import BuildOptions
    from propulsion_export.parity.report import ParityReport
    from propulsion_export.pipeline.adapters import add_adapter, remove_adapter
    from propulsion_export.pipeline.building import build as build_engine
    from propulsion_export.pipeline.exporting import export_onnx
    from propulsion_export.pipeline.generating import Settings
    from propulsion_export.pipeline.merging import merge
    from propulsion_export.pipeline.packaging import package
    from propulsion_export.pipeline.predicting import predict
    from propulsion_export.pipeline.session import Reply, Session
    from propulsion_export.pipeline.verifying import check_parity
    from propulsion_export.training import TrainOptions, train
    from propulsion_export.tuning import PropulsionConfig

_HOMES = {
    "Adapter": "adapter:Adapter",
    "Artifact": "artifact:Artifact",
    "BuildOptions": "engine:BuildOptions",
    "ParityReport": "parity.report:ParityReport",
    "PropulsionConfig": "tuning:PropulsionConfig",
    "Reply": "pipeline.session:Reply",
    "Sampling": "choosing:Sampling",
    "Session": "pipeline.session:Session",
    "Settings": "pipeline.generating:Settings",
    "TrainOptions": "training:TrainOptions",
    "add_adapter": "pipeline.adapters:add_adapter",
    "build_engine": "pipeline.building:build",
    "check_parity": "pipeline.verifying:check_parity",
    "export_onnx": "pipeline.exporting:export_onnx",
    "merge": "pipeline.merging:merge",
    "package": "pipeline.packaging:package",
    "predict": "pipeline.predicting:predict",
    "remove_adapter": "pipeline.adapters:remove_adapter",
    "train": "training:train",
}

__all__ = [
    "Adapter",
    "Artifact",
    "BuildOptions",
    "ParityReport",
    "PropulsionConfig",
    "Reply",
    "Sampling",
    "Session",
    "Settings",
    "TrainOptions",
    "add_adapter",
    "build_engine",
    "check_parity",
    "export_onnx",
    "merge",
    "package",
    "predict",
    "remove_adapter",
    "train",
]


register_with_peft()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
