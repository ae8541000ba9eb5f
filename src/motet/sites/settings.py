"""Settings of a site, and of the coordinator of many.

In:  ``site.toml``; ``coordinate.toml``.
Out: frozen ``Site`` and ``Coordination``; every mistake named with its place. Paths in a file count from its folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from motet.algorithms import ALGORITHMS
from motet.algorithms.mor import ClientSettings, parse_kind
from motet.config import Section, nearest, read_toml, settings
from motet.data.domains import DomainSettings
from motet.data.pictures import LONGEST
from motet.data.recipes import DataSettings
from motet.errors import ConfigError
from motet.evaluation.people import EvaluationSettings
from motet.experiment import PRESETS
from motet.experiment import Settings as RunOfSelectors
from motet.federated.host import SitePolicy
from motet.federated.server import RunSettings
from motet.mixing.settings import TABLES as MIXTURE
from motet.mixing.settings import USUAL, MixingSettings
from motet.selector.backbone import BackboneSettings
from motet.selector.heads import HeadSettings
from motet.selector.whitening import FeatureSettings

NAME = r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$"
"""What a site may be called: it is in file names, in certificates and in logs."""
SELECTORS = ("fedvpa", "fedvpl", "fedbiscuit", "shared", "mixture-em")
"""Methods over embedded pairs whose clients send no pairs; the other controls pool data, or train a language model."""
METHODS = (*SELECTORS, "mor")
REHEARSAL = "-rehearsal"
"""What stands after the name of a rehearsal's run folder."""


