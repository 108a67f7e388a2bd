"""When jobs will be done, held against a queue that is worked off by a clock of the test's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.serve import jobs, leases
from runtime.serve.api import Api
from runtime.serve.forecast import Outlook, in_turn, learned, pace, size_of
from runtime.serve.jobs import Job, Store, new_id
from runtime.serve.settings import Settings
from tests.serving import LONG, TINY, Server

WITHIN = 0.25  # of the truth


@dataclass
class Clock:
    """The store's time."""

    now: float = 1e6
    CLOCK_MONOTONIC: int = 0

    def time(self) -> float:
        return self.now

    def clock_gettime(self, _: int) -> float:
        return self.now


@dataclass
class Works:
    """A store whose jobs take `factor` times what is predicted, give or take a tenth."""

    store: Store
    clock: Clock
    factor: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)
    claims: list[str] = field(default_factory=list)

    def add(
        self, predicted: float, owner: str = "a", priority: int = 0, deviation: float = 0.0, model: str = "m"
    ) -> str:
        values = {
            "id": new_id("video"), "kind": "video", "owner": owner, "model": model, "prompt": "", "priority": priority,
            "request": {}, "shown": {}, "total": 10,
        }  # fmt: skip
        job = self.store.create(values, max_queue=1000, max_owner=1000)
        assert job is not None
        self.store.estimate(job, predicted, 0.8 * predicted)
        self.seconds[job.id] = predicted * self.factor * (1 + deviation)
        return job.id

    def run(self) -> None:
        """Work everything off, a step of a job at a time; a much shorter job of higher priority goes first."""
        while (job := self.store.claim("worker")) is not None:
            self.claims.append(job.id)
            self.make(job)

    def make(self, job: Job) -> None:
        step = 0.8 * self.seconds[job.id] / job.total
        for done in range(job.step + 1, job.total + 1):
            self.clock.now += step
            self.store.beat(job, done, job.total, round(90 * done / job.total))
            if self.store.pressing(job, step * (job.total - done)):
                self.store.release(job)
                return
        self.clock.now += 0.2 * self.seconds[job.id]
        self.store.finish(job, "completed")
        self.done[job.id] = self.clock.now


@contextmanager
def told_by(clock: Clock) -> Iterator[None]:
    """Let the store ask this clock."""
    with mock.patch.object(jobs, "time", clock), mock.patch.object(leases, "time", clock):
        yield


@pytest.fixture
def works(tmp_path: Path) -> Any:
    clock = Clock()
    with told_by(clock):
        yield Works(Store(tmp_path), clock)


predictions = st.floats(1.0, 300.0)
deviations = st.floats(-0.1, 0.1)
owners, priorities = st.sampled_from("abc"), st.sampled_from([0, 0, 0, 1])


