"""Propulsion (arXiv 2409.10927) as a PEFT tuner; importing this package makes PEFT know it."""

from aenum import extend_enum
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from propulsion_export.tuning.config import PropulsionConfig
from propulsion_export.tuning.layer import PropulsionLayer
from propulsion_export.tuning.model import PropulsionModel

__all__ = ["PropulsionConfig", "PropulsionLayer", "PropulsionModel"]

# PEFT's list of methods is a closed enum. Drop this when PEFT lets packages register a type.
if "PROPULSION" not in PeftType.__members__:
    extend_enum(PeftType, "PROPULSION", "PROPULSION")
if PeftType.PROPULSION not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(
        name="propulsion",
        config_cls=PropulsionConfig,
        model_cls=PropulsionModel,
        is_mixed_compatible=False,
    )
