"""Receipt: what was done, truthfully: settings, approximations, seconds and bytes per stage."""

from __future__ import annotations

import json
import platform
import secrets
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runtime.offload import Offload
from runtime.trace import Stages

PACKAGES = ("dit-runtime", "torch", "tokenizers", "transformers", "av")


@dataclass
class Receipt:
    """The record of one video; `stages` goes on filling while frames are decoded and written."""

    request: dict[str, Any]  # as resolved: every default filled in
    canvas: tuple[int, int]  # (width, height) in pixels that the model worked at; the video is its middle
    seed: int
    model: str
    model_hash: str
    engine: str
    device: str
    dtype: str
    offload: Offload = field(default_factory=Offload)  # which weights stay on the device
    loras: list[str] = field(default_factory=list)  # merged into the weights: file:strength
    approximations: list[str] = field(default_factory=list)  # empty: exact, reordered at most
    quality: dict[str, Any] | None = (
        None  # what was skipped for speed, by what right, and what that is estimated to cost
    )
    notes: list[str] = field(default_factory=list)  # what the user should know, such as text that was cut
    expanded: dict[str, str] = field(default_factory=dict)  # prompt -> what was made of it
    decoding: list[str] = field(default_factory=list)  # ways tried in turn, as memory allowed; the last went through
    seams: list[Any] = field(default_factory=list)  # where made frames meet given ones: what was corrected there
    stages: Stages = field(default_factory=dict)
    predicted: dict[str, Any] | None = None  # of the planner, beside `stages`; None: this machine is not calibrated
    versions: dict[str, str] = field(default_factory=lambda: versions())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to_json(self) -> str:
        """Return the receipt as a JSON object."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    def save(self, path: str | Path) -> Path:
        """Write the receipt as JSON; it appears when all of it is there."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name[:32]}.{secrets.token_hex(4)}.partial")
        try:
            unfinished.write_text(self.to_json() + "\n", encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path


def versions() -> dict[str, str]:
    """Return the versions of what makes the video."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