class SiteSettings(Section):
    """Who the site is, and where its pairs lie."""

    name: str = Field("north", pattern=NAME)
    """Its name, as the coordinator knows it: small letters, digits and hyphens."""
    data: str = "pairs"
    """File or folder of preference pairs: JSON lines or Parquet, with prompt, chosen and rejected."""
    held_out_share: float = Field(0.25, gt=0, lt=1)
    """Share of the prompts that nobody ever trains on: the site judges by them, and sends counts."""
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Share of the rows that may be unreadable before the site refuses to start."""
    image_pixels: int = Field(LONGEST, ge=16)
    """Longest side of a picture, in pixels: larger ones are shrunk to it when they are read."""
    store: str = "store"
    """Folder for what the site keeps: its memory, its answers, its log, its features."""


class OwnReward(Section):
    """The reward model that the site offers to a mixture (MoR); other methods do not look at it."""

    kind: str = "sentence"
    """``sentence``, ``causal``, ``vlm``, ``picture``, ``rules`` or ``toy``; ``KIND:MODEL`` takes another backbone;
    ``selector:FOLDER:N`` is the selector of a finished run at its prototype N."""

    @model_validator(mode="after")
    def _kind_exists(self) -> "OwnReward":
        parse_kind(self.kind)
        return self


SITE_TABLES: Mapping[str, type[Section]] = {
    "site": SiteSettings,
    "backbone": BackboneSettings,
    "reward": OwnReward,
    "head": HeadSettings,
    "policy": SitePolicy,
}
"""Tables of ``site.toml``."""


class FederationSettings(Section):
    """Who takes part, how they are reached, and how long the server waits."""

    engine: Literal["flare", "flower", "local"] = "flare"
    """``flare`` and ``flower`` reach real sites; ``local`` rehearses with all of them in this process, and wants
    ``site_files``."""
    sites: tuple[str, ...] = Field(min_length=1)
    """Names of the sites, each as its ``site.toml`` has it. Their order numbers the clients."""
    site_files: tuple[str, ...] = ()
    """For ``engine = "local"`` only: the ``site.toml`` of each site, in the order of ``sites``."""
    project: str = Field("motet", pattern=NAME)
    """Name of the project, in the certificates."""
    host: str = "localhost"
    """Name under which sites reach the server; it is in the server's certificate."""
    port: int = Field(8002, ge=1, le=65535)
    """Port on which the server listens for sites."""
    kits: str = "kits"
    """Folder of the start-up kits; they are made where it is absent."""
    out: str = "run"
    """The run folder."""
    deadline_seconds: float = Field(600.0, gt=0)
    """Longest wait for the answers to one request."""
    setup_seconds: float = Field(3600.0, gt=0)
    """The same while sites read and embed their pairs, or train their reward models."""
    quorum: int | None = Field(None, ge=1)
    """Fewest sites whose answers make a round. Left out: two thirds of those asked, rounded up."""
    retries: int = Field(2, ge=0)
    """How often those that did not answer are asked again."""

    @model_validator(mode="after")
    def _names_are_names(self) -> "FederationSettings":
        import re

        for name in self.sites:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"sites must be small letters, digits and hyphens, got {name!r}")
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites must have different names, got {', '.join(self.sites)}")
        if self.engine == "local" and len(self.site_files) != len(self.sites):
            raise ValueError(
                f"engine 'local' wants a site_files entry for each of the {len(self.sites)} sites, got "
                f"{len(self.site_files)}"
            )
        if self.quorum is not None and self.quorum > len(self.sites):
            raise ValueError(f"quorum must be at most the {len(self.sites)} sites, got {self.quorum}")
        return self

    def needed(self, asked: int) -> int:
        """Fewest answers of so many sites that are asked."""
        return min(self.quorum, asked) if self.quorum is not None else -(-2 * asked // 3)


class PublicSettings(Section):
    """What the server itself holds: public pairs."""

    data: str | None = None
    """File or folder of public pairs. A mixture learns from their choices, other methods only read their texts."""
    recipe: str | None = None
    """In place of data: the public part of a recipe's deal, such as ``voices``; texts without choices."""
    judged_share: float = Field(0.25, gt=0, lt=1)
    """For a mixture: share of the public prompts that its router and its policy are judged on and not trained on."""
    image_pixels: int = Field(LONGEST, ge=16)
    """Longest side of a public picture, in pixels: larger ones are shrunk to it, and so travel to the sites."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "PublicSettings":
        if (self.data is None) == (self.recipe is None):
            raise ValueError("give data, a file of public pairs, or recipe, such as 'voices', and not both")
        return self


COORDINATION: Mapping[str, type[Section]] = {"federation": FederationSettings, "public": PublicSettings}
"""Tables of ``coordinate.toml`` whatever the method; those of ``motet run`` come to them, but for ``[data]``."""
OF_SELECTORS: Mapping[str, type[Section]] = {
    "backbone": BackboneSettings, "features": FeatureSettings, "run": RunSettings, "evaluation": EvaluationSettings,
}  # fmt: skip
OF_MIXTURES: Mapping[str, type[Section]] = {
    name: MIXTURE[name] for name in ("router", "server", "policy", "grpo", "sampling")
}
USUAL_AT_SITES: Mapping[str, Mapping[str, Any]] = {
    **{name: dict(USUAL.get(name, {})) for name in OF_MIXTURES},
    "server": {"base": "smollm2", "policy_steps": 60},
}
"""Where defaults of a mixture over sites differ from those of its tables."""


@dataclass(frozen=True)
class Site:
    """One site, as its ``site.toml`` says."""

    path: Path
    site: SiteSettings
    backbone: BackboneSettings
    reward: OwnReward
    head: HeadSettings
    policy: SitePolicy

    @property
    def name(self) -> str:
        """Of the site."""
        return self.site.name

    @property
    def data(self) -> Path:
        """Where its pairs lie."""
        return self.path.parent / Path(self.site.data).expanduser()

    @property
    def store(self) -> Path:
        """What it keeps."""
        return self.path.parent / Path(self.site.store).expanduser()


@dataclass(frozen=True)
class Coordination:
    """One coordinated run, as its ``coordinate.toml`` says."""

    path: Path
    federation: FederationSettings
    public: PublicSettings
    asked: RunOfSelectors | MixingSettings
    """Settings of the run itself."""

    @property
    def method(self) -> str:
        """Of the run."""
        return self.asked.method

    def place(self, name: str) -> Path:
        """A path of the file, from its folder."""
        return self.path.parent / Path(name).expanduser()

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.place(self.federation.out)

    @property
    def kits(self) -> Path:
        """The start-up kits."""
        return self.place(self.federation.kits)

    @property
    def site_files(self) -> dict[str, Path]:
        """For a rehearsal: the ``site.toml`` of each site."""
        files = self.federation.site_files
        return {n: self.place(f) for n, f in zip(self.federation.sites, files, strict=True)} if files else {}


def read_site(path: Path) -> Site:
    """A site's settings.

    Raises:
        ConfigError: There is no such file, or a setting is unknown or out of range.
    """
    file = _read(path, "motet site init writes one")
    for name in file:
        if name not in SITE_TABLES:
            raise ConfigError(f"unknown table {name!r} in {path.name}; {nearest(name, SITE_TABLES)}")
    built = {name: _table(kind, file, name, path) for name, kind in SITE_TABLES.items()}
    return Site(path.absolute(), **built)


def read_coordination(path: Path, engine: str | None = None) -> Coordination:
    """A coordinator's settings.

    Args:
        path: ``coordinate.toml``.
        engine: In place of the file's. A rehearsal of what the file sends to real sites has a run folder of its own,
            with ``-rehearsal`` after its name: what it leaves is no part of the real run.

    Raises:
        ConfigError: There is no such file, or a setting is unknown or out of range.
    """
    file = _read(path, "docs/sites.md shows one")
    method, seed = file.get("method", "fedvpa"), file.get("seed", 0)
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(
            f"method in {path.name} must be one that leaves pairs with their sites, got {method!r}; "
            f"{nearest(str(method), METHODS)}"
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed in {path.name} must be a whole number of 0 or more, got {seed!r}")
    tables = {**COORDINATION, **(OF_MIXTURES if method == "mor" else of_selectors(method))}
    for name in file:
        if name not in (*tables, "method", "seed"):
            raise ConfigError(f"unknown table {name!r} in {path.name}; {nearest(name, [*tables, 'method', 'seed'])}")
    said = file.get("federation")
    if engine is not None and isinstance(said, dict):
        file["federation"] = {**said, "engine": engine}
    federation = _table(FederationSettings, file, "federation", path)
    if engine == "local" and isinstance(said, dict) and said.get("engine") != "local":
        federation = federation.model_copy(update={"out": federation.out.rstrip("/") + REHEARSAL})
    public = _table(PublicSettings, file, "public", path)
    if method == "mor" and public.recipe is not None:  # said before a kit is made, or a site is waited for
        raise ConfigError(
            f"recipe in [public] of {path.name} gives texts without choices, and the router of a mixture learns from "
            "choices; give data, a file of public pairs"
        )
    asked = _mixture(file, path, seed, len(federation.sites)) if method == "mor" else _selectors(
        file, path, seed, method, len(federation.sites)
    )  # fmt: skip
    return Coordination(path.absolute(), federation, public, asked)


def of_selectors(method: str) -> dict[str, type[Section]]:
    """Tables of a method over embedded pairs."""
    return {**OF_SELECTORS, "algorithm": ALGORITHMS[method].settings}


def _selectors(file: Mapping[str, Any], path: Path, seed: int, method: str, sites: int) -> RunOfSelectors:
    preset = _dictionary(file, "run", path).get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r} in {path.name}; {nearest(str(preset), PRESETS)}")
    often = {"checkpoint_every": 1, **PRESETS[preset].get("run", {})}
    standing = {**PRESETS[preset], "run": often, "algorithm": ALGORITHMS[method].paper if preset == "paper" else {}}
    built: dict[str, Any] = {  # a round over a network costs more than a checkpoint, so each has one
        name: _table(kind, file, name, path, standing.get(name, {})) for name, kind in of_selectors(method).items()
    }
    data = DataSettings(recipe="pairs", clients=sites, unseen_clients=0)
    return RunOfSelectors(data=data, seed=seed, method=method, **built)


def _mixture(file: Mapping[str, Any], path: Path, seed: int, sites: int) -> MixingSettings:
    built: dict[str, Any] = {
        name: _table(kind, file, name, path, USUAL_AT_SITES.get(name, {})) for name, kind in OF_MIXTURES.items()
    }
    if built["router"].router == "oracle":
        raise ConfigError(f"router in [router] of {path.name} must not be 'oracle': nobody knows a true domain here")
    whole = {name: built.get(name, kind()) for name, kind in MIXTURE.items() if name not in ("domains", "clients")}
    domains = DomainSettings(clients=sites, conflict=False, data=None)
    return MixingSettings(recipe="sites", domains=domains, clients=ClientSettings(kinds=("rules",)), seed=seed, **whole)


def _read(path: Path, hint: str) -> dict[str, Any]:
    if not path.is_file():
        what = "is a folder, the settings are a .toml file in it" if path.is_dir() else "does not exist"
        raise ConfigError(f"{str(path)!r} {what}; {hint}")
    return read_toml(path)


def _dictionary(file: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    table = file.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name!r} in {path.name} must be a table, write [{name}] and its settings below it")
    return table


def _table(
    kind: type[Section], file: Mapping[str, Any], name: str, path: Path, standing: Mapping[str, Any] | None = None
) -> Any:
    return settings(kind, {**(standing or {}), **_dictionary(file, name, path)}, f"[{name}] of {path.name}")
