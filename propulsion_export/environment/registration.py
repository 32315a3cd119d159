"""Register Propulsion with PEFT once both are imported, in either order, without importing PEFT.

After `import propulsion_export`, `peft.PeftModel.from_pretrained` can load Propulsion adapters.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TUNER = "propulsion_export.tuning"  # registers the method on import


def register_with_peft() -> None:
    """Register now if PEFT is imported, else right after it is."""
    if "peft" in sys.modules:
        importlib.import_module(_TUNER)
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Finds `peft` as the other finders do, and makes its import register the method."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        importlib.import_module(_TUNER)
