"""What a model is, as data: its numbers, its published defaults, its networks and where their weights lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from runtime.models.costs import Costs

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.weights import Component

# How weights take frames that are known: as extra input channels; by a control branch of their own; as clean tokens at
# sigma 0 beside noisy ones; or not at all, so that the known frames are blended in at each step.
Conditioning = Literal["channels", "control", "clean_tokens", "blend"]


CAPTIONS = (
    "You write captions for a text-to-video model. Rewrite the user's idea as one paragraph in English that describes "
    "the video: subject, action, place, light, camera, in plain words. Keep every fact that is given, add only what "
    "fits it, and answer with the paragraph alone."
)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets where it says nothing: the model's own published settings."""

    width: int
    height: int
    num_frames: int
    fps: float
    steps: int
    guidance: float
    shift: float
    guidance_2: float | None = None  # the second expert's; None: the same as `guidance`
    sampler: str = "unipc"
    recipe: str | None = None  # of distilled weights: a key of recipes.RECIPES
    sigmas: tuple[float, ...] | None = None  # where the network is asked instead of at `steps` levels by `shift`


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The facts about a model that the stations between prompt and video need; numbers come from published configs."""

    family: str
    name: str
    latent_channels: int
    stride: tuple[int, int, int]  # pixels per latent cell in (time, height, width)
    patch: tuple[int, int, int]  # latent cells per token in (time, height, width)
    text_length: int  # tokens that the text is cut or zero-padded to
    max_positions: int  # rotary table length per axis, in tokens
    schedule: str  # a key of schedules.SCHEDULES
    sampler_options: Mapping[str, Any]
    defaults: Defaults
    boundary: float | None = None  # sigma at and above which the first of two experts works
    conditioning: Conditioning = "blend"  # how known frames are consumed
    captions: str = CAPTIONS  # what a language model is told of the captions that it was trained on
    expansion: Mapping[str, Sequence[Sequence[str]]] | None = None  # its own rules, see expansion.by_rules

    @property
    def size_multiple(self) -> tuple[int, int]:
        """Pixels that the (height, width) of what the model makes are multiples of."""
        return self.stride[1] * self.patch[1], self.stride[2] * self.patch[2]

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) in pixels that a frame is made at: the next that the model makes."""
        down, across = self.size_multiple
        return -(-height // down) * down, -(-width // across) * across

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return [C, T, H, W] of the latents of a clip, on its canvas."""
        t, h, w = self.stride
        rows, columns = self.canvas(height, width)
        return self.latent_channels, (num_frames - 1) // t + 1, rows // h, columns // w

    def sampled_frames(self, num_frames: int) -> int:
        """Return the smallest number of frames, at least `num_frames`, that the model makes: 1 + time stride * n."""
        step = self.stride[0] * self.patch[0]
        return -(-(num_frames - 1) // step) * step + 1


def nearest_multiples(value: int, step: int) -> tuple[int, int]:
    """Return the positive multiples of `step` next to `value`, below and above."""
    return max(value // step, 1) * step, -(-max(value, 1) // step) * step


def nearest_counts(count: int, step: int) -> tuple[int, int]:
    """Return the numbers of frames 1 + n * step next to `count`, below and above it."""
    below = max(count - 1, 0) // step * step + 1
    return below, below + step


@dataclass(frozen=True)
class Stretch:
    """How positions are spread beyond what weights were trained on."""

    kind: str  # "ntk" or "riflex"
    trained: tuple[int, int, int]  # tokens in (time, height, width)


@dataclass(frozen=True)
class ImageSize:
    """How pictures are shown to an image encoder: scaled to the shorter edge, cut in the middle, normalised."""

    pictures: int  # how many: 1 the first known one, 2 also the last
    edge: int
    crop: tuple[int, int]  # (height, width)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Shown(NamedTuple):
    """Some frames of what is sampled: pixels [1, 3, F, H, W] in [-1, 1], and where they are given [1, 1, F, H, W]."""

    pixels: torch.Tensor  # 0 where nothing is given
    given: torch.Tensor  # 1 given, 0 to be made


class Channels(Protocol):
    """Makes the channels of what is known."""

    def __call__(
        self,
        encode: Callable[[Callable[[], Iterable[torch.Tensor]]], torch.Tensor],
        chunks: Callable[[], Iterable[Shown]],
        references: Sequence[torch.Tensor],
        /,
    ) -> torch.Tensor:
        """Return [1, C, T, H, W] of a clip in the autoencoder's chunks, and pictures [1, 3, 1, H, W] to look like."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, described from its configs alone; nothing of its weights has been read."""

    folder: Path
    spec: ModelSpec
    transformers: tuple[Component, ...]  # one, or two experts: high noise first
    vae: Component
    text_encoder: Component
    tokenizer: Path  # a folder that transformers' AutoTokenizer reads
    costs: Callable[[], Costs]  # the family's formulas for this checkpoint, from its configs
    missing: tuple[str, ...] = ()  # files that the layout asks for and that are not there
    image_encoder: Component | None = None  # of weights that are shown the known pictures as well
    image_size: ImageSize | None = None
    channels: Channels | None = None  # makes the channels of what is known, where weights take them

    @property
    def components(self) -> tuple[Component, ...]:
        """All networks, in the order a request meets them."""
        images = () if self.image_encoder is None else (self.image_encoder,)
        return (self.text_encoder, *images, *self.transformers, self.vae)


@dataclass(frozen=True)
class Projected:
    """What one transformer reads of the context at every step: its own projections of the text, and positions.

    A row is one prompt; the unconditional row comes first where there is guidance.
    """

    keys: tuple[torch.Tensor, ...]  # per block [R, S, N, K]
    values: tuple[torch.Tensor, ...]  # per block [R, S, N, K]
    bias: torch.Tensor | None  # [R, 1, 1, S], added to the scores; None: all zero
    rope: torch.Tensor  # [L, K/2, 2] float32, (cos, sin)
    images: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()  # per block keys and values [1, S, N, K] of pictures
    control: torch.Tensor | None = None  # [1, L, D], what a control branch starts from

    def row(self, index: int) -> Projected:
        """Return the same for one prompt alone."""
        pick = slice(index, index + 1)
        return replace(
            self,
            keys=tuple(k[pick] for k in self.keys),
            values=tuple(v[pick] for v in self.values),
            bias=None if self.bias is None else self.bias[pick],
        )


@dataclass(frozen=True)
class Context:
    """Everything that stays the same over the steps of one request, per expert."""

    experts: tuple[Projected, ...]

    @property
    def rows(self) -> int:
        """How many prompts it holds: 2 with guidance (unconditional, conditional), else 1."""
        return self.experts[0].keys[0].shape[0]

    def row(self, index: int) -> Context:
        """Return the context of one prompt alone."""
        return Context(tuple(projected.row(index) for projected in self.experts))


RunBlock: TypeAlias = "Callable[..., torch.Tensor]"  # (block, *the block's arguments) -> what the block returns


def run_block(block: nn.Module, *arguments: Any) -> torch.Tensor:
    """Call a block as it is written."""
    return block(*arguments)


class Transformer(Protocol):
    """What the stations ask of a family's transformer.

    The class of its blocks declares `shapes`, one per argument that there may be: "B L D" by the dimension key; and
    `may_be_fp8`, the names in it of the layers that may be in 8 bits: linear ones, and attention among video tokens.
    """

    config: Any  # a frozen dataclass
    blocks: Sequence[nn.Module]

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings that `project` takes."""
        ...

    def project(
        self,
        texts: Sequence[torch.Tensor],
        text_length: int,
        latent_shape: tuple[int, int, int],
        *,
        pictures: torch.Tensor | None = None,
        control: torch.Tensor | None = None,
        stretch: Stretch | None = None,
    ) -> Projected:
        """Project the text embeddings of R prompts, each [S, text_dim], and positions of (T, H, W), for all steps.

        `pictures` are image embeddings [P, S, D'], `control` is [1, C, T, H, W]; each where the weights take them.
        """
        ...

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, projected: Projected, run: RunBlock = run_block
    ) -> torch.Tensor:
        """Return the velocity [R, C, T, H, W] float32; the arguments are a Denoiser's. `run` calls each block."""
        ...

    def patchify(self, x: torch.Tensor) -> torch.Tensor:
        """Cut x [B, C, T, H, W] into tokens [B, L, C']."""
        ...

    def unpatchify(self, h: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Join the tokens [R, L, C''] of a velocity into [R, C, T, H, W], where x had `shape`."""
        ...

    def times(self, sigma: torch.Tensor) -> torch.Tensor:
        """Turn sigma into the model's own times [B, M] float32, on its device."""
        ...

    def flow(self, tokens: torch.Tensor, time: torch.Tensor, projected: Projected) -> torch.Tensor:
        """Return the velocity's tokens: what lies between `patchify` and `unpatchify`, tensors alone."""
        ...


class Autoencoder(Protocol):
    """What the stations ask of a family's video autoencoder; latents are normalised as the sampler sees them."""

    def decode_stream(
        self, latents: torch.Tensor, tile: tuple[int, int] | None = None, start: int = 0
    ) -> Iterator[torch.Tensor]:
        """Yield pixels [B, 3, F, H, W] in [-1, 1] of latents [B, C, T, H, W], one latent frame after the other.

        They begin at latent frame `start`.

        `tile` (height, width) in pixels bounds what is decoded at once, halo included; the numbers are the same.
        """
        ...

    def decode_chunk(
        self, latent: torch.Tensor, kept: Sequence[torch.Tensor], first: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return pixels [B, 3, F, H, W] of one latent frame [B, C, 1, H, W], and what to keep for the next one.

        Tensors in, tensors out, for a whole frame: what engines export.
        """
        ...

    def kept_at_first(self, latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the zeros that `decode_chunk` takes as `kept` for a clip's first latent frame [B, C, 1, H, W]."""
        ...

    def encode_stream(
        self, chunks: Iterable[torch.Tensor], tile: tuple[int, int] | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield latent frames [B, C, 1, H, W] of chunks of pixels [B, 3, F, H, W] in [-1, 1].

        The first chunk holds one frame, each next one a stride's. `tile` as in `decode_stream`.
        """
        ...

    def tile_of(self, height: int, width: int, parts: tuple[int, int]) -> tuple[int, int]:
        """Return the tile (height, width) in pixels, halo included, that cuts a frame into parts (rows, columns)."""
        ...


class Denoiser(Protocol):
    """The one callable between sampler and network."""

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, context: Context, /) -> torch.Tensor:
        """Return the velocity [R, C, T, H, W] float32 of x [B, C, T, H, W] at sigma [B] or [B, T] (float64).

        R is the context's rows; B is R or 1 (one x under several prompts).
        """
        ...


def config_from(cls: type, given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the entries of a published config that the dataclass `cls` has; ValueError names unknown ones.

    Keys with a leading underscore are the publisher's own notes; lists become tuples.
    """
    known = {f.name for f in fields(cls)}
    found = {key: value for key, value in given.items() if not key.startswith("_")}
    if unknown := sorted(found.keys() - known):
        raise ValueError(f"{what} has keys that are not known: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
