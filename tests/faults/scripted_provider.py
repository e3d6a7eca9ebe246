"""A payment provider whose every answer a test writes, with a ledger, on a clock that the test moves.

It makes a new charge at every call, as real ones do. What it does keeps within what the service may expect of it
(`workers.gateways`): what it executes or shows late, it does within 70 s of the call, which is inside the settle window
(a call is sent within 5 s of its claim; 20 s after that comes its deadline, 60 s later the window ends).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tests.faults.processes_that_fail import passing
from workers.gateways import (
    Capabilities,
    ChargeOutcome,
    ChargeRecord,
    ChargeRequest,
    Confirmed,
    Declined,
    GatewayUnavailable,
    InDoubt,
    NotSent,
)

#: Seconds after a call in which the provider may still execute it, or not yet show what it did.
LATE = 70.0

#: Where a worker can be crashed or frozen inside of a call.
BEFORE_SENDING = "provider.before_sending"
AFTER_SENDING = "provider.after_sending"
BEFORE_ASKING = "provider.before_asking"
AFTER_ASKING = "provider.after_asking"
PROVIDER_POINTS = frozenset({BEFORE_SENDING, AFTER_SENDING, BEFORE_ASKING, AFTER_ASKING})


class Clock:
    """A monotonic clock that also moves when it is told to. In place of the module `time` where that is asked."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def monotonic(self) -> float:
        """Seconds, on the scale of every `start_by`."""
        return time.monotonic() + self._ahead

    def advance(self, seconds: float) -> None:
        """So much time has passed."""
        self._ahead += seconds


class Behaviour(Enum):
    """What becomes of one call: the charges it makes, when (seconds after it was sent), and what the caller hears."""

    PAID = "succeeded"
    PAID_SHOWN_LATE = "succeeded", 0.0, LATE  #: answered, but `find` does not know of it yet
    PAID_SILENTLY = "succeeded", 0.0, 0.0, False
    PAID_LATE = "succeeded", LATE, LATE  #: answered to whoever still listens then
    PAID_LATE_AND_SILENTLY = "succeeded", LATE, LATE, False
    REFUSED = "declined"
    REFUSED_SILENTLY = "declined", 0.0, 0.0, False
    REFUSED_LATE = "declined", LATE, LATE, False
    LOST = "", LATE, LATE, False  #: no charge and no answer; it might still have come
    PAID_TWICE = "succeeded succeeded", 0.0, 0.0, False
    NOT_SENT = NotSent("connection_refused")
    WRONG_KEY = NotSent("unauthorized", alert=True)

    def __init__(
        self, what: str | NotSent, executed_after: float = 0.0, listed_after: float = 0.0, answered: bool = True
    ) -> None:
        self.not_sent = what if isinstance(what, NotSent) else None
        self.statuses = what.split() if isinstance(what, str) else []
        self.executed_after = executed_after
        self.listed_after = listed_after
        self.answered = answered


@dataclass(frozen=True, slots=True)
class Entry:
    """One charge in the ledger, from `executed_at` on; `find` shows it from `listed_at` on."""

    reference: str
    record: ChargeRecord
    executed_at: float
    listed_at: float


@dataclass(frozen=True, slots=True)
class Sent:
    """One call that reached the provider. Until `under_way_until` something may still come of it."""

    reference: str
    under_way_until: float


