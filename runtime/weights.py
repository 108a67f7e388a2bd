"""Published weight files -> modules, by a key map: strict, memory-mapped, cast as they are placed.

Only safetensors is read, and the two .pth files of the original Wan layout through torch's weights-only unpickler;
any other pickle is refused, because unpickling runs whatever code the file carries.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

# How much of a file is read between two openings: touched pages count as resident memory until the file is closed.
WINDOW_BYTES = 8 << 20
SAMPLE_BYTES = 1 << 16
MAX_HEADER = 2**24  # of a safetensors file: room for a hundred times the tensors of the largest model
WHOLE_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Slot:
    """The place of one published tensor in our module: a parameter, or some of its leading rows."""

    name: str
    start: int | None = None  # first row; None: the whole parameter
    stop: int | None = None
    shape: tuple[int, ...] | None = None  # published shape where it differs from the place's by ones

    def within(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the place inside the parameter."""
        return parameter if self.start is None else parameter[self.start : self.stop]


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: how it is built, where its weights lie and what they are called there."""

    name: str
    build: Callable[[], nn.Module]  # called under torch.device("meta")
    files: tuple[Path, ...]
    keys: Callable[[nn.Module], Mapping[str, Slot]]  # published name -> place
    keep_float32: Callable[[str], bool] = lambda name: False  # parameters that stay float32 in any dtype
    ignored: frozenset[str] = frozenset()  # published names with nothing to hold (duplicates of tied weights)
    prepare: Callable[[nn.Module], None] = lambda module: None  # once, after loading: memory layouts
    other_keys: Callable[[nn.Module], Mapping[str, Slot]] = lambda module: {}  # what other layouts call the same
    blocks: str = ""  # the list of equal blocks, by its place in the module, where it has one

    def all_keys(self, module: nn.Module) -> dict[str, Slot]:
        """Return where each tensor belongs by any name that a layout gives it."""
        return {**self.other_keys(module), **self.keys(module)}


def load(component: Component, device: torch.device, dtype: torch.dtype, *, without_blocks: bool = False) -> nn.Module:
    """Build a component's module and fill it from its files, on `device` in `dtype`.

    `without_blocks` leaves the parameters of its blocks on the meta device. Raises ValueError naming the first five
    missing, unexpected or misshapen tensors, or the damaged file.
    """
    with torch.device("meta"):
        module = component.build()
    module.requires_grad_(False).eval()
    left_out = f"{component.blocks}." if without_blocks else None
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    chosen = {name for name in names if left_out is None or not name.startswith(left_out)}
    places = allocate(module, component, device, dtype, chosen)
    keys = component.keys(module)
    wrong: list[str] = []
    seen: set[str] = set()
    absent = {name for name, slot in keys.items() if slot.name not in places}
    for name, shape, first, piece in pieces(component.files, without=absent):
        slot = keys.get(name)
        if slot is None:
            if name not in component.ignored and first == 0:
                wrong.append(f"unexpected {name}")
            continue
        seen.add(name)
        place = slot.within(places[slot.name])
        if shape != (slot.shape or tuple(place.shape)):
            if first == 0:
                wrong.append(f"{name} has shape {list(shape)}, expected {list(slot.shape or place.shape)}")
        elif not wrong:
            put(piece, place, shape, first)
    wrong += [f"missing {name}" for name in keys if name not in seen | absent]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"the weights of {component.name} in {component.files[0].parent} do not fit its config.json: "
            f"{'; '.join(wrong[:5])}{more}. The config belongs to other weights, or a file is of another version: "
            "fetch both again from one revision"
        )
    component.prepare(module)
    return module


def refill(component: Component, module: nn.Module, names: Collection[str]) -> None:
    """Read these parameters of a loaded module again from its files, as `load` did."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    slots = {name: slot for name, slot in component.keys(module).items() if slot.name in names}
    for name, shape, first, piece in pieces(component.files if slots else (), only=slots):
        put(piece, slots[name].within(parameters[slots[name].name].data), shape, first)


