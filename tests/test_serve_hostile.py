"""What a stranger may send: files, names, bodies and addresses that are not what they seem. Nothing of it is a path."""

from __future__ import annotations

import gzip
import io
import json
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")

from runtime.serve.gate import stranger
from runtime.serve.keys import LEAST, Pace, key_of, read_keys
from runtime.serve.pictures import MAX_FRAMES, look
from runtime.video import Video
from tests.serving import TINY, Server

KEY = {"Authorization": "Bearer " + "a" * LEAST}
FEW = {"Authorization": "Bearer " + "b" * LEAST}
MOST = 2**20  # bytes of a body


@pytest.fixture(scope="module")
def site() -> Iterator[ThreadingHTTPServer]:
    """A site with a picture at /red.png; all else leads to another place."""
    written = io.BytesIO()
    Image.new("RGB", (64, 64), (255, 0, 0)).save(written, "PNG")

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/red.png"
            self.send_response(200 if found else 302)
            self.send_header("location", "/red.png")
            self.end_headers()
            self.wfile.write(written.getvalue() if found else b"")

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, site: ThreadingHTTPServer) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "keys").write_text(f"# two\none:{'a' * LEAST}\nfew:{'b' * LEAST} jobs=1 per-minute=2\n")
    (folder / "serve.toml").write_text(f'max_upload = {MOST}\nfetch_host = ["127.0.0.1:{site.server_port}"]\n')
    flags = "--api-key", str(folder / "keys"), "--config", str(folder / "serve.toml"), "--no-credentials"
    started = Server(folder / "data", *flags)
    started.http.headers.update(KEY)
    yield started
    assert started.stop() == 0


