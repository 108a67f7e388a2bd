"""The page in a real browser against a started server: what a person does with it, and what must never happen."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi")

from runtime.reading import read_video
from tests.browsing import Visit, browser, plays
from tests.serving import TINY, Server

FOLDER = Path(__file__).parent.parent / "runtime/serve/page"
SHOTS = os.environ.get("PAGE_SHOTS")  # a folder that pictures of the page are written to
HOSTILE = [
    "<img src=x onerror=alert(1)><script>alert(2)</script>",
    "\u202eevil\u202c مرحبا بالعالم {n} ${t} ' \" ` --",
    "a ball " * 285,
]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def server(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("data") / "page", "--port", free_port())
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def videos(server: Server) -> list[dict[str, Any]]:
    made = [TINY | {"prompt": prompt} for prompt in ("a red ball", "a blue ball", *HOSTILE)]
    return [server.done(server.create(fields)["id"]) for fields in made]


@pytest.fixture
def visit(chromium: Any, server: Server) -> Iterator[Visit]:
    found = Visit(chromium, server.url)
    yield found
    for each in server.http.get("/v1/videos", params={"status": "queued,in_progress"}).json()["data"]:
        server.http.post(f"/v1/videos/{each['id']}/cancel")
    found.end()


def settle(page: Any, **values: str) -> None:
    """Open the settings, and fill in some by their labels."""
    page.get_by_text("More settings").click()
    for name, value in values.items():
        page.get_by_label(name, exact=True).fill(value)


def make(page: Any, prompt: str = "a red ball", **values: str) -> None:
    """Make a video of a few steps, as a person would."""
    page.get_by_label("What should the video show?").fill(prompt)
    settle(page, **{"Steps": "2", "Width": "64", "Height": "64"} | values)
    page.get_by_role("button", name="Make video").click()


def newest(server: Server) -> dict[str, Any]:
    """The newest job; one without an id where there is none."""
    found = server.http.get("/v1/videos", params={"limit": 1}).json()["data"]
    return found[0] if found else {"id": None, "task": None}


def png(colour: str = "green") -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(picture, "PNG")
    return picture.getvalue()


def test_it_is_small_and_shut(server: Server) -> None:
    """Under 150 kB, nothing inline, and a policy that lets nothing in from elsewhere."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 150_000
    index = server.http.get("/")
    assert index.headers["content-type"].startswith("text/html")
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    for path in FOLDER.iterdir():
        text = path.read_text()
        answer = server.http.get(f"/page/{path.name}")
        assert answer.status_code == 200 and answer.content == path.read_bytes()
        assert answer.headers["content-security-policy"] == policy
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|style=|\son\w+=\"", text), path
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), path
        again = server.http.get(f"/page/{path.name}", headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304
    for path in ("/page/", "/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py"):
        assert server.http.get(path).status_code == 404, path


def test_every_text_in_every_language() -> None:
    """None is missing in a language, none is asked for that is not there, and none is left over."""
    source = (FOLDER / "texts.js").read_text()
    rows = re.findall(r'^  "([\w.]+)": \["(.+?)", "(.+?)"\],$', source, re.M)
    known = {name for name, _, _ in rows}
    assert len(rows) == len(known) == len(re.findall(r'^  "', source, re.M))
    for name, english, chinese in rows:
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), name
    code = "".join(path.read_text() for path in FOLDER.glob("*.js") if path.name != "texts.js")
    asked = set(re.findall(r'\bt\("([\w.]+)"', code))
    assert not asked - known
    built = {name for name in known if re.search(rf"\bt\(`{re.escape(name.rpartition('.')[0])}\.\$", code)}
    named = {name for name in known if f'"{name}"' in code}
    assert not known - asked - built - named - {"quality.draft.why", "quality.standard.why", "quality.final.why"}


