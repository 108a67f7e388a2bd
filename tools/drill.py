"""Kill a server at random moments, and count what is lost: python tools/drill.py --kills 20

Jobs of the built-in model are accepted all the while; worker, server or both are killed (SIGKILL) at random. In the end
every accepted job must be completed once, and its frames equal those of the same job on a server that nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import httpx2

from tests.serving import Server, frames_of

JOB = {"prompt": "a red ball", "num_frames": 9, "num_inference_steps": 12}
SEEDS = 3


def main() -> int:
    """Run the drill and print its table; 1 where anything was lost, doubled or different."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often something is killed (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wanted = undisturbed(Path(folder) / "calm")
        jobs, kills, states, server = disturbed(Path(folder) / "drill", options.kills, random.Random(options.seed))
        try:
            found = [server.done(job) for job in jobs]
            different = sum(
                frames_of(server.content(job)).tobytes() != wanted[video["seed"]]
                for job, video in zip(jobs, found, strict=True)
            )
            listed = Counter(
                video["id"] for video in server.http.get("/v1/videos", params={"limit": 100}).json()["data"]
            )
        finally:
            code = server.stop()
    lost, doubled = len(set(jobs) - set(listed)), sum(count - 1 for count in listed.values())
    print("| | |\n| --- | ---: |")
    for name, count in sorted(kills.items()):
        print(f"| killed: {name} | {count} |")
    for name, count in sorted(states.items()):
        print(f"| killed while the youngest job was {name} | {count} |")
    for name, count in (
        ("jobs accepted", len(jobs)), ("lost", lost), ("with two results", doubled), ("with other frames", different),
        ("most attempts of one job", max(video["attempt"] for video in found)), ("exit code at the end", code),
    ):  # fmt: skip
        print(f"| {name} | {count} |")
    return int(bool(lost or doubled or different or code))


def undisturbed(data: Path) -> dict[int, bytes]:
    """Return the frames of each seed's job on a server that is left alone."""
    server = Server(data)
    made = {seed: server.create(JOB | {"seed": seed})["id"] for seed in range(SEEDS)}
    frames = {}
    for seed, job in made.items():
        server.done(job)
        frames[seed] = frames_of(server.content(job)).tobytes()
    server.stop()
    return frames


def disturbed(data: Path, kills: int, moments: random.Random) -> tuple[list[str], Counter[str], Counter[str], Server]:
    """Return (accepted jobs, what was killed, in which states, the server) after so many kills."""
    server = Server(data)
    jobs: list[str] = []
    done: Counter[str] = Counter()
    states: Counter[str] = Counter()
    for index in range(kills):
        if index % 2 == 0:
            jobs.append(server.create(JOB | {"seed": index % SEEDS})["id"])
        time.sleep(moments.uniform(0.0, 4.0))
        which = moments.choice(("worker", "server", "both"))
        try:
            states[server.video(jobs[-1])["status"]] += 1
        except httpx2.HTTPError:
            states["unknown"] += 1
        server.kill(which)
        done[which] += 1
        if which != "worker":
            server.start()
    return jobs, done, states, server


if __name__ == "__main__":
    sys.exit(main())
