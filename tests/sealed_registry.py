"""The seals of a bank's registry, made right again behind the bank's back."""

import hashlib
import sqlite3


def seal(name: str, entry: str, checksum: str) -> str:
    """The seal of an adapter's record."""
    return hashlib.sha256(f"{name}\0{entry}\0{checksum}".encode()).hexdigest()


def seal_again(db: sqlite3.Connection, name: str) -> None:
    """Seal an adapter's record as it is now."""
    query = "SELECT name, entry, checksum FROM adapters WHERE name = ?"
    record = db.execute(query, [name]).fetchone()
    db.execute("UPDATE adapters SET seal = ? WHERE name = ?", [seal(*record), name])
