"""Policies: a language model that takes a taste, opened from its folder, asked, and shipped.

In:  a policy folder, a run of feddpo, a stock PEFT adapter, or the word ``base``; a taste in words, or a few choices.
Out: answers at that taste, whole or as they grow; an ordinary PEFT adapter of that taste.

A taste in words is a prototype's name (``helpful``, ``p0``), a mixture (``0.7*p0+0.3*p1``), ``base`` (the base model),
or a file with a person's choices, from which the taste is inferred without training.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from motet.alignment.policy import TasteAdapter, Worn, adapter_from, fold, wearing
from motet.alignment.sampling import Answer, SamplingSettings, end_tokens, prompt_ids, sample
from motet.alignment.trainers import LoraSettings, OpenBase, adapter_files, open_base
from motet.card import card
from motet.config import settings as build
from motet.config import write_atomically, write_json
from motet.data.pairs import read_pairs
from motet.errors import ConfigError, DataError, RunError
from motet.person import UNSURE, Chooser, open_chooser
from motet.records import Pair, Turn
from motet.selector.backbone import BackboneSettings, find_device, find_dtype, model_folder
from motet.selector.trained import TENSORS as SELECTOR

ABOUT, TENSORS = "policy.json", "policy.safetensors"
FORMAT = 1
UNREAD = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")
"""What PEFT may do to an adapter beside plain LoRA; read as such it would be another one."""
WIDE = 0.8
"""A posterior whose standard deviations are on average above this share of the population's says next to nothing."""


@dataclass(frozen=True, eq=False)
class Policy:
    """A trained adapter, the tastes it was trained under, and what is known of it. Without adapter: the base alone."""

    adapter: TasteAdapter | None
    names: tuple[str, ...]
    """What each prototype is called; unique. Empty where the policy knows no taste."""
    tastes: Float[Tensor, "prototypes latent"]
    about: Mapping[str, Any]
    """What ``policy.json`` holds: base, method, recipe, figures."""
    folder: Path | None = None

    @property
    def model(self) -> str:
        """The base, as the setting ``model`` names it."""
        return str(self.about["base"])


@dataclass(frozen=True, eq=False)
class Taste:
    """A taste that somebody asked for."""

    label: str
    vector: Float[Tensor, " latent"] | None
    """``None`` where the policy knows no taste, and for the base."""
    shares: Mapping[str, float]
    """Of each prototype in it; empty where it is no mixture of prototypes."""
    said: tuple[str, ...] = ()
    """What the user should know of it."""
    unsure: bool = False
    """The choices that it was inferred from do not say much."""
    bare: bool = False
    """Not a taste: the base model, without the policy."""


BARE = Taste("base", None, {}, bare=True)
"""The base model, without any policy."""


def open_policy(where: Path | str, base: str | None = None) -> Policy:
    """A policy from its folder.

    Args:
        where: A policy folder, a run of feddpo, a stock PEFT adapter, or ``base`` for the bare base model.
        base: The base model. Needed for ``base`` and for a stock adapter, which only knows its base's name; useful for
            a policy whose base lies elsewhere now.

    Raises:
        RunError: There is no policy, or it is damaged.
        ConfigError: ``base`` is needed and was left out.
    """
    if str(where) == "base":
        return Policy(None, (), torch.zeros(0, 0), {"base": _needed(base, "the bare base model"), "by": "base"})
    folder = Path(where)
    if (folder / ABOUT).exists():
        found = _own(folder)
        return found if base is None else replace(found, about={**found.about, "base": base})
    if (folder / "adapter" / "adapter_config.json").exists():
        found = _stock(folder / "adapter", base or _run_model(folder))
        return Policy(found.adapter, (), found.tastes, {**found.about, "by": "feddpo", **_run_notes(folder)}, folder)
    if (folder / "adapter_config.json").exists():
        return _stock(folder, _needed(base, f"the adapter in {str(folder)!r}"))
    raise RunError(
        f"there is no policy in {str(folder)!r}: {ABOUT} or adapter_config.json must be there; give what motet align "
        "wrote, a run of feddpo, a PEFT adapter, or the word base"
    )


