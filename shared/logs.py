"""One line of JSON per event on stderr, the same for every process of Fairlane."""

from __future__ import annotations

import logging
import sys
from contextvars import Context, copy_context

import structlog


def configure_logging(level: int = logging.INFO) -> None:
    """Send structlog's events to stderr as JSON, one line each. Called once, at a process's start."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        # Not cached: a test in the same process must see what is logged, and we log little.
        cache_logger_on_first_use=False,
    )


def nobodys_context() -> Context:
    """For a task that works for many requests: its log lines go by the id of none, not by that of the first."""
    context = copy_context()
    context.run(structlog.contextvars.clear_contextvars)
    return context
