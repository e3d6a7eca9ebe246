"""Flower's settings: the Procfile's flower line names this file. Nothing imports it.

Flower runs it and takes every name that is one of its options. What is set here wins over `FLOWER_*` in the
environment, so that the password and read-only cannot be switched off by accident. The password never stands
on a command line, where `ps` would show it.
"""

from __future__ import annotations

from shared.settings import settings_or_exit

_settings = settings_or_exit("flower_auth")

basic_auth = [_settings.flower_auth]
address = _settings.flower_host
port = _settings.flower_port

# Flower shows; it does not steer: revoking a task or stopping a worker is nobody's click.
read_only = True

# Claim checks carry lanes and counts, never a purchase's data, so arguments and results may be shown.
tasks_columns = "name,uuid,state,args,kwargs,result,received,runtime,worker"

# An hour of claim checks at ten a second; the default, 100,000, only costs memory.
max_tasks = 36_000
