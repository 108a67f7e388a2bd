"""Model = text encoder + transformer(s) + VAE + spec, placed on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from tokenizers import Tokenizer

from runtime import precision as eight_bits
from runtime import weights
from runtime.engines import engine as find_engine
from runtime.lora import Fits, Lora, fit, merge
from runtime.models import open_checkpoint, repository
from runtime.models.costs import Costs
from runtime.models.spec import Autoencoder, Checkpoint, ModelSpec, Transformer
from runtime.offload import Offload, Shelf, give_back_memory, load_streamed
from runtime.trace import Stages, recording, span

DEMO = Path(__file__).parent / "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Model:
    """A loaded model; the text encoder is read only when a prompt is not in the text cache."""

    checkpoint: Checkpoint
    transformers: tuple[Transformer, ...]
    vae: Autoencoder
    device: torch.device
    dtype: torch.dtype
    engine: str
    load_stages: Stages = field(default_factory=dict)
    offload: Offload = field(default_factory=Offload)
    memory: int | None = None  # bytes that may be used; None: what the device has
    loras: tuple[Lora, ...] = ()  # merged into the transformers
    merged: tuple[frozenset[str], ...] = ()  # the parameters of each transformer that they changed
    precision: str = "full"  # "fp8": the weights of all layers that may be are there in 8 bits alone
    tile: tuple[int, int] | None = None  # (height, width) in pixels decoded at once; None: the whole frame
    _other_vae: tuple[torch.device, torch.dtype, Autoencoder] | None = field(default=None, repr=False)
    # Per expert, the layers quantised so far.
    _fp8: tuple[dict[str, torch.nn.Module], ...] = field(default=(), repr=False)
    _narrowed: dict[frozenset[str], tuple[Transformer, ...]] = field(default_factory=dict, repr=False)

    @property
    def spec(self) -> ModelSpec:
        """The model's facts and defaults."""
        return self.checkpoint.spec

    @property
    def vae_dtype(self) -> torch.dtype:
        """What the autoencoder computes in, both ways, where nothing else is asked for."""
        return vae_dtype(self.device, self.dtype)

    @cached_property
    def costs(self) -> Costs:
        """The formulas of what its networks compute and hold."""
        return self.checkpoint.costs()

    @cached_property
    def fp8_layers(self) -> tuple[str, ...]:
        """The layers that may be in 8 bits, by expert and name: "transformer.blocks.0.ffn_in"."""
        parts = zip(self.checkpoint.transformers, self.transformers, strict=True)
        return tuple(f"{part.name}.{name}" for part, network in parts for name in eight_bits.candidates(network))

    @cached_property
    def narrow_layers(self) -> frozenset[str]:
        """Those of `fp8_layers` that were loaded in 8 bits: the ones with weights, or none."""
        if self.precision == "full":
            return frozenset()
        parts = zip(self.checkpoint.transformers, self.transformers, strict=True)
        return frozenset(f"{part.name}.{name}" for part, network in parts for name in eight_bits.weighty(network))

    def in_fp8(self, layers: frozenset[str]) -> tuple[Transformer, ...]:
        """Return the experts with some of `fp8_layers` in 8 bits, quantised at first use and kept beside the others."""
        if not layers:
            return self.transformers
        if layers not in self._narrowed:
            self._fp8 = self._fp8 or tuple({} for _ in self.transformers)
            found = []
            for part, network, made in zip(self.checkpoint.transformers, self.transformers, self._fp8, strict=True):
                prefix = f"{part.name}."
                names = sorted(name.removeprefix(prefix) for name in layers if name.startswith(prefix))
                found.append(eight_bits.to_fp8(network, names, made))
            self._narrowed[layers] = tuple(found)
        return self._narrowed[layers]

    def forget_fp8(self) -> None:
        """Let go of what `in_fp8` quantised, because the weights are others now."""
        self._fp8 = ()
        self._narrowed.clear()

    def autoencoder(self, device: torch.device, dtype: torch.dtype) -> Autoencoder:
        """Return the autoencoder on a device in a dtype; beside the loaded one, the last other copy is kept."""
        if device.type == self.device.type and dtype == self.vae_dtype:
            return self.vae
        if self._other_vae is None or self._other_vae[:2] != (device, dtype):
            self._other_vae = None  # its memory goes first
            self._other_vae = device, dtype, load_autoencoder(self.checkpoint, device, dtype)
        return self._other_vae[2]

    @cached_property
    def text_encoder(self) -> Any:
        """The text encoder, loaded at first use, on the model's device in its dtype."""
        with span("load/text_encoder"):
            if self.offload.text == "streamed":
                return load_streamed(self.checkpoint.text_encoder, self.dtype, Shelf(self.device, 0), 0)
            return weights.load(self.checkpoint.text_encoder, self.device, self.dtype)

    def release_text_encoder(self) -> None:
        """Give the text encoder's memory back, unless it is to stay; it is loaded again when it is needed."""
        if self.offload.text != "resident" and self.__dict__.pop("text_encoder", None) is not None:
            give_back_memory()

    @cached_property
    def image_encoder(self) -> Any:
        """The encoder that known pictures are shown to, where the weights have one; loaded at first use."""
        assert self.checkpoint.image_encoder is not None
        with span("load/image_encoder"):
            return weights.load(self.checkpoint.image_encoder, self.device, self.dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the checkpoint brings; it neither pads nor cuts, whatever it did when it was saved."""
        folder = self.checkpoint.tokenizer
        try:
            if (whole := folder / "tokenizer.json").is_file():
                found = Tokenizer.from_file(str(whole))
            elif (folder / "spiece.model").is_file():
                from transformers import AutoTokenizer  # which takes seconds to load

                found = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
            else:
                raise FileNotFoundError("it has neither tokenizer.json nor spiece.model")
            found.no_padding()
            found.no_truncation()
            return found
        except Exception as error:  # both libraries fail with many kinds on an empty or damaged folder
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the tokenizer in {folder} cannot be read ({reason}); fetch the model again") from error

    @cached_property
    def published(self) -> str:
        """A hash of the weights that make the video, as they were published: transformers and VAE."""
        return weights.fingerprint(
            tuple(file for part in (*self.checkpoint.transformers, self.checkpoint.vae) for file in part.files)
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights that make the video, and of what was merged into them."""
        return ":".join([self.published, *(lora.fingerprint for lora in self.loras)])

    @cached_property
    def text_fingerprint(self) -> str:
        """A hash of the text encoder's weights; where they are only sampled, of their times of change too."""
        files = self.checkpoint.text_encoder.files
        found = weights.fingerprint(files)
        if found.startswith("sampled"):
            found += ":" + ",".join(str(file.stat().st_mtime_ns) for file in files)
        return found


def locate(name_or_path: str | Path) -> Path:
    """Return the folder of a model: "demo", a folder, a published name, or a repository id in the local cache.

    Raises FileNotFoundError where there is none.
    """
    if str(name_or_path) == "demo":
        return DEMO
    if not str(name_or_path).strip():
        raise ValueError("the model's name is empty; legal: 'demo', a folder, or a cached repository")
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; legal: a model's folder, so name the folder that holds model_index.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = repository(str(name_or_path))
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"there is no model {str(name_or_path)!r}: no such folder, and no such repository in the local Hugging "
            f"Face cache. Legal: 'demo', a folder, or a cached repository; fetch it with: hf download {name}"
        ) from None


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device asked for, "auto" meaning a GPU if there is one; ValueError where it is not there."""
    available = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}; legal: auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if available else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ValueError(
            f"device is {str(device)!r}, but this machine shows {count} NVIDIA GPUs to PyTorch {torch.__version__}; "
            "take --device cpu, or install the driver and a CUDA build of PyTorch"
        )
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype asked for, "auto" meaning bfloat16 on a GPU and float32 on a CPU; ValueError for others."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; legal: auto, {', '.join(DTYPES)}")
    return found


class Loading(TypedDict, total=False):
    """How a model is loaded: what `load` takes beside its name."""

    device: str | torch.device
    dtype: str | torch.dtype
    engine: str
    offload: Offload | None
    loras: Sequence[Lora]
    precision: str


def vae_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the autoencoder's dtype beside transformers of a dtype: 16 bits on a GPU, whose kernels are made for them,
    if those are; else float32, as published."""
    return torch.bfloat16 if device.type == "cuda" and dtype != torch.float32 else torch.float32


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    engine: str = "eager",
    offload: Offload | None = None,
    loras: Sequence[Lora] = (),
    precision: str = "full",
) -> Model:
    """Load a model: "demo", a folder in a published layout, or a repository id in the local Hugging Face cache.

    `dtype` is the transformer's and the text encoder's; the VAE computes in float32, as published, but beside 16 bits
    on a GPU in bfloat16. `offload` says which weights stay on the device (None: all). `loras` are merged into the
    transformers, in turn. `precision` "fp8" keeps the large layers of the blocks in 8 bits alone: half the memory, and
    no exact videos. Raises ValueError or FileNotFoundError with what is wrong and what to do.
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    find_engine(engine)
    if offload is not None and offload.blocks is not None and engine != "eager":
        raise ValueError(
            f"engine is {engine!r} and {offload.blocks} transformer blocks are to stay on the device; blocks that come "
            "and go are run by the engine 'eager': take it, or keep all blocks"
        )
    check_precision(precision, engine, offload)
    checkpoint = open_whole(name_or_path)
    stages: Stages = {}
    with recording(stages), span("load", memory=True):
        # In 8 bits a GPU need not have room for the full weights: they wait in the host's memory.
        first = place if precision == "full" else torch.device("cpu")
        transformers = tuple(load_transformers(checkpoint, first, kind, offload or Offload()))
        vae = load_autoencoder(checkpoint, place, vae_dtype(place, kind))
        model = Model(checkpoint, transformers, vae, place, kind, engine, stages, offload or Offload())
        change_loras(model, loras)
        if precision == "fp8":
            for network in transformers:
                eight_bits.narrow(network, place)
            model.precision = precision
    return model


def load_autoencoder_alone(name_or_path: str | Path, *, device: str | torch.device = "auto") -> Model:
    """Load of a model what `decode`, `encode` and `preview` need, in float32: no transformer. Errors as of `load`."""
    place, stages = choose_device(device), Stages()
    checkpoint = open_whole(name_or_path)
    with recording(stages), span("load", memory=True):
        vae = load_autoencoder(checkpoint, place, torch.float32)
    return Model(checkpoint, (), vae, place, torch.float32, "eager", stages)


def open_whole(name_or_path: str | Path) -> Checkpoint:
    """Return a checkpoint of which no file is missing; FileNotFoundError names what is."""
    checkpoint = open_checkpoint(locate(name_or_path))
    if checkpoint.missing:
        more = f" and {len(checkpoint.missing) - 5} more" if len(checkpoint.missing) > 5 else ""
        raise FileNotFoundError(
            f"the model in {checkpoint.folder} lacks {', '.join(checkpoint.missing[:5])}{more}; fetch it again whole"
        )
    return checkpoint


def check_precision(precision: str, engine: str, offload: Offload | None) -> None:
    """Raise ValueError for a precision that is not known, or that an engine or blocks that come and go cannot have."""
    if precision not in eight_bits.PRECISIONS:
        raise ValueError(f"precision is {precision!r}; legal: {', '.join(eight_bits.PRECISIONS)}")
    if precision == "full":
        return
    if engine not in eight_bits.ENGINES:
        raise ValueError(
            f"precision is {precision!r} and engine {engine!r}; layers in 8 bits are run by the engines "
            f"{', '.join(eight_bits.ENGINES)}: take one of them, or --precision full"
        )
    if offload is not None and offload.blocks is not None:
        raise ValueError(
            f"precision is {precision!r}, and {offload.blocks} transformer blocks are to stay on the device; blocks "
            "that come and go are read as they were published: keep all blocks, or take --precision full"
        )


def fit_loras(model: Model, loras: Sequence[Lora]) -> list[list[Fits]]:
    """Return where LoRAs change each transformer; ValueError where one does not fit, or the weights cannot change."""
    if loras and model.offload.blocks is not None:
        raise ValueError(
            f"{len(loras)} LoRAs are given, and {model.offload.blocks} transformer blocks are to stay on the device; "
            "blocks that come and go are read from the published files: keep all blocks, or leave the LoRAs out"
        )
    if model.precision == "fp8":
        raise ValueError(
            "other LoRAs are asked for, and the weights are in 8 bits already; LoRAs are merged before that: load the "
            "model with them, or with --precision full"
        )
    experts = len(model.transformers)
    parts = zip(model.checkpoint.transformers, model.transformers, strict=True)
    return [
        [fit(lora, part, cast(torch.nn.Module, network), number, experts) for lora in loras]
        for number, (part, network) in enumerate(parts)
    ]


def change_loras(model: Model, loras: Sequence[Lora]) -> None:
    """Merge LoRAs, in turn, in place of those that a model has: it equals then one that was loaded with these.

    What the former ones changed is read from the files again, and nothing else. Raises ValueError as `fit_loras`, and
    the model stays as it was.
    """
    if tuple(loras) == model.loras:
        return
    merged = []
    for number, own in enumerate(fit_loras(model, loras)):
        network = cast(torch.nn.Module, model.transformers[number])
        if model.merged:
            weights.refill(model.checkpoint.transformers[number], network, model.merged[number])
        names = [merge(fits, lora.strength, network) for lora, fits in zip(loras, own, strict=True)]
        merged.append(frozenset().union(*names))
    model.loras, model.merged = tuple(loras), tuple(merged)
    model.__dict__.pop("fingerprint", None)
    model.forget_fp8()


def load_autoencoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """Load the autoencoder; in 16 bits its kernels are laid out in float32, on the host, before they are rounded, but
    for those that stay float32."""
    whole = dtype == torch.float32
    network = weights.load(checkpoint.vae, device if whole else torch.device("cpu"), torch.float32)
    if not whole:
        for name, parameter in network.named_parameters():
            parameter.data = parameter.data.to(device, torch.float32 if checkpoint.vae.keep_float32(name) else dtype)
        checkpoint.vae.prepare(network)
    return cast(Autoencoder, network)


def load_transformers(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, offload: Offload
) -> Iterator[Transformer]:
    """Yield the experts, their blocks in memory or coming through slots that they share."""
    shelf = None if offload.blocks is None else Shelf(device, offload.blocks)
    for number, part in enumerate(checkpoint.transformers):
        if shelf is None:
            yield cast(Transformer, weights.load(part, device, dtype))
        else:
            yield cast(Transformer, load_streamed(part, dtype, shelf, number))