@dataclass
class Provider:
    """The provider itself. Every worker has a line to it (`ScriptedLine`)."""

    clock: Clock
    #: Called at the moment a charge arrives with its reference and `start_by`: what is wrong with that, if anything.
    objections: Callable[[str, float], list[str]]
    ledger: list[Entry] = field(default_factory=list)
    calls: list[Sent] = field(default_factory=list)
    #: What should never have happened, in words.
    violations: list[str] = field(default_factory=list)
    #: Charged twice by the script, not by the service.
    charged_twice: set[str] = field(default_factory=set)
    #: References it was asked about and gave no answer.
    silent_about: set[str] = field(default_factory=set)
    _numbers: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def forget_everything(self) -> None:
        """An empty ledger."""
        for kept in (self.ledger, self.calls, self.violations, self.charged_twice, self.silent_about):
            kept.clear()

    def receive(self, reference: str, behaviour: Behaviour, start_by: float) -> list[Entry]:
        """A charge has arrived. The entries it makes, now or later."""
        with self._lock:
            now = self.clock.monotonic()
            self.violations += self.objections(reference, start_by)
            if any(call.reference == reference and call.under_way_until > now for call in self.calls):
                self.violations.append(f"{reference}: a second call while the first is under way")
            if self.executed(reference):
                self.violations.append(f"{reference}: called again although it is charged")
            entries = []
            for status in behaviour.statuses:
                self._numbers += 1
                record = ChargeRecord(f"ch_{self._numbers}", status)
                executed_at, listed_at = now + behaviour.executed_after, now + behaviour.listed_after
                entries.append(Entry(reference, record, executed_at, listed_at))
            self.ledger += entries
            self.calls.append(Sent(reference, now + behaviour.executed_after))
            if len(entries) > 1:
                self.charged_twice.add(reference)
            return entries

    def executed(self, reference: str, status: str = "succeeded") -> list[str]:
        """The ids of its charges that were executed by now and came out like this."""
        with self._lock:
            now = self.clock.monotonic()
            return [
                entry.record.id
                for entry in self.ledger
                if entry.reference == reference and entry.record.status == status and entry.executed_at <= now
            ]

    def coming(self, reference: str) -> bool:
        """Whether a charge that succeeds is in the ledger, or will be."""
        with self._lock:
            return any(entry.reference == reference and entry.record.status == "succeeded" for entry in self.ledger)

    def found(self, reference: str) -> list[ChargeRecord]:
        """What it shows of a reference now."""
        with self._lock:
            now = self.clock.monotonic()
            return [entry.record for entry in self.ledger if entry.reference == reference and entry.listed_at <= now]


class ScriptedLine:
    """One worker's gateway: it keeps the contract of `Gateway`, `start_by` above all, and its worker can be stopped."""

    capabilities = Capabilities(deduplicates=False, can_find=True)

    def __init__(self, provider: Provider, noticed: Callable[[str], None]) -> None:
        self._provider = provider
        self._noticed = noticed
        self._behaviours: Iterator[Behaviour] = iter(())
        self.silent = False

    def follow(self, behaviours: Sequence[Behaviour] = (), *, silent: bool = False) -> None:
        """From now on: calls come out like these, one after another, then paid; questions are answered, or not."""
        self._behaviours = iter(behaviours)
        self.silent = silent

    async def charge(self, request: ChargeRequest, *, start_by: float) -> ChargeOutcome:
        """See `Gateway.charge`."""
        behaviour = next(self._behaviours, Behaviour.PAID)
        passing(BEFORE_SENDING)
        if self._provider.clock.monotonic() >= start_by:
            self._noticed("too late to send")
            return NotSent("too_late")
        if behaviour.not_sent is not None:
            return behaviour.not_sent
        entries = self._provider.receive(request.reference, behaviour, start_by)
        await asyncio.sleep(0)
        passing(AFTER_SENDING)
        now = self._provider.clock.monotonic()
        if not (behaviour.answered and entries and entries[0].executed_at <= now):
            return InDoubt("no_answer")
        if behaviour.executed_after:
            self._noticed("answer to a late worker")
        record = entries[0].record
        return Confirmed(record.id) if record.status == "succeeded" else Declined("no_money", record.id)

    async def find(self, reference: str) -> list[ChargeRecord]:
        """See `Gateway.find`."""
        passing(BEFORE_ASKING)
        if self.silent:
            self._provider.silent_about.add(reference)
            raise GatewayUnavailable("silent")
        records = self._provider.found(reference)
        await asyncio.sleep(0)
        passing(AFTER_ASKING)
        return records

    async def close(self) -> None:
        """See `Gateway.close`."""
