"""Propulsion adapters to production: train, fold or keep switchable, ONNX, engines, parity.

The names below are the public interface. Each is imported when it is first used, so that importing
this package loads no framework; it only tells PEFT, once that is imported, that PROPULSION exists.
"""

import importlib
from typing import TYPE_CHECKING, Any

from propulsion_export.environment.registration import register_with_peft

if TYPE_CHECKING:
    from propulsion_export.adapters.adapter import Adapter
    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.artifacts.changing import add_adapter, remove_adapter
    from propulsion_export.engine import BuildOptions
    from propulsion_export.parity.reports.report import ParityReport
    from propulsion_export.pipeline.fold_onnx import fold_onnx
    from propulsion_export.pipeline.merge import merge
    from propulsion_export.pipeline.merge_gguf import merge_gguf
    from propulsion_export.pipeline.onnx import export_modes, export_onnx
    from propulsion_export.pipeline.onnx_options import OnnxOptions
    from propulsion_export.pipeline.package import package
    from propulsion_export.pipeline.parity import check_parity
    from propulsion_export.pipeline.run import predict
    from propulsion_export.pipeline.trt import build_engine
    from propulsion_export.runners.opening import open_runner
    from propulsion_export.serving.generation import Settings
    from propulsion_export.serving.loaded_model import Reply
    from propulsion_export.serving.session import Session
    from propulsion_export.serving.token_sampling import Sampling
    from propulsion_export.training import TrainOptions, train
    from propulsion_export.tuning import PropulsionConfig

_HOMES = {
    "Adapter": "adapters.adapter:Adapter",
    "Artifact": "artifacts.artifact:Artifact",
    "BuildOptions": "engine.options:BuildOptions",
    "OnnxOptions": "pipeline.onnx_options:OnnxOptions",
    "ParityReport": "parity.reports.report:ParityReport",
    "PropulsionConfig": "tuning:PropulsionConfig",
    "Reply": "serving.loaded_model:Reply",
    "Sampling": "serving.token_sampling:Sampling",
    "Session": "serving.session:Session",
    "Settings": "serving.generation:Settings",
    "TrainOptions": "training:TrainOptions",
    "add_adapter": "artifacts.changing:add_adapter",
    "build_engine": "pipeline.trt:build_engine",
    "check_parity": "pipeline.parity:check_parity",
    "export_modes": "pipeline.onnx:export_modes",
    "export_onnx": "pipeline.onnx:export_onnx",
    "fold_onnx": "pipeline.fold_onnx:fold_onnx",
    "merge": "pipeline.merge:merge",
    "merge_gguf": "pipeline.merge_gguf:merge_gguf",
    "open_runner": "runners.opening:open_runner",
    "package": "pipeline.package:package",
    "predict": "pipeline.run:predict",
    "remove_adapter": "artifacts.changing:remove_adapter",
    "train": "training:train",
}

__all__ = [
    "Adapter",
    "Artifact",
    "BuildOptions",
    "OnnxOptions",
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
    "export_modes",
    "export_onnx",
    "fold_onnx",
    "merge",
    "merge_gguf",
    "open_runner",
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
