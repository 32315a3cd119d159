"""Compare what an artifact does with one adapter with what it does with others, or another does.

| module | case |
|---|---|
| `switching` | an adapter after another, and after the base model; generations that take turns |
| `identity` | an adapter that changes nothing, against the base model |
| `adding` | an adapter that is removed and added again |
| `against` | another artifact of the same base model and adapter |

The first three compare bit for bit on one small batch, see `probe`; they need no oracle.
`parity.mixing` compares the rows of a bank's batches.
"""