class BlockFiles:
    """The weights of a component's blocks, read from its files block by block.

    Raises ValueError at once where a tensor is missing or has another shape.
    """

    def __init__(self, component: Component, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        found = {name: (file, shape) for file in component.files for name, (shape, _) in shapes(file).items()}
        self.blocks: dict[int, dict[str, Slot]] = {}
        self.files: dict[int, set[Path]] = {}
        for name, slot in component.keys(module).items():
            if not slot.name.startswith(f"{component.blocks}."):
                continue
            wanted = slot.shape or tuple(slot.within(parameters[slot.name]).shape)
            if name not in found or found[name][1] != wanted:
                given = f"has shape {list(found[name][1])}" if name in found else "is missing"
                raise ValueError(
                    f"{name} of {component.name} in {component.files[0].parent} {given}, expected {list(wanted)}: "
                    "fetch the weights and their config.json again from one revision"
                )
            number, _, rest = slot.name.removeprefix(f"{component.blocks}.").partition(".")
            self.blocks.setdefault(int(number), {})[name] = replace(slot, name=rest)
            self.files.setdefault(int(number), set()).add(found[name][0])

    def fetch(self, index: int, places: Mapping[str, torch.Tensor]) -> None:
        """Fill the parameters of one block, by their names in it."""
        slots = self.blocks[index]
        for name, shape, first, piece in pieces(tuple(sorted(self.files[index])), only=slots):
            put(piece, slots[name].within(places[slots[name].name]), shape, first)


def put(piece: torch.Tensor, place: torch.Tensor, shape: tuple[int, ...], first: int) -> None:
    """Copy rows of a published tensor of `shape`, from row `first` on, to their place."""
    place = place.view(shape)[first : first + len(piece)] if shape else place
    # On a GPU the cast runs there: the host holds one piece in its published dtype at most.
    place.copy_(piece.to(place.device))


def allocate(
    module: nn.Module, component: Component, device: torch.device, dtype: torch.dtype, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """Replace the meta parameters called so by empty ones on `device`; return them by name (tied ones share memory)."""
    made: dict[int, nn.Parameter] = {}
    places: dict[str, torch.Tensor] = {}
    for name, meta in list(module.named_parameters(remove_duplicate=False)):
        if name not in names:
            continue
        if id(meta) not in made:
            kind = torch.float32 if component.keep_float32(name) else dtype
            empty = torch.empty(meta.shape, dtype=kind, device=device)
            made[id(meta)] = nn.Parameter(empty, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, made[id(meta)])
        places[name] = made[id(meta)].data
    return places


def pieces(
    files: tuple[Path, ...], without: Container[str] = (), only: Container[str] | None = None
) -> Iterator[tuple[str, tuple[int, ...], int, torch.Tensor]]:
    """Yield (name, full shape, first row, rows from there on) over all tensors of all files, a window at a time."""
    for file in files:
        handle, opened = WeightFile(file), 0
        for name, (shape, _) in handle.shapes().items():
            if name in without or (only is not None and name not in only):
                continue
            count = shape[0] if shape else 1
            first = 0
            while first == 0 or first < count:
                if opened >= WINDOW_BYTES:
                    handle, opened = WeightFile(file), 0
                piece = handle.rows(name, first, WINDOW_BYTES) if shape else handle.whole(name)
                opened += piece.nbytes
                yield name, shape, first, piece
                first += max(len(piece), 1) if shape else 1


class WeightFile:
    """An open file of either kind, memory-mapped; ValueError where it is damaged or could run code."""

    def __init__(self, file: Path) -> None:
        if file.suffix == ".safetensors":
            self.slices = _open_safetensors(file)
            self.tensors: dict[str, torch.Tensor] = {}
        elif file.suffix == ".pth":
            self.tensors = _open_pth(file)
        else:
            raise ValueError(refusal(file))

    def whole(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self.tensors[name] if self.tensors else self.slices.get_tensor(name)

    def rows(self, name: str, first: int, most: int) -> torch.Tensor:
        """Return rows of a tensor from `first` on, of at most `most` bytes, or one."""
        tensor = self.tensors[name] if self.tensors else self.slices.get_slice(name)
        count = max(most // max(tensor[first : first + 1].nbytes, 1), 1)
        return tensor[first : first + count]

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype)."""
        if self.tensors:
            return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in self.tensors.items()}
        slices = {name: self.slices.get_slice(name) for name in self.slices.offset_keys()}
        return {name: (tuple(part.get_shape()), _dtype_name(part.get_dtype())) for name, part in slices.items()}


def _dtype_name(safetensors_name: str) -> str:
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(safetensors_name, safetensors_name)


def shapes(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name -> (shape, dtype) of a weight file of either kind, without reading weights."""
    return WeightFile(file).shapes()


def _open_pth(file: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing; fetch the model again") from error
    except Exception as error:  # a damaged pickle fails with anything, from KeyError to OSError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file} cannot be read as plain tensors ({reason}); it is damaged or carries code. Legal: a .pth with "
            "tensors only, or safetensors: fetch it again, or convert it where you trust it with "
            "safetensors.torch.save_file(torch.load(FILE), NEW_FILE)"
        ) from error
    if not isinstance(found, dict) or not found or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise ValueError(f"{file} does not hold a dictionary of tensors; legal: the published state dictionary")
    return found


def _open_safetensors(file: Path) -> Any:
    try:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
        if MAX_HEADER < size < file.stat().st_size:
            raise ValueError(f"{file} has a header of {size} bytes, legal: up to {MAX_HEADER}; fetch it again")
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); fetch it again") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing; fetch the model again") from error


def refusal(file: Path) -> str:
    """Say why a pickle is not read and how to convert it."""
    return (
        f"{file} is a pickle, which can run code when it is read; legal are safetensors files. Convert it where you "
        "trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
    )


def publish(path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> None:
    """Write tensors and notes as safetensors; the file appears only when it is complete. OSError where it cannot."""
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as scratch:
        unfinished = Path(scratch) / "unfinished"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, dict(notes))
        except SafetensorError as error:
            told = re.search(r"os error (\d+)", str(error))
            message = f"{path} cannot be written ({error}); free some space or name another place"
            raise OSError(*([int(told[1])] if told else []), message) from error
        as_usual = Path(scratch) / "as_usual"
        as_usual.touch()
        unfinished.chmod(as_usual.stat().st_mode)  # safetensors makes files that only their owner can read
        unfinished.replace(path)


def find(folder: Path, stem: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return (files, missing file names) of weights called `stem` in a folder: one file, or shards with an index.

    Raises ValueError for an index that names a file outside the folder, and where only a pickle is there.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(
                    f"{index} names the shard {name!r}, which is outside its folder; legal: plain file names. "
                    "The index is not the published one: fetch it again"
                )
    else:
        names = [f"{stem}.safetensors"]
    missing = tuple(str(folder / name) for name in names if not (folder / name).exists())
    if missing:
        for pickled in (folder / f"{stem}.bin", folder / "pytorch_model.bin", folder / f"{stem}.pt"):
            if pickled.exists():
                raise ValueError(refusal(pickled))
    return tuple(folder / name for name in names), missing


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a JSON {type(found).__name__}; expected an object: fetch it again")
    return found


def fingerprint(files: Mapping[str, Path] | tuple[Path, ...]) -> str:
    """Return a hash that tells weights apart: of whole files up to 64 MiB, of 64 evenly spread samples beyond.

    The prefix says which: `sha256:` or `sampled-sha256:`.
    """
    digest, sampled = hashlib.sha256(), False
    for file in files.values() if isinstance(files, Mapping) else files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as handle:
            if size <= WHOLE_FILE_BYTES:
                digest.update(handle.read())
                continue
            sampled = True
            for i in range(64):
                handle.seek(i * (size - SAMPLE_BYTES) // 63)
                digest.update(handle.read(SAMPLE_BYTES))
    return f"{'sampled-' if sampled else ''}sha256:{digest.hexdigest()[:32]}"