@settings(deadline=None, max_examples=15)
@given(
    st.floats(0.4, 3.0),
    st.lists(st.tuples(predictions, owners, priorities, deviations), min_size=1, max_size=12),
)
def test_jobs_are_done_when_it_was_told(factor: float, given: list[tuple[float, str, int, float]]) -> None:
    """Whatever the machine's pace is, once one job of each size has shown it; with keys that share, and priorities."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, told_by(clock):
        works = Works(Store(Path(folder)), clock, factor)
        for size in {size_of(predicted) for predicted, *_ in given}:
            works.add(2.0**size)
        works.run()
        works.claims.clear()
        ids = [works.add(*each) for each in given]
        outlooks = works.store.outlooks(1)
        order = sorted(ids, key=lambda job: outlooks[job].position)
        began = clock.now
        works.run()
        assert works.claims == order
        for job in ids:
            told, true = outlooks[job].done, works.done[job] - began
            assert told is not None and abs(told - true) <= WITHIN * true, (told, true)


def test_a_running_job_tells_its_own_pace(works: Works) -> None:
    works.factor = 4.0  # nobody has learned that yet
    job = works.store.get(works.add(100.0))
    assert job is not None
    first = works.store.outlooks(1)[job.id].done
    assert first == pytest.approx(100.0)
    taken = works.store.claim("worker")
    assert taken is not None
    for step in range(1, 6):
        works.clock.now += 32.0
        works.store.beat(taken, step, 10, 9 * step)
    assert works.store.outlooks(1)[job.id].done == pytest.approx(5 * 32 + 20)
    works.clock.now += 16.0
    assert works.store.outlooks(1)[job.id].done == pytest.approx(5 * 32 + 20 - 16), "time passes"


def test_what_is_overdue_is_not_said_to_be_done(works: Works) -> None:
    """The steps are done, and the last frames take longer than was foreseen."""
    job = works.add(10.0)
    taken = works.store.claim("worker")
    assert taken is not None
    works.clock.now += 8.0
    works.store.beat(taken, 10, 10, 90)
    works.store.beat(taken, 10, 10, 99)
    told = []
    for _ in range(3):
        works.clock.now += 30.0
        told.append(works.store.outlooks(1)[job].done)
    assert all(seconds is not None and 0 < seconds < 5 for seconds in told), told
    assert told == sorted(told), "the longer it takes, the longer it may"


def test_a_small_job_does_not_wait_for_a_long_one(works: Works) -> None:
    film = works.store.claim("worker") if works.add(1000.0) else None
    assert film is not None
    picture, other = works.add(5.0, priority=1), works.add(500.0, priority=1)
    outlooks = works.store.outlooks(1)
    assert outlooks[picture].wait == 0.0 and outlooks[picture].done == 5.0
    assert outlooks[other].wait == pytest.approx(1005.0), "it is no shorter by far"
    assert works.store.pressing(film, 1000.0)


def test_several_workers_and_what_is_not_predicted(works: Works) -> None:
    ids = [works.add(seconds) for seconds in (10.0, 20.0, 30.0, 40.0)]
    outlooks = works.store.outlooks(2)
    assert [outlooks[job].done for job in ids] == [10.0, 20.0, 40.0, 60.0]
    job = works.store.get(ids[0])
    assert job is not None
    with works.store._write() as db:
        db.execute("UPDATE jobs SET estimate = NULL WHERE id = ?", (job.id,))
    assert works.store.outlooks(1)[ids[0]].done is None
    assert works.store.outlooks(2)[ids[3]].position == 3


def test_jobs_of_a_model_that_is_not_served_are_in_nobodys_way(works: Works) -> None:
    """A server that was started again with another model makes that one's jobs as if it were alone."""
    works.add(100.0, model="gone")
    running = works.store.claim("a worker of another server")
    left, mine = works.add(100.0, model="gone"), works.add(10.0)
    assert running is not None and works.store.active() == 3 and works.store.active(["m"]) == 1
    assert works.store.outlooks(1, ["m"]) == {mine: Outlook(0, 0.0, 10.0)}
    assert works.store.outlooks(1)[mine].position == 1 and left in works.store.outlooks(1, ["m", "gone"])
    api, waiting = Api(Settings(data=works.store.data, model=("m",)), works.store, lambda: None), works.store.get(left)
    assert waiting is not None
    told = api.object(waiting)
    assert "'gone' is not served" in told["warnings"][0] and "queue_position" not in told
    values = {
        "kind": "video", "owner": "a", "model": "m", "prompt": "", "priority": 0, "request": {}, "shown": {},
    }  # fmt: skip
    for limits, taken in (((2, 9), True), ((2, 9), False), ((9, 2), False)):
        of = {"max_queue": limits[0], "max_owner": limits[1], "models": ["m"]}
        assert (works.store.create(values | {"id": new_id("video")}, **of) is not None) == taken


def test_fair_shares() -> None:
    jobs = [
        {"id": n, "seq": n, "owner": owner, "priority": priority, "estimate": 10.0}
        for n, (owner, priority) in enumerate([("a", 0), ("a", 0), ("a", 0), ("b", 0), ("b", 1), ("c", 0)])
    ]
    assert [job["id"] for job in in_turn(jobs, {})] == [4, 0, 5, 1, 3, 2]
    assert [job["id"] for job in in_turn(jobs, {"a": 100.0})][-3:] == [0, 1, 2]


def test_paces() -> None:
    paces = {("m", 0): 2.0, ("m", 5): 4.0, ("n", 0): 8.0}
    assert (pace(paces, "m", 1.2), pace(paces, "m", 1000.0), pace(paces, "o", 1.0)) == (2.0, 4.0, 1.0)
    assert learned(None, 3.0, 2.0) == 1.5 and 1.0 < learned(1.0, 3.0, 2.0) < 1.5


def test_who_is_ready_can_foresee(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that nobody has measured, too: in short at first, whole as soon as there is nothing else to do."""
    monkeypatch.setenv("DIT_RUNTIME_CACHE", str(tmp_path / "cache"))
    server = Server(tmp_path / "data")

    def machine() -> str:
        answer = server.http.post("/v1/plan", json=TINY)
        assert answer.status_code == 200, answer.text
        return answer.json()["predicted"]["machine"]

    assert machine().endswith(", measured briefly")
    film = server.create(LONG)["id"]
    server.until(lambda: server.video(film).get("eta_seconds"))
    server.http.delete(f"/v1/videos/{film}")
    server.until(lambda: list((tmp_path / "cache" / "machine").glob("*.json")))
    server.until(lambda: not machine().endswith("briefly"))
    assert server.stop() == 0
