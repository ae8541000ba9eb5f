"""Settings of a run of MoR: every table, with one name for each setting over all of them.

In:  the recipe's name, a TOML file, single words.
Out: frozen ``MixingSettings``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from motet.algorithms.mor import ClientSettings, parse_kind
from motet.alignment.grpo import GRPOOnTastes
from motet.alignment.router import RouterSettings
from motet.alignment.sampling import SamplingSettings
from motet.alignment.stretches import PolicySettings
from motet.config import Section, nearest, read_toml, settings, words_by_table
from motet.data.domains import READERS, DomainSettings
from motet.data.drawn import DRAWN
from motet.errors import ConfigError
from motet.mixing import MIXTURES
from motet.selector.eyes import EyesSettings
from motet.selector.heads import HeadSettings


class ServerSettings(Section):
    """The server: the model that it trains, and how the run is judged."""

    base: str = "eyes"
    """The model that the server trains: ``eyes`` builds the small vision-language model; or a folder or a hub name. One
    that reads texts only is asked without the pictures."""
    base_steps: int = Field(400, ge=1)
    """Steps of training of the server's own small model, where it is ``eyes``; few leave it something to learn."""
    taught_questions: int = Field(4000, ge=1)
    """Questions with answers that the server's own small model is taught, of those for bases."""
    scarce_domains: tuple[str, ...] = ()
    """Domains of which that small model is taught ``scarce_questions`` questions only: what else it is to know of them,
    the clients' scores must teach it."""
    scarce_questions: int = Field(60, ge=0)
    """Questions of each of them that it is taught; enough to know what is asked, too few to know how to answer."""
    policy_steps: int = Field(0, ge=0)
    """Steps of GRPO with the routed mixture; 0 trains no policy: reward models and routing only."""
    base_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Type of the base's weights; the adapter is float32."""
    base_device: str = "auto"
    """``auto`` takes a GPU if there is one; or a torch device such as ``cpu``."""
    scored_questions: int = Field(400, ge=10)
    """Held-out questions, spread over the domains, that the server model answers before and after."""
    blind: bool = True
    """Whether to score it with the pictures of other questions, too: what is right then owes nothing to seeing."""
    attacks: bool = True
    """Whether to try every attack with 1, 2 and 3 hostile clients."""
    attack_draws: int = Field(2, ge=1)
    """How many draws of who is hostile an attack's figure is the mean of."""
    leave_out: bool = True
    """Whether to leave out each domain's clients once."""
    feddpo_rounds: int = Field(3, ge=1)
    """Rounds of the control FedDPO, over all clients."""
    feddpo_steps: int = Field(10, ge=1)
    """Its local steps of 8 pairs."""
    feddpo_learning_rate: float = Field(1e-3, gt=0)
    """Of its AdamW."""
    examples: int = Field(10, ge=0)
    """Questions that the report shows with the answers before and after."""


TABLES: Mapping[str, type[Section]] = {
    "domains": DomainSettings,
    "clients": ClientSettings,
    "head": HeadSettings,
    "router": RouterSettings,
    "server": ServerSettings,
    "eyes": EyesSettings,
    "policy": PolicySettings,
    "grpo": GRPOOnTastes,
    "sampling": SamplingSettings,
}
USUAL: Mapping[str, Mapping[str, Any]] = {
    "domains": {"base_questions": 20_000},
    "eyes": {"eyes_steps": 900},
    "policy": {
        "lora_rank": 16, "lora_alpha": 32.0, "kl_budget": 5.0, "check_every": 50, "validation_prompts": 100,
        "lora_targets": (
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ),
    },
    "grpo": {
        "grpo_learning_rate": 1e-3, "group_size": 8, "groups_per_step": 16, "answers_per_pass": 64,
        "drop_flat_groups": True, "group_mixtures": 0,
    },
    "sampling": {"max_new_tokens": 16, "sampling_temperature": 1.0},
}  # fmt: skip
"""Where a mixture's defaults differ from those of a taste-gated policy."""
OWN: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # a model that has hardly been taught shapes, whose clients know them: what it lacks, the scores have to bring
    "mor-demo": {
        "server": {
            "policy_steps": 150,
            "base_steps": 1500,
            "taught_questions": 8000,
            "scarce_domains": ("shapes",),
        },
        "domains": {"public_pairs": 1000, "public_questions": 2000},
        "router": {"top_k": 2},
    },
    # of real questions there are few, but for shapes: a small model learns to see nothing else from them
    "mor": {
        "eyes": {"eyes_steps": 500},
        "clients": {
            "kinds": (
                "sentence",
                "causal",
                "rules",
                "picture",
                "vlm",
                "picture",
                "sentence",
                "sentence",
                "sentence",
                "vlm",
            ),
        },
    },
}
"""What each recipe sets beside that."""


