"""Where sales take place, and what may happen there: processes that die or stop, time that passes, Redis wiped.

Time passes by moving everything else into the past: the times in Postgres, the lives of the keys in Redis, and the
clock by which workers judge `start_by`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import psycopg
import structlog
from redis import Redis

from shared import keys
from shared.routing import lane_of, queues
from shared.settings import Settings
from tests.faults.processes_that_fail import Ended, Fault, Process, Report, Work
from tests.faults.scripted_provider import Behaviour, Clock, Provider, ScriptedLine

#: Enough for two at once while three are frozen.
PROCESSES = 5
FROZEN_AT_MOST = 3

_SHIFT = """
UPDATE fairlane.purchases SET
    due_at = due_at - i, call_deadline = call_deadline - i, expires_at = expires_at - i, accepted_at = accepted_at - i,
    decided_at = decided_at - i, finished_at = finished_at - i, doubt_since = doubt_since - i, ask_at = ask_at - i
FROM (SELECT interval '{seconds} seconds' AS i) AS shift;
UPDATE fairlane.charge_attempts SET
    claimed_at = claimed_at - i, call_deadline = call_deadline - i, recorded_at = recorded_at - i,
    recheck_at = recheck_at - i
FROM (SELECT interval '{seconds} seconds' AS i) AS shift;
UPDATE fairlane.items SET created_at = created_at - i, updated_at = updated_at - i
FROM (SELECT interval '{seconds} seconds' AS i) AS shift;
"""

#: shift(ARGV = seconds): every key that dies some day dies so much earlier.
_EXPIRE = """
local ms = math.floor(tonumber(ARGV[1]) * 1000)
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left >= 0 then
    if left <= ms then redis.call('DEL', key) else redis.call('PEXPIRE', key, left - ms) end
  end
end
"""


_AT_SENDING = """
SELECT p.status, p.attempt, count(a.*) FILTER (WHERE a.attempt < p.attempt
    AND (a.outcome IS NULL OR a.outcome NOT IN ('not_sent', 'not_charged'))) AS unknown