def test_a_video_from_a_prompt(visit: Visit, server: Server) -> None:
    """Made, shown with its progress, and played; its seed is what the field says."""
    make(visit.page)
    film = visit.page.locator(".stage video")
    film.wait_for()
    visit.until(lambda: plays(film))
    made = newest(server)
    assert made["size"] == "64x64" and made["num_inference_steps"] == 2
    assert visit.page.get_by_label("Seed", exact=True).input_value() == str(made["seed"])
    assert re.search(r"About .+ of memory", visit.until(lambda: visit.page.locator(".forecast").inner_text()))


def test_expand_variations_and_pictures(visit: Visit, server: Server) -> None:
    page = visit.page
    page.get_by_label("What should the video show?").fill("a red ball rises")
    page.get_by_role("button", name="Expand").click()
    expanded = page.get_by_label("Written out for the model")
    expanded.wait_for()
    assert "rises from the bottom to the top" in expanded.input_value()
    expanded.fill("a red ball rises to the top")
    picture = {"name": "first.png", "mimeType": "image/png", "buffer": png()}
    page.get_by_label("First frame").set_input_files(picture)
    page.get_by_label("Last frame").set_input_files(picture)
    page.get_by_label("Keyframe", exact=True).set_input_files(picture)
    page.get_by_label("Second at which keyframe 1 stands").fill("0.5")
    page.get_by_label("2 at once").check()
    page.get_by_label("Keep this seed").click()
    page.get_by_label("Seed", exact=True).fill("41")
    before = newest(server)["id"]
    settle(page, Steps="2", Width="64", Height="64")
    page.get_by_role("button", name="Make video").click()
    last = visit.until(lambda: (found := newest(server))["id"] != before and found["seed"] == 42 and found)
    assert last["prompt"] == "a red ball rises to the top" and last["task"] == "place"
    assert len(server.done(last["id"])["receipt"]["request"]["clips"]) == 3
    page.reload()
    assert page.get_by_label("What should the video show?").input_value() == "a red ball rises"


def test_cancel(visit: Visit, server: Server) -> None:
    make(visit.page, Steps="400")
    visit.page.locator(".stage .preview:not([hidden])").wait_for()
    visit.page.locator(".stage").get_by_role("button", name="Cancel").click()
    visit.until(lambda: newest(server)["status"] == "cancelled")
    visit.page.locator(".stage progress").wait_for(state="hidden")


def test_a_reload_another_tab_and_a_restart_go_on(visit: Visit, server: Server) -> None:
    """Whatever happens in between, the page comes back to the job by itself, and the job goes on where it was."""
    page = visit.page
    make(page, Steps="1000")
    step = re.compile(r"Step ([1-9]\d*) of 1000")

    def shown() -> int:
        return int(step.search(page.get_by_text(step).first.inner_text())[1])  # type: ignore[index]

    page.get_by_text(step).first.wait_for()
    page.reload()
    page.get_by_text(step).first.wait_for()
    other = visit.open()
    other.get_by_text(step).first.wait_for()
    other.close()
    visit.until(lambda: shown() > 10)  # a checkpoint is behind it
    server.kill("both")
    page.locator(".offline:not([hidden])").wait_for()
    reached = newest_step(server)
    server.start()
    page.locator(".offline").wait_for(state="hidden")
    visit.until(
        lambda: newest(server)["attempt"] > 1 and shown() > reached > 0, 240
    )  # it may measure the machine first
    page.locator(".stage").get_by_role("button", name="Cancel").click()
    visit.until(lambda: newest(server)["status"] == "cancelled")


def newest_step(server: Server) -> int:
    """How far the newest job had come, read while no server runs."""
    with sqlite3.connect(server.data / "store.db") as db:
        return db.execute("SELECT step FROM jobs ORDER BY seq DESC LIMIT 1").fetchone()[0]


