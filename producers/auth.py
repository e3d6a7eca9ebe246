"""Who is calling: API keys and their roles.

A key is found by its digest, made with a secret that is new in every process. Looking a digest up takes a time that
depends on the digest, but no caller knows the digest of any text, nor can move towards one: the time says nothing about
the keys. One lookup costs the same for one key and for a thousand.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

from starlette.requests import Request

from producers.problems import FORBIDDEN, UNAUTHORIZED, Problem
from shared.settings import ApiKey, Role

_CHALLENGE: Final = {"WWW-Authenticate": 'Bearer realm="fairlane"'}
_CHALLENGE_INVALID: Final = {"WWW-Authenticate": 'Bearer realm="fairlane", error="invalid_token"'}


class Authenticator:
    """Tells callers by the keys of one process. A client may have two keys at once, while one is being replaced."""

    def __init__(self, api_keys: Iterable[ApiKey]) -> None:
        self._pepper = secrets.token_bytes(32)
        self.replace(api_keys)

    def replace(self, api_keys: Iterable[ApiKey]) -> None:
        """From now on these keys hold and no others."""
        self._keys = {self._digest(key.secret.encode()): key for key in api_keys}

    def __len__(self) -> int:
        return len(self._keys)

    def authenticate(self, request: Request) -> ApiKey:
        """The key of this request. Raises Problem (401) when there is none, or an unknown one."""
        for name, value in request.scope["headers"]:
            if name == b"authorization":
                scheme, _, secret = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    raise Problem(
                        UNAUTHORIZED,
                        "The Authorization header is not of the form “Bearer <key>”.",
                        headers=_CHALLENGE,
                    )
                key = self._keys.get(self._digest(secret.strip()))
                if key is None:
                    raise Problem(UNAUTHORIZED, "The API key is not known.", headers=_CHALLENGE_INVALID)
                # For the access log.
                request.scope.setdefault("state", {})["client"] = key.name
                return key
        raise Problem(UNAUTHORIZED, "The request has no Authorization header.", headers=_CHALLENGE)

    def _digest(self, secret: bytes) -> bytes:
        return blake2b(secret, digest_size=32, key=self._pepper).digest()


async def require_key(request: Request) -> ApiKey:
    """The caller, for a FastAPI route that any key may use. Raises Problem (401)."""
    authenticator: Authenticator = request.app.state.parts.authenticator
    return authenticator.authenticate(request)


async def require_admin(request: Request) -> ApiKey:
    """The caller, for a FastAPI route that only admins may use. Raises Problem (401, 403)."""
    key = await require_key(request)
    if key.role is not Role.ADMIN:
        raise Problem(FORBIDDEN, f"The role {key.role} may not do this; the role {Role.ADMIN} may.")
    return key
