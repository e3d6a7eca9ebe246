"""The errors Fairlane raises. The docstring is the message unless one is given."""

from __future__ import annotations


class FairlaneError(Exception):
    """Something in Fairlane went wrong."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class SettingsError(FairlaneError):
    """A setting is missing or cannot work. The message is one line and names it."""


class LanesMismatchError(SettingsError):
    """The database was laid out for another number of lanes."""


class UnavailableError(FairlaneError):
    """A part that is needed for a safe answer did not answer."""


class QueueFullError(UnavailableError):
    """More is waiting than can be worked off in time."""


class StockBelowCommittedError(FairlaneError):
    """The new stock is less than what is already held or sold."""


class ItemChangedError(FairlaneError):
    """The item is not, or no longer, the one that was to be changed."""
