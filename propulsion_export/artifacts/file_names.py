"""The names of the files in an artifact's directory."""

from typing import Literal

from propulsion_export.adapters.names import BASE_NAME

MANIFEST_FILE: Literal["propulsion.json"] = "propulsion.json"
GRAPH_FILE = "model.onnx"
# The encoder, the decoder's first step and its later steps, under optimum's names.
ENCODER_DECODER_FILES = (
    "encoder_model.onnx",
    "decoder_model.onnx",
    "decoder_with_past_model.onnx",
)
WEIGHTS_FILE = f"{GRAPH_FILE}.data"  # the weights of all graphs in the directory
ENGINE_FILE = "model.engine"
# Beside a file of weights that several artifacts share: those of this one.
OWN_WEIGHTS_FILE = f"{GRAPH_FILE}.own.data"
ADAPTERS = "adapters"
BASE_FEEDS = f"{ADAPTERS}/{BASE_NAME}.safetensors"
# In packages: the id of each adapter of a bank, and the bank as an array for numpy.
ADAPTERS_FILE = f"{ADAPTERS}.json"
BANK_ARRAY_FILE = "propulsion_bank.npy"
GENAI_CONFIG_FILE = "genai_config.json"
ONNX_ADAPTER_SUFFIX = ".onnx_adapter"
