"""Gateways by name, from the entry point group `fairlane.gateways`.

A package offers one in its `pyproject.toml`:

    [project.entry-points."fairlane.gateways"]
    acme = "acme_fairlane:AcmeGateway"
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol, cast

from shared.errors import SettingsError
from workers.gateways.outcomes import Gateway

ENTRY_POINT_GROUP = "fairlane.gateways"


class GatewayFactory(Protocol):
    """What an entry point must lead to: a class or function called like this, with or without a loop."""

    def __call__(self, url: str, *, call_timeout: float, connections: int) -> Gateway:
        """A gateway to the provider at `url`. Units: see `HttpGateway`. `ValueError` for what cannot work."""


def load_gateway(name: str, *, url: str, call_timeout: float, connections: int) -> Gateway:
    """The gateway of this name, ready for use.

    Raises `SettingsError` when no installed package offers it, when two do, when it cannot be imported, or
    when it refuses the address or the numbers.
    """
    offered = entry_points(group=ENTRY_POINT_GROUP)
    named = {point.value: point for point in offered if point.name == name}
    if len(named) != 1:
        known = ", ".join(sorted({point.name for point in offered})) or "none"
        problem = "offered twice" if named else "not installed"
        raise SettingsError(f"FAIRLANE_GATEWAY: payment gateway {name!r} is {problem}; installed: {known}")
    (point,) = named.values()
    try:
        factory = cast(GatewayFactory, point.load())
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"FAIRLANE_GATEWAY: payment gateway {name!r} ({point.value}) cannot be loaded: {error}"
        ) from error
    try:
        return factory(url, call_timeout=call_timeout, connections=connections)
    except ValueError as error:
        raise SettingsError(f"FAIRLANE_PAYMENT_URL: payment gateway {name!r} refuses it: {error}") from error
