"""python -m runtime.serve.examining FILE ANCHORS: the credentials of a file that somebody sent, for `boxed`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runtime.provenance import read
from runtime.serve.boxed import answer, boxed


def examine(path: Path, anchors: Path) -> dict[str, Any]:
    """Read a file's credentials in a child with limits; `anchors` is a file of certificates, empty for none."""
    return boxed("runtime.serve.examining", str(path), str(anchors))


def main() -> None:
    """What the child does."""
    anchors = Path(sys.argv[2]).read_bytes() or None
    answer(lambda path: read(path, anchors).to_dict(), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
