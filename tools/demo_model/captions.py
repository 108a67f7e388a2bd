"""Captions of scenes in three styles, rules that expand a terse prompt into a descriptive one, and held-out scenes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from tools.demo_model.world import Scene, Thing, draw_scene

STYLES = ("terse", "plain", "descriptive")

NUMBERS = {1: ("a",), 2: ("two",), 3: ("three",)}
SHAPE_WORDS = {
    "ball": ("ball", "sphere"),
    "cube": ("cube", "box", "block"),
    "pyramid": ("pyramid", "triangle", "cone"),
    "star": ("star",),
    "ring": ("ring", "hoop", "donut"),
}
PLURALS = {"box": "boxes"}
COLOUR_WORDS = {
    "red": ("red", "crimson"), "green": ("green",), "blue": ("blue",), "yellow": ("yellow",),
    "orange": ("orange",), "purple": ("purple", "violet"), "white": ("white",), "black": ("black",),
}  # fmt: skip
SIZE_WORDS = {"small": ("small", "little"), "medium": (), "large": ("large", "big")}
MATERIAL_WORDS = {"matte": (), "shiny": ("shiny", "glossy")}
GROUND_WORDS = {
    "grass": ("over green grass", "on grass", "over a meadow"),
    "sand": ("over yellow sand", "on sand", "on a beach"),
    "snow": ("over white snow", "on snow", "in a snowy field"),
    "water": ("over blue water", "on water", "over the sea"),
    "road": ("over a grey road", "on a road", "on asphalt"),
}
TIME_WORDS = {"day": ("by day",), "sunset": ("at sunset", "in the evening"), "night": ("at night", "in the moonlight")}
WEATHER_WORDS = {
    "clear": ("under a clear sky",),
    "fog": ("in fog", "in the mist"),
    "rain": ("in the rain",),
    "snowfall": ("in falling snow", "while snow falls"),
}
MOTION_WORDS = {  # what one does, what several do
    "left": (("rolls left", "roll left"), ("moves to the left", "move to the left"), ("slides left", "slide left")),
    "right": (
        ("rolls right", "roll right"),
        ("moves to the right", "move to the right"),
        ("slides right", "slide right"),
    ),
    "rise": (("rises", "rise"), ("goes up", "go up"), ("floats up", "float up")),
    "fall": (("falls", "fall"), ("goes down", "go down"), ("sinks", "sink")),
    "bounce": (("bounces", "bounce"), ("jumps up and down", "jump up and down")),
    "orbit": (("circles", "circle"), ("moves in a circle", "move in a circle")),
    "spin": (("spins", "spin"), ("turns around", "turn around")),
    "approach": (("approaches", "approach"), ("comes closer", "come closer")),
    "still": (("stands still", "stand still"), ("rests", "rest")),
}
LONG_MOTIONS = {  # the first wording of the descriptive style; "from right to left" is told apart by word order alone
    "rise": ("rises from the bottom to the top", "rise from the bottom to the top"),
    "fall": ("falls from the top to the bottom", "fall from the top to the bottom"),
}
CAMERA_WORDS = {
    "still": "the camera stands still",
    "pan left": "the camera pans left",
    "pan right": "the camera pans right",
    "zoom in": "the camera zooms in",
    "zoom out": "the camera zooms out",
    "orbit": "the camera orbits",
}
POST_WORDS = "behind a grey post"


def held_out(scene: Scene) -> bool:
    """Return whether the scene's first thing, ground and motion are kept out of all training: one in ten are."""
    thing = scene.things[0]
    key = f"{thing.shape} {thing.colour} {scene.ground} {scene.motion}"
    return int(hashlib.md5(key.encode()).hexdigest(), 16) % 10 == 0


def training_scene(rng: np.random.Generator, hard: bool = False) -> Scene:
    """Return a random scene (`draw_scene`) that is not held out."""
    while held_out(scene := draw_scene(rng, hard)):
        pass
    return scene


def held_out_scene(rng: np.random.Generator) -> Scene:
    """Return a random scene that is held out, its path from the start."""
    while not held_out(scene := draw_scene(rng)):
        pass
    return replace(scene, start=0.0, post=False)


def _plural(word: str) -> str:
    return PLURALS.get(word, word + "s")


NOUNS = {form for words in SHAPE_WORDS.values() for word in words for form in (word, _plural(word))}


def _pick(words: tuple[str, ...], rng: np.random.Generator | None) -> str:
    if not words:
        return ""
    return words[0] if rng is None else str(rng.choice(words))


def _noun(thing: Thing, count: int, rng: np.random.Generator | None, full: bool) -> str:
    shape = _pick(SHAPE_WORDS[thing.shape], rng)
    words = [
        _pick(SIZE_WORDS[thing.size], rng) if full and count == 1 else "",
        _pick(MATERIAL_WORDS[thing.material], rng) if full else "",
        _pick(COLOUR_WORDS[thing.colour], rng),
        shape if count == 1 else _plural(shape),
    ]
    article = NUMBERS[count][0]
    if count == 1 and next(w for w in words if w)[0] in "aeiou":
        article = "an"
    return " ".join([article, *filter(None, words)])


