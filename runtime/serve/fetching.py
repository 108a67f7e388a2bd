"""Addresses that came with a request: nothing is asked of one but what the operator's list allows.

The rules: http or https, a host of the list, the scheme's own port or one that the list names; every address that the
name stands for is public, or an address of the list; the connection goes to the address that was checked, whatever the
name stands for a moment later; no redirect is followed; time and size are bounded in all.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.serve.errors import bad
from runtime.serve.forms import Upload, parse_json

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it would log addresses whole, with what is secret in them

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64 = ipaddress.ip_network("64:ff9b::/96")
PORTS = {"http": 80, "https": 443}
INPUTS = {"input_reference", "image_url", "reference_url", "image", "last_frame"}  # fields that may hold an address
STRUCTURED = {"input_reference", "keyframes", "storyboard", "image", "last_frame"}  # ... or hold those, as JSON text


@dataclass(frozen=True)
class Access:
    """What may be asked: hosts (`example.com`, `*.example.com`, `*`, `10.1.2.3`, `10.1.0.0/16`, each with `:PORT` for
    another port than the scheme's own), bytes of an answer, seconds in all. No host: nothing."""

    hosts: tuple[str, ...] = ()
    max_bytes: int = 20 * 2**20
    seconds: float = 10.0

    def names(self, host: str, port: int | None) -> bool:
        """Tell whether a host of an address is on the list; `port` is None where it is the scheme's own."""
        return any(_fits(entry, host) and given in (port, "*") for entry, given in map(_parted, self.hosts))

    def admits(self, address: Address) -> bool:
        """Tell whether a connection may go there: public, or in a network that the list spells out."""
        networks = (_network(entry) for entry, _ in map(_parted, self.hosts))
        return public(address) or any(net is not None and address in net for net in networks)


@dataclass(frozen=True)
class Answer:
    """What came back: `body` is whole, or it would have been an error."""

    status: int
    kind: str  # the content type
    body: bytes


def ask(
    method: str, url: str, access: Access, *, content: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """Ask an address by the rules above; it blocks. ValueError for what they refuse, OSError for what does not work."""
    return asyncio.run(ask_async(method, url, access, content=content, headers=headers))


async def ask_async(
    method: str, url: str, access: Access, *, content: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """Do what `ask` does, without blocking."""
    try:
        async with asyncio.timeout(access.seconds):
            return await _ask(method, url, access, content, dict(headers or {}))
    except TimeoutError:
        raise OSError(f"{shortened(url)} does not answer within {access.seconds:g} s") from None


async def fetch_inputs(fields: dict[str, Any], folder: Callable[[], Path], access: Access) -> None:
    """Put files in `folder()` in the place of the addresses of inputs in a body; ApiError for what cannot be fetched.

    Without hosts on the list the addresses stay, and are refused where they are read.
    """
    if not access.hosts:
        return
    for name in STRUCTURED & fields.keys():
        if isinstance(value := fields[name], str) and value.lstrip()[:1] in ("[", "{"):
            fields[name] = parse_json(value.encode())
    pending: list[Any] = [fields]
    while pending:
        found = pending.pop()
        if isinstance(found, list):
            pending += found
        elif isinstance(found, dict):
            for name, value in found.items():
                if name in INPUTS and isinstance(value, str) and re.match("https?:", value, re.IGNORECASE):
                    found[name] = await _fetched(value, name, folder, access)
            pending += [value for value in found.values() if isinstance(value, dict | list)]


async def _fetched(url: str, name: str, folder: Callable[[], Path], access: Access) -> Upload:
    try:
        answer = await ask_async("GET", url, access)
        if answer.status != 200:
            raise OSError(f"{shortened(url)} answers {answer.status}")
    except (ValueError, OSError) as error:
        raise bad(f"{name}: {error}", name, "not_fetched") from error
    path = folder() / f"upload-{secrets.token_hex(4)}"
    path.write_bytes(answer.body)
    return Upload(path)


def check(url: str, access: Access) -> tuple[str, str, int]:
    """Return (scheme, host, port) of an address; ValueError where the list refuses it. Nothing is looked up."""
    import httpx2

    if not access.hosts:
        raise ValueError("addresses are not fetched by this server; send the file itself")
    if not url.isascii() or re.search(r"[\s\\\x00-\x20\x7f]", url):
        raise ValueError(f"{shortened(url)} has characters that no address has")
    try:
        parsed = httpx2.URL(url)
        port = parsed.port  # none where it is the scheme's own
    except httpx2.InvalidURL as error:
        raise ValueError(f"{shortened(url)} is no address ({error})") from error
    if parsed.scheme not in PORTS or not parsed.host or parsed.userinfo:
        raise ValueError(f"{shortened(url)} is refused; legal: http or https, a host, no user or password")
    if not access.names(parsed.host.lower(), port):
        raise ValueError(f"{shortened(url)} is at no host that this server may ask")
    return parsed.scheme, parsed.host.lower(), port or PORTS[parsed.scheme]


def shortened(url: str) -> str:
    """Return an address for a message or a log: without what may be secret in it."""
    return ascii(re.split(r"[?#]", re.sub(r"//[^/@]*@", "//", url))[0][:120])[1:-1]


def public(address: Address) -> bool:
    """Tell whether an address is one of the open network, and does not hide one that is not."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return public(inner)
    return address.is_global and not (address.is_multicast or address.is_reserved)


async def _ask(method: str, url: str, access: Access, content: bytes | None, headers: dict[str, str]) -> Answer:
    import httpx2

    scheme, host, port = check(url, access)
    address = await _resolve(host, port, access)
    literal = f"[{address}]" if address.version == 6 else str(address)
    pinned = httpx2.URL(url).copy_with(host=literal)
    named = f"[{host}]" if ":" in host else host
    headers["host"] = named if port == PORTS[scheme] else f"{named}:{port}"
    headers["accept-encoding"] = "identity"  # what is small on the wire is small here
    extensions = {"sni_hostname": host} if scheme == "https" else {}
    body = bytearray()
    try:
        async with (
            httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=access.seconds) as client,
            client.stream(method, pinned, content=content, headers=headers, extensions=extensions) as answer,
        ):
            if answer.is_redirect:
                raise OSError(f"{shortened(url)} leads somewhere else, and that is not followed")
            async for chunk in answer.aiter_raw():
                body += chunk
                if len(body) > access.max_bytes:
                    raise OSError(f"{shortened(url)} has more than {access.max_bytes} bytes")
            return Answer(answer.status_code, answer.headers.get("content-type", ""), bytes(body))
    except httpx2.HTTPError as error:
        raise OSError(f"{shortened(url)} cannot be asked ({type(error).__name__})") from error


async def _resolve(host: str, port: int, access: Access) -> Address:
    """Return the address to connect to; ValueError where any that the name stands for is not admitted."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OSError(f"the host {host[:120]} is not known") from error
    addresses = [ipaddress.ip_address(str(each[4][0]).partition("%")[0]) for each in found]
    if not addresses or not all(map(access.admits, addresses)):
        raise ValueError(f"the host {host[:120]} is refused: it stands for an address that is not public")
    return addresses[0]


def _parted(entry: str) -> tuple[str, int | str | None]:
    """Return (host, port) of an entry of the list; the port is None where it names none."""
    match = re.fullmatch(r"(\[[^\]]+\]|[^:]+):(\d+|\*)", entry)
    if match is None:
        return entry.strip("[]").lower(), None
    return match[1].strip("[]").lower(), match[2] if match[2] == "*" else int(match[2])


def _network(host: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(host)
    except ValueError:
        return None


def _fits(entry: str, host: str) -> bool:
    if entry.startswith("*."):
        return host.endswith(entry[1:])
    if (network := _network(entry)) is not None:
        try:
            return ipaddress.ip_address(host) in network
        except ValueError:
            return False
    return entry in ("*", host)