def _own(folder: Path) -> Policy:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise RunError(
                f"the policy in {str(folder)!r} has format {about['format']!r}, this motet reads {FORMAT}; "
                "use the motet that wrote it, or align again"
            )
        tensors = load((folder / TENSORS).read_bytes())
        adapter = adapter_from(tensors, build(LoraSettings, about["lora"], f"lora of {ABOUT}"))
        names, tastes, base = tuple(about["names"]), tensors["tastes"], about["base"]
        if not adapter.gates or tastes.shape != (len(names), adapter.latent) or not isinstance(base, str):
            raise ValueError("its parts do not fit together")
        return Policy(adapter, names, tastes, about, folder)
    except (SafetensorError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        raise RunError(f"the policy in {str(folder)!r} is damaged ({error}); align again in another folder") from None


def _stock(folder: Path, base: str) -> Policy:
    """An ordinary PEFT adapter as a policy that knows no taste."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load((folder / "adapter_model.safetensors").read_bytes())
        down: dict[str, Tensor] = {}
        up: dict[str, Tensor] = {}
        odd: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            {"A.weight": down, "B.weight": up}.get(part, odd)[layer] = tensor
        if odd or not down or down.keys() != up.keys() or any(config.get(name) for name in UNREAD):
            raise RunError(f"the adapter in {str(folder)!r} is no plain LoRA adapter; motet reads those only")
        lora = LoraSettings(
            lora_rank=int(config["r"]),
            lora_alpha=float(config["lora_alpha"]),
            lora_dropout=0.0,
            lora_targets=tuple(sorted({layer.rpartition(".")[2] for layer in down})),
        )
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
        raise RunError(f"the adapter in {str(folder)!r} is damaged ({error}); give a PEFT adapter folder") from None
    empty = {layer: torch.zeros(lora.lora_rank, 0) for layer in down}
    adapter = TasteAdapter(lora, down, up, empty, 1.0)
    return Policy(adapter, (), torch.zeros(0, 0), {"base": base, "by": "PEFT adapter"}, folder)


def _needed(base: str | None, what: str) -> str:
    if base is None:
        raise ConfigError(f"{what} needs --base, got none; for example --base smollm2")
    return base


def _run_model(folder: Path) -> str:
    from motet.experiment import resolve

    return resolve(config=folder / "config.toml").backbone.model


def _run_notes(folder: Path) -> dict[str, Any]:
    from motet.experiment import resolve

    asked = resolve(config=folder / "config.toml")
    return {"method": asked.method, "recipe": asked.data.recipe, "data": asked.data.model_dump(mode="json"),
            "run_seed": asked.seed}  # fmt: skip


def write_policy(
    folder: Path, adapter: TasteAdapter, tastes: Tensor, names: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Write ``policy.safetensors`` and ``policy.json``, each atomically; the latter last."""
    tensors = {**adapter.tensors(), "tastes": tastes}
    payload = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()})
    content = {"format": FORMAT, "names": list(names), "lora": adapter.settings.model_dump(mode="json"), **about}
    content["lora"] = {name: content["lora"][name] for name in LoraSettings.model_fields}
    write_atomically(folder / TENSORS, payload)
    write_json(folder / ABOUT, content)


def open_model(policy: Policy, cache: Path, device: str = "auto", dtype: str = "auto") -> OpenBase:
    """The language model under a policy.

    Raises:
        BackboneError: It cannot be opened.
    """
    place = find_device(device)
    return open_base(model_folder(base_settings(policy.model), cache), str(place), find_dtype(dtype, place))


def base_settings(model: str) -> BackboneSettings:
    """How ``model_folder`` wants to be asked for a base."""
    return BackboneSettings(model=model)


@contextlib.contextmanager
def dressed(base: OpenBase, policy: Policy) -> Iterator[Worn | None]:
    """The base with the policy on; bare where the policy is the base itself."""
    if policy.adapter is None:
        yield None
        return
    with wearing(base, policy.adapter) as worn:
        worn.model.eval()
        yield worn


@contextlib.contextmanager
def bared(worn: Worn | None) -> Iterator[None]:
    """The policy off for a while; nothing where there is none."""
    if worn is None:
        yield
        return
    with worn.taken_off():
        yield


@contextlib.contextmanager
def turned(worn: Worn | None, taste: Taste, rows: int) -> Iterator[tuple[Worn | None, Tensor | None]]:
    """What sampling and distance want of a policy at one taste: what is worn, and the taste of each of so many rows."""
    if taste.bare:
        with bared(worn):
            yield None, None
    else:
        yield worn, None if taste.vector is None else taste.vector.expand(rows, -1)


