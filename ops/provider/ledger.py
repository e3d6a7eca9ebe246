"""The provider's books: every charge it made, in memory and in an append-only file of JSON lines.

A line is written before the reply is sent, so a `kill -9` loses no charge that anybody was told of. It is not
forced to disk: what is proved here is that processes may die, not that the machine may.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec


class LedgerError(Exception):
    """The ledger file cannot be used. The message is one line and names the file."""


class Charge(msgspec.Struct, frozen=True, omit_defaults=True):
    """One charge, as it stands in the file."""

    id: str
    reference: str
    amount: int  #: in the currency's minor unit
    currency: str
    customer: str
    status: Literal["succeeded", "declined"]
    at: float  #: seconds since the epoch
    reason: str | None = None
    idempotency_key: str | None = None


class Ledger:
    """All charges, found by reference. One process at a time may hold the file."""

    def __init__(self, path: Path) -> None:
        """Read the file, or make it. Raises `LedgerError` when it is in use or damaged."""
        self._path = path
        self.charges: list[Charge] = []
        self._by_reference: dict[str, list[Charge]] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load()
        except BlockingIOError as error:
            os.close(self._file)
            raise LedgerError(f"{path}: another provider is using this ledger") from error
        except LedgerError:
            os.close(self._file)
            raise

    def _load(self) -> None:
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                self._keep(msgspec.json.decode(line, type=Charge))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise LedgerError(f"{self._path}: line {number} cannot be read: {error}") from error
        # A last line without its end was cut by a kill in mid-write. Nobody was told of that charge.
        os.ftruncate(self._file, whole)

    def _keep(self, charge: Charge) -> None:
        self.charges.append(charge)
        self._by_reference.setdefault(charge.reference, []).append(charge)

    def record(
        self,
        *,
        reference: str,
        amount: int,
        currency: str,
        customer: str,
        reason: str | None = None,
        idempotency_key: str | None = None,
    ) -> Charge:
        """Make a new charge, always. With a `reason` it is a declined one."""
        charge = Charge(
            id=f"ch_{secrets.token_hex(12)}",
            reference=reference,
            amount=amount,
            currency=currency,
            customer=customer,
            status="declined" if reason else "succeeded",
            at=time.time(),
            reason=reason,
            idempotency_key=idempotency_key,
        )
        # One write: a charge is in the file whole, or it is the last line and was never told to anybody.
        line = msgspec.json.encode(charge) + b"\n"
        if os.write(self._file, line) != len(line):
            raise LedgerError(f"{self._path}: the disk is full")
        self._keep(charge)
        return charge

    def find(self, reference: str) -> list[Charge]:
        """The charges of this reference, oldest first."""
        return self._by_reference.get(reference, [])

    def charged_twice(self) -> Iterable[str]:
        """The references with more than one succeeded charge: each is a customer who paid twice."""
        for reference, charges in self._by_reference.items():
            if len(charges) > 1 and sum(charge.status == "succeeded" for charge in charges) > 1:
                yield reference

    def close(self) -> None:
        os.close(self._file)
