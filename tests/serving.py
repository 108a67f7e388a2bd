"""A started server for tests and drills, and what they ask of it."""

from __future__ import annotations

import atexit
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import httpx2
import numpy as np

UNSHARE = ("unshare", "-m") if os.geteuid() == 0 else ("unshare", "-Urm")  # mounts that are the process's own
TINY = {"prompt": "a red ball", "size": "64x64", "num_frames": 5, "num_inference_steps": 2, "seed": 3}
LONG = {"prompt": "a red ball", "num_frames": 17, "num_inference_steps": 60, "seed": 4, "guidance_scale": 4}


def frames_of(content: bytes) -> np.ndarray:
    """Return the frames of a video, uint8 [F, H, W, 3]: the same job's are equal, its signed files are not."""
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def raw(method: str, path: str, body: bytes = b"", *more: str, kind: str = "application/json") -> bytes:
    """Return the bytes of a request, with `more` lines of headers; a length among them is that of the body."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", *more]
    if body:
        lines += [f"content-type: {kind}"]
        lines += [] if any(line.startswith("content-length") for line in more) else [f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Server:
    """python -m runtime.serve on a free port, with its data in a folder.

    `faulty` is tests/faulty.py instead; `disk` such as "8m" gives the data a small disk of its own, that this process
    alone sees and `files` reaches.
    """

    def __init__(self, data: Path, *flags: str, faulty: bool = False, disk: str | None = None) -> None:
        self.data, self.flags = data, flags
        mount = f'mount -t tmpfs -o size={disk} none "$0" && exec "$@"'
        self.before = [] if disk is None else [*UNSHARE, "sh", "-c", mount, str(data)]
        self.program = [str(Path(__file__).with_name("faulty.py"))] if faulty else ["-m", "runtime.serve"]
        data.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        """Start it and wait until it takes jobs."""
        command = [*self.before, sys.executable, *self.program, "--port", "0", "--data", str(self.data), *self.flags]
        with (self.data / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        atexit.register(self.process.kill)  # where a test ends before it stops it; its workers follow
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, f"{line!r} {self.log()[-2000:]}"
        self.url = found[0]
        self.http = httpx2.Client(base_url=self.url, timeout=60)
        self.until(lambda: self.http.get("/health/ready").status_code == 200)

    @property
    def files(self) -> Path:
        """The data folder as the server sees it."""
        return Path(f"/proc/{self.process.pid}/root{self.data}")

    def log(self) -> str:
        """Return what it wrote to standard error."""
        return (self.data / "server.log").read_text()

    def until(self, holds: Any, seconds: float = 120) -> Any:
        """Wait until a condition holds, and return what it gave."""
        end = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < end, f"waited {seconds} s in vain; {self.log()[-2000:]}"
            time.sleep(0.05)
        return found

    def workers(self) -> list[int]:
        """Return the process ids of its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        named = [(int(pid), Path(f"/proc/{pid}/cmdline").read_bytes()) for pid in children]
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        for thread in threads:
            for pid in (thread / "children").read_text().split():
                named.append((int(pid), Path(f"/proc/{pid}/cmdline").read_bytes()))
        return sorted({pid for pid, command in named if b"worker" in command})

    def create(self, fields: dict[str, Any] | None = None, path: str = "/v1/videos", **more: Any) -> dict[str, Any]:
        """Create a job, and return its object."""
        answer = self.http.post(path, json=fields or TINY, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def video(self, video_id: str) -> dict[str, Any]:
        """Return a job's object."""
        answer = self.http.get(f"/v1/videos/{video_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def done(self, video_id: str, status: str = "completed") -> dict[str, Any]:
        """Wait for the end of a job, and return its object."""
        self.until(lambda: self.video(video_id)["status"] not in ("queued", "in_progress"))
        found = self.video(video_id)
        assert found["status"] == status, found
        return found

    def content(self, video_id: str) -> bytes:
        """Return a video's file."""
        answer = self.http.get(f"/v1/videos/{video_id}/content")
        assert answer.status_code == 200, answer.text
        return answer.content

    def kill(self, which: str = "both") -> None:
        """Kill its worker, the server or both, as nothing can be prepared for."""
        pids = self.workers() if which in ("worker", "both") else []
        for pid in ([self.process.pid] if which in ("server", "both") else []) + pids:
            os.kill(pid, signal.SIGKILL)
        if which != "worker":
            self.process.wait()

    def stop(self, seconds: float = 40) -> int:
        """Tell it to end; return its exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(seconds)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code