def parse_taste(policy: Policy, text: str, cache: Path) -> Taste:
    """A taste from what a user wrote; see the top of this file.

    Raises:
        ConfigError: The policy knows no such taste.
        DataError: The file holds no choices.
    """
    if text.strip().casefold() == "base":
        return BARE
    if not policy.names:
        if text.strip():
            raise ConfigError(f"this policy knows no tastes, got {text!r}; leave --taste out, or give base")
        return Taste("–", None, {})
    if not text.strip():
        raise ConfigError(f"--taste is needed, got none; this policy knows {_tags(policy)}, and base")
    named = text.strip() in policy.names
    if not named and (text.endswith((".jsonl", ".json", ".parquet")) or Path(text).is_file()):
        path = Path(text)
        if not path.is_file():
            raise DataError(f"there is no file {text!r}; --taste takes a name, a mixture or a file with choices")
        return person_taste(policy, read_pairs(path).pairs, cache, path.name)
    shares = _mixture(policy, text)
    total, said = sum(shares.values()), []
    if abs(total - 1) > 1e-6 or min(shares.values()) < 0:
        said.append(
            f"the weights sum to {total:g}; tastes were trained as mixtures that sum to 1, this one goes beyond"
        )
    return replace(mixture(policy, shares), said=tuple(said))


def mixture(policy: Policy, shares: Mapping[str, float]) -> Taste:
    """The taste that is so much of each prototype; no share at all is the base."""
    kept = {name: float(share) for name, share in shares.items() if share}
    if not kept:
        return BARE
    vector = torch.stack([share * policy.tastes[policy.names.index(name)] for name, share in kept.items()]).sum(dim=0)
    only = next(iter(kept)) if list(kept.values()) == [1.0] else None
    return Taste(only or "+".join(f"{share:g}*{name}" for name, share in kept.items()), vector, kept)


def _mixture(policy: Policy, text: str) -> dict[str, float]:
    known = {name: name for name in policy.names} | {f"p{i}": name for i, name in enumerate(policy.names)}
    if text.strip() in known:  # a name may hold a plus sign
        return {known[text.strip()]: 1.0}
    shares: dict[str, float] = {}
    for term in text.split("+"):
        weight, star, name = term.rpartition("*")
        name = name.strip()
        try:
            share = float(weight) if star else 1.0
            if not math.isfinite(share):
                raise ValueError(weight)
        except ValueError:
            raise ConfigError(
                f"--taste wants names and weights such as 0.7*{policy.names[0]}+0.3*{policy.names[-1]}, "
                f"got {text!r}: {weight.strip()!r} is no number"
            ) from None
        if name not in known:
            raise ConfigError(
                f"unknown taste {name!r} in --taste {text!r}; this policy knows {_tags(policy)}, and base"
            )
        shares[known[name]] = shares.get(known[name], 0.0) + share
    return shares


def _tags(policy: Policy) -> str:
    return ", ".join(f"{name} (p{i})" for i, name in enumerate(policy.names))


def person_taste(
    policy: Policy, choices: Sequence[Pair], cache: Path, label: str = "you", chooser: Chooser | None = None
) -> Taste:
    """The taste of somebody who chose so: the prototypes, weighed by how well each explains the choices.

    Where the method knows no prototypes, the mean of the posterior.

    Raises:
        RunError: The policy was trained by a reward that knows no tastes.
        DataError: There are no choices.
    """
    if policy.folder is None or not (policy.folder / SELECTOR).exists():
        raise RunError("this policy keeps no selector, so it cannot infer a person's taste; name a taste instead")
    if not choices:
        raise DataError(f"{label} holds no choices; give JSON lines with prompt, chosen, rejected")
    chooser = chooser or open_chooser(policy.folder, cache)
    if len(chooser.selector.prototypes):
        shares = prototype_shares(chooser, choices)
        best = int(shares.argmax())
        unsure = bool(shares.max() < UNSURE)
        said = [f"taste inferred from {len(choices)} choices: {shares[best]:.0%} {policy.names[best]}"]
        if unsure:
            said.append("these choices fit several kinds of people, so this taste means little; give more of them")
        found = dict(zip(policy.names, shares.tolist(), strict=True))
        return Taste(label, shares @ policy.tastes, found, tuple(said), unsure)
    mean, log_scale = chooser.taste(choices)
    unsure = bool(log_scale.exp().mean() > WIDE)
    said = [f"taste inferred from {len(choices)} choices: the posterior's mean"]
    if unsure:
        said.append(
            f"the posterior is nearly as wide as the population ({log_scale.exp().mean():.2f} of it), so this taste "
            "means little; give more choices"
        )
    return Taste(label, mean, {}, tuple(said), unsure)


