"""What the tests of sessions ask: texts, and rows of tokens."""

import numpy as np

TEXTS = ["ba be bi", "ko", "do re mi fa bol", "Ka ke. ki", "ba", "la ti lor", "na ne ni", "hi"]
ROWS, LENGTH = 16, 7
KINDS = ("switchable", "banked")


def random_inputs(seed=0):
    """Random tokens, all of them real, int64 [16, 7]."""
    tokens = np.random.default_rng(seed).integers(5, 99, (ROWS, LENGTH))
    return {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "token_type_ids": np.zeros_like(tokens),
    }


def own(inputs, row):
    return {name: values[row : row + 1] for name, values in inputs.items()}
