"""Content credentials (C2PA): how a result came about, signed into its file as the last step, and read again.

A file that is written anew, by whatever program, loses them; so nothing touches one after `seal`. They hold the
generator, the model, a hash of the settings, the seed, and each input as an ingredient, with its own credentials where
it has some. Nothing is ever fetched: no remote manifests, no revocation lists, no time stamps.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.certificates import Signer, check_anchors, check_installed
from runtime.kinds import MEDIA_TYPES, kind_of

if TYPE_CHECKING:
    from runtime.receipt import Receipt
    from runtime.request import Request

SEALED = (".mp4", ".png", ".gif")  # webm and folders of pictures can hold no credentials
SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MADE, ALTERED = f"{SOURCE}trainedAlgorithmicMedia", f"{SOURCE}compositeWithTrainedAlgorithmicMedia"
GENERATION = "dit-runtime.generation"  # the assertion with what only we say
TRANSCODE, CUT = "transcode", "cut"  # the tasks of a file that shows another one in another format, or a part of it
PLACES = ("frames", "clip", "mask")  # of a receipt's request: where its files lay
PARENTED = ("extend", "prepend", "loop", "edit")  # tasks that go on from one clip
QUIET = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}


@dataclass(frozen=True)
class Input:
    """A file that a result was made from: "parentOf" it, "componentOf" it, or "inputTo" the network alone."""

    path: Path
    relation: str


@dataclass(frozen=True)
class Credentials:
    """What a file says of its origin. `state` is "valid", "tampered", "missing" or "unsupported" (a kind of file that
    can hold none); `trusted` is whether a certificate that the reader trusts vouches for the signer."""

    state: str
    trusted: bool = False
    signer: str | None = None
    generator: str | None = None
    made: dict[str, Any] | None = None  # model, seed, settings_hash, task
    actions: list[str] = field(default_factory=list)
    ingredients: list[dict[str, Any]] = field(default_factory=list)  # title, relation, state, and the same of itself
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def check_sealable(path: str | os.PathLike[str]) -> None:
    """ValueError where a file of that name can hold no credentials; to be called before anything is made."""
    check_installed()
    suffix = Path(path).suffix.lower()
    if suffix not in SEALED or os.fspath(path).endswith("/"):
        raise ValueError(f"{suffix or 'a folder'} can hold no content credentials; legal: {', '.join(SEALED)}")


def inputs_of(request: Request) -> list[Input]:
    """Return the files that a request is made from; frames that came from memory have no origin to be named."""
    found: dict[Path, str] = {}
    for index, clip in enumerate([*request.clips, *request.references]):
        if isinstance(clip.frames, np.ndarray) or (path := clip.video.origin) is None:
            continue
        relation = "inputTo" if index >= len(request.clips) or clip.fps is None else "componentOf"
        if request.task in PARENTED and index == 0:
            relation = "parentOf"
        found.setdefault(path, relation)
    return [Input(path, relation) for path, relation in found.items()]


def generation(receipt: Receipt, request: Request) -> dict[str, Any]:
    """Return what the credentials say of how a result was made: no prompt, no path, but a hash over the settings."""
    return {
        "model": receipt.model, "model_hash": receipt.model_hash, "seed": receipt.seed, "task": request.task,
        "settings_hash": settings_hash(receipt.request), "created": receipt.created,
    }  # fmt: skip


def derived(source: Path, task: str) -> tuple[dict[str, Any], list[Input]]:
    """Return what `seal` takes for a file that shows another one in another format (TRANSCODE), or a part (CUT)."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return (read(source).made or {}) | {"task": task, "created": now}, [Input(source, "parentOf")]


def settings_hash(settings: dict[str, Any]) -> str:
    """Return the SHA-256 of a receipt's request; where its clips lay does not matter."""

    def placeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placeless(each) for name, each in value.items() if name not in PLACES}
        return [placeless(each) for each in value] if isinstance(value, list | tuple) else value

    return hashlib.sha256(json.dumps(placeless(settings), sort_keys=True, default=str).encode()).hexdigest()