def prototype_shares(chooser: Chooser, choices: Sequence[Pair]) -> Float[Tensor, " prototypes"]:
    """How likely each prototype is for somebody who chose so."""
    s = chooser.selector
    nearest = torch.cdist(s.prior.means, s.prototypes).argmin(dim=1)
    return torch.zeros(len(s.prototypes)).index_add_(0, nearest, chooser.responsibilities(choices))


def answers_at(
    base: OpenBase,
    worn: Worn | None,
    prompts: Sequence[tuple[Turn, ...]],
    taste: Taste,
    settings: SamplingSettings,
    seed: int,
) -> list[Answer]:
    """One answer to each prompt at one taste."""
    with turned(worn, taste, len(prompts)) as (worn, tastes):
        return sample(base, prompts, settings, seed, "say", worn=worn, tastes=tastes)


def stream(
    base: OpenBase, worn: Worn | None, prompt: tuple[Turn, ...], taste: Taste, settings: SamplingSettings, seed: int
) -> Iterator[str]:
    """The answer so far, again and again as it grows; token by token, so that several can be asked in turn."""
    ids = torch.tensor([prompt_ids(base, prompt, settings.max_prompt_tokens)], device=base.device)
    draw = torch.Generator().manual_seed(seed)
    cache, tokens, ends = None, [], end_tokens(base)
    for _ in range(settings.max_new_tokens):
        with torch.inference_mode(), bared(worn if taste.bare else None):
            if worn is not None:
                worn.dial.turn(None if taste.vector is None else taste.vector.to(base.device))
            model = base.model if worn is None else worn.model
            seen = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = seen.past_key_values
        chances = (seen.logits[0, -1].float().cpu() / settings.sampling_temperature).softmax(dim=-1)
        token = int(torch.multinomial(_nucleus(chances, settings.top_p), 1, generator=draw))
        if token in ends:
            break
        tokens.append(token)
        ids = torch.tensor([[token]], device=base.device)
        # a letter of several tokens is shown when it is whole
        yield base.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd").strip()


def _nucleus(chances: Tensor, top_p: float) -> Tensor:
    if top_p >= 1:
        return chances
    ordered, places = chances.sort(descending=True)
    kept = ordered * ((ordered.cumsum(dim=0) - ordered) < top_p)
    return torch.zeros_like(chances).scatter(0, places, kept)


def _judged(policy: Policy, taste: Taste) -> list[tuple[str, str]]:
    """What ``motet judge`` left in the policy's folder about this taste against the base."""
    rows = []
    for path in sorted(policy.folder.glob("judged-base-*.json")) if policy.folder is not None else ():
        try:
            verdicts = json.loads(path.read_text(encoding="utf-8"))["table"].get(taste.label, {})
        except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
            raise RunError(
                f"{path.name} in {str(policy.folder)!r} is damaged ({error}); judge again, or delete it"
            ) from None
        for verdict in verdicts.values():
            figure = f"{verdict['win_rate']:.3f} ({verdict['low']:.3f} to {verdict['high']:.3f})"
            right = verdict["about"].get("held_out_accuracy")
            known = "" if right is None else f"; the judge is right on {right:.1%} of its own held-out pairs"
            rows.append(
                (f"Win rate against the base, {verdict['judge']}", f"{figure}, {verdict['prompts']} prompts{known}")
            )
    return rows


def export(policy: Policy, base: OpenBase, taste: Taste, out: Path) -> list[str]:
    """Write an ordinary PEFT adapter of one taste, and its model card.

    Raises:
        RunError: The folder holds something else already, or there is nothing to export.
    """
    if policy.adapter is None:
        raise RunError("the bare base model has no adapter to export; give what motet align wrote")
    if taste.bare:
        raise RunError("the taste 'base' is the model without any adapter, so there is nothing to export; name a taste")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{str(out)!r} is not an empty folder; choose another --out")
    adapter_files(base, fold(policy.adapter, taste.vector), policy.adapter.settings, out)
    said = card(policy.about, base.name, taste.label, taste.shares, _judged(policy, taste))
    write_atomically(out / "README.md", said.encode())
    return [
        f"{path.name}: {path.stat().st_size:,} bytes" for path in sorted(out.iterdir()) if not path.name.startswith(".")
    ]