def _subject(scene: Scene, rng: np.random.Generator | None, full: bool) -> str:
    first = scene.things[0]
    if all((t.shape, t.colour) == (first.shape, first.colour) for t in scene.things):
        return _noun(first, len(scene.things), rng, full)
    nouns = [_noun(replace(t, size="medium"), 1, rng, full) for t in scene.things]
    return " and ".join([", ".join(nouns[:-1]), nouns[-1]])


def caption(scene: Scene, style: str, rng: np.random.Generator | None = None) -> str:
    """Return the caption of a scene; synonyms are drawn from `rng`, the first of each where None.

    "terse" names the things, the motion and the ground; "plain" adds what is unusual; "descriptive" says everything.
    """
    full = style != "terse"
    many = len(scene.things) > 1
    words = MOTION_WORDS[scene.motion]
    motion = words[0 if rng is None else int(rng.integers(len(words)))][many]
    if style == "descriptive" and scene.motion in LONG_MOTIONS:
        motion = LONG_MOTIONS[scene.motion][many]
    place = _pick(GROUND_WORDS[scene.ground], rng)
    text = f"{_subject(scene, rng, full)} {motion} {place}"
    if full and scene.post:
        text += f" {POST_WORDS}"
    unusual_time, unusual_weather = scene.time != "day", scene.weather != "clear"
    if style == "descriptive" or (full and unusual_time):
        text += f" {_pick(TIME_WORDS[scene.time], rng)}"
    if style == "descriptive" or (full and unusual_weather):
        text += f" {_pick(WEATHER_WORDS[scene.weather], rng)}"
    if style == "descriptive" or (full and scene.camera != "still"):
        text += f", {CAMERA_WORDS[scene.camera]}"
    return text


def owners(text: str, scene: Scene) -> list[tuple[Thing, ...]]:
    """Return for each word and comma of a scene's caption the things that it tells of, none after the last noun."""
    several = len({(t.shape, t.colour) for t in scene.things}) > 1
    left = [(t,) for t in scene.things] if several else [scene.things]
    out: list[tuple[Thing, ...]] = []
    for word in text.replace(",", " ,").split():
        out.append(left[0] if left and word not in ("and", ",") else ())
        if left and word in NOUNS:
            left.pop(0)
    return out


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption in a random style, mostly descriptive: what is asked for well is shown well."""
    return caption(scene, str(rng.choice(STYLES, p=(0.12, 0.23, 0.65))), rng)


def vocabulary() -> list[str]:
    """Return every word that a caption can hold, sorted."""
    texts: list[str] = ["a an two three four and , .", *CAMERA_WORDS.values(), POST_WORDS]
    for table in (SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS, MATERIAL_WORDS, GROUND_WORDS, TIME_WORDS, WEATHER_WORDS):
        texts += [word for row in table.values() for word in row]
    texts += [_plural(word) for row in SHAPE_WORDS.values() for word in row]
    texts += [words for rows in MOTION_WORDS.values() for row in rows for words in row]
    texts += [words for row in LONG_MOTIONS.values() for words in row]
    texts += ["from right to left"]
    texts += [
        "rolling moving sliding rising falling bouncing circling spinning turning approaching",
        "standing the is it in video of",
    ]
    return sorted({word for text in texts for word in text.replace(",", " ").split()})


def expansion_rules() -> dict[str, list[list[str]]]:
    """Return the rules, as data for the checkpoint's runtime.json, that make a terse prompt a descriptive one.

    "replace" holds (pattern, text), applied in turn; "append" (pattern, text): added unless the pattern is found.
    """
    replace_rules = []
    for motion, (one, many) in LONG_MOTIONS.items():
        for words_one, words_many in MOTION_WORDS[motion]:
            replace_rules.append([rf"\b{words_one}\b(?! from)", one])
            replace_rules.append([rf"\b{words_many}\b(?! from)", many])
    place = "|".join(sorted({w.split()[-1] for row in GROUND_WORDS.values() for w in row}))
    times = "|".join(w for row in TIME_WORDS.values() for w in row)
    weathers = "|".join(w for row in WEATHER_WORDS.values() for w in row)
    return {
        "replace": replace_rules,
        "append": [
            [rf"\b({place})\b", f" {GROUND_WORDS['grass'][0]}"],
            [rf"\b({times}|sunset|night|day)\b", f" {TIME_WORDS['day'][0]}"],
            [rf"\b({weathers}|rain|fog|snowfall)\b", f" {WEATHER_WORDS['clear'][0]}"],
            [r"\bcamera\b", f", {CAMERA_WORDS['still']}"],
        ],
    }
