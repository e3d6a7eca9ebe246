"""Small calls of the API for its tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

SHOP = {"Authorization": "Bearer shop-secret"}
ADMIN = {"Authorization": "Bearer admin-secret"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: CIMultiDictProxy[str]
    text: str
    json: Any


async def call(
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    json: object = None,
    data: object = None,
) -> Answer:
    """One request on its own connection; the path is sent as it is written."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        session.request(
            method, URL(url, encoded=True), headers=headers, json=json, data=data, allow_redirects=False
        ) as reply,
    ):
        text = await reply.text()
        parsed = await reply.json(content_type=None) if "json" in reply.content_type else None
        return Answer(reply.status, reply.headers, text, parsed)


def assert_problem(answer: Answer, status: int, slug: str) -> None:
    """That this is a complete problem of this kind."""
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json"), answer.text
    assert answer.json["type"] == f"/problems/{slug}"
    assert answer.json["status"] == status
    assert answer.json["title"]
    assert answer.json["detail"]


def fields(answer: Answer) -> set[str]:
    """The fields a malformed request was told of."""
    return {error["field"] for error in answer.json["errors"]}
