"""A client of the server's surface: the same paths that OpenAI's client speaks, and what goes beyond them."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

FAILED = ("failed", "cancelled")
TRIES = 3
LONGEST_WAIT = 60.0  # seconds that a server may ask to wait before another try
STARTING = 120.0  # seconds that one is waited for which says that no model is loaded yet
Found = dict[str, Any]
Many = list[Found]  # the method `list` hides the type of that name
Names = list[str]
Pictures = list[bytes]


class ServerError(OSError):
    """What the server answered instead of a success: `status` (0: no answer came), `code`, and its message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Client:
    """Asks a server for videos; `key` is an API key where the server has them.

        client = runtime.Client("http://127.0.0.1:8000")
        client.save(client.wait(client.create("a red ball", num_inference_steps=25)), "ball.mp4")

    Videos are named by their ids or objects, or are files where a Path is given; `fields` are the API's, and a Path in
    them is sent as a file. What is asked for is asked again where no answer came or the server is busy, and made once
    all the same. Raises ServerError for what the server refuses, and where it cannot be reached.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, seconds: float = 600.0) -> None:
        import httpx2

        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address of a server; legal: such as http://127.0.0.1:8000")
        self.http = httpx2.Client(base_url=url, headers=headers, timeout=httpx2.Timeout(seconds, connect=5.0))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    # What makes something: the object of it is returned at once.

    def create(self, prompt: str, **fields: Any) -> Found:
        """Ask for a video, with any field of the API."""
        return self._make("/v1/videos", {"prompt": prompt, **fields})

    def loop(self, prompt: str, video: str | Path | Found | None = None, **fields: Any) -> Found:
        """Ask for a seamless loop, of a prompt or of a clip that is closed."""
        given = {} if video is None else {"video": _clip(video)}
        return self.create(prompt, loop=True, **given, **fields)

    def remix(self, video: str | Found, prompt: str, **fields: Any) -> Found:
        """Ask for a finished video made anew."""
        return self._make(f"/v1/videos/{_name(video)}/remix", {"prompt": prompt, **fields})

    def finish(self, video: str | Found, **fields: Any) -> Found:
        """Ask for the final video of a draft."""
        return self._make(f"/v1/videos/{_name(video)}/finish", fields)

    def edit(self, video: str | Path | Found, prompt: str, **fields: Any) -> Found:
        """Ask for a clip made anew."""
        return self._make("/v1/videos/edits", {"video": _clip(video), "prompt": prompt, **fields})

    def extend(self, video: str | Path | Found, prompt: str, **fields: Any) -> Found:
        """Ask for more of a clip."""
        return self._make("/v1/videos/extensions", {"video": _clip(video), "prompt": prompt, **fields})

    def connect(self, first: str | Path | Found, second: str | Path | Found, prompt: str, **fields: Any) -> Found:
        """Ask for what leads from one clip to another."""
        return self._make(
            "/v1/videos/connections", {"videos": [_clip(first), _clip(second)], "prompt": prompt, **fields}
        )

    def image(self, prompt: str, **fields: Any) -> Pictures:
        """Return `n` pictures (one by default), as the files' bytes, when they are made."""
        return _pictures(self._make("/v1/images/generations", {"prompt": prompt, **fields}))

    def edit_image(self, image: Path, prompt: str, **fields: Any) -> Pictures:
        """Return a picture made anew, where a `mask` is transparent or as far as `strength` says."""
        return _pictures(self._make("/v1/images/edits", {"image": image, "prompt": prompt, **fields}))

    # What tells of videos, and ends them.

    def get(self, video: str | Found) -> Found:
        """Return a video's object."""
        return self._json("GET", f"/v1/videos/{_name(video)}")

    def list(self, limit: int = 100, **filters: Any) -> Iterator[Found]:
        """Yield all videos, the newest first, asked for in pages of `limit`; filters are `status` and `search`."""
        after: Found = {}
        while True:
            page = self._json("GET", "/v1/videos", params={"limit": limit, **filters, **after})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}

    def events(self, video: str | Found) -> Iterator[tuple[str, Found]]:
        """Yield (event, data) as they come: "progress", "preview", and "done" as the last; a lost connection is taken
        up again where it was."""
        last, tries = "", TRIES
        while tries:
            tries -= 1
            headers = {"last-event-id": last} if last else {}
            with self._stream("GET", f"/v1/videos/{_name(video)}/events", headers=headers) as lines:
                for kind, data, number in _events(lines):
                    last, tries = number, TRIES
                    yield kind, data
                    if kind == "done":
                        return
            time.sleep(1.0)
        raise ServerError(0, "unreachable", f"the events of {_name(video)} end before it is done")

    def wait(self, video: str | Found, seconds: float = 0.5) -> Found:
        """Return a video's object when it is completed; ServerError where it fails."""
        while (found := self.get(video))["status"] != "completed":
            if found["status"] in FAILED:
                error = found["error"] or {"code": found["status"], "message": f"{found['id']} is {found['status']}"}
                raise ServerError(200, error["code"], error["message"])
            time.sleep(seconds)
        return found

    def save(
        self, video: str | Found, path: str | Path, *, variant: str = "video", format: str | None = None,
        part: tuple[int, int | None] | None = None,
    ) -> Path:  # fmt: skip
        """Write a video's file (as mp4, webm or gif), thumbnail or spritesheet; it appears when all of it is there.

        `part` are the frames of a video that are wanted, from the first number up to before the second (None: the end).
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        params: dict[str, Any] = {"variant": variant} | ({} if format is None else {"format": format})
        if part is not None:
            params |= {"from": part[0]} | ({} if part[1] is None else {"to": part[1]})
        try:
            with (
                self._stream("GET", f"/v1/videos/{_name(video)}/content", params=params) as answer,
                partial.open("wb") as handle,
            ):
                for chunk in answer.iter_bytes():
                    handle.write(chunk)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def cancel(self, video: str | Found) -> Found:
        """Stop a video at its next step."""
        return self._json("POST", f"/v1/videos/{_name(video)}/cancel")

    def delete(self, video: str | Found, *, undo: float = 0.0) -> Found:
        """Remove a video and its files; for `undo` seconds it can be restored."""
        return self._json("DELETE", f"/v1/videos/{_name(video)}", params={"undo": undo} if undo else {})

    def restore(self, video: str | Found) -> Found:
        """Take a deletion back, as long as the server keeps what was deleted."""
        return self._json("POST", f"/v1/videos/{_name(video)}/restore")

    def verify(self, video: str | Path | Found) -> Found:
        """Return what the content credentials of a file, or of a video of the server, say."""
        return self._make("/v1/provenance", {"video": _clip(video)})

    # What tells of prompts, characters and the server.

    def plan(self, **fields: Any) -> Found:
        """Return what a request would take; no video is made."""
        return self._make("/v1/plan", fields)

    def expand(self, prompt: str, **fields: Any) -> Found:
        """Return a prompt written out."""
        return self._make("/v1/prompts/expand", {"prompt": prompt, **fields})

    def create_character(self, name: str, video: str | Path | Found) -> Found:
        """Keep who is seen in a clip or picture under a name."""
        return self._make("/v1/videos/characters", {"name": name, "video": _clip(video)})

    def characters(self) -> Many:
        """Return the characters that are kept."""
        return self._json("GET", "/v1/videos/characters")["data"]

    def delete_character(self, character: str) -> Found:
        """Remove a character, by its id."""
        return self._json("DELETE", f"/v1/videos/characters/{character}")

    def models(self) -> Names:
        """Return the names of the server's models."""
        return [each["id"] for each in self._json("GET", "/v1/models")["data"]]

    def _make(self, path: str, fields: Mapping[str, Any]) -> Found:
        headers = {"idempotency-key": uuid.uuid4().hex}
        files = {name: value for name, value in fields.items() if isinstance(value, Path)}
        texts = {name: _enclosed(value) for name, value in fields.items() if name not in files and value is not None}
        if not files:
            return self._json("POST", path, json=texts, headers=headers)
        plain = {name: value if isinstance(value, str) else json.dumps(value) for name, value in texts.items()}
        with ExitStack() as stack:
            opened = {name: stack.enter_context(file.open("rb")) for name, file in files.items()}
            return self._json("POST", path, data=plain, files=opened, headers=headers)

    def _json(self, method: str, path: str, **more: Any) -> Found:
        import httpx2

        left, starting = TRIES, time.monotonic() + STARTING
        while True:
            left -= 1
            try:
                answer = self.http.request(method, path, **more)
            except httpx2.TransportError as error:
                if not left:
                    raise self._unreachable(error) from error
                time.sleep(0.5)
                continue
            wait = _wait(answer)
            if wait is not None and _error(answer)[0] == "not_ready" and time.monotonic() < starting:
                left = TRIES
            if not left or wait is None:
                _check(answer)
                return answer.json()
            time.sleep(wait)

    @contextmanager
    def _stream(self, method: str, path: str, **more: Any) -> Iterator[Any]:
        """Yield an answer that is read as it comes; what fails is told as everywhere."""
        import httpx2

        try:
            with self.http.stream(method, path, **more) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    _check(answer)
                yield answer
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ServerError:
        return ServerError(
            0, "unreachable", f"{self.http.base_url} cannot be reached ({type(error).__name__}); is the server running?"
        )


