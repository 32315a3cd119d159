"""Any number of adapters as rows of one flat file, and a registry that maps names to rows.

Row r holds all packed inputs of one adapter, at byte r * D * itemsize of the bank file; row 0 is
the base model's. Rows are appended and never overwritten, because other processes may be reading
them through a memory map. Rows after the last one that the registry counts were left by a killed
process, or belong to a registry that was replaced by a backup; they are ignored. Every change is
one transaction of the registry and has a random id.

`registry` reads and writes the registry's tables, `row_file` the rows on disk, `transactions` open
and commit the registry, and `bank` offers the operations on the whole bank.
"""

from propulsion_export.artifacts.bank.bank import Bank, Snapshot
from propulsion_export.artifacts.bank.registry import (
    BANK_FILE,
    DTYPES,
    REGISTRY_FILE,
    REGISTRY_VERSION,
    BankRow,
    is_bank_file,
)
from propulsion_export.artifacts.bank.row_file import check_row

__all__ = [
    "BANK_FILE",
    "DTYPES",
    "REGISTRY_FILE",
    "REGISTRY_VERSION",
    "Bank",
    "BankRow",
    "Snapshot",
    "check_row",
    "is_bank_file",
]
