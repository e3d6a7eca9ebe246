"""Both signals end a command in order, also one that a script started in the background."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.processes.process import OwnedProcess

COMMAND = """
import time
from ops.interruption import orderly_end
with orderly_end() as interruption:
    try:
        print("waiting", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("put away", flush=True)
        raise SystemExit(interruption.code)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("ignored", ["", "trap '' INT; "], ids=["foreground", "background"])
def test_it_ends_in_order(tmp_path: Path, project_root: Path, number: int, code: int, ignored: str) -> None:
    argv = ["/bin/sh", "-c", f'{ignored}exec "$0" -c "$1"', sys.executable, COMMAND]
    with OwnedProcess(argv, log=tmp_path / "command.log", cwd=project_root) as process:
        process.wait_ready(lambda: "waiting" in process.logs(), 30)
        process.send_signal(number)
        assert process.wait_exit(30) == code
        assert "put away" in process.logs()
