"""Which webhook URLs are refused: everything that is not public and not allowed by name."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest

from qlm_batch.callbacks.targets import check_webhook_url, is_public, resolve_target
from qlm_batch.domain.errors import InvalidInput, Unavailable

PRIVATE = [
    "https://127.0.0.1/hook",
    "https://127.8.8.8/",
    "https://0.0.0.0/",
    "https://10.1.2.3/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://169.254.169.254/latest/meta-data",
    "https://100.64.0.1/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://240.0.0.1/",
    "https://[::1]/",
    "https://[::]/",
    "https://[fe80::1]/",
    "https://[fc00::1]/",
    "https://[fec0::1]/",
    "https://[ff02::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:10.0.0.1]/",
    "https://[::7f00:1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0177.0.0.1/",
    "https://127.1/",
    "https://127.0.0.1./",
    "https://localhost/",
    "https://LOCALHOST./",
    "https://api.localhost/",
]
MALFORMED = [
    "",
    "hook",
    "https://",
    "https:///path",
    "ftp://example.com/",
    "file:///etc/passwd",
    "https://user:secret@example.com/",
    "https://exa mple.com/",
    "https://example.com:0/",
    "https://example.com:99999/",
    "https://example.com:22/",
    "https://example.com:25/",
    "http://example.com/",
    "https://example.com/" + "x" * 2_048,
    "https://example.com\r\nHost: other/",
]


@pytest.mark.parametrize("url", PRIVATE + MALFORMED)
def test_such_a_url_is_refused_at_create_by_the_name_of_its_field(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_webhook_url(url)
    assert caught.value.param == "callbacks.webhook"
    assert caught.value.code == "invalid_webhook_url"


@pytest.mark.parametrize("url", [url for url in PRIVATE if "localhost" not in url.lower()])
def test_such_an_address_is_refused_again_at_delivery(url: str) -> None:
    with pytest.raises(InvalidInput):
        resolve_target(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook?x=1",
        "https://example.com:8443/",
        "https://8.8.8.8/",
        "https://[2606:4700::1111]/",
        "https://bücher.example/",
    ],
)
def test_a_public_https_url_is_accepted(url: str) -> None:
    check_webhook_url(url)


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        ("http://127.0.0.1:9000/hook", ["127.0.0.0/8"]),
        ("http://127.0.0.1:9000/hook", ["127.0.0.1"]),
        ("http://[::1]:80/", ["::1"]),
        ("http://receiver.internal:81/", ["receiver.internal"]),
        ("http://Receiver.Internal./", ["RECEIVER.internal"]),
        ("http://localhost:9000/", ["localhost"]),
    ],
)
def test_what_the_operator_listed_is_accepted(url: str, allow: list[str]) -> None:
    check_webhook_url(url, allow)


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        ("https://127.0.0.1/", ["10.0.0.0/8"]),
        ("http://8.8.8.8/", ["10.0.0.0/8"]),
        ("https://169.254.169.254/", ["example.com"]),
    ],
)
def test_a_list_allows_only_what_is_on_it(url: str, allow: list[str]) -> None:
    with pytest.raises(InvalidInput):
        check_webhook_url(url, allow)


def resolving_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_name_is_resolved_once_and_its_addresses_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolving_to(monkeypatch, "8.8.8.8", "2606:4700::1111")
    target = resolve_target("https://Example.com./hook")
    assert target.addresses == ("8.8.8.8", "2606:4700::1111")
    assert (target.host, target.port) == ("example.com", 443)


@pytest.mark.parametrize(
    "addresses", [("10.0.0.1",), ("8.8.8.8", "127.0.0.1"), ("fe80::1%eth0",), ("::ffff:10.0.0.1",)]
)
def test_a_name_with_any_private_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...]
) -> None:
    resolving_to(monkeypatch, *addresses)
    with pytest.raises(InvalidInput, match="not a public address"):
        resolve_target("https://example.com/")


def test_a_name_may_resolve_into_a_listed_range(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving_to(monkeypatch, "10.0.0.7")
    url = "http://receiver.internal:81/"
    check_webhook_url(url, ["10.0.0.0/24"])
    assert resolve_target(url, ["10.0.0.0/24"]).addresses == ("10.0.0.7",)


def test_plain_http_stays_refused_for_a_name_outside_the_listed_ranges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolving_to(monkeypatch, "8.8.8.8")
    with pytest.raises(InvalidInput, match="https"):
        resolve_target("http://example.com/", ["10.0.0.0/24"])


def test_a_name_without_addresses_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(Unavailable, match=r"example\.com"):
        resolve_target("https://example.com/")


def test_public_is_what_the_internet_routes() -> None:
    assert is_public(ipaddress.ip_address("1.1.1.1"))
    assert is_public(ipaddress.ip_address("64:ff9b::808:808"))
    assert not is_public(ipaddress.ip_address("2001:db8::1"))