@dataclass(frozen=True)
class MixingSettings:
    """All settings of a run."""

    recipe: str
    domains: DomainSettings
    clients: ClientSettings
    head: HeadSettings
    router: RouterSettings
    server: ServerSettings
    eyes: EyesSettings
    policy: PolicySettings
    grpo: GRPOOnTastes
    sampling: SamplingSettings
    seed: int = 0
    method: str = field(default="mor", init=False)

    def tables(self) -> dict[str, Any]:
        """As TOML tables."""
        kept = {name: getattr(self, name).model_dump(mode="json") for name in TABLES}
        return {"method": self.method, "recipe": self.recipe, "seed": self.seed, **kept}


def resolve_mixing(
    recipe: str | None, words: Mapping[str, Any], config: Path | None = None, seed: int | None = None
) -> MixingSettings:
    """Settings from, in rising order of precedence: defaults, the recipe's, a TOML file, single words.

    Args:
        recipe: ``mor`` or ``mor-demo``; left out: the file's.
        words: Settings by name, with or without their table.
        config: A TOML file, such as a run folder's ``config.toml``.
        seed: Overrides the file's.

    Raises:
        ConfigError: Anything unknown or out of range, with its place.
    """
    file = read_toml(config) if config else {}
    place = config.name if config else "the settings"
    for name in file:
        if name not in (*TABLES, "method", "recipe", "seed"):
            raise ConfigError(f"unknown table {name!r} in {place}; {nearest(name, [*TABLES, 'seed', 'recipe'])}")
    asked_of = recipe or file.get("recipe")
    if not isinstance(asked_of, str) or asked_of not in MIXTURES:
        raise ConfigError(f"unknown mixture {asked_of!r}; {nearest(str(asked_of), MIXTURES)}")
    asked = words_by_table(words, TABLES)
    built: dict[str, Any] = {}
    for name, kind in TABLES.items():
        standing = {**USUAL.get(name, {}), **OWN[asked_of].get(name, {})}
        table = {**standing, **file.get(name, {})}
        settings(kind, table, f"[{name}] of {place}")  # so that a mistake is reported where it was made
        built[name] = settings(kind, {**table, **asked[name]}, "--set")
    if asked_of == "mor" and built["domains"].data is None:
        raise ConfigError("mor reads real data, got no folder; give one with --data, or use mor-demo, which needs none")
    if asked_of == "mor-demo" and built["domains"].data is not None:
        raise ConfigError("mor-demo draws its own pictures, got --data; use mor for the data in a folder")
    if built["router"].router == "oracle" and built["server"].policy_steps:
        raise ConfigError(
            "router 'oracle' is told true domains and serves judging only, it trains no policy; "
            "set policy_steps=0, or another router"
        )
    known = tuple(DRAWN) if asked_of == "mor-demo" else READERS
    for domain in built["server"].scarce_domains:  # one that takes no part is scarce in vain
        if domain not in known:
            raise ConfigError(f"scarce_domains must name domains, got {domain!r}; {nearest(domain, known)}")
    for word in built["clients"].kinds:
        parse_kind(word)
    number = seed if seed is not None else file.get("seed", 0)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ConfigError(f"seed must be a whole number of 0 or more, got {number!r}")
    return MixingSettings(recipe=asked_of, **built, seed=number)
