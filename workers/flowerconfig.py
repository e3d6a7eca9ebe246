"""Flower's settings: the Procfile's flower line names this file. Nothing imports it.

Flower runs it and takes every name that is one of its options. What is set here wins over `FLOWER_*` in the
environment, so that the password and read-only cannot be switched off by accident. The password never stands
on a command line, where `ps` would show it.

    FAIRLANE_FLOWER_AUTH  user:password, required; printable ASCII
    FAIRLANE_FLOWER_HOST  address to listen on; 127.0.0.1 unless set
    FAIRLANE_FLOWER_PORT  1-65535; 5555 unless set
"""

from __future__ import annotations

import os


def _credentials(text: str) -> str:
    user, colon, password = text.partition(":")
    if not (user and colon and password and text.isascii() and text.isprintable()):
        raise SystemExit('FAIRLANE_FLOWER_AUTH must be "user:password", both given, in printable ASCII')
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise SystemExit(f"FAIRLANE_FLOWER_PORT must be a port from 1 to 65535, not {text!r}")
    return int(text)


basic_auth = [_credentials(os.environ.get("FAIRLANE_FLOWER_AUTH", ""))]
address = os.environ.get("FAIRLANE_FLOWER_HOST") or "127.0.0.1"
port = _port(os.environ.get("FAIRLANE_FLOWER_PORT") or "5555")

# Flower shows; it does not steer: revoking a task or stopping a worker is nobody's click.
read_only = True

# Claim checks carry lanes and counts, never a purchase's data, so arguments and results may be shown.
tasks_columns = "name,uuid,state,args,kwargs,result,received,runtime,worker"

# An hour of claim checks at ten a second; the default, 100,000, only costs memory.
max_tasks = 36_000
