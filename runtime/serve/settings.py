"""Settings of the server: what the command line says, before what a TOML file says, before the defaults."""

from __future__ import annotations

import dataclasses
import ipaddress
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from runtime.certificates import Signer, find_signer, signer_files
from runtime.cli.arguments import Parser
from runtime.expansion import Expansion
from runtime.serve.fetching import Access
from runtime.serve.keys import Key, read_keys
from runtime.serve.loras import lora_files
from runtime.serve.moderation import Rule
from runtime.serve.webhooks import read_secret

PATHS = {"data", "api_key", "certificate", "private_key", "webhook_secret"}
LISTS = {"model", "lora", "fetch_host", "webhook_host"}
TEXTS = ("host", "device", "engine", "dtype", "precision", "warm", "log", "expand_model", "expand_url")
SWITCHES = ("insecure", "credentials", "exclusive", "move_damaged")
RANGES: dict[str, tuple[float, float]] = {  # the least and the most of each number; whole where the least is
    "port": (0, 65535), "health_port": (0, 65535), "workers": (1, 1024), "max_queue": (0, 10**9),
    "max_per_key": (0, 10**9), "max_upload": (1, 2**50), "min_free": (0, 2**60), "grace": (0.0, 1e6),
    "hang": (0.0, 1e9), "max_seconds": (0.0, 1e9), "full_wait": (0.0, 1e9), "keep": (0.0, 1e12),
}  # fmt: skip
MAX_FETCH = 20 * 2**20  # bytes of one input
MAX_WORDS = 2**16  # bytes of what is answered to a webhook


@dataclass(frozen=True)
class Settings:
    """How one server runs; sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    data: Path = Path("dit-runtime-data")
    model: tuple[str, ...] = ("demo",)
    lora: tuple[str, ...] = ()  # NAME=FILE[:STRENGTH], as loras.lora_files says, that requests may name
    api_key: Path | None = None  # a file of keys, as keys.read_keys says
    workers: int = 1
    device: str = "auto"
    engine: str = "eager"  # this and the next two: as runtime.load takes them
    dtype: str = "auto"
    precision: str = "full"
    warm: str = ""  # sizes to run once before a worker is ready, such as 832x480x81,480x832x49
    insecure: bool = False  # another address than loopback without a key
    grace: float = 20.0  # between SIGTERM and the end
    hang: float = 60.0  # without a sign of life, or 10 times its median step: a worker is killed, its job made again
    max_queue: int = 1000
    max_per_key: int = 1000
    max_seconds: float = 86400.0  # that one job may take by its prediction; 0: whatever it takes
    max_upload: int = 256 * 2**20
    min_free: int = 256 * 2**20  # of the disk; below it nothing is accepted
    full_wait: float = 60.0  # that a running job waits for space on a full disk, before it fails
    fetch_host: tuple[str, ...] = ()  # where inputs may be fetched from, as fetching.Access says; none: nothing is
    credentials: bool = True  # content credentials in every result
    certificate: Path | None = None  # whose they are; none: one for development, kept in the data folder
    private_key: Path | None = None
    moderation: tuple[Rule, ...] = ()  # [[moderation]] tables of the file, as moderation.Rule says
    health_port: int | None = None  # health on a port of its own, which no flood of requests can fill
    exclusive: bool = False  # no other server may use the data folder
    move_damaged: bool = False  # a damaged store goes aside, and an empty one takes its place
    webhook_host: tuple[str, ...] = ()  # who may be told of a video's end, as fetching.Access says; none: nobody is
    webhook_secret: Path | None = None  # what that is signed with; None: a file in the data folder, made at first
    keep: float = 0.0  # that results are kept after their end; 0: until they are deleted
    log: str = "text"  # or "json"
    expand_model: str | None = None  # who writes prompts out; None: the checkpoint's own rules
    expand_url: str | None = None
    keys: dict[str, Key] = field(default_factory=dict, repr=False)  # by the digest of each

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            given = getattr(self, name)
            whole = isinstance(least, int)
            if given is None:
                continue
            if (
                isinstance(given, bool)
                or not isinstance(given, int if whole else int | float)
                or not least <= given <= most
            ):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"{name} is {given!r}; legal: {kind} from {least:g} to {most:g}")
        for name in SWITCHES:
            if not isinstance(given := getattr(self, name), bool):
                raise ValueError(f"{name} is {given!r}; legal: true, false")
        for name in TEXTS:
            if not isinstance(given := getattr(self, name), str | None):
                raise ValueError(f"{name} is {given!r}; legal: text")
        if self.log not in ("text", "json"):
            raise ValueError(f"log is {self.log!r}; legal: text, json")
        Expansion(model=self.expand_model, url=self.expand_url)  # raises for what cannot be
        lora_files(self.lora)

    @property
    def served(self) -> tuple[str, ...]:
        """The models' names in the API."""
        return tuple(model_place(each)[0] for each in self.model)

    @property
    def expansion(self) -> Expansion:
        """Who writes prompts out."""
        return Expansion(model=self.expand_model, url=self.expand_url)

    @property
    def signer(self) -> Signer | None:
        """Who signs the results, made at first use; None where nobody is to. ValueError where that cannot be."""
        if not self.credentials:
            return None
        return find_signer(self.certificate, self.private_key, self.data / "credentials")

    @property
    def signer_files(self) -> tuple[Path, Path] | None:
        """Where the signer's certificate and key lie; None where nobody signs."""
        return signer_files(self.certificate, self.private_key, self.data / "credentials") if self.credentials else None

    def limits(self, owner: str) -> Key:
        """What an owner may ask for; several keys of one name are one owner, with the first one's limits."""
        found = next((key for key in self.keys.values() if key.name == owner), Key(owner))
        return dataclasses.replace(found, jobs=self.max_per_key if found.jobs is None else found.jobs)

    @property
    def webhooks(self) -> Access:
        """Who may be told."""
        return Access(self.webhook_host, max_bytes=MAX_WORDS)

    def read_secret(self) -> bytes:
        """Return what webhooks are signed with."""
        return read_secret(self.webhook_secret or self.data / "webhook-secret")

    @property
    def fetching(self) -> Access:
        """What inputs may be fetched."""
        return Access(self.fetch_host, max_bytes=min(MAX_FETCH, self.max_upload))


