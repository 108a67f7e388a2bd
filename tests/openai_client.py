"""What an unmodified OpenAI client does against a server: python openai_client.py URL, in that client's own Python."""

from __future__ import annotations

import base64
import sys
import threading
import urllib.request
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

warnings.simplefilter("ignore", DeprecationWarning)

TINY = {"num_frames": 5, "num_inference_steps": 2, "seed": 3}


def refusing_once(url: str) -> tuple[str, list[int]]:
    """Return the address of what stands before a server, answers 503 once, and what it answered."""
    answers: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.append(200 if answers else 503)
            body = urllib.request.urlopen(url + self.path).read() if answers[-1] == 200 else b"{}"
            self.send_response(answers[-1])
            self.send_header("retry-after", "1")
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    gate = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=gate.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{gate.server_address[1]}", answers


def main(url: str) -> None:
    """Create, poll, list with paging, download, remix, extend, edit, errors, retries, delete."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1)
    video = client.videos.create_and_poll(prompt="a red ball", size="64x64", extra_body=TINY, poll_interval_ms=100)
    assert video.status == "completed" and video.progress == 100 and video.size == "64x64", video
    assert client.videos.retrieve(video.id).seconds == "0.625"
    data = client.videos.download_content(video.id).read()
    assert data[4:8] == b"ftyp"
    assert client.videos.download_content(video.id, variant="thumbnail").read()[:4] == b"RIFF"
    again = client.videos.create(prompt="a red ball", size="64x64", extra_body=TINY)
    other = client.videos.remix(video.id, prompt="a blue ball", extra_body={"num_inference_steps": 4})
    assert other.remixed_from_video_id == video.id
    ids = [each.id for each in client.videos.list(limit=1, order="asc")]
    assert ids[-3:] == [video.id, again.id, other.id], ids
    if hasattr(client.videos, "extend"):
        more = {"num_frames": 4, "num_inference_steps": 2}
        longer = client.videos.extend(prompt="on", seconds=openai.omit, video=("clip.mp4", data), extra_body=more)
        edited = client.videos.edit(
            prompt="blue", video=openai.omit, extra_body={"video": {"id": video.id}, "num_inference_steps": 4}
        )
        for each in (longer, edited):
            assert client.videos.poll(each.id, poll_interval_ms=100).status == "completed", each
            client.videos.delete(each.id)
        character = client.videos.create_character(name="Ada", video=("clip.mp4", data))
        assert client.videos.get_character(character.id).name == "Ada"
    for each in (again, other):
        assert client.videos.poll(each.id, poll_interval_ms=100).status == "completed"
    sheets = [client.videos.download_content(each.id, variant="spritesheet").read() for each in (video, again)]
    assert sheets[0] == sheets[1]  # the same seed; the files themselves are signed, each by itself
    try:
        client.videos.create(prompt="x", size="833x481")
        raise AssertionError("an odd size was taken")
    except openai.BadRequestError as error:  # the clients' own environments have no pytest
        assert error.param == "size" and "832" in error.message and error.request_id, error  # noqa: PT017
    try:
        client.videos.retrieve("video_none")
        raise AssertionError("there is no such video")
    except openai.NotFoundError as error:
        assert error.code == "not_found", error  # noqa: PT017
    gate, answers = refusing_once(url)
    patient = openai.OpenAI(base_url=f"{gate}/v1", api_key="none", max_retries=2)
    assert patient.videos.retrieve(video.id).id == video.id and answers == [503, 200], answers
    picture = client.images.generate(prompt="a ball", n=2, extra_body={"num_inference_steps": 2})
    assert len(picture.data) == 2 and picture.data[0].b64_json
    drawn = base64.b64decode(picture.data[0].b64_json)
    edited = client.images.edit(image=("a.png", drawn), prompt="a cube", extra_body={"num_inference_steps": 2})
    assert edited.data[0].b64_json
    assert [model.id for model in client.models.list()] == ["demo"]
    for each in (video, again, other):
        assert client.videos.delete(each.id).deleted
    assert openai.__version__
    print(f"openai {openai.__version__}: everything is as it should be")


if __name__ == "__main__":
    main(sys.argv[1])
