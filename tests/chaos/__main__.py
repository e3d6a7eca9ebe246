"""`make chaos SEED=7 MINUTES=10`: the seeded random mix of all faults, for as long as you like."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from ops.interruption import orderly_end
from tests.chaos.mix import Outcome, run

ROOT = Path(__file__).parents[2]


def print_outcome(outcome: Outcome) -> None:
    """The table."""
    said = outcome.as_dict()
    print(f"{'fault':36}{'fired':>7}{'drawn':>7}")
    for kind, counts in said["faults"].items():
        print(f"{kind:36}{counts['fired']:>7}{counts['drawn']:>7}")
    print(f"{'all':36}{outcome.fired.total():>7}{outcome.drawn.total():>7}\n")
    for name in ("buyers", "purchases_total", "purchases_per_second", "purchases", "refused", "asked_again_later"):
        print(f"{name.replace('_', ' '):36}{_told(said[name])}")
    for name in ("troubles", "starts_refused", "settled_within"):
        print(f"{name.replace('_', ' '):36}{_told(said[name])}")
    print()
    for name in ("lost", "oversold", "charged_twice", "winners_lost"):
        print(f"{name.replace('_', ' '):36}{said[name]}")
    for name, values in outcome.verdict.broken.items():
        print(f"\nBROKEN: {name.replace('_', ' ')} ({len(values)})")
        for value in values[:20]:
            print(f"  {value}")


def _told(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    return str(value)


def main() -> int:
    """Exit code 0 when every promise was kept, 1 when one was broken or the service did not come back."""
    parser = argparse.ArgumentParser(prog="make chaos", description="Everything that can go wrong, drawn from a seed.")
    parser.add_argument("--seed", type=int, help="replays the same faults at the same moments (default: a new one)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long buyers come and faults fire (default 10)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument("--keep", action="store_true", help="keep logs and data even if all went well")
    given = parser.parse_args()
    if not given.minutes > 0:
        parser.error("--minutes: must be more than 0")
    seed: int = secrets.randbelow(1_000_000) if given.seed is None else given.seed
    # A short path, as servers have sockets in theirs.
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    keep = True
    with orderly_end() as interruption:
        try:
            print(f"seed {seed}, {given.minutes:g} minutes, in {folder}", file=sys.stderr, flush=True)
            outcome = asyncio.run(run(seed, given.minutes * 60, folder, ROOT / "Procfile", tell=_tell))
            keep = given.keep or not outcome.ok
            if given.json:
                print(json.dumps(outcome.as_dict(), indent=2))
            else:
                print_outcome(outcome)
            return 0 if outcome.ok else 1
        except KeyboardInterrupt:
            keep = given.keep
            return interruption.code
        finally:
            if keep:
                print(f"seed {seed}: logs, books and data are kept in {folder}", file=sys.stderr)
            else:
                shutil.rmtree(folder)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
