"""Which way up: what is stored turned or mirrored, and frames made upright.

The eight ways have the numbers that EXIF gives them. Pillow reads them from a picture: the decoder's turn alone does
not tell a mirrored picture from one that is not. A clip has them in its display matrix.
"""

from __future__ import annotations

import math
import struct
import warnings
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

ORIENTATION = 0x0112  # EXIF's tag
# Orientation -> whether it is mirrored left to right, and then by how many quarter turns against the clock.
WAYS = {
    1: (False, 0), 2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip
NUMBERS = {way: number for number, way in WAYS.items()}


def picture_way(path: Path) -> int:
    """Return the orientation, 1 to 8, of a picture's EXIF; 1, with a warning, where that cannot be read."""
    try:
        with Image.open(path) as picture:
            found = picture.getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        warnings.warn(f"the EXIF of {path} cannot be read ({error}), so it stands as it is stored", stacklevel=2)
        return 1
    return found if found in WAYS else 1


def frame_way(frame: av.VideoFrame) -> int:
    """Return the orientation, 1 to 8, of a clip's frame: the nearest to its display matrix."""
    try:
        found: Any = frame.side_data  # its published type lacks this kind
        matrix = found["DISPLAYMATRIX"]
    except KeyError:
        return 1
    except ValueError:  # PyAV knows no name for some of the side data, and then gives none of it
        return NUMBERS[False, round(frame.rotation / 90) % 4]
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # x' = a x + c y, y' = b x + d y
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return NUMBERS[mirrored, round(-math.degrees(math.atan2(b, a)) / 90) % 4]


def upright(frame: np.ndarray, way: int) -> np.ndarray:
    """Return a frame [H, W, 3] that is stored in a way, as it is meant."""
    if way == 1:
        return frame
    mirrored, turns = WAYS[way]
    return np.ascontiguousarray(np.rot90(frame[:, ::-1] if mirrored else frame, turns))


def lies(way: int) -> bool:
    """Tell whether width and height change places."""
    return WAYS[way][1] % 2 == 1
