"""Every setting of Fairlane, read once per process from the environment (prefix `FAIRLANE_`) and passed down.

Durations are in seconds. Each has beside it why its number is what it is. `load_settings` is the only reader of the
environment; it fails with one line that names the setting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from shared.errors import SettingsError

PREFIX = "FAIRLANE_"


class Delivery(StrEnum):
    """What one Celery message stands for."""

    LANE = "lane"  #: a lane has work; repeated calls are coalesced
    PURCHASE = "purchase"  #: one purchase, task id = purchase id; slower, each one visible in Flower


class NotChargedPolicy(StrEnum):
    """What becomes of a purchase whose call never reached the provider."""

    RETRY = "retry"  #: another attempt, up to `NEVER_CHARGED_LIMIT` of them, then declined
    DECLINE = "decline"  #: declined at once


class Role(StrEnum):
    """What an API key may do."""

    SHOP = "shop"  #: buy, and see its own purchases
    ADMIN = "admin"  #: also create and change items


#: Scheme, host in lower case and port, nothing after it. No `*`: a status is for the buyer's own shop.
_ORIGIN = re.compile(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One caller of the API. `name` scopes its idempotency keys and owns its purchases."""

    name: str
    secret: str = field(repr=False)
    role: Role


def parse_api_key(entry: str, place: str) -> ApiKey:
    """`name:secret:role` as a key. Raises ValueError, which names the place of the entry."""
    match entry.split(":"):
        case [name, secret, role] if name and secret and role in set(Role):
            return ApiKey(name, secret, Role(role))
        case _:
            # The entry itself is not repeated: it holds a secret.
            raise ValueError(f"{place} is not name:secret:role with the role shop or admin")


def _parse_api_keys(value: Any) -> Any:
    """`name:secret:role,…` as keys. One name may come twice, with two secrets, while a secret is being replaced."""
    if not isinstance(value, str):
        return value
    entries = filter(None, (part.strip() for part in value.split(",")))
    keys = tuple(parse_api_key(entry, f"entry {place}") for place, entry in enumerate(entries, start=1))
    if len({key.secret for key in keys}) != len(keys):
        raise ValueError("two entries share one secret")
    return keys


def _parse_origins(value: Any) -> Any:
    """`https://shop.example,…` as origins, each exactly as a browser sends it."""
    if not isinstance(value, str):
        return value
    origins = tuple(filter(None, (part.strip() for part in value.split(","))))
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin[:100]!r} is not an origin like https://shop.example")
    return origins


def _postgres_url(value: Any) -> Any:
    """Any common spelling of a Postgres URL, as SQLAlchemy needs it for psycopg 3."""
    if not isinstance(value, str):
        return value
    scheme, separator, rest = value.partition("://")
    if not separator or scheme not in {"postgres", "postgresql", "postgresql+psycopg"}:
        raise ValueError("is not a postgresql:// URL")
    url = f"postgresql+psycopg://{rest}"
    try:
        make_url(url)
    except (ArgumentError, ValueError):
        # Its text would repeat the URL, password and all.
        raise ValueError("is not a postgresql:// URL that can be read") from None
    return url


def _redis_url(value: Any) -> Any:
    # Not unix://, which Celery does not speak.
    if isinstance(value, str) and not _has_host(value, {"redis", "rediss"}):
        raise ValueError("is not a redis:// URL with a host")
    return value


def _has_host(url: str, schemes: set[str]) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in schemes and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _http_url(value: Any) -> Any:
    if isinstance(value, str) and not _has_host(value, {"http", "https"}):
        raise ValueError("is not an http:// or https:// URL with a host")
    return value.rstrip("/") if isinstance(value, str) else value


#: A millisecond at least: Postgres and Redis count in those, and to Postgres a timeout of 0 means none.
Seconds = Annotated[float, Field(ge=0.001, le=86_400)]
RedisUrl = Annotated[str, BeforeValidator(_redis_url)]
#: Requests a second: from one in a quarter of an hour to far more than one installation answers.
Rate = Annotated[float, Field(ge=0.001, le=1_000_000)]
#: Requests at once. An empty bucket of the largest burst and the lowest rate is full after three years, which is still
#: an exact number of microseconds in Lua.
Burst = Annotated[int, Field(ge=1, le=100_000)]


