"""The REST API as the commands call it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from qlm_batch.domain.errors import InvalidInput, NotFound, QlmError, Unauthenticated, Unavailable

Json = dict[str, Any]
_CHUNK = 1 << 20


class ApiError(QlmError):
    """What the service answered when it refused."""


class Client:
    """A connection to one service, found by arguments, environment or a running `qlm up`."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        if not _is_address(self.url):
            raise InvalidInput(
                f"{url!r} is no address of a service; write it like http://127.0.0.1:8600 in --url"
                " or QLM_URL",
                param="url",
            )
        if not (key.isascii() and key.isprintable()):
            raise Unauthenticated(
                "the API key holds a character that no key has; give it whole, as it was made, in "
                "--key or QLM_API_KEY"
            )
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(30.0, read=300.0),
            trust_env=False,
        )

    @classmethod
    def find(cls, url: str | None, key: str | None, data_dir: Path) -> Client:
        """The service at `url`, or the one `qlm up` runs in `data_dir`."""
        if not url:
            state = private_text(data_dir / "service.json")
            if state is None:
                raise Unavailable(
                    f"no service found in {data_dir}: start one with `qlm up`, or name one with "
                    "--url or QLM_URL"
                )
            url = str(json.loads(state)["url"])
        if not key:
            key = private_text(data_dir / "api.key")
            if key is None:
                raise Unauthenticated("no API key: set QLM_API_KEY or pass --key")
        return cls(url, key.strip())

    def close(self) -> None:
        """Give the connection back."""
        self._http.close()

    def get(self, path: str, **params: object) -> Json:
        """GET a JSON object."""
        return self._json("GET", path, params={k: v for k, v in params.items() if v is not None})

    def post(
        self, path: str, body: Mapping[str, object], headers: Mapping[str, str] | None = None
    ) -> Json:
        """POST a JSON object."""
        return self._json("POST", path, json=body, headers=headers)

    def upload(
        self, source: BinaryIO, filename: str, on_bytes: Callable[[int], None] = lambda _: None
    ) -> Json:
        """Stream a file of any size, or standard input; `on_bytes` hears of every chunk sent."""
        boundary = secrets.token_hex(16)
        safe_name = filename.replace('"', "_").replace("\r", "_").replace("\n", "_")

        def body() -> Iterator[bytes]:
            yield (
                f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
                f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '
                f'filename="{safe_name}"\r\nContent-Type: application/jsonl\r\n\r\n'
            ).encode()
            while chunk := source.read(_CHUNK):
                yield chunk
                on_bytes(len(chunk))
            yield f"\r\n--{boundary}--\r\n".encode()

        return self._json(
            "POST",
            "/v1/files",
            content=body(),
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )

    def download(self, path: str, **params: object) -> Iterator[bytes]:
        """Stream the bytes behind `path`."""
        given = {k: v for k, v in params.items() if v is not None}
        try:
            with self._http.stream("GET", path, params=given) as response:  # type: ignore[arg-type]
                if response.is_error:
                    response.read()
                    _raise_for(response)
                yield from response.iter_bytes(_CHUNK)
        except httpx.TransportError as error:
            raise _unreachable(self.url, error) from error

    def _json(self, method: str, path: str, **kwargs: Any) -> Json:
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.TransportError as error:
            raise _unreachable(self.url, error) from error
        _raise_for(response)
        answer: Json = response.json()
        return answer


def private_text(file: Path) -> str | None:
    """What a private file of the service holds; None where there is none."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unauthenticated(
            f"{file} cannot be read ({error.strerror}), it is for the user who runs the service; "
            "name the service with --url and your key with QLM_API_KEY"
        ) from None


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def _unreachable(url: str, error: Exception) -> Unavailable:
    return Unavailable(f"cannot reach {url}: {error}; is the service running (`qlm up`)?")


def _raise_for(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        error = response.json()["error"]
        message, code, param = error["message"], error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError):
        message, code, param = f"HTTP {response.status_code}: {response.text[:200]}", None, None
    kind = {401: Unauthenticated, 404: NotFound, 503: Unavailable}.get(
        response.status_code, ApiError
    )
    raise kind(message, code=code, param=param)


def default_key() -> str | None:
    """The key from the environment; OPENAI_API_KEY is left alone on purpose."""
    return os.environ.get("QLM_API_KEY")