def test_storyboard(visit: Visit, server: Server) -> None:
    """Three cards, by keys and by pointer; one begins with a picture; a gap stays for the model."""
    visit.go("storyboard")
    page = visit.page
    for words in ("a red ball", "a blue ball", "a green ball"):
        page.get_by_role("button", name="Add card").click()
        page.get_by_label("What happens", exact=True).fill(words)
    cards = page.locator(".piece .body")
    assert cards.count() == 3
    first, last = cards.nth(0), cards.nth(2)
    first.press("Alt+ArrowLeft")
    last.press("Shift+ArrowRight")
    assert page.locator(".gap").count() == 2
    page.get_by_label("Begins with").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png()})
    before = visit.until(lambda: page.locator(".piece").nth(2).bounding_box())  # none while the lane is drawn anew
    handle = visit.until(lambda: page.locator(".piece").nth(2).locator(".edge.to").bounding_box())
    page.mouse.move(handle["x"] + 5, handle["y"] + 20)
    page.mouse.down()
    page.mouse.move(handle["x"] - 60, handle["y"] + 20, steps=5)
    page.mouse.up()
    visit.until(lambda: (box := page.locator(".piece").nth(2).bounding_box()) and box["width"] < before["width"] - 20)
    page.get_by_label("Draft").check()
    visit.until(lambda: "About" in page.locator(".forecast").inner_text())
    page.get_by_role("button", name="Make film").click()
    visit.until(lambda: newest(server)["task"] == "storyboard")
    made = server.done(newest(server)["id"])
    told = made["receipt"]["request"]["storyboard"]
    assert [card["prompt"] for card in told] == ["a red ball", "a blue ball", "a green ball"]
    assert told[0]["to"] < told[1]["from"] and told[1]["to"] < told[2]["from"] and told[2]["clip"]


def test_from_the_library(visit: Visit, server: Server, videos: list[dict[str, Any]]) -> None:
    """Remix, extend, loop and connect, each from where a person finds it; the seam of what was extended is shown."""
    one, two = videos[0]["id"], videos[1]["id"]
    page = visit.page
    made: dict[str, dict[str, Any]] = {}

    def sent(task: str) -> None:
        found = visit.until(lambda: (video := newest(server))["task"] == task and video)
        made[task] = server.done(found["id"])

    visit.go("library")
    page.locator(f"[data-id={one}] > a").click()
    page.get_by_role("button", name="Remix", exact=True).click()
    page.get_by_label("What it should show instead").fill("a blue ball")
    page.get_by_label("Strength").fill("0.75")
    page.locator("form").get_by_role("button", name="Remix").click()
    sent("edit")
    visit.go(f"clip/{one}")
    page.get_by_role("button", name="Extend", exact=True).click()
    page.get_by_label("Before the beginning").check()
    page.locator("form").get_by_role("button", name="Extend").click()
    sent("prepend")
    visit.go(f"clip/{one}")
    page.get_by_role("button", name="Re-cut").click()
    page.get_by_role("slider", name="First frame of the part").press("ArrowRight")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save the part").click()
    assert saved.value.suggested_filename.endswith("-1-5.mp4")
    assert read_video(saved.value.path()).num_frames == 4
    page.get_by_role("button", name="Loop the part").click()
    page.locator("form").get_by_role("button", name="Loop").click()
    sent("loop")
    visit.go("library")
    page.locator(f"[data-id={one}] > a").drag_to(page.locator(f"[data-id={two}] > a"))
    page.get_by_label("What happens between them").fill("it turns blue")
    page.get_by_role("dialog").get_by_role("button", name="Connect").click()
    sent("connect")
    assert made["edit"]["receipt"]["request"]["strength"] == 0.75
    assert {made[task]["remixed_from_video_id"] for task in made} == {one}
    assert made["connect"]["num_frames"] > 10
    visit.go(f"clip/{made['prepend']['id']}")
    page.locator(".rail .seam").wait_for()
    assert page.locator(".rail .given").count() == 1 and page.locator(".rail .made").count() == 1
    assert "Seam at" in page.locator(".legend").inner_text()