def read_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Return the settings of a command line; ValueError or OSError for what cannot be."""
    parser = Parser(prog="python -m runtime.serve", description="Serve videos over HTTP.")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML with the same names, such as port = 8000")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000; 0: any that is free)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="jobs and results (default: ./dit-runtime-data)")
    parser.add_argument("--model", action="append", metavar="NAME[=PLACE]", help="may be given again (default: demo)")
    parser.add_argument(
        "--lora", action="append", metavar="NAME=FILE[:STRENGTH]", help="that requests may name; may be given again"
    )
    parser.add_argument("--api-key", type=Path, metavar="FILE", help="lines NAME:KEY [jobs=N] [per-minute=N]")
    parser.add_argument("--workers", type=int, metavar="N", help="worker processes (default: 1)")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--engine", help="eager (default), cuda_graph, inductor, tensorrt; kept warm over jobs")
    parser.add_argument("--dtype", help="auto (default), float32, bfloat16, float16")
    parser.add_argument("--precision", help="full (default), or fp8: large layers in 8 bits; not exact")
    parser.add_argument("--warm", metavar="SIZES", help="sizes to run before it is ready, such as 832x480x81")
    parser.add_argument("--insecure", action="store_true", default=None, help="no key on an address others can reach")
    parser.add_argument("--grace", type=float, metavar="S", help="seconds to end in after SIGTERM (default: 20)")
    parser.add_argument("--max-queue", type=int, metavar="N", help="jobs waiting or running at most (default: 1000)")
    parser.add_argument("--max-per-key", type=int, metavar="N", help="the same for each key (default: 1000)")
    parser.add_argument(
        "--fetch-host", action="append", metavar="HOST",
        help="host that inputs may be fetched from, such as *.example.com; may be given again (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--no-credentials", dest="credentials", action="store_false", default=None,
        help="no content credentials (C2PA) in the results",
    )  # fmt: skip
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="whose name they bear (PEM; default: our own)")
    parser.add_argument("--private-key", type=Path, metavar="FILE", help="the certificate's key (PEM)")
    parser.add_argument("--health-port", type=int, metavar="N", help="answers health alone, at once (default: none)")
    parser.add_argument("--exclusive", action="store_true", default=None, help="no other server on this data folder")
    parser.add_argument(
        "--move-damaged", action="store_true", default=None, help="move a damaged store aside and begin with none"
    )
    parser.add_argument(
        "--webhook-host", action="append", metavar="HOST",
        help="host that may be told of a video's end (webhook_url); may be given again (default: none)",
    )  # fmt: skip
    parser.add_argument("--webhook-secret", type=Path, metavar="FILE", help="whsec_... (default: made in --data)")
    parser.add_argument(
        "--max-seconds", type=float, metavar="S",
        help="that one job may take by its prediction (default: 86400, a day; 0: any)",
    )  # fmt: skip
    parser.add_argument("--keep", type=float, metavar="S", help="seconds that results are kept (default: for ever)")
    parser.add_argument("--log", choices=("text", "json"), help="how lines are written (default: text)")
    parser.add_argument(
        "--expand-model", metavar="NAME", help="writes prompts out, at the endpoint or in a folder here"
    )
    parser.add_argument("--expand-url", metavar="URL", help="a chat endpoint, such as http://localhost:8000/v1")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    told: dict[str, Any] = {}
    if (config := options.pop("config", None)) is not None:
        told = read_config(config)
        known = {f.name for f in dataclasses.fields(Settings)} - {"keys"}
        if unknown := sorted(told.keys() - known):
            raise ValueError(f"{config} has keys that are not known: {', '.join(unknown)}; legal: {', '.join(known)}")
    values = told | options
    settings = Settings(**typed(values))
    names = settings.served
    if twice := next((name for name in names if not name or names.count(name) > 1), None):
        raise ValueError(f"model {twice!r} is named twice; legal: each name once, so give NAME=PLACE")
    if settings.api_key is not None:
        settings = dataclasses.replace(settings, keys=read_keys(settings.api_key))
    if not settings.keys and not settings.insecure and not loopback(settings.host):
        raise ValueError(
            f"host is {settings.host}, which others can reach, and there is no API key: give --api-key FILE, or "
            "--insecure if that is meant"
        )
    return settings


def read_config(file: Path) -> dict[str, Any]:
    """Return what a TOML file says, by our names; ValueError for what is no TOML."""
    try:
        return {name.replace("-", "_"): value for name, value in tomllib.loads(file.read_text("utf-8")).items()}
    except ValueError as error:
        raise ValueError(f"{file} is no TOML ({error})") from error


def typed(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as their fields take them: paths, tuples, rules; ValueError for what cannot be one."""
    values = dict(told)
    for name in PATHS & values.keys():
        if not isinstance(values[name], str | Path):
            raise ValueError(f"{name} is {values[name]!r}; legal: the name of a file or folder")
        values[name] = Path(values[name])
    tables = values.get("moderation", ())
    if not isinstance(tables, list | tuple) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"moderation is {tables!r}; legal: [[moderation]] tables")
    values["moderation"] = tuple(Rule.of(table) for table in tables)
    for name in LISTS & values.keys():
        given = [values[name]] if isinstance(values[name], str) else values[name]
        if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
            raise ValueError(f"{name} is {given!r}; legal: text, or a list of texts")
        values[name] = tuple(given)
    return values


def model_place(text: str) -> tuple[str, str]:
    """Return (name in the API, name or folder to load) of NAME or NAME=PLACE."""
    name, _, place = text.partition("=")
    return name, place or name


@lru_cache(maxsize=256)
def loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
