"""Who calls: bearer keys, roles and the rate limit, checked before anything else is done."""

from __future__ import annotations

import hashlib
import time
from typing import Annotated

from fastapi import Depends, Security
from fastapi.dependencies.models import Dependant
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from qlm_batch.api.edge import RATE_HEADERS
from qlm_batch.api.limits import REQUESTS_PER_MINUTE, RateLimiter
from qlm_batch.api.services import ApiServices
from qlm_batch.domain.errors import Forbidden, TooMany, Unauthenticated
from qlm_batch.domain.jobs import ApiKey
from qlm_batch.domain.store import KeyStore

KEY_CACHE_S = 2.0
"""How long a revoked key may still work in this process."""

_CACHED_KEYS = 1024
_MAX_SECRET = 200
_RANKS = {"read": 0, "user": 1, "admin": 2}

_bearer = HTTPBearer(
    auto_error=False, scheme_name="api_key", description="A key made with `qlm keys create`."
)


class KeyRing:
    """Looks keys up and remembers good ones for KEY_CACHE_S, by the hash of their secret."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._known: dict[bytes, tuple[float, ApiKey]] = {}

    async def key_for(self, secret: str) -> ApiKey:
        """The key of this secret. Unauthenticated when unknown or revoked."""
        if not secret.isascii() or not secret.isprintable() or len(secret) > _MAX_SECRET:
            raise Unauthenticated("This is not an API key of this service.")
        digest = hashlib.sha256(secret.encode()).digest()
        until, key = self._known.get(digest, (0.0, None))
        if key is not None and time.monotonic() < until:
            return key
        self._known.pop(digest, None)
        key = await run_in_threadpool(self._store.key_for, secret)
        if len(self._known) >= _CACHED_KEYS:
            self._known.clear()
        self._known[digest] = (time.monotonic() + KEY_CACHE_S, key)
        return key


def get_services(request: Request) -> ApiServices:
    """The parts this application was built from."""
    services: ApiServices = request.app.state.services
    return services


class Access:
    """A dependency: the caller's key, if its role reaches `role` and its rate allows the call."""

    def __init__(self, role: str) -> None:
        self._role = role

    async def __call__(
        self,
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    ) -> ApiKey:
        """The caller's key. Raises Unauthenticated, TooMany or Forbidden, in this order."""
        if credentials is None:
            raise _no_key()
        ring: KeyRing = request.app.state.keys
        key = await ring.key_for(credentials.credentials)
        await _spend(request, key)
        if _RANKS.get(key.role, -1) < _RANKS[self._role]:
            raise Forbidden(
                f"This key has the role '{key.role}'; the call needs '{self._role}'.",
                code="insufficient_role",
            )
        return key


async def require_key(request: Request) -> None:
    """Raise Unauthenticated where the route asks for a key and the call has no good one.

    Bodies are read before dependencies run, so that a bad one would else be told to anybody.
    """
    if not _asks_for_key(getattr(request.scope.get("route"), "dependant", None)):
        return
    ring: KeyRing = request.app.state.keys
    credentials = await _bearer(request)
    if credentials is None:
        raise _no_key()
    await ring.key_for(credentials.credentials)


def _asks_for_key(dependant: Dependant | None) -> bool:
    if dependant is None:
        return False
    return isinstance(dependant.call, Access) or any(map(_asks_for_key, dependant.dependencies))


def _no_key() -> Unauthenticated:
    return Unauthenticated(
        "Send an API key in the header 'Authorization: Bearer KEY'. `qlm keys create` makes one."
    )


async def _spend(request: Request, key: ApiKey) -> None:
    per_minute = key.limits.get(REQUESTS_PER_MINUTE)
    if per_minute is None:
        return
    limiter: RateLimiter = request.app.state.limiter
    allowance = await limiter.spend(key.id, per_minute, time.monotonic())
    setattr(request.state, RATE_HEADERS, allowance.headers())
    if allowance.wait_s:
        raise TooMany(
            f"This key allows {per_minute} requests a minute. "
            f"Try again in {allowance.wait_s:.1f} seconds.",
            retry_after_s=allowance.wait_s,
        )


async def _services(request: Request) -> ApiServices:
    return get_services(request)


Parts = Annotated[ApiServices, Depends(_services)]
Reader = Annotated[ApiKey, Depends(Access("read"))]
Writer = Annotated[ApiKey, Depends(Access("user"))]
Admin = Annotated[ApiKey, Depends(Access("admin"))]
