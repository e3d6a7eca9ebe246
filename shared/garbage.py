"""Python's garbage collector in processes that run for long and serve many."""

from __future__ import annotations

import gc

#: Objects that are made and not freed until the youngest are looked at. A request leaves hardly any cycles behind, and
#: at the default (700 to 2,000, by the release of Python) a busy process was measured to spend a fifth of its time on
#: looking. So many take a few MB.
_YOUNGEST = 50_000


def spare_what_is_here() -> None:
    """Call it once a process is ready to serve: what it has by then, it keeps.

    All that was imported and opened is collected once and then left out of every later collection, and collections are
    made less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNGEST, *gc.get_threshold()[1:])
