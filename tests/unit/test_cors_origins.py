"""`FAIRLANE_CORS_ORIGINS`: exact origins, as browsers send them."""

from __future__ import annotations

import pytest

from shared.errors import SettingsError
from shared.settings import load_settings


@pytest.fixture(autouse=True)
def _other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLANE_DATABASE_URL", "postgresql://fairlane@127.0.0.1/fairlane")
    monkeypatch.setenv("FAIRLANE_REDIS_URL", "redis://127.0.0.1/0")


def test_there_are_none_by_default() -> None:
    assert load_settings().cors_origins == ()


def test_several_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLANE_CORS_ORIGINS", "https://shop.example, http://localhost:5173,https://[::1]:8443,")
    assert load_settings().cors_origins == ("https://shop.example", "http://localhost:5173", "https://[::1]:8443")


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "shop.example",
        "https://shop.example/",
        "https://Shop.example",
        "https://*.example",
        "ftp://a.example",
    ],
)
def test_what_no_browser_sends_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    monkeypatch.setenv("FAIRLANE_CORS_ORIGINS", f"https://shop.example,{origin}")
    with pytest.raises(SettingsError, match=r"^FAIRLANE_CORS_ORIGINS: .* is not an origin"):
        load_settings()
