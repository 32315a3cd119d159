"""Run GGUF files in llama.cpp, and make F16 files of quantised ones."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest


class LlamaCpp:
    """A GGUF file in llama.cpp, on one thread."""

    def __init__(self, file, context=512):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp runs the file")
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.verbosity = context, 1, -1
        params.warmup = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def greedy(self, prompt, count, probabilities=1):
        """The most likely tokens, and the log-probabilities of the likeliest at each place.

        Returns:
            A list of tokens; a list of dictionaries from token to log-probability.
        """
        request = {
            "prompt": [int(token) for token in prompt],
            "n_predict": count,
            "temperature": 0,
            "n_probs": probabilities,
            "ignore_eos": True,
            "cache_prompt": True,
        }
        (choice,) = self.server.handle_completions(request)["choices"]
        places = choice["logprobs"]["content"]
        likeliest = [
            {each["id"]: each["logprob"] for each in place["top_logprobs"]} for place in places
        ]
        return [place["id"] for place in places], likeliest

    def after_each(self, tokens, first, probabilities):
        """The log-probabilities of the likeliest next tokens after `first` tokens, one more, …"""
        return [
            self.greedy(tokens[:end], 1, probabilities)[1][0]
            for end in range(first, len(tokens) + 1)
        ]


def divergence(likeliest, expected):
    """KL(PyTorch || llama.cpp) of the next token at each place, in nats.

    Tokens that llama.cpp does not name, as they are too unlikely, count as one.

    Args:
        likeliest: log-probabilities by token, for each place.
        expected: PyTorch's log-probabilities, [places, tokens].
    """
    found = []
    for theirs, ours in zip(likeliest, expected, strict=True):
        tokens = list(theirs)
        p, q = np.exp(ours[tokens]), np.exp([theirs[token] for token in tokens])
        p, q = (np.append(each, max(1e-12, 1 - each.sum())) for each in (p, q))
        found.append(float((p * np.log(p / q)).sum()))
    return np.array(found)


def write_float_copy(file, copy, kind="F16"):
    """Write a GGUF file again with its matrices in a floating-point type, dequantised."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    number = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, np.asarray(values, np.float32))
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def quantised_by_llama_cpp(values, kind):
    """The bytes of float32 values [..., rows, columns] in a type, by llama.cpp's quantiser.

    Types of few bits get an importance matrix of ones, without which they are refused.
    """
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp quantises")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    quantise = library.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    size = ctypes.c_int64
    quantise.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, size, size, size]
    quantise.argtypes += [ctypes.c_void_p]
    number = gguf.GGMLQuantizationType[kind]
    entries, block = gguf.GGML_QUANT_SIZES[number]
    flat = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    packed = np.zeros((*values.shape[:-1], values.shape[-1] // entries * block), np.uint8)
    ones = np.ones(flat.shape[1], np.float32)
    library.ggml_quantize_init(int(number))
    done = quantise(
        int(number), flat.ctypes.data, packed.ctypes.data, 0, *flat.shape, ones.ctypes.data
    )
    assert done == packed.nbytes
    return packed
