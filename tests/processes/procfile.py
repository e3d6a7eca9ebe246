"""The lines of a Procfile, each as an owned process.

with ProcfileStack(root / "Procfile", env=settings, logs=tmp_path, lines=("lanes", "charges")) as stack:
    stack.start("web", env={"PORT": "8123"})
    stack.start("lanes", name="lanes.2")
    stack["lanes"].kill()
    stack["lanes"].restart()
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from honcho.environ import parse_procfile

from tests.processes.process import STOP_SECONDS, OwnedProcess, ProcessError


class ProcfileStack(Mapping[str, OwnedProcess]):
    """Processes by name, started from the Procfile's lines in the Procfile's directory.

    `env` is given to every line. Each process logs to ``<logs>/<name>.log``. `lines` are started on entering
    the context; on leaving it all processes are asked to stop at once, and then ended.
    """

    def __init__(self, procfile: Path, *, env: Mapping[str, str], logs: Path, lines: Iterable[str] = ()) -> None:
        self.commands: dict[str, str] = dict(parse_procfile(procfile.read_text()).processes)
        self._directory = procfile.resolve().parent
        self._env = dict(env)
        self._logs = logs
        self._lines = tuple(lines)
        self._processes: dict[str, OwnedProcess] = {}

    def start(self, line: str, *, name: str | None = None, env: Mapping[str, str] | None = None) -> OwnedProcess:
        """Start a line as `name` (the line's own by default; another name is a second process of it).

        `env` is added to the stack's. Raises KeyError for a line the Procfile lacks, ProcessError for a name
        in use.
        """
        name = name or line
        if name in self._processes:
            raise ProcessError(f"{name} was already started: restart it, or give the second one a name")
        process = OwnedProcess(
            shell_argv(self.commands[line]),
            log=self._logs / f"{name}.log",
            env=self._env | dict(env or {}),
            cwd=self._directory,
            name=name,
        )
        self._processes[name] = process
        return process.start()

    def run(self, line: str, *, bound: float) -> str:
        """Run a line that ends by itself (``release``); returns its output.

        Raises ProcessError when it takes longer than `bound` seconds or its exit code is not 0.
        """
        with self.start(line) as process:
            code = process.wait_exit(bound)
        del self._processes[line]
        if code != 0:
            raise ProcessError(f"{line} exited with {code}:\n{process.logs_of_run()}")
        return process.logs_of_run()

    def stop(self, bound: float = STOP_SECONDS) -> None:
        """Stop every process, the last started first. They end side by side: the slowest sets the wait."""
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            process.finish(bound)

    def __enter__(self) -> Self:
        try:
            for line in self._lines:
                self.start(line)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __getitem__(self, name: str) -> OwnedProcess:
        return self._processes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._processes)

    def __len__(self) -> int:
        return len(self._processes)


def shell_argv(line: str) -> list[str]:
    """The shell command that runs a Procfile line in place of the shell itself.

    A shell expands ``$PORT`` and ``${NAME:-default}``. It then becomes the program (``exec``), so that the
    process id and the signals are the program's; ``env`` takes the assignments a line may begin with. Raises
    ValueError for a line of several commands, which ``exec`` would cut after the first.
    """
    tokens = shlex.shlex(line, posix=True, punctuation_chars=True)
    if any(token and set(token) <= set(";&|") for token in tokens):
        raise ValueError(f"a Procfile line must be one command: {line}")
    return ["/bin/sh", "-c", f"exec env {line}"]