def test_a_clip_its_receipt_and_its_copies(
    visit: Visit, server: Server, videos: list[dict[str, Any]], tmp_path: Path
) -> None:
    page, video = visit.page, videos[0]
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.go(f"clip/{video['id']}")
    visit.until(lambda: plays(page.locator("video")))
    page.locator("aside").get_by_text("redentials").first.wait_for()  # asked for when all else is shown
    facts = page.locator("aside").inner_text()
    for text in ("64 × 64", "Seed", "Nothing was approximated", "Time taken", "Time predicted", "redentials"):
        assert text in facts, text
    for kind, head in (("mp4", b"ftyp"), ("webm", b"\x1aE\xdf\xa3"), ("gif", b"GIF8")):
        with page.expect_download() as waiting:
            page.get_by_label(f"Download as {kind}").click()
        file = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(file)
        assert head in file.read_bytes()[:16] and file.suffix == f".{kind}"
    for name, part in (("Copy curl", "curl http"), ("Copy Python", "runtime.Client(")):
        page.get_by_role("button", name=name).click()
        page.get_by_text("Copied").last.wait_for()
        assert part in page.evaluate("navigator.clipboard.readText()")
    page.get_by_role("button", name="Use as input").click()
    page.get_by_role("button", name="Words and settings").click()
    assert page.get_by_label("What should the video show?").input_value() == "a red ball"
    assert page.get_by_label("Seed", exact=True).input_value() == "3"


def test_filter_delete_and_undo(visit: Visit, server: Server, videos: list[dict[str, Any]]) -> None:
    extra = server.done(server.create(TINY | {"prompt": "a purple ball"})["id"])["id"]
    visit.go("library")
    page = visit.page
    page.get_by_label("Search").fill("purple")
    page.locator(f"[data-id={extra}]").wait_for()
    assert page.locator(".shot").count() == 1
    page.get_by_label("Kind").select_option("loop")
    page.get_by_text("Nothing matches").wait_for()
    page.get_by_label("Kind").select_option("all")
    page.locator(f"[data-id={extra}] .pick").check()
    page.get_by_role("button", name="Delete").click()
    page.locator(f"[data-id={extra}]").wait_for(state="detached")
    assert server.http.get(f"/v1/videos/{extra}").status_code == 404
    page.get_by_role("button", name="Undo").click()
    page.locator(f"[data-id={extra}]").wait_for()
    assert server.video(extra)["status"] == "completed"


def test_hover_plays_the_sheet(visit: Visit, videos: list[dict[str, Any]]) -> None:
    visit.go("library")
    card = visit.page.locator(f"[data-id={videos[0]['id']}]")
    card.hover()
    sheet = card.locator(".sheet:not([hidden])")
    sheet.wait_for()
    seen = {sheet.evaluate("each => each.style.backgroundPosition")}
    visit.until(lambda: seen.add(sheet.evaluate("each => each.style.backgroundPosition")) or len(seen) > 2)
    visit.page.mouse.move(2, 2)
    sheet.wait_for(state="detached")


def test_compare_stays_in_step(visit: Visit, videos: list[dict[str, Any]]) -> None:
    visit.go(f"compare/{videos[0]['id']}/{videos[1]['id']}")
    page = visit.page
    films = page.locator(".screens video")
    films.nth(1).wait_for()
    visit.until(lambda: plays(films.first))
    page.get_by_label("One frame on").click()
    both = "films => films.every(film => !film.seeking && film.paused) && films.map(film => film.currentTime)"
    times = visit.until(lambda: films.evaluate_all(both))
    assert abs(times[0] - times[1]) < 0.05
    page.get_by_role("radio", name="Wipe").check()
    page.get_by_role("slider", name="Wipe").fill("25")
    assert "25%" in page.locator(".screens .b").evaluate("each => getComputedStyle(each).clipPath")


