"""A transcript in a Markdown file, and the shell that shows whether it still tells the truth.

The transcript stands between two comments, in a fenced block of any language:

    <!-- transcript:begin -->
    ```console
    $ curl -s http://127.0.0.1:8000/healthz
    {"status":"ok"}
    ```
    <!-- transcript:end -->

- A line that begins with `$ ` is a command. It goes on in the next line after a backslash at its end; a `> ` at the
  beginning of that line is a prompt and not part of it. Commands run in one bash, so variables live on.
- The other lines are what the command prints, both outputs together. `…` stands for any text in a line; a line of `…`
  alone stands for any lines, or none. Empty lines and white space at the end of a line do not count.
- A command that only asks is repeated, for a bounded time, until it prints what is expected.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

BEGIN = "<!-- transcript:begin -->"
END = "<!-- transcript:end -->"
ANYTHING = "…"

#: A purchase is final long before, and a person would have given up as well.
REPEAT_WITHIN = 30.0
REPEAT_EVERY = 0.2

#: Options by which curl sends something: such a command is run once only.
_SENDS = re.compile(r"\s(-X|--request|-d|--data\S*|--json|-F|--form|-T|--upload-file)\b")


class TranscriptError(AssertionError):
    """The file has no transcript, or what it shows is not what happens."""


@dataclass(frozen=True)
class Step:
    """A command, the lines it is to print, and the line of the file that it stands in."""

    line: int
    command: str
    expected: tuple[str, ...]

    @property
    def only_asks(self) -> bool:
        """Whether running it again changes nothing."""
        return _SENDS.search(self.command) is None


def read_transcript(text: str, name: str = "README.md") -> list[Step]:
    """The steps of every transcript in this text. Raises TranscriptError when there is none."""
    steps: list[Step] = []
    inside = fenced = continued = False
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.rstrip()
        if line.strip() in (BEGIN, END):
            inside, fenced, continued = line.strip() == BEGIN, False, False
        elif inside and line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced and continued:
            last = steps[-1]
            steps[-1] = Step(last.line, f"{last.command}\n{line.removeprefix('> ')}", ())
            continued = line.endswith("\\")
        elif fenced and line.startswith("$ "):
            steps.append(Step(number, line.removeprefix("$ "), ()))
            continued = line.endswith("\\")
        elif fenced and line and not steps:
            raise TranscriptError(f"{name}:{number}: the transcript begins with no command: {line}")
        elif fenced and line:
            last = steps[-1]
            steps[-1] = Step(last.line, last.command, (*last.expected, line))
    if not steps:
        raise TranscriptError(f"{name} has no commands in a fenced block between {BEGIN} and {END}")
    return steps


def printed(output: str) -> list[str]:
    """The lines of an output that count."""
    return [line.rstrip() for line in output.splitlines() if line.strip()]


def matches(expected: Sequence[str], output: str) -> bool:
    """Whether the output is what is expected."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == ANYTHING else ".*?".join(map(re.escape, line.split(ANYTHING))) + r"\n"
        for line in expected
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in printed(output))) is not None


class Shell:
    """One bash for all commands of a transcript, in `directory`; a context manager."""

    _END = "--end-of-command--"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> Self:
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._directory,
            start_new_session=True,
        )
        return self

    def run(self, command: str) -> str:
        """Run it and return what it printed, on both outputs."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        # The command reads nothing of what is written after it.
        self._bash.stdin.write(f"{{ {command}\n}} </dev/null\nprintf '\\n%s\\n' {self._END}\n")
        self._bash.stdin.flush()
        lines: list[str] = []
        for line in self._bash.stdout:
            if line.strip() == self._END:
                return "".join(lines)
            lines.append(line)
        raise TranscriptError(f"the shell ended at: {command}\n{''.join(lines)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bash.kill()
        self._bash.communicate()


def play(steps: Sequence[Step], directory: Path, name: str = "README.md") -> None:
    """Run the steps in order, in this directory. Raises TranscriptError at the first that prints something else."""
    with Shell(directory) as shell:
        for step in steps:
            deadline = time.monotonic() + REPEAT_WITHIN
            while not matches(step.expected, output := shell.run(step.command)):
                if not step.only_asks or time.monotonic() > deadline:
                    raise TranscriptError(_difference(step, output, name))
                time.sleep(REPEAT_EVERY)


def _difference(step: Step, output: str, name: str) -> str:
    expected = "\n".join(f"  | {line}" for line in step.expected) or "  (nothing)"
    got = "\n".join(f"  | {line}" for line in printed(output)) or "  (nothing)"
    repeated = f", also after {REPEAT_WITHIN:g} s" if step.only_asks else ""
    return (
        f"{name}:{step.line}: this command does not print what the transcript says{repeated}\n"
        f"  $ {step.command}\nexpected ({ANYTHING} matches anything):\n{expected}\nprinted:\n{got}"
    )
