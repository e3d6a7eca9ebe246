"""Settings: a process that cannot work says so at start, in one line that names the setting."""

from __future__ import annotations

import pytest

from shared.errors import SettingsError
from shared.settings import ApiKey, Role, load_settings, settings_or_exit

GOOD = {
    "FAIRLANE_DATABASE_URL": "postgres://u@h/db",
    "FAIRLANE_REDIS_URL": "redis://h:6379/0",
    "FAIRLANE_API_KEYS": "web:s1:shop, web:s2:shop,ops:s3:admin",
}


@pytest.fixture(autouse=True)
def good_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)


def test_defaults_and_parsing() -> None:
    settings = load_settings("api_keys")
    assert settings.database_url == "postgresql+psycopg://u@h/db"
    assert settings.celery_broker_url == settings.redis_url
    assert settings.lanes == 16
    assert settings.api_keys == (
        ApiKey("web", "s1", Role.SHOP),
        ApiKey("web", "s2", Role.SHOP),
        ApiKey("ops", "s3", Role.ADMIN),
    )


def test_secrets_are_not_shown() -> None:
    shown = repr(load_settings()) + repr(load_settings().api_keys)
    assert "s1" not in shown
    assert "u@h" not in shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://h/db"),
        ("DATABASE_URL", ""),
        ("DATABASE_URL", "postgresql://u:p@h:abc/db"),
        ("REDIS_URL", "redis://h:abc/0"),
        ("REDIS_URL", "redis://"),
        ("REDIS_URL", "unix:///run/redis.sock"),
        ("PAYMENT_URL", "http://"),
        ("LOCK_TIMEOUT", "0.0001"),
        ("REDIS_TIMEOUT", "30"),
        ("REDIS_URL", "http://h"),
        ("BROKER_URL", "amqp://h"),
        ("PAYMENT_URL", "provider.example"),
        ("API_KEYS", "web:s1"),
        ("API_KEYS", "web:s1:root"),
        ("API_KEYS", "a:same:shop,b:same:shop"),
        ("LANES", "0"),
        ("LANES", "sixteen"),
        ("DELIVERY", "post"),
        ("PORT", "70000"),
        ("CALL_TIMEOUT", "0"),
        ("CALL_TIMEOUT", "inf"),
        ("CHARGE_LOCK_TTL", "20"),
        ("FLOWER_AUTH", "ops:"),
        ("CLIENT_RATE", "0"),
        ("CUSTOMER_BURST", "5"),
    ],
)
def test_an_impossible_setting_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"FAIRLANE_{name}", value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    assert f"FAIRLANE_{name}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not value or "same" not in str(error.value)


def test_a_setting_that_a_process_needs_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        settings_or_exit("payment_url")
    assert end.value.code == "fairlane: FAIRLANE_PAYMENT_URL: is not set"


def test_the_lock_must_outlast_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLANE_CALL_TIMEOUT", "25")
    with pytest.raises(SettingsError, match="FAIRLANE_CHARGE_LOCK_TTL"):
        load_settings()