def test_broken_files_are_told_of(visit: Visit, server: Server) -> None:
    """What the browser can tell is told at once; what only the server can, in its words. Nothing is queued."""
    page, before = visit.page, newest(server)["id"]
    for name, kind, content, words in (
        ("broken.png", "image/png", b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "cannot be read"),
        ("notes.txt", "text/plain", b"hello", "not a picture or clip"),
        ("cut.mp4", "video/mp4", b"\0\0\0\x18ftypmp42", "cannot be read"),
    ):
        page.evaluate(
            """([name, type, content]) => {
                const data = new DataTransfer()
                data.items.add(new File([new Uint8Array(content)], name, { type }))
                const drop = new DragEvent("drop", { bubbles: true, dataTransfer: data })
                document.querySelector(".composer").dispatchEvent(drop)
            }""",
            [name, kind, list(content)],
        )  # fmt: skip
        page.get_by_text(re.compile(f"{re.escape(name)}.*{words}")).wait_for()
    assert newest(server)["id"] == before


def test_hostile_prompts_are_text(visit: Visit, videos: list[dict[str, Any]]) -> None:
    for video, prompt in zip(videos[2:], HOSTILE, strict=True):
        visit.go(f"clip/{video['id']}")
        visit.page.locator("aside h1").wait_for()
        assert visit.page.locator("aside h1").evaluate("each => [each.textContent, each.children.length]") == [
            prompt,
            0,
        ]
        box = visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert box, "it is wider than the window"
    visit.go("library")
    visit.page.locator(f"[data-id={videos[2]['id']}]").wait_for()
    assert visit.page.locator("img[src=x], main script").count() == 0


def test_a_key_is_asked_for_once(chromium: Any, tmp_path: Path) -> None:
    """It is kept for the tab alone; pictures and videos come with it; another tab has to ask again."""
    keys = tmp_path / "keys"
    keys.write_text("me:correct-horse-battery\n")
    started = Server(tmp_path / "keyed", "--api-key", str(keys))
    try:
        found = Visit(chromium, started.url)
        page = found.page
        page.get_by_role("textbox", name="Key").fill("wrong-wrong-wrong-wrong")
        page.get_by_role("button", name="Continue").click()
        page.get_by_text("does not know that key").wait_for()
        page.get_by_role("textbox", name="Key").fill("correct-horse-battery")
        page.get_by_role("button", name="Continue").click()
        make(page)
        found.until(lambda: plays(page.locator(".stage video")))
        page.reload()
        found.until(lambda: plays(page.locator(".stage video")))
        assert page.get_by_role("dialog").count() == 0
        assert page.evaluate("[document.cookie, JSON.stringify(localStorage).includes('horse')]") == ["", False]
        other = found.open()
        other.get_by_role("textbox", name="Key").wait_for()
        found.end()
    finally:
        started.stop()


