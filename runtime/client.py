"""A client of the server's surface: the same paths that OpenAI's client speaks, and what goes beyond them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

FAILED = ("failed", "cancelled")


class ServerError(OSError):
    """What the server answered instead of a success: `status`, `code`, and its message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Client:
    """Asks a server for videos; `key` is an API key where the server has them.

        client = runtime.Client("http://127.0.0.1:8000")
        client.save(client.wait(client.create("a red ball", num_inference_steps=25)), "ball.mp4")

    Raises ServerError for what the server refuses, and httpx2's errors where it cannot be reached.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, seconds: float = 600.0) -> None:
        import httpx2

        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.http = httpx2.Client(base_url=url, headers=headers, timeout=seconds)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def create(self, prompt: str, **fields: Any) -> dict[str, Any]:
        """Ask for a video, with any field of the API, and return its object at once; a Path is sent as a file."""
        return self._make("/v1/videos", {"prompt": prompt, **fields})

    def remix(self, video: str, prompt: str, **fields: Any) -> dict[str, Any]:
        """Ask for a finished video made anew, by its id."""
        return self._make(f"/v1/videos/{video}/remix", {"prompt": prompt, **fields})

    def edit(self, video: str | Path, prompt: str, **fields: Any) -> dict[str, Any]:
        """Ask for a clip made anew: a video by its id, or a file."""
        return self._make("/v1/videos/edits", {"video": _clip(video), "prompt": prompt, **fields})

    def extend(self, video: str | Path, prompt: str, **fields: Any) -> dict[str, Any]:
        """Ask for more of a clip: a video by its id, or a file."""
        return self._make("/v1/videos/extensions", {"video": _clip(video), "prompt": prompt, **fields})

    def connect(self, first: str, second: str, prompt: str, **fields: Any) -> dict[str, Any]:
        """Ask for what leads from one finished video to another, by their ids."""
        return self._make(
            "/v1/videos/connections", {"videos": [_clip(first), _clip(second)], "prompt": prompt, **fields}
        )

    def get(self, video: str) -> dict[str, Any]:
        """Return a video's object."""
        return self._json("GET", f"/v1/videos/{video}")

    def list(self, limit: int = 100) -> Iterator[dict[str, Any]]:
        """Yield all videos, the newest first."""
        after: dict[str, Any] = {}
        while True:
            page = self._json("GET", "/v1/videos", params={"limit": limit, **after})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}

    def wait(self, video: dict[str, Any] | str, seconds: float = 0.5) -> dict[str, Any]:
        """Return a video's object when it is completed; ServerError where it fails."""
        name = video if isinstance(video, str) else video["id"]
        while (found := self.get(name))["status"] != "completed":
            if found["status"] in FAILED:
                error = found["error"] or {"code": found["status"], "message": f"{name} is {found['status']}"}
                raise ServerError(200, error["code"], error["message"])
            time.sleep(seconds)
        return found

    def save(self, video: dict[str, Any] | str, path: str | Path, *, variant: str = "video") -> Path:
        """Write a video's file, thumbnail or sprite sheet; a file of that name is replaced when all is there."""
        name, path = video if isinstance(video, str) else video["id"], Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with (
                self.http.stream("GET", f"/v1/videos/{name}/content", params={"variant": variant}) as answer,
                partial.open("wb") as handle,
            ):
                if answer.status_code != 200:
                    answer.read()
                self._check(answer)
                for chunk in answer.iter_bytes():
                    handle.write(chunk)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def cancel(self, video: str) -> dict[str, Any]:
        """Stop a video at its next step."""
        return self._json("POST", f"/v1/videos/{video}/cancel")

    def delete(self, video: str) -> None:
        """Remove a video and its files."""
        self._json("DELETE", f"/v1/videos/{video}")

    def _make(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        files = {name: value for name, value in fields.items() if isinstance(value, Path)}
        if not files:
            return self._json("POST", path, json=fields)
        texts = {name: str(value) for name, value in fields.items() if name not in files}
        with ExitStack() as stack:
            opened = {name: stack.enter_context(file.open("rb")) for name, file in files.items()}
            return self._json("POST", path, data=texts, files=opened)

    def _json(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        answer = self.http.request(method, path, **more)
        self._check(answer)
        return answer.json()

    @staticmethod
    def _check(answer: Any) -> None:
        if answer.status_code >= 400:
            try:
                error = answer.json()["error"]
            except (ValueError, KeyError, TypeError):
                error = {"code": None, "message": f"the server answered {answer.status_code}"}
            raise ServerError(answer.status_code, error["code"], error["message"])


def _clip(video: str | Path) -> Any:
    return video if isinstance(video, Path) else {"id": video}