FROM fairlane.purchases p LEFT JOIN fairlane.charge_attempts a ON a.purchase_id = p.id
WHERE p.id = %s GROUP BY p.id
"""


@dataclass(frozen=True, slots=True)
class Doing:
    """Something a process is to do, what becomes of its result, and how the provider behaves meanwhile."""

    name: str
    work: Work
    then: Any = lambda _: None
    behaviours: tuple[Behaviour, ...] = ()
    silent: bool = False
    #: Seconds that pass after each of its statements.
    slow: float = 0.0


@dataclass
class Stage:
    """Where sales take place: connections to look, the provider, the clock, the processes and what happens to them."""

    settings: Settings
    view: psycopg.Connection[dict[str, Any]]
    at_provider: psycopg.Connection[dict[str, Any]]
    redis: Redis
    clock: Clock = field(default_factory=Clock)
    #: How often what happened, over all sales: a fault that never fires is noticed.
    noticed: Counter[str] = field(default_factory=Counter)
    frozen: list[Process] = field(default_factory=list)
    #: Whether anything went wrong on purpose since this was last set to False.
    disturbed: bool = False
    #: What was done in this sale, for whoever must understand a failure that does not come again.
    story: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.provider = Provider(self.clock, self._objections)
        self._flushed_at = self.clock.monotonic()
        self._stood: dict[Process, set[tuple[Any, ...]]] = {}
        self._lines: dict[Process, ScriptedLine] = {}
        for number in range(PROCESSES):
            line = ScriptedLine(self.provider, lambda what: self.noticed.update([what]))
            self._lines[Process(f"process-{number}", self.settings, line)] = line

    def close(self) -> None:
        """Close every process."""
        self.wake_everybody()
        for process in self._lines:
            process.close()

    @contextmanager
    def telling_its_story(self) -> Iterator[None]:
        """If this fails, tell what was done: two at once may not meet a second time."""
        try:
            yield
        except AssertionError as error:
            error.add_note("\n".join(self.story))
            raise

    def hears(self, logger: object, level: str, entry: Any) -> NoReturn:
        """What would be logged of thousands of faults. On a busy machine Redis may be too slow for a process, too."""
        event = entry["event"]
        if level == "warning" and "_not_" in event and event != "outcome_did_not_count":
            self.disturbed = True
            self.noticed[f"logged {event}"] += 1
        raise structlog.DropEvent

    # Processes

    def renew_processes(self) -> None:
        """New ones in place of all, with nothing in memory. Nobody may be frozen."""
        for process in self._lines:
            process.begin_again()

    def run(self, work: Doing, fault: Fault | None = None) -> Report | None:
        """Have a process that is free do this, until it is done, dead or frozen. None if no process is free."""
        reports = self.run_at_once([(work, fault)])
        return reports[0] if reports else None

    def run_at_once(self, works: Sequence[tuple[Doing, Fault | None]]) -> list[Report]:
        """Have processes do these at the same time; nothing if there are not enough that are free."""
        free = [process for process in self._lines if process.frozen_at is None]
        if len(free) < len(works):
            return []
        chosen = list(zip(free, works, strict=False))
        for process, (work, fault) in chosen:
            self._lines[process].follow(work.behaviours, silent=work.silent)
            process.slow = work.slow
            process.start(work.work, work.then, fault)
        reports, errors = [], []
        for process, _ in chosen:
            try:
                reports.append(self._ended(process))
            except Exception as error:  # noqa: BLE001 - raised again, once nobody works any more
                errors.append(error)
        for (work, fault), report in zip(works, reports, strict=False):
            self.story.append(f"{work.name} {fault or ''} -> {report}")
        if errors:
            errors[0].add_note("\n".join(self.story))
            raise errors[0]
        return reports

    def _ended(self, process: Process) -> Report:
        point, report = process.frozen_at, process.wait()
        if not isinstance(report, Ended):
            self.disturbed = True
            kind = type(report).__name__.lower()
            self.noticed[f"{kind} at {getattr(report, 'point', point)}"] += 1
        if process.frozen_at is not None:
            self.frozen.append(process)
            self._stood[process] = self._called_for()
        return report

    def wake(self, index: int, fault: Fault | None = None) -> None:
        """One of the frozen goes on, if there is any."""
        if not self.frozen:
            return
        process = self.frozen.pop(index % len(self.frozen))
        self.disturbed = True
        self.noticed[f"woken at {process.frozen_at}"] += 1
        if self._stood.pop(process) - self._called_for():
            self.noticed["woken after others took over"] += 1
        self.story.append(f"{process.name} wakes at {process.frozen_at}")
        process.wake(fault)
        self.story.append(f"  -> {self._ended(process)}")

    def wake_everybody(self) -> None:
        """All of the frozen go on, one after another."""
        while self.frozen:
            self.wake(0)

    def lane(self, sku: str) -> int:
        """The lane that decides this item."""
        return lane_of(sku, self.settings.lanes)

    # Time and Redis

    def lose_messages(self) -> None:
        """The broker forgets every message."""
        self.disturbed = True
        if self.redis.delete(*queues(self.settings.lanes)):
            self.noticed["messages lost"] += 1
            self.story.append("messages lost")

    def flush(self) -> None:
        """Redis loses everything."""
        self.disturbed = True
        self._flushed_at = self.clock.monotonic()
        self.redis.flushall()
        self.noticed["flush"] += 1
        self.story.append("flush")

    def let_time_pass(self, seconds: float) -> None:
        """So much time passes for everybody."""
        self.story.append(f"{seconds} s pass")
        self.clock.advance(seconds)
        self.view.execute(_SHIFT.format(seconds=float(seconds)).encode())
        self.redis.eval(_EXPIRE, 0, seconds)

    def deadlocks(self) -> int:
        """How many there were in this database."""
        (row,) = self.view.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        return int(row["deadlocks"])

    def _called_for(self) -> set[tuple[Any, ...]]:
        """The calls that are under way or in doubt, as far as Postgres knows."""
        rows = self.view.execute(
            "SELECT id, fence, status FROM fairlane.purchases WHERE status IN ('charging', 'in_doubt')"
        )
        return {(row["id"], row["fence"], row["status"]) for row in rows}

    def _objections(self, reference: str, start_by: float) -> list[str]:
        """What is wrong with a call that arrives at the provider now."""
        (row,) = self.at_provider.execute(_AT_SENDING, [reference]).fetchall()
        wrong = []
        if row["status"] != "charging":
            wrong.append(f"{reference}: called while {row['status']}")
        if row["unknown"]:
            wrong.append(f"{reference}: called while the outcome of an earlier attempt is unknown")
        claimed_after_flush = start_by - self.settings.start_within > self._flushed_at
        if claimed_after_flush and not self.redis.exists(keys.charge_lock(reference)):
            wrong.append(f"{reference}: called without its lock")
        if row["attempt"] > 1:
            self.noticed["second call"] += 1
        return wrong