def sealing(title: str, made: dict[str, Any], inputs: Sequence[Input], signer: Signer) -> Callable[[Path], None]:
    """Return what `Video.save` calls to sign a file, which is to be named `title`; the rest is as for `seal`."""
    from runtime.trace import span  # torch, which who only reads credentials does without

    def sign(path: Path) -> None:
        with span("seal"):
            seal(path, title, made, inputs, signer)

    return sign


def seal(path: Path, title: str, made: dict[str, Any], inputs: Sequence[Input], signer: Signer) -> None:
    """Sign what `generation` says into a finished file, in its place: it is there as it was, or signed, at any moment.

    OSError where the disk is full, ValueError where the signer's certificate is not one that C2PA takes.
    """
    from c2pa import Builder, C2paError, C2paSignerInfo
    from c2pa import Signer as Sealer

    signed = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.partial")
    try:
        builder = Builder(_manifest(title, made, inputs), _context(signer.anchor))
        for index, each in enumerate(inputs):
            _add(builder, each, _name(index))
        info = C2paSignerInfo(signer.algorithm.encode(), signer.chain, signer.key, None)
        with path.open("rb") as source, signed.open("w+b") as target:
            builder.sign(Sealer.from_info(info), MEDIA_TYPES[kind_of(path) or ""], source, target)
            target.flush()
            os.fsync(target.fileno())
        signed.replace(path)
    except C2paError as error:
        if "space" in str(error).lower():
            raise OSError(28, f"no space left on the disk while {title} was signed") from error
        raise ValueError(f"{title} cannot be signed ({error})") from error
    finally:
        signed.unlink(missing_ok=True)


def read(path: Path, anchors: bytes | None = None) -> Credentials:
    """Return what a file says of its origin; `anchors` are the certificates, in PEM, that the reader trusts.

    ValueError for anchors that are none.
    """
    check_installed()
    if anchors is not None:
        check_anchors(anchors)
    from c2pa import C2paError, Reader

    kind = kind_of(path)
    if kind is None or kind == "webm":
        return Credentials("unsupported")
    try:
        with path.open("rb") as source:
            reader = Reader(MEDIA_TYPES[kind], source, context=_context(anchors))
            found, state = json.loads(reader.json()), reader.get_validation_state()
    except C2paError.ManifestNotFound:
        return Credentials("missing")
    except C2paError as error:
        return Credentials("tampered", problems=[f"the credentials cannot be read ({str(error)[:200]})"])
    manifests, active = found["manifests"], found["active_manifest"]
    problems = [each["code"] for each in found.get("validation_status", ()) if not each["code"].endswith("untrusted")]
    own = manifests[active]
    return Credentials(
        state="tampered" if state == "Invalid" else "valid",
        trusted=state == "Trusted",
        signer=(own.get("signature_info") or {}).get("common_name"),
        generator=_generator(own),
        made=_assertion(own, GENERATION),
        actions=[each.get("action", "") for each in (_assertion(own, "c2pa.actions") or {}).get("actions", ())],
        ingredients=_ingredients(manifests, own, {active}),
        problems=problems,
    )


def told(name: str, found: Credentials) -> str:
    """Return credentials as lines to read."""
    states = {
        "valid": "unchanged since it was signed", "missing": "without content credentials",
        "tampered": "changed since it was signed, or wrongly signed",
        "unsupported": "of a kind that can hold no content credentials",
    }  # fmt: skip
    lines = [f"{name}: {states[found.state]}"]
    if found.problems:
        lines.append(f"problems: {', '.join(found.problems)}")
    if found.signer is not None:
        lines.append(f"signed by: {found.signer} ({'trusted' if found.trusted else 'says so itself: not trusted'})")
    if found.generator is not None:
        lines.append(f"made by: {found.generator}" + _facts(found.made))
    lines += _tree(found.ingredients, "  ")
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)  # a stranger's words


def _facts(made: dict[str, Any] | None) -> str:
    if made is None:
        return ""
    return "".join(f", {name} {str(made[name])[:80]}" for name in ("model", "seed", "settings_hash") if name in made)