def _wait(answer: Any) -> float | None:
    """Return the seconds after which a server that is busy wants to be asked again; None where it does not."""
    if answer.status_code not in (429, 502, 503, 504) or answer.headers.get("x-should-retry") == "false":
        return None
    try:
        seconds = float(answer.headers.get("retry-after", 1))
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST_WAIT else None


def _check(answer: Any) -> None:
    if answer.status_code >= 400:
        raise ServerError(answer.status_code, *_error(answer))


def _error(answer: Any) -> tuple[str | None, str]:
    try:
        error = answer.json()["error"]
        return error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return None, f"the server answered {answer.status_code}"


def _events(answer: Any) -> Iterator[tuple[str, Found, str]]:
    """Yield (event, data, id) of a stream of server-sent events."""
    event: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
        elif "data" in event:
            yield event.get("event", "message"), json.loads(event["data"]), event.get("id", "")
            event = {}


def _name(video: str | Found) -> str:
    return video if isinstance(video, str) else video["id"]


def _clip(video: str | Path | Found) -> Any:
    return video if isinstance(video, Path) else {"id": _name(video)}


def _enclosed(value: Any) -> Any:
    """Return a field with the files within lists and objects as data: URLs."""
    if isinstance(value, Path):
        return f"data:application/octet-stream;base64,{base64.b64encode(value.read_bytes()).decode()}"
    if isinstance(value, Mapping):
        return {name: _enclosed(each) for name, each in value.items()}
    return [_enclosed(each) for each in value] if isinstance(value, list | tuple) else value


def _pictures(answer: Found) -> Pictures:
    return [base64.b64decode(each["b64_json"]) for each in answer["data"]]
