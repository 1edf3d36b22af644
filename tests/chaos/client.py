"""A client as patient as the service asks for: it tries again until the answer is final."""

from __future__ import annotations

import time
from typing import Any

import httpx

PATIENCE_S = 120.0
_AGAIN = frozenset({429, 502, 503, 504})


class Silent(Exception):
    """The service gave no final answer within PATIENCE_S."""


class Client:
    """Calls with one key. What is sent twice must be harmless twice."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=15, trust_env=False
        )
        self.server_errors: list[str] = []
        """Answers with status 500, which no fault excuses."""

    def call(self, method: str, path: str, **given: Any) -> httpx.Response:
        """The first final answer."""
        give_up_at = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self._http.request(method, path, **given)
                if answer.status_code == 500:
                    self.server_errors.append(f"{method} {path}: {answer.text[:200]}")
                elif answer.status_code not in _AGAIN:
                    return answer
            except httpx.TransportError as error:
                answer = None
                fault = repr(error)
            if time.monotonic() > give_up_at:
                told = fault if answer is None else f"{answer.status_code} {answer.text[:200]}"
                raise Silent(f"{method} {path}: {told}")
            time.sleep(0.25)

    def json(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        """The body of a successful answer. AssertionError for any other."""
        answer = self.call(method, path, **given)
        assert answer.status_code == 200, f"{method} {path}: {answer.status_code} {answer.text}"
        found: dict[str, Any] = answer.json()
        return found

    def close(self) -> None:
        """Give connections back."""
        self._http.close()
