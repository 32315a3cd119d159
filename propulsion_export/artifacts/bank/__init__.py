"""Any number of adapters in one flat file of rows, and the registry that says whose each row is.

BankRow r is everything one adapter feeds and lies at byte r * D * itemsize of the bank file; row 0 is
the base model. Rows are appended and never written again while the file lives, because others may
be reading them through a memory map; what lies behind the last row that the registry counts is what
a killed process left, and counts for nothing. Every change is one transaction of the registry.

`registry` is what the registry says, `rows` are the rows on disk, `transactions` bind the two, and
`bank` is what one does with them.
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
