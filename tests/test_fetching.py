"""Addresses: only what the operator's list allows is ever asked, whatever the text, the name or the answer tries."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("httpx2")

from runtime.serve.errors import ApiError
from runtime.serve.fetching import Access, ask, check, fetch_inputs, public


class Site(BaseHTTPRequestHandler):
    """/hello, /moved (to /hello), /large (endless), /slow (a byte now and then), and what was posted at /echo."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["host"]))  # type: ignore[attr-defined]
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", "/hello")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("content-type", "text/plain")
        self.end_headers()
        try:
            if self.path == "/large":
                for _ in range(10_000):
                    self.wfile.write(b"x" * 65536)
            elif self.path == "/slow":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            else:
                self.wfile.write(b"hello")
        except OSError:
            return  # the other side has heard enough

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body[::-1])

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_what_is_on_the_list_is_asked(site: Any) -> None:
    port = site.server_port
    access = Access(hosts=(f"127.0.0.1:{port}",))
    found = ask("GET", f"http://127.0.0.1:{port}/hello", access)
    assert (found.status, found.body, found.kind) == (200, b"hello", "text/plain")
    assert ask("POST", f"http://127.0.0.1:{port}/echo", access, content=b"abc").body == b"cba"


@pytest.mark.parametrize(
    ("path", "most", "says"), [("moved", 100, "somewhere else"), ("large", 10**6, "bytes"), ("slow", 100, "within")]
)
def test_redirects_floods_and_drips_end(site: Any, path: str, most: int, says: str) -> None:
    access = Access(hosts=(f"127.0.0.1:{site.server_port}",), max_bytes=most, seconds=1)
    with pytest.raises(OSError, match=says):
        ask("GET", f"http://127.0.0.1:{site.server_port}/{path}", access)


def test_the_connection_goes_to_the_address_that_was_checked(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up once: a second answer, as of a rebinding server, would be another address."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: Any, port: Any, *more: Any, **rest: Any) -> Any:
        if host in ("rebinding.example", b"rebinding.example"):
            asked.append("once")
            address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]
        return real(host, port, *more, **rest)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    port = site.server_port
    url = f"http://rebinding.example:{port}/hello"
    with pytest.raises(ValueError, match="not public"):
        ask("GET", url, Access(hosts=(f"rebinding.example:{port}",)))
    asked.clear()
    assert ask("GET", url, Access(hosts=(f"rebinding.example:{port}", "127.0.0.1"))).body == b"hello"
    assert asked == ["once"] and site.seen[-1] == ("/hello", f"rebinding.example:{port}")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://169.254.169.254/latest", "http://[::1]/", "http://0x7f.1/", "http://2130706433/",
        "http://127.1/", "http://0/", "http://[::ffff:127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://localhost/",
        "http://10.0.0.1/", "http://192.168.0.1/", "http://172.16.0.1/", "http://100.64.0.1/", "http://[fe80::1]/",
        "http://[fc00::1]/", "http://224.0.0.1/",
    ],
)  # fmt: skip
def test_private_addresses_are_refused_even_where_every_name_is_allowed(url: str) -> None:
    with pytest.raises((ValueError, OSError), match=r"not public|not known|no address"):
        ask("GET", url, Access(hosts=("*",), seconds=2))


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "gopher://ok.example/", "ftp://ok.example/", "http://ok.example\\@10.0.0.1/", "http://",
        "http://user:pass@ok.example/", "http://ok.example@10.0.0.1/", "http://ok.example:22/", "//ok.example/",
        "http://evil.example/", "http://ok.example.evil.example/", "http://evilok.example/", "http://ok.example\n.x/",
        "http://ok.example./", "/etc/passwd", "", "http://ok.example:99999/", "http://\u24d8k.example/",
    ],
)  # fmt: skip
def test_other_hosts_schemes_and_tricks_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        check(url, Access(hosts=("ok.example", "sub.ok.example:8080")))
    assert "user:pass" not in str(caught.value), "no secret in a message"


def test_the_list() -> None:
    access = Access(hosts=("ok.example", "*.wide.example", "other.example:8080", "10.1.0.0/16", "any.example:*"))
    for url in (
        "https://ok.example/x?y", "http://OK.example/", "http://a.b.wide.example/", "http://other.example:8080/",
        "http://10.1.2.3/", "http://ok.example:80/", "https://any.example:123/",
    ):  # fmt: skip
        assert check(url, access)[0] in ("http", "https")
    for url in ("http://wide.example/", "http://other.example/", "http://10.2.0.1/", "http://ok.example:443/"):
        with pytest.raises(ValueError, match="no host"):
            check(url, access)
    with pytest.raises(ValueError, match="not fetched"):
        check("https://ok.example/", Access())


def test_inputs_become_files(site: Any, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{site.server_port}/hello"
    access = Access(hosts=(f"127.0.0.1:{site.server_port}",))
    frames = json.dumps([{"frame": 0, "image_url": url}, {"frame": 4, "image": url}])
    fields: dict[str, Any] = {"prompt": url, "input_reference": {"image_url": url}, "keyframes": frames}
    asyncio.run(fetch_inputs(fields, lambda: tmp_path, access))
    files = [
        fields["input_reference"]["image_url"],
        *(each[name] for each, name in zip(fields["keyframes"], ("image_url", "image"), strict=True)),
    ]
    assert [each.path.read_bytes() for each in files] == [b"hello"] * 3 and fields["prompt"] == url
    with pytest.raises(ApiError, match="no host"):
        asyncio.run(fetch_inputs({"last_frame": "https://evil.example/"}, lambda: tmp_path, access))
    untouched = {"last_frame": url}
    asyncio.run(fetch_inputs(untouched, lambda: tmp_path, Access()))
    assert untouched == {"last_frame": url}


@given(st.ip_addresses(v=4))
def test_an_address_inside_another_is_judged_by_itself(inner: ipaddress.IPv4Address) -> None:
    number = int(inner)
    outer = [(0xFFFF << 32) | number, (0x64FF9B << 96) | number, (0x2002 << 112) | (number << 80)]
    assert [public(ipaddress.IPv6Address(each)) for each in outer] == [public(inner)] * 3


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TLS the name in the address is proven, though the connection goes to the address that was checked."""
    pytest.importorskip("cryptography")
    from runtime.certificates import development_signer

    development_signer(tmp_path / "keys")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "keys" / "certificate.pem", tmp_path / "keys" / "private-key.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    names, port = list[str](), server.server_port
    here = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: here)
    context.sni_callback = lambda _, name, __: names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(OSError, match="cannot be asked"):
            ask("GET", f"https://named.example:{port}/hello", Access((f"named.example:{port}", "127.0.0.1")))
        assert names == ["named.example"]
    finally:
        server.shutdown()
        server.server_close()
