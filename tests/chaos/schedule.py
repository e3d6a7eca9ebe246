"""What goes wrong when, drawn from a seed: the same seed gives the same faults at the same moments.

`schedule` draws kinds from a shuffled deck, so that every kind comes up before one comes up again. Faults overlap, but
a target is hurt by one thing at a time and then gets a moment to recover. Storms and calmer times take turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

WEB, SWEEPS = ("web", "web.2"), ("sweep", "sweep.2")
LANES, CHARGES = ("lanes", "lanes.2"), ("charges", "charges.2")
#: Started in this order. The second of a line reaches its servers directly, the first by wires that can be cut.
PROCESSES = {name: name.split(".")[0] for name in (*WEB, *LANES, *CHARGES, *SWEEPS)}
REDIS, POSTGRES, PROVIDER = ("redis",), ("postgres",), ("provider",)
#: How the first process of each line reaches its servers: `line:server`.
WIRES = tuple(
    f"{line}:{server}" for line in ("web", "lanes", "charges", "sweep") for server in ("redis", "broker", "postgres")
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault: whom it may hit, for how many seconds at least and at most, and the seconds to recover."""

    name: str
    targets: tuple[str, ...]
    shortest: float
    longest: float
    recovery: float


@dataclass(frozen=True, slots=True)
class Event:
    """One fault: seconds from the start, what happens to whom, and for how long. `draw` decides what is left open."""

    at: float
    kind: str
    target: str
    seconds: float
    draw: int


#: A process that was killed takes three to ten seconds to come back: it imports Celery or FastAPI on a busy machine.
_RESTART, _RESUME = 10.0, 1.0
#: Postgres starts, and replays what it had not written, within two to five.
_RECOVER = 5.0

KINDS = (
    Kind("web killed", WEB, 0.1, 2, _RESTART),
    Kind("web stopped", WEB, 0.1, 1, _RESTART),
    Kind("web frozen", WEB, 0.2, 6, _RESUME),
    Kind("lanes killed", LANES, 0.1, 3, _RESTART),
    Kind("lanes stopped", LANES, 0.1, 3, _RESTART),
    # Longer than every timeout that concerns a decision: the longest is the task's limit, 4 s here.
    Kind("lanes frozen", LANES, 0.2, 8, _RESUME),
    Kind("a lane's process killed", LANES, 0, 0, _RESUME),
    Kind("a lane's process frozen", LANES, 0.2, 8, _RESUME),
    Kind("charges killed", CHARGES, 0.1, 3, _RESTART),
    Kind("charges stopped", CHARGES, 0.1, 3, _RESTART),
    # Longer than a call's deadline and the settle window together, 6 s here.
    Kind("charges frozen", CHARGES, 0.2, 8, _RESUME),
    Kind("sweep killed", SWEEPS, 0.1, 3, _RESTART),
    Kind("sweep frozen", SWEEPS, 0.2, 8, _RESUME),
    Kind("redis killed", REDIS, 0.1, 2, _RESUME),
    Kind("redis killed, its log cut short", REDIS, 0.1, 2, _RESUME),
    Kind("redis flushed", REDIS, 0, 0, _RESUME),
    Kind("redis paused", REDIS, 0.2, 4, _RESUME),
    Kind("redis frozen", REDIS, 0.2, 4, _RESUME),
    Kind("redis out of memory", REDIS, 0.3, 2, _RESUME),
    Kind("redis connections closed", REDIS, 0, 0, _RESUME),
    Kind("postgres restarted", POSTGRES, 0, 0.5, _RECOVER),
    Kind("postgres killed", POSTGRES, 0, 1, _RECOVER),
    Kind("postgres connections terminated", POSTGRES, 0, 0, _RESUME),
    Kind("postgres frozen", POSTGRES, 0.5, 4, _RESUME),
    Kind("provider killed", PROVIDER, 0.1, 2, _RESUME),
    # A provider that executes a call later than the settle window allows is what cannot be excluded: keep well below.
    Kind("provider frozen", PROVIDER, 0.2, 2, _RESUME),
    Kind("wire cut", WIRES, 0.1, 4, _RESUME),
    Kind("wire held", WIRES, 0.3, 6, _RESUME),
    Kind("wire slow", WIRES, 0.5, 6, _RESUME),
    Kind("replies lost", WIRES, 0.5, 4, _RESUME),
)
#: Every wire is hit now and then, not one of them.
_OFTEN = {"wire cut": 3, "wire held": 3, "wire slow": 2, "replies lost": 4}
#: Seconds from one fault to the next on average, drawn anew after a while: a storm, a bad day, a calmer time.
_GAPS, _SHORTEST_WEATHER, _LONGEST_WEATHER = (0.5, 1.0, 3.0), 6.0, 20.0
#: A sale must run before something can go wrong with it.
_FIRST_AT = 2.0


def schedule(seed: int, seconds: float) -> list[Event]:
    """The faults of a run of this length, in order of their times. A pure function."""
    random = Random(seed)
    events: list[Event] = []
    deck: list[Kind] = []
    recovered: dict[str, float] = {}
    at, weather_until, gap = _FIRST_AT, 0.0, 0.0
    while True:
        if at >= weather_until:
            weather_until = at + random.uniform(_SHORTEST_WEATHER, _LONGEST_WEATHER)
            gap = random.choice(_GAPS)
        at += random.expovariate(1 / gap)
        if at >= seconds:
            return events
        if not deck:
            deck = [kind for kind in KINDS for _ in range(_OFTEN.get(kind.name, 1))]
            random.shuffle(deck)
        for place, kind in enumerate(deck):
            whole = [
                target
                for target in kind.targets
                if all(recovered.get(part, 0) <= at for part in (target, *_ends(target)))
            ]
            if whole:
                target = random.choice(whole)
                lasts = min(random.uniform(kind.shortest, kind.longest), seconds - at)
                events.append(Event(round(at, 3), kind.name, target, round(lasts, 3), random.getrandbits(32)))
                recovered[target] = at + lasts + kind.recovery
                del deck[place]
                break


def _ends(target: str) -> tuple[str, ...]:
    """What a wire connects: a fault of it is felt only while both work."""
    line, wire, server = target.partition(":")
    return (line, "redis" if server == "broker" else server) if wire else ()