class Settings(BaseSettings):
    """One process's settings: frozen, complete and checked against each other."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    database_url: Annotated[str, BeforeValidator(_postgres_url)] = Field(repr=False)
    redis_url: RedisUrl = Field(repr=False)
    #: Celery's broker; by default the same Redis.
    broker_url: RedisUrl | None = Field(default=None, repr=False)
    #: Base URL of the payment provider; needed by the charge workers and the audit.
    payment_url: Annotated[str, BeforeValidator(_http_url)] | None = None
    #: Which gateway speaks to the provider: a name in the entry point group `fairlane.gateways`.
    gateway: str = "http"
    #: Who may call the API: `name:secret:role,…`; needed by the web process.
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(_parse_api_keys)] = ()
    #: More keys, or all of them: a file with a `name:secret:role` per line, read again when it changes.
    api_keys_file: Path | None = None
    #: Origins whose scripts may read the public status of a purchase (`/v1/status`), separated by commas.
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_origins)] = ()
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    #: Whether the API process writes a line per request to standard output.
    access_log: bool = True

    # Connections of clients
    #: Connections that one API process serves at once; more are answered 503. By default 10,000, or what the process
    #: may open files for.
    connections: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    #: From the first byte of a request to its last: the largest has 16 KiB, which a weak mobile connection carries in
    #: a second or two.
    request_within: Seconds = 10
    #: An idle connection is kept for longer than load balancers keep theirs (60 s as a rule), so that none sends a
    #: request into a connection that is just being closed.
    keep_alive: Seconds = 65

    #: Partitions of the items. Stored in the database; 16 keeps 16 cores busy and a sweep of all lanes cheap.
    lanes: Annotated[int, Field(ge=1, le=100)] = 16
    delivery: Delivery = Delivery.LANE

    # Accepting
    #: Purchases in one commit. 200 were measured to insert at 32,000 a second; more adds latency, not rate.
    accept_batch: Annotated[int, Field(ge=1, le=1_000)] = 200
    #: Requests waiting for a commit per process. At 10,000 a second the last of them waits about a second.
    accept_queue: Annotated[int, Field(ge=1)] = 10_000
    #: How long an idempotency key is remembered in Redis. Most retries come within minutes; Postgres knows the rest.
    key_seen_ttl: Seconds = 300
    #: Life of a door record: as long as the door may work with a count that nobody refreshed.
    door_ttl: Seconds = 5

    # Rates of POST /v1/purchases, off until set: what is right depends on the shop, and a wrong limit refuses buyers.
    #: Requests a second of one client (an API key's name) in the long run, by all API processes together.
    client_rate: Rate | None = None
    #: How many of them may come at once after a rest; by default what comes in a second.
    client_burst: Burst | None = None
    #: The same for one customer of a client.
    customer_rate: Rate | None = None
    customer_burst: Burst | None = None
    #: The same for everybody together: what Postgres is known to take. More is told to come again (503).
    total_rate: Rate | None = None
    total_burst: Burst | None = None

    # Deciding
    #: Purchases in one decision, which holds its lane's and its items' locks for some 60 ms. A long line is decided a
    #: fifth faster than by batches of 500, and a fifth slower than by 2,000, in whose time outcomes would wait longer.
    decide_batch: Annotated[int, Field(ge=1, le=5_000)] = 1_000
    #: A lane gives way after this long, so that hot lanes starve nobody.
    decide_slice: Seconds = 0.25
    #: A called lane is not called again for this long; also how long a lost call can go unrepeated.
    called_ttl: Seconds = 2
    #: A worker process that is at one lane for this long waits for a server that does not answer; it is replaced.
    #: Healthy ones give way after their slice, and what the server can end is ended by the timeouts below.
    decide_limit: Annotated[int, Field(ge=1, le=3_600)] = 30
    #: How long a decision waits for its lane's lock: longer than any healthy batch, shorter than a person notices.
    lock_timeout: Seconds = 1
    #: Postgres ends a transaction whose process stopped in the middle of it after this long.
    idle_in_transaction_timeout: Seconds = 2
    #: No statement of ours runs for seconds; one that does is stuck.
    statement_timeout: Seconds = 10
    #: A process that holds a connection for this long is waiting for a server that does not answer (frozen, or behind a
    #: network that lets nothing through), and hangs up. Longer than a stuck statement, which the server ends itself.
    connection_timeout: Seconds = 15

    # Charging
    #: Calls under way at once per charge process, from claim to record. A slot is taken for about five payments of
    #: 50 ms when the process is busy, so 512 are what one core can keep going: with 256 it made two thirds of the
    #: charges, with 768 no more.
    charge_slots: Annotated[int, Field(ge=1, le=2_000)] = 512
    #: Deadline of one payment call: slower than any healthy gateway's p99.
    call_timeout: Seconds = 10
    #: A claimed call that has not been sent after this long is not sent at all.
    start_within: Seconds = 5
    #: Added to the call's deadline before it counts as overdue: clocks, garbage collection, a slow commit.
    call_margin: Seconds = 5
    #: Life of the narrow lock; must outlast start_within + call_timeout + call_margin.
    charge_lock_ttl: Seconds = 30
    #: Pause of claims after a call was provably not sent (lock not obtained, provider unreachable); doubled per
    #: attempt up to 64 times, with jitter.
    charge_retry: Seconds = 0.5

    #: After a call's deadline, how long a provider may need until "not found" means "never charged".
    settle_window: Seconds = 60
    #: How long a silent provider is asked about a purchase before an operator must look.
    doubt_patience: Seconds = 3_600
    #: What becomes of a purchase that was never charged: another attempt, or declined at once.
    not_charged: NotChargedPolicy = NotChargedPolicy.RETRY
    #: After so many attempts that the provider knows nothing of it is declined. With 2, a worker that dies after its
    #: claim and another fault soon after cost winners their purchase (seen under random faults); each further attempt
    #: takes more than a minute and adds the small risk that a provider executes an older one later still.
    never_charged_limit: Annotated[int, Field(ge=1, le=100)] = 5

    #: How long stock is held for a purchase that is not paid, unless the item says otherwise: a quarter of an hour
    #: outlasts a provider's outage of minutes and does not hold a sale up for long.
    hold_seconds: Annotated[int, Field(ge=1, le=86_400)] = 900

    # Statuses
    #: Life of a status in Redis; Postgres answers after it.
    status_ttl: Seconds = 3_600
    #: A status that may still change is believed for this long; then Postgres is asked.
    status_fresh: Seconds = 2

    # Parts
    #: The sweep repeats after this long: a lost call costs a purchase half a second.
    sweep_every: Seconds = 0.5
    #: Redis answers in well under a millisecond; after this long it is down. Below idle_in_transaction_timeout, as a
    #: decision asks Redis once while it holds its lane.
    redis_timeout: Seconds = 1
    #: Connections to Postgres per process; a lane worker needs one, the API a few for its groups.
    database_pool: Annotated[int, Field(ge=1, le=100)] = 5
    #: Where Flower listens; only inside a container anywhere else than on loopback.
    flower_host: str = "127.0.0.1"
    #: Flower's login `user:password`.
    flower_auth: str | None = Field(default=None, repr=False)
    flower_port: Annotated[int, Field(ge=1, le=65_535)] = 5555

    @field_validator("flower_auth")
    @classmethod
    def _flower_auth_has_both_parts(cls, value: str | None) -> str | None:
        if value is not None and not (all(value.partition(":")) and value.isascii() and value.isprintable()):
            raise ValueError("is not user:password in printable ASCII")
        return value

    @model_validator(mode="after")
    def _a_burst_is_of_a_rate(self) -> Self:
        for whose in ("client", "customer", "total"):
            if getattr(self, f"{whose}_burst") is not None and getattr(self, f"{whose}_rate") is None:
                raise ValueError(f"{PREFIX}{whose.upper()}_BURST: needs {whose.upper()}_RATE")
        return self

    @model_validator(mode="after")
    def _lock_outlasts_the_call(self) -> Self:
        if self.charge_lock_ttl <= self.overdue_after:
            raise ValueError(
                f"{PREFIX}CHARGE_LOCK_TTL: {self.charge_lock_ttl:g} s does not outlast "
                f"START_WITHIN + CALL_TIMEOUT + CALL_MARGIN = {self.overdue_after:g} s"
            )
        return self

    @model_validator(mode="after")
    def _the_server_gives_up_before_the_client(self) -> Self:
        if self.statement_timeout >= self.connection_timeout:
            raise ValueError(
                f"{PREFIX}CONNECTION_TIMEOUT: {self.connection_timeout:g} s must be more than "
                f"STATEMENT_TIMEOUT = {self.statement_timeout:g} s"
            )
        return self

    @model_validator(mode="after")
    def _redis_answers_before_a_transaction_ends(self) -> Self:
        if self.redis_timeout >= self.idle_in_transaction_timeout:
            raise ValueError(
                f"{PREFIX}REDIS_TIMEOUT: {self.redis_timeout:g} s must be less than "
                f"IDLE_IN_TRANSACTION_TIMEOUT = {self.idle_in_transaction_timeout:g} s"
            )
        return self

    @property
    def overdue_after(self) -> float:
        """Seconds from the claim after which a call without an outcome is in doubt."""
        return self.start_within + self.call_timeout + self.call_margin

    @property
    def celery_broker_url(self) -> str:
        """Where Celery's messages go."""
        return self.broker_url or self.redis_url


#: Settings that another one can stand in for.
_INSTEAD: Final = {"api_keys": "api_keys_file"}


def load_settings(*needed: str) -> Settings:
    """The settings of this process.

    `needed` names optional settings that this process cannot do without (`"payment_url"`).
    Raises SettingsError with one line naming the first setting that is missing or cannot work.
    """
    try:
        settings = Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise SettingsError(message) from None
        name = f"{PREFIX}{str(first['loc'][0]).upper()}"
        raise SettingsError(f"{name}: {'is not set' if first['type'] == 'missing' else message}") from None
    for name in needed:
        if not getattr(settings, name) and not getattr(settings, _INSTEAD.get(name, name)):
            raise SettingsError(f"{PREFIX}{name.upper()}: is not set")
    return settings


def settings_or_exit(*needed: str) -> Settings:
    """`load_settings` for a process's start: an error ends the process with its one line on stderr."""
    try:
        return load_settings(*needed)
    except SettingsError as error:
        raise SystemExit(f"fairlane: {error}") from None
