"""Real Postgres and Valkey servers from wheels, owned by this process, for dev, demo and tests.

```python
with EmbeddedServers(Path(".fairlane")) as servers:
    subprocess.run(command, env=os.environ | servers.environment())
```

Everything lies below the given folder: `postgres/` and `valkey/`, each with `data/`, a log, a record of the
last start and a lock file. The data stays from run to run. The servers listen on 127.0.0.1 only. See
`server` for how they live and end, `unprivileged` for what happens when the user is root.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from ops.embedded.errors import EmbeddedError, EmbeddedNotInstalled
from ops.embedded.postgres import EmbeddedPostgres
from ops.embedded.valkey import EmbeddedValkey

__all__ = ["EmbeddedError", "EmbeddedNotInstalled", "EmbeddedPostgres", "EmbeddedServers", "EmbeddedValkey"]


class EmbeddedServers:
    """Both servers, with their data below `directory`. A context manager: starts both, stops both."""

    def __init__(self, directory: Path) -> None:
        self.postgres = EmbeddedPostgres(directory / "postgres")
        self.valkey = EmbeddedValkey(directory / "valkey")

    def start(self) -> None:
        """Start both, or none: when one fails, the other is stopped and the error raised."""
        try:
            self.valkey.start()
            self.postgres.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop both, Postgres last: it is the truth. A failure to stop one does not spare the other."""
        with ExitStack() as last_first:
            last_first.callback(self.postgres.stop)
            last_first.callback(self.valkey.stop)

    def environment(self) -> dict[str, str]:
        """Return the settings by which processes find the servers; EmbeddedError before the first start."""
        return {"FAIRLANE_DATABASE_URL": self.postgres.url, "FAIRLANE_REDIS_URL": self.valkey.url}

    def __enter__(self) -> EmbeddedServers:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
