from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes.process import OwnedProcess, ProcessError, _end_session, session_members, wait_for
from tests.processes.procfile import ProcfileStack, shell_argv

# Says "up" when it is, and ends in order when asked to.
SERVER = """
import signal, sys
def end(*_):
    print("down", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
while True:
    signal.pause()
"""
# Has a child in another process group, as a pool may; neither listens to SIGTERM.
STUBBORN_FAMILY = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setpgid(0, 0)
    print("up", flush=True)
while True:
    signal.pause()
"""
BOUND = 20.0  # an interpreter starts in a tenth of a second; a busy machine may need many times that


def owned(code: str, log: Path) -> OwnedProcess:
    return OwnedProcess([sys.executable, "-c", code], log=log)


def up(process: OwnedProcess) -> OwnedProcess:
    return process.wait_ready(lambda: "up\n" in process.logs_of_run(), BOUND)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "process.log"


def test_stop_lets_it_end_in_order(log: Path) -> None:
    with owned(SERVER, log) as process:
        assert up(process).alive
        assert process.stop() == 7
        assert not process.alive
    assert process.logs() == "up\ndown\n"


def test_stop_kills_a_whole_family_that_does_not_listen(log: Path) -> None:
    with owned(STUBBORN_FAMILY, log) as process:
        up(process)
        assert len(session_members(process.pid)) == 2
        assert process.stop(bound=0.1) == -signal.SIGKILL
        assert session_members(process.pid) == []


def test_kill_reaches_another_process_group_and_may_be_repeated(log: Path) -> None:
    with owned(STUBBORN_FAMILY, log) as process:
        up(process)
        assert process.kill() == process.kill() == -signal.SIGKILL
        assert session_members(process.pid) == []


def test_children_of_a_dead_parent_are_ended_by_kill(log: Path) -> None:
    with owned(STUBBORN_FAMILY, log) as process:
        up(process)
        process.send_signal(signal.SIGKILL)
        assert wait_for(lambda: not process.alive, BOUND)
        assert len(session_members(process.pid)) == 1
        process.kill()
        assert session_members(process.pid) == []


def test_restart_is_another_run_in_the_same_log(log: Path) -> None:
    with owned(SERVER, log) as process:
        first = up(process).pid
        up(process.restart())
        assert process.pid != first
        assert process.logs() == "up\ndown\nup\n"
        assert process.logs_of_run() == "up\n"
        process.kill()
        assert up(process.restart()).alive


def test_a_running_process_is_not_started_twice(log: Path) -> None:
    with owned(SERVER, log) as process, pytest.raises(ProcessError, match="already running"):
        process.start()


def test_paused_it_lives_and_does_nothing_until_resumed(log: Path) -> None:
    with owned(SERVER, log) as process:
        up(process).pause()
        assert process.alive
        assert process.paused
        process.send_signal(signal.SIGTERM)
        assert "down" not in process.logs()
        process.resume()
        assert process.wait_exit(BOUND) == 7


def test_a_paused_process_can_be_stopped_in_order(log: Path) -> None:
    with owned(SERVER, log) as process:
        up(process).pause()
        assert process.stop(BOUND) == 7


def test_waiting_for_a_process_that_exits_tells_why(log: Path) -> None:
    process = owned("raise SystemExit('no such setting')", log)
    with process, pytest.raises(ProcessError, match=r"(?s)exited before it was ready.*no such setting"):
        process.wait_ready(lambda: False, BOUND)


def test_waiting_is_bounded(log: Path) -> None:
    with owned(SERVER, log) as process, pytest.raises(ProcessError, match=r"not ready within 0\.1 s"):
        process.wait_ready(lambda: False, 0.1)


def test_nothing_is_left_when_the_test_fails(log: Path) -> None:
    process = owned(SERVER, log)

    def failing() -> None:
        with process:
            up(process)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert session_members(process.pid) == []


def test_a_forgotten_process_ends_with_its_object(log: Path) -> None:
    pid = up(owned(STUBBORN_FAMILY, log).start()).pid
    gc.collect()
    assert session_members(pid) == []


def test_a_forgotten_process_ends_with_the_interpreter(log: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tests.processes.process import OwnedProcess
process = OwnedProcess([sys.executable, "-c", {STUBBORN_FAMILY!r}], log=Path({str(log)!r})).start()
process.wait_ready(lambda: "up" in process.logs())
print(process.pid)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True, timeout=60)
    assert session_members(int(done.stdout)) == []


def test_settings_of_the_shell_do_not_reach_it(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLANE_LANES", "3")
    code = "import os; print(os.environ.get('FAIRLANE_LANES'), os.environ['FAIRLANE_PORT'])"
    process = OwnedProcess([sys.executable, "-c", code], log=log, env={"FAIRLANE_PORT": "1"})
    with process:
        assert process.wait_exit(BOUND) == 0
    assert process.logs() == "None 1\n"


def test_procfile_lines_are_expanded_and_restarted_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    procfile = tmp_path / "Procfile"
    procfile.write_text(
        "release: echo migrated ${PLACE:-here}\n"
        "broken: false\n"
        "web: python server.py --port $PORT\n"
        "sweep: MODE=quiet python server.py\n"
    )
    with ProcfileStack(procfile, env={"PORT": "81"}, logs=tmp_path / "logs", lines=("web",)) as stack:
        assert stack.run("release", bound=BOUND) == "migrated here\n"
        with pytest.raises(ProcessError, match="exited with 1"):
            stack.run("broken", bound=BOUND)
        stack.start("sweep")
        stack.start("web", name="web.2", env={"PORT": "82"})
        assert list(stack) == ["web", "sweep", "web.2"]
        for process in stack.values():
            up(process)
        assert len(session_members(stack["web"].pid)) == 1  # the program itself, no shell before it
        sweep = stack["sweep"].pid
        assert psutil.Process(stack["web.2"].pid).cmdline()[-1] == "82"
        stack["web"].kill()
        up(stack["web"].restart())
        assert stack["sweep"].alive
        assert stack["sweep"].pid == sweep
        pids = [process.pid for process in stack.values()]
    assert [member for pid in pids for member in session_members(pid)] == []
    assert stack["sweep"].exit_code == 7


def test_a_line_of_several_commands_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one command"):
        shell_argv("fairlane migrate && python -m producers")


def test_a_fork_of_the_test_run_ends_nothing(log: Path) -> None:
    with owned(SERVER, log) as process:
        up(process)
        _end_session(process._started(), owner=os.getppid())
        assert process.alive
