"""Which addresses a webhook may reach: public ones, and those the operator listed."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from qlm_batch.domain.errors import InvalidInput, Unavailable

PARAM = "callbacks.webhook"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_URL_CHARS = 2048
_DEFAULT_PORTS = {"http": 80, "https": 443}
_FIRST_UNPRIVILEGED_PORT = 1024
_LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_EMBEDS_V4 = (_NAT64, ipaddress.IPv6Network("64:ff9b:1::/48"), ipaddress.IPv6Network("::/96"))


@dataclass(frozen=True, slots=True)
class Target:
    """A URL whose host was resolved; only `addresses` may be connected to."""

    url: httpx.URL
    host: str
    port: int
    addresses: tuple[str, ...]


class _Allowed:
    """The operator's list: host names, and ranges of addresses."""

    def __init__(self, entries: Sequence[str]) -> None:
        self.names: set[str] = set()
        self.networks: list[_Network] = []
        for entry in entries:
            try:
                self.networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                self.names.add(entry.lower().rstrip("."))

    def has(self, address: _Address) -> bool:
        return any(address in network for network in self.networks)


def check_webhook_url(url: str, allow: Sequence[str] = ()) -> None:
    """Refuse, with InvalidInput, a URL that no delivery could ever be made to. Asks no DNS."""
    parsed, host, port = _parse(url)
    allowed = _Allowed(allow)
    if host in allowed.names:
        return
    address = _literal(host)
    if address is not None:
        listed = allowed.has(address)
        if not listed and not is_public(address):
            raise _refused(f"{host} is not a public address")
    else:
        # A name may yet resolve into a listed range; `resolve_target` decides that.
        listed = bool(allowed.networks)
        if not listed and (host in _LOCAL_NAMES or host.endswith(".localhost")):
            raise _refused(f"{host} is this machine")
    if not listed:
        _check_public_use(parsed.scheme, port)


def resolve_target(url: str, allow: Sequence[str] = ()) -> Target:
    """Resolve a URL's host once and check every address it has.

    InvalidInput when any of them is neither public nor listed; Unavailable when DNS does not answer
    or knows no such name. Blocks for as long as the resolver takes.
    """
    parsed, host, port = _parse(url)
    allowed = _Allowed(allow)
    literal = _literal(host)
    addresses = [literal] if literal is not None else _look_up(host, port)
    if host not in allowed.names:
        unlisted = [address for address in addresses if not allowed.has(address)]
        for address in unlisted:
            if not is_public(address):
                raise _refused(f"{host} is at {address}, which is not a public address")
        if unlisted:
            _check_public_use(parsed.scheme, port)
    return Target(parsed, host, port, tuple(str(address) for address in addresses))


def is_public(address: _Address) -> bool:
    """Whether an address is on the public internet, IPv4 addresses inside IPv6 ones included."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None and not is_public(address.sixtofour):
            return False
        if address.teredo is not None:
            return False
        if any(address in network for network in _EMBEDS_V4):
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
            return address in _NAT64 and is_public(embedded)
        if address.is_site_local:
            return False
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not address.is_unspecified
    )


def _parse(url: str) -> tuple[httpx.URL, str, int]:
    """The URL, its host in ASCII lower case without a final dot, and its port."""
    if len(url) > _URL_CHARS:
        raise _refused(f"it is longer than {_URL_CHARS} characters")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii").lower().rstrip(".")
    except (httpx.InvalidURL, UnicodeError, ValueError, TypeError):
        raise _refused("it is not a valid URL") from None
    if parsed.scheme not in _DEFAULT_PORTS:
        raise _refused("it must start with https://")
    if not host:
        raise _refused("it names no host")
    if parsed.userinfo:
        raise _refused("it must not hold a user name or password")
    port = _DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
    if not 0 < port < 65536:
        raise _refused(f"{port} is not a port")
    return parsed, host, port


def _literal(host: str) -> _Address | None:
    """The host as an address; None for a name. Refuses the disguises of IPv4 addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        pass
    if ":" in host or "%" in host or _NUMERIC_LABEL.fullmatch(host.rsplit(".", 1)[-1]):
        raise _refused(f"{host} is not a host name; write addresses in their usual form")
    return None


def _look_up(host: str, port: int) -> list[_Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unavailable(f"The name {host} could not be resolved: {error}.") from error
    texts = dict.fromkeys(str(entry[4][0]).split("%", 1)[0] for entry in found)
    return [ipaddress.ip_address(text) for text in texts]


def _check_public_use(scheme: str, port: int) -> None:
    if scheme != "https":
        raise _refused("it must start with https://")
    if port < _FIRST_UNPRIVILEGED_PORT and port != _DEFAULT_PORTS["https"]:
        raise _refused(f"port {port} belongs to another service; use 443 or one above 1023")


def _refused(reason: str) -> InvalidInput:
    return InvalidInput(
        f"The webhook URL cannot be used: {reason}. Give a public https address; the operator can "
        "allow others with QLM_WEBHOOK_ALLOW.",
        code="invalid_webhook_url",
        param=PARAM,
    )