def raw(server: Server, head: str, body: bytes = b"", chunks: int = 0) -> bytes:
    """Send bytes as they are, a last chunk so many times; return the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"{head}\r\nhost: {host}\r\nauthorization: {KEY['Authorization']}\r\nconnection: close\r\n\r\n"
        try:
            connection.sendall(head.encode() + body)
            for _ in range(chunks):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except OSError:
            pass  # it has heard enough, and answered
        found = b""
        while piece := connection.recv(65536):
            found += piece
        return found


def folders(server: Server) -> set[str]:
    return {path.name for path in (server.data / "jobs").iterdir()}


@pytest.mark.fault(9)
def test_more_than_is_taken_is_told_while_it_comes(server: Server) -> None:
    """Said in advance, said wrongly, or not said at all: and nothing of it stays on the disk."""
    before = folders(server)
    form = "content-type: multipart/form-data; boundary=b"
    start = b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="x"\r\n\r\n'
    chunk = b"%x\r\n%s\r\n" % (len(start), start)
    for answer in (
        raw(server, f"POST /v1/videos HTTP/1.1\r\n{form}\r\ntransfer-encoding: chunked", chunk, chunks=10_000),
        raw(server, f"POST /v1/videos HTTP/1.1\r\n{form}\r\ncontent-length: {10**12}", start + b"x" * (MOST + 1)),
        raw(server, f"POST /v1/provenance HTTP/1.1\r\n{form}\r\ntransfer-encoding: chunked", chunk, chunks=10_000),
    ):
        assert answer.startswith(b"HTTP/1.1 413") and b"request_too_large" in answer, answer[:300]
    assert folders(server) == before


@pytest.mark.fault(13)
@pytest.mark.parametrize("name", ["../../x", "/etc/cron.d/x", "a\0b", "x" * 5000, "CON", "ü\u202egnp.exe", "..", ""])
def test_the_name_of_an_upload_is_never_used(server: Server, name: str) -> None:
    before = set(server.data.rglob("*"))
    answer = server.http.post("/v1/videos", files={"input_reference": (name, b"no picture")}, data={"prompt": "x"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] in ("invalid_upload", "invalid_request")
    assert set(server.data.rglob("*")) == before


@pytest.mark.fault(12)
def test_addresses_are_fetched_from_the_list_alone(server: Server, site: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{site.server_port}"
    made = server.create(TINY | {"input_reference": {"image_url": f"{url}/red.png"}})
    server.http.delete(f"/v1/videos/{made['id']}")
    for address in (
        f"{url}/elsewhere", "http://127.0.0.1:1/", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd",
        f"http://localhost:{site.server_port}/red.png", f"{url.replace('//', '//user@')}/red.png", f"{url}\\@10.0.0.1/",
    ):  # fmt: skip
        for fields in (
            {"input_reference": {"image_url": address}},
            {"keyframes": [{"frame": 0, "image_url": address}]},
        ):
            answer = server.http.post("/v1/videos", json=TINY | fields)
            assert answer.status_code == 400 and answer.json()["error"]["code"] in ("not_fetched", "invalid_request")


@pytest.mark.fault(18)
def test_bodies(server: Server) -> None:
    """Bombs, half bodies and lies: 400 or 413 or 415 in the shape of all errors, never 500."""
    json_type = {"content-type": "application/json"}
    bomb = gzip.compress(b'{"prompt": "' + b"x" * 10**7)
    for body, headers in (
        (bomb, json_type | {"content-encoding": "gzip"}),
        (zlib.compress(b"{}"), json_type | {"content-encoding": "deflate"}),
        (b'{"keyframes": ' + b"[" * 900 + b"]" * 900 + b"}", json_type), (b'{"seed": 1e999, "prompt": "x"}', json_type),
        (b'{"prompt": ["x"]}', json_type), (b'{"prompt": "x", "keyframes": {"frame": 0}}', json_type),
        (b'{"prompt": "x", "num_frames": 99999999999999999999}', json_type), (b"null", json_type),
        (b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}),
        (b"--b\r\n" * 1000, {"content-type": "multipart/form-data; boundary=b"}),
        (b'--b\r\nContent-Disposition: form-data; name="a[b][c][d]"\r\n\r\nx\r\n--b--\r\n',
         {"content-type": "multipart/form-data; boundary=b"}),
    ):  # fmt: skip
        answer = server.http.post("/v1/videos", content=body, headers=headers)
        assert answer.status_code in (400, 413, 415), (body[:60], answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    "prompt", ["a\0ball", "\ud800ball", "\u202eball\u202c", "כדור אדום", "ball " * 900, "🏀" * 300]
)
def test_odd_prompts_are_taken(server: Server, prompt: str) -> None:
    body = json.dumps(TINY | {"prompt": prompt, "num_inference_steps": 500}).encode()
    answer = server.http.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200 and "\0" not in answer.json()["prompt"], answer.text
    server.http.delete(f"/v1/videos/{answer.json()['id']}")


def test_what_a_browser_may_do(server: Server) -> None:
    for path, status in (("/health/live", 200), ("/v1/videos", 200), ("/nothing", 404)):
        answer = server.http.get(path)
        assert answer.status_code == status and answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert (
            answer.headers["referrer-policy"] == "no-referrer" and "access-control-allow-origin" not in answer.headers
        )
    refused = server.http.get("/v1/videos", headers={"Authorization": "Bearer no"})
    assert refused.status_code == 401 and refused.headers["x-frame-options"] == "DENY"


def test_each_key_has_its_own_limits(server: Server) -> None:
    long = TINY | {"num_inference_steps": 900}
    first = server.http.post("/v1/videos", json=long, headers=FEW)
    assert first.status_code == 200, first.text
    second, third = (server.http.post("/v1/videos", json=long, headers=FEW) for _ in range(2))
    assert second.status_code == 429 and third.status_code == 429
    assert third.json()["error"]["code"] == "rate_limit_exceeded" and 1 <= int(third.headers["retry-after"]) <= 60
    other = server.http.post("/v1/videos", json=long)
    assert other.status_code == 200
    server.http.delete(f"/v1/videos/{first.json()['id']}", headers=FEW)
    server.http.delete(f"/v1/videos/{other.json()['id']}")
    assert "a" * LEAST not in server.log() and "b" * LEAST not in server.log()


@pytest.mark.fault(25)
def test_a_file_that_is_gone(server: Server) -> None:
    video = server.create()["id"]
    server.done(video)
    for path in (server.data / "jobs" / video).glob("output*"):
        path.unlink()
    answer = server.http.get(f"/v1/videos/{video}/content")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "output_missing"
    assert server.video(video)["status"] == "failed" and server.video(video)["error"]["code"] == "output_missing"
    assert server.http.get(f"/v1/videos/{video}/content").json()["error"]["code"] == "video_failed"


def test_a_file_of_keys(tmp_path: Path) -> None:
    (path := tmp_path / "keys").write_text(
        f"one:{'a' * 16} jobs=3\n\n# no key\n{'b' * 16}\ntwo:{'c' * 16} per-minute=4 jobs=0\n"
    )
    keys = read_keys(path)
    found = [key_of(keys, letter * 16) for letter in "abcd"]
    assert [None if key is None else (key.name, key.jobs, key.per_minute) for key in found] == [
        ("one", 3, None), ("key-3", None, None), ("two", 0, 4), None,
    ]  # fmt: skip
    assert "a" * 16 not in repr(keys) and key_of(keys, "") is None and key_of(keys, "a" * 15) is None
    for text, says in (
        ("x:short", "16"),
        (f"x:{'a' * 16} all=1", "jobs=N"),
        (f"{'a' * 16}\n{'a' * 16}", "twice"),
        ("#", "no key"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_keys(path)
    pace = Pace()
    assert [pace.wait("x", 2) > 0 for _ in range(4)] == [False, False, True, True] and pace.wait("y", 2) == 0


@pytest.mark.parametrize(
    ("host", "origin", "bound", "code"),
    [
        ("127.0.0.1:8000", "", "127.0.0.1", None), ("localhost:8000", "http://localhost:8000", "127.0.0.1", None),
        ("[::1]:8000", "", "::1", None), ("gpu-box:8000", "http://gpu-box:8000", "0.0.0.0", None),
        ("", "", "127.0.0.1", None), ("evil.example", "", "localhost", "unknown_host"),
        ("127.0.0.1:8000", "https://evil.example", "127.0.0.1", "cross_origin"),
        ("localhost:8000", "null", "127.0.0.1", "cross_origin"),
        ("evil.example:8000", "http://evil.example:8000", "127.0.0.1", "unknown_host"),
    ],
)  # fmt: skip
def test_pages_of_other_sites_ask_a_server_without_keys_in_vain(
    host: str, origin: str, bound: str, code: str | None
) -> None:
    headers = {b"host": host.encode()} | ({b"origin": origin.encode()} if origin else {})
    found = stranger(headers, bound)
    assert (None if found is None else found.code) == code


def picture(path: Path, image: Image.Image, kind: str = "PNG", **how: Any) -> dict[str, Any]:
    image.save(path, kind, **how)
    return look(path, mask=False)


@pytest.mark.fault(8)
def test_pictures_of_every_kind(tmp_path: Path) -> None:
    """16 bits, alpha, palette, grey, CMYK, turned, animated, with a page behind it: upright RGB, or refused."""
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.fromarray(np.full((8, 12), 32896, np.uint16))
    frames = [Image.new("RGB", (12, 8), (index * 90, 0, 0)) for index in range(3)]
    more = {"save_all": True, "append_images": frames[1:]}
    modes = [(Image.new(mode, (12, 8)), "PNG", {}) for mode in ("RGBA", "P", "LA", "1")]
    others = [(Image.new("CMYK", (12, 8)), "JPEG", {}), (Image.new("RGB", (8, 12)), "JPEG", {"exif": turned})]
    moving = [(frames[0], kind, more) for kind in ("WEBP", "PNG")]
    for index, (image, kind, how) in enumerate([(grey, "PNG", {}), *modes, *others, *moving]):
        found = picture(tmp_path / f"upload-{index}", image, kind, **how)
        with Image.open(tmp_path / found["file"]) as kept:
            assert (kept.mode, kept.size, found["num_frames"]) == ("RGB", (12, 8), 1), (kind, image.mode)
            assert index or kept.getpixel((0, 0)) == (128, 128, 128)
    (both := tmp_path / "both").write_bytes((tmp_path / "upload-1").read_bytes() + b"<script>alert(1)</script>PK\3\4")
    assert b"script" not in (tmp_path / look(both, mask=False)["file"]).read_bytes()


FTYP = b"\0\0\0\x18ftypisom\0\0\0\0isomiso2"


@pytest.mark.fault(10, 11)
@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x89PNG\r\n\x1a\n", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://x/"/></svg>',
        b"\xff\xd8\xff\xe0" + b"\0" * 99, b"\0\0\0\x18ftypheic\0\0\0\0heicmif1", b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        b"GIF89a" + b"\xff" * 20, b"\x1aE\xdf\xa3" + b"\xff" * 64, b"%PDF-1.7", b"\x7fELF", b"PK\3\4", b"#!/bin/sh\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n", b"\x00\x00\x01\xba" + b"\0" * 64,
        b"ffconcat version 1.0\nfile /etc/passwd\n", FTYP, FTYP + b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        FTYP + b'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="x"></MPD>',
    ],
)  # fmt: skip
def test_what_only_looks_like_a_film(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "upload-0").write_bytes(content)
    with pytest.raises((ValueError, OSError, SyntaxError)):
        look(path, mask=False)


def film(path: Path, count: int, *, fps: int = 24, size: int = 16) -> Path:
    frames = np.zeros((count, size, size, 3), np.uint8)
    return Video(frames, fps=fps, num_frames=count, height=size, width=size).save(path)


@pytest.mark.fault(10)
def test_films_beyond_the_limits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_FRAMES}"):
        look(film(tmp_path / "long.mp4", MAX_FRAMES + 1, fps=1).rename(tmp_path / "upload-1"), mask=False)
    whole = film(tmp_path / "cut.mp4", 30).read_bytes()
    (tmp_path / "upload-2").write_bytes(whole[: len(whole) * 2 // 3])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.rate = 48000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    (tmp_path / "sound.mp4").rename(tmp_path / "upload-3")
    for name in ("upload-2", "upload-3"):
        with pytest.raises((ValueError, OSError)):
            look(tmp_path / name, mask=False)
    with av.open(str(tmp_path / "gap.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for at in (0, 36_000_000):  # ten hours at 1000 frames a second, in two frames
            picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            picture.pts = at
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    (tmp_path / "gap.mp4").rename(tmp_path / "upload-4")
    with pytest.raises(ValueError, match=r"fps|frames"):
        look(tmp_path / "upload-4", mask=False)


@pytest.mark.fault(7, 10)
@pytest.mark.parametrize(
    ("hog", "says"),
    [
        ("lambda path: bytearray(2**40) and {}", "MemoryError"),
        ("spin", ""),
        ("lambda path: path.write_bytes(bytes(2**20)) and {}", "OSError"),
    ],
)
def test_a_child_ends_at_its_limits(tmp_path: Path, hog: str, says: str) -> None:
    code = (
        "import pathlib\nfrom runtime.serve import boxed\nboxed.SECONDS, boxed.FILE_BYTES = 1, 2**16\n"
        f"def spin(path):\n    while True:\n        pass\nboxed.answer({hog}, pathlib.Path('{tmp_path}/x'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert says in done.stdout and (says or done.returncode < 0), (done.stdout, done.stderr[-500:])