def _tree(ingredients: list[dict[str, Any]], indent: str) -> Iterator[str]:
    for each in ingredients:
        by = f", by {each['generator']}{_facts(each.get('made'))}" if each.get("generator") else ""
        state = {"missing": "no credentials"}.get(each["state"], each["state"])
        yield f"{indent}{each['relation']}: {each['title']} ({state}{by})"
        yield from _tree(each.get("ingredients", []), indent + "  ")


def _context(anchors: bytes | None) -> Any:
    from c2pa import Context, Settings

    trust = {} if anchors is None else {"trust": {"user_anchors": anchors.decode(), "allowed_list": anchors.decode()}}
    return Context(Settings.from_dict(QUIET | trust))


def _name(index: int) -> str:
    return f"xmp:iid:input-{index}"


def _manifest(title: str, made: dict[str, Any], inputs: Sequence[Input]) -> dict[str, Any]:
    """Return the manifest's definition; its actions name the ingredients by their place."""
    agent = {"name": "dit-runtime", "version": version("dit-runtime")}

    def action(kind: str, relation: str, **more: Any) -> dict[str, Any]:
        names = [_name(index) for index, each in enumerate(inputs) if each.relation == relation]
        parameters = {"parameters": {"ingredientIds": names}} if names else {}
        return {"action": f"c2pa.{kind}", "softwareAgent": agent, "when": made["created"], **parameters, **more}

    relations = {each.relation for each in inputs}
    if made["task"] == TRANSCODE:
        actions = [action("opened", "parentOf"), action("transcoded", "")]
    elif made["task"] == CUT:
        actions = [action("opened", "parentOf"), action("edited", "")]
    elif "parentOf" in relations:
        actions = [action("opened", "parentOf"), action("edited", "inputTo", digitalSourceType=ALTERED)]
    else:
        source = ALTERED if "componentOf" in relations else MADE
        actions = [action("created", "inputTo", digitalSourceType=source)]
    if "componentOf" in relations:
        actions.append(action("placed", "componentOf"))
    return {
        "claim_generator_info": [agent],
        "title": title,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": GENERATION, "data": made},
        ],
    }


def _add(builder: Any, each: Input, name: str) -> None:
    """Add an ingredient with the credentials that it has; one that the library cannot read is named by its hash."""
    from c2pa import C2paError

    said = {"title": each.path.name, "relationship": each.relation, "instance_id": name}
    with each.path.open("rb") as handle:
        said["hash"] = hashlib.file_digest(handle, "sha256").hexdigest()
        handle.seek(0)
        kind = MEDIA_TYPES.get(kind_of(each.path) or "", "application/octet-stream")
        try:
            builder.add_ingredient(said, kind, handle)
        except C2paError:
            handle.seek(0)
            builder.add_ingredient(said, "application/octet-stream", handle)


def _ingredients(manifests: dict[str, Any], own: dict[str, Any], told_of: set[str]) -> list[dict[str, Any]]:
    """Return what a manifest was made from, as its signer found it then; each one's own ingredients are told once."""
    found = []
    for each in own.get("ingredients", ()):
        told = {"title": each.get("title"), "relation": each.get("relationship"), "state": "missing"}
        if (label := each.get("active_manifest")) in manifests:
            results = each.get("validation_results", {}).get("activeManifest", {}).get("failure", ())
            failed = [result["code"] for result in results if not result["code"].endswith("untrusted")]
            told["state"] = "tampered" if failed else "valid"
            told["generator"] = _generator(manifests[label])
            told["made"] = _assertion(manifests[label], GENERATION)
            if label not in told_of:
                told_of.add(label)
                told["ingredients"] = _ingredients(manifests, manifests[label], told_of)
        found.append(told)
    return found


def _generator(manifest: dict[str, Any]) -> str | None:
    info = (manifest.get("claim_generator_info") or [{}])[0]
    return " ".join(info[part] for part in ("name", "version") if part in info) or manifest.get("claim_generator")


def _assertion(manifest: dict[str, Any], label: str) -> dict[str, Any] | None:
    found = (each.get("data") for each in manifest.get("assertions", ()) if each["label"].startswith(label))
    return next((each for each in found if isinstance(each, dict)), None)