def violations(page: Any) -> list[str]:
    """What axe-core finds serious or worse."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {[node['target'] for node in each['nodes']]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(("scheme", "language"), [("light", "en-GB"), ("dark", "zh-CN")])
def test_it_is_accessible(
    chromium: Any, server: Server, videos: list[dict[str, Any]], scheme: str, language: str
) -> None:
    found = Visit(chromium, server.url, color_scheme=scheme, locale=language, reduced_motion="reduce")
    pages = (
        "create",
        "library",
        f"clip/{videos[0]['id']}",
        f"compare/{videos[0]['id']}/{videos[1]['id']}",
        "storyboard",
    )
    for place in pages:
        found.go(place)
        found.page.locator("h1").first.wait_for(state="attached")
        found.page.wait_for_timeout(300)
        assert violations(found.page) == [], place
    found.page.locator(".board .button").first.click()
    assert violations(found.page) == []
    assert found.page.locator("html").get_attribute("lang") == language[:2]
    found.end()


def test_it_is_worked_by_keys_alone(visit: Visit, server: Server) -> None:
    page, before = visit.page, newest(server)["id"]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_label("What should the video show?").focus()
    page.keyboard.type("a ball by keys")
    page.keyboard.press("Control+Enter")
    made = visit.until(lambda: (found := newest(server))["id"] != before and found)
    assert made["prompt"] == "a ball by keys"
    server.http.delete(f"/v1/videos/{made['id']}")


def fill_library(server: Server, video: dict[str, Any], count: int) -> None:
    """Add copies of a video, as if they had been made."""
    with sqlite3.connect(server.data / "store.db", timeout=30) as db:
        names = [row[1] for row in db.execute("PRAGMA table_info(jobs)") if row[1] not in ("seq", "id", "prompt")]
        columns = ", ".join(names)
        for number in range(count):
            copy = f"video_{number:032x}"
            shutil.copytree(server.data / "jobs" / video["id"], server.data / "jobs" / copy, copy_function=os.link)
            db.execute(
                f"INSERT INTO jobs (id, prompt, {columns}) SELECT ?, ?, {columns} FROM jobs WHERE id = ?",
                (copy, f"clip number {number}", video["id"]),
            )


def test_five_hundred_clips(chromium: Any, server: Server, videos: list[dict[str, Any]], record_property: Any) -> None:
    """All are there, the page is usable before the last has come, and no window of it has holes."""
    fill_library(server, videos[0], 500)
    found = Visit(chromium, server.url)
    found.page.close()
    page = found.page = found.context.new_page()
    page.goto(f"{server.url}/#/library")
    page.locator(".shot img").first.wait_for()
    ready = page.evaluate("performance.now()")
    record_property("interactive_ms", ready)
    found.until(lambda: page.locator(".shot").count() >= 500)
    height = page.evaluate("document.documentElement.scrollHeight")
    holes = """async () => {
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))
        const seen = [...document.querySelectorAll('.shot')].filter(each => {
            const box = each.getBoundingClientRect()
            return box.bottom > 60 && box.top < innerHeight
        })
        const images = seen.map(each => each.querySelector('img'))
        const loaded = each => each.complete || new Promise(done => each.addEventListener('load', done))
        await Promise.all(images.map(loaded))
        return [seen.length, images.filter(each => !each.checkVisibility() || !each.naturalWidth).length]
    }"""
    for part in range(11):
        page.evaluate("top => scrollTo(0, top)", height * part / 10)
        count, missing = page.evaluate(holes)
        assert count >= 5 and missing == 0, part
    found.end()


@pytest.mark.skipif(not SHOTS, reason="PAGE_SHOTS names no folder for pictures of the page")
def test_pictures_of_it(chromium: Any, server: Server) -> None:
    """Write what it looks like: on a desk, on a phone, in the dark."""
    assert SHOTS
    folder = Path(SHOTS)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = (
        "a red ball rolls left over green grass",
        "a blue square rises over the sand at night",
        "two yellow balls fall into the snow",
        "a green triangle goes right over blue water",
    )
    for seed, prompt in enumerate(prompts):
        server.done(server.create({"prompt": prompt, "seed": seed + 2, "num_inference_steps": 12})["id"])
    phone = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    for name, settings in (("desktop", {}), ("dark", {"color_scheme": "dark"}), ("phone", phone)):
        words = "a yellow ball rolls right over the sand"
        jobs = [server.create({"prompt": words, "num_inference_steps": steps})["id"] for steps in (200, 25)]
        server.until(lambda job=jobs[0]: server.video(job)["step"] > 60)
        found = Visit(chromium, server.url, **({"viewport": {"width": 1280, "height": 800}} | settings))
        for place in ("create", "library", "storyboard", f"clip/{newest_done(server)}"):
            found.go(place)
            found.page.get_by_label("What should the video show?").or_(found.page.locator("h1")).first.wait_for()
            if place == "create":
                found.page.get_by_label("What should the video show?").fill(words)
                found.page.locator(".stage .preview:not([hidden])").wait_for()
            found.page.wait_for_timeout(800)
            file = folder / f"{name}-{place.partition('/')[0]}.png"
            Image.open(io.BytesIO(found.page.screenshot())).convert("P", palette=Image.Palette.ADAPTIVE).save(
                file, optimize=True
            )
        found.end()
        for job in jobs:
            server.http.delete(f"/v1/videos/{job}")


def newest_done(server: Server) -> str:
    """The id of the newest video that is done."""
    return server.http.get("/v1/videos", params={"status": "completed", "limit": 1}).json()["data"][0]["id"]
