"""The names of graph inputs and outputs, and of their dimensions."""

# One adapter, packed: each input is one flat vector of all its scales, biases or saved modules.
SCALES_INPUT = "propulsion_scales"
BIASES_INPUT = "propulsion_biases"
MODULES_INPUT = "propulsion_modules"
PACKED_INPUTS = (SCALES_INPUT, BIASES_INPUT, MODULES_INPUT)

# A bank: one row per adapter, holding its three packed inputs; and the row that each row of the
# batch uses.
BANK_INPUT = "propulsion_bank"
IDS_INPUT = "adapter_ids"
ADAPTERS_DIMENSION = "adapters"  # the number of rows of the bank
# While a bank is traced: the row of the bank of each row of the batch.
ROWS_INPUT = "propulsion_rows"

# A decoder's cache going in and coming out, and its logits.
PAST, PRESENT, LOGITS = "past_key_values", "present", "logits"
# States of a decoder of a fixed size beside the cache, `past.N.conv` and `present.N.conv`.
PAST_STATE = "past"
STATE_KINDS = ("conv", "recurrent")
