"""Stage 2: from a finished run to one language model that takes any of its tastes.

In:  the folder of a run (its selector or rewards), a base model, public prompts.
Out: a policy folder: the taste-gated adapter, its tastes, how it was trained, a model card. See ``docs/policies.md``.

For DPO, answers are sampled from the base on public prompts and kept in the cache, and the reward labels them under
each prototype and under mixtures. For GRPO the policy itself answers, and the reward scores what it says.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import load
from torch import Tensor

from motet.alignment.dpo import DPOOnTastes, train_policy
from motet.alignment.grpo import GRPOOnTastes, train_policy_grpo
from motet.alignment.labels import Labels, LabelSettings, counts, label, mark_cut
from motet.alignment.policy import TasteAdapter, Worn, start_policy
from motet.alignment.sampling import Answer, SamplingSettings, distance, end_tokens, sample, sample_through, weights_key
from motet.alignment.stretches import Look, PolicySettings, Trained
from motet.alignment.trainers import OpenBase, open_base
from motet.card import card
from motet.config import Section, settings, words_by_table, write_atomically, write_toml
from motet.data.partition import Deal, deal_digest
from motet.data.prompts import bundled_prompts, read_prompts
from motet.data.recipes import RECIPES, load_recipe
from motet.errors import ConfigError, DataError, RunError
from motet.experiment import Settings, locked, resolve
from motet.person import unique_names
from motet.policies import ABOUT, base_settings, write_policy
from motet.records import Turn, generator, prompt_group
from motet.selector.backbone import find_device, find_dtype, model_folder
from motet.selector.reward import LinearReward, RewardModel, SelectorReward, open_reward
from motet.selector.rewards import TENSORS as REWARDS
from motet.selector.trained import CONFIG as SELECTOR_CONFIG
from motet.selector.trained import TENSORS as SELECTOR

Prompt = tuple[Turn, ...]
CHECKPOINT, STEPS, ALIGN = "checkpoint.safetensors", "steps.jsonl", "align.toml"
POSTERIORS = "posteriors.safetensors"


class AlignSettings(Section):
    """From a run to a policy."""

    by: Literal["dpo", "grpo"] = "dpo"
    """How the policy is trained: DPO on labelled pairs, or GRPO on rewards."""
    base: str | None = None
    """The language model: ``smollm2``, ``gemma3-270m``, a folder, a .gguf file or a hub name. Left out: the run's."""
    prompts: str | None = None
    """File with public prompts, JSON lines or text. Left out: the run's public prompts, topped up from the bundled
    ones where they are fewer than prompts_used."""
    prompts_used: int = Field(100, ge=2)
    """At most so many prompts are trained on, beside those for validation."""
    tastes: int = Field(2, ge=2)
    """Tastes of a method that has no prototypes (fedvpl): centres of k-means over its people's posteriors."""
    align_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the base's weights; ``auto`` takes bfloat16 where the device is fast at it. The adapter is float32."""
    align_device: str = "auto"
    """``auto`` takes a GPU if there is one; or a torch device such as ``cpu``."""


@runtime_checkable
class Watcher(Protocol):
    """Whoever looks on."""

    def said(self, text: str) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None: ...

    def looked(self, row: Mapping[str, float]) -> None: ...


class Silent:
    """Looks on and says nothing."""

    def said(self, text: str) -> None: ...

    def stage(self, name: str, done: int, total: int) -> None: ...

    def looked(self, row: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class Asked:
    """All settings of an alignment."""

    align: AlignSettings
    sampling: SamplingSettings
    labels: LabelSettings
    policy: PolicySettings
    dpo: DPOOnTastes
    grpo: GRPOOnTastes
    seed: int = 0

    def tables(self) -> dict[str, Any]:
        """As TOML tables."""
        return {"seed": self.seed} | {name: getattr(self, name).model_dump(mode="json") for name in TABLES}


TABLES: dict[str, type[Section]] = {
    "align": AlignSettings,
    "sampling": SamplingSettings,
    "labels": LabelSettings,
    "policy": PolicySettings,
    "dpo": DPOOnTastes,
    "grpo": GRPOOnTastes,
}


def resolve_align(words: Mapping[str, Any], seed: int = 0) -> Asked:
    """Settings of an alignment from single words.

    Raises:
        ConfigError: Anything unknown or out of range.
    """
    tables = words_by_table(words, TABLES)
    built: dict[str, Any] = {name: settings(kind, tables[name], "--set") for name, kind in TABLES.items()}
    idle = {"dpo": ("grpo",), "grpo": ("dpo", "labels")}[built["align"].by]
    if lost := [name for table in idle for name in tables[table]]:
        raise ConfigError(
            f"{lost[0]!r} in --set means nothing by {built['align'].by}; leave it out, or choose the other --by"
        )
    return Asked(**built, seed=seed)


def align(
    run: Path,
    out: Path,
    asked: Asked,
    cache: Path,
    resume: bool = False,
    data: str | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train a policy from a run, and leave a folder that everything can be asked of.

    Args:
        run: A finished run of a method that keeps a selector or rewards.
        out: The policy folder; it must not hold another policy unless ``resume`` is set.
        asked: Settings, see :func:`resolve_align`.
        cache: Where features, converted models and sampled answers are kept.
        resume: Go on from the folder's checkpoint.
        data: Where the run's data lies now, if it has moved.
        watcher: Told of every step.

    Returns:
        What ``policy.json`` holds.

    Raises:
        MotetError: See the message.
        KeyboardInterrupt: On Ctrl-C; sampled answers are kept, and training can be resumed.
    """
    watcher, began = watcher or Silent(), time.perf_counter()
    if (out / "summary.json").exists():
        raise RunError(f"{str(out)!r} holds a run, a policy needs a folder of its own; choose another --out")
    if not resume and ((out / ABOUT).exists() or (out / CHECKPOINT).exists()):
        raise RunError(f"{str(out)!r} already holds a policy; add --resume to go on with it, or choose another --out")
    if resume and (out / ABOUT).exists() and not (out / CHECKPOINT).exists():
        raise RunError(f"the policy in {str(out)!r} is finished; choose another --out to train another")
    settled = _run_settings(run, data)
    reward = open_reward(run, cache)
    names, tastes = tastes_of(run, reward, asked)
    with locked(out):
        if not (out / CHECKPOINT).exists():  # one that is there is of the same settings, or will be refused
            write_toml(out / ALIGN, asked.tables())
        deal = load_recipe(settled.data, settled.seed)
        digest = deal_digest(deal)
        noted = json.loads((run / "summary.json").read_text(encoding="utf-8")).get("deal_digest")
        if noted not in (None, digest):
            raise DataError(
                f"the data of {str(run)!r} must be what the run was dealt, it is other data by now; "
                "give the same with --data"
            )
        training, validation = _prompts(deal, asked, watcher)
        place = find_device(asked.align.align_device)
        model = asked.align.base or settled.backbone.model
        folder = model_folder(base_settings(model), cache)
        base = open_base(folder, str(place), find_dtype(asked.align.align_dtype, place))
        looking = _looker(base, replace(reward, cache=None), validation, tastes, asked, watcher)
        start = start_policy(base, asked.policy, tastes, generator(asked.seed, "adapter"))
        ready = Ready(base, start, training, reward, names, tastes)
        by = _by_grpo if asked.align.by == "grpo" else _by_dpo
        trained, figures = by(ready, asked, run, out, cache, looking, watcher)
        write_atomically(out / STEPS, "".join(json.dumps(row) + "\n" for row in trained.log).encode())
        best = next(row for row in trained.log if row["step"] == trained.step)
        notes = {
            "base": model, "by": asked.align.by, "method": settled.method, "recipe": settled.data.recipe,
            "data": settled.data.model_dump(mode="json"), "deal_digest": digest, "run_seed": settled.seed,
            "seed": asked.seed,
            "names": list(names),
            "figures": {
                "steps": trained.step, "gain_nats": best["gain"], "kl_nats": best["kl"], **figures,
                "parameters": trained.adapter.numbers(),
                "seconds": round(time.perf_counter() - began, 1),
            },
            "trained_on": sorted({prompt_group(prompt) for prompt in (*training, *validation)}),
        }  # fmt: skip
        for name in (SELECTOR, SELECTOR_CONFIG, POSTERIORS):
            if (run / name).exists():
                write_atomically(out / name, (run / name).read_bytes())
        write_atomically(out / "README.md", card(notes, base.name, "", {}).encode())
        write_policy(out, trained.adapter, tastes, names, notes)
        return notes


@dataclass(frozen=True, eq=False)
class Ready:
    """What either training starts from."""

    base: OpenBase
    start: TasteAdapter
    prompts: Sequence[Prompt]
    reward: SelectorReward | LinearReward
    names: tuple[str, ...]
    tastes: Float[Tensor, "tastes latent"]


def _by_dpo(
    ready: Ready, asked: Asked, run: Path, out: Path, cache: Path, looking: Callable[[Worn], Look], watcher: Watcher
) -> tuple[Trained, dict[str, int]]:
    """On pairs of the base's answers, labelled by the reward; and what there was to train on."""
    candidates = sample_candidates(ready.base, ready.prompts, asked, cache, watcher)
    texts = [[answer.text for answer in some] for some in candidates]
    watcher.said("labelling the answers under every taste")
    labels = label(ready.prompts, texts, ready.reward, ready.tastes, ready.names, asked.labels, asked.seed)
    ends = frozenset(end_tokens(ready.base))
    labels = mark_cut(
        labels,
        {
            (prompt, answer.text)
            for prompt, some in zip(ready.prompts, candidates, strict=True)
            for answer in some
            if not answer.tokens or answer.tokens[-1] not in ends
        },
    )
    watcher.said(_told(labels, len(ready.prompts)))
    if not (out / CHECKPOINT).exists():
        _write_pairs(out, labels)
    identity = _identity(asked, ready.base, [(row.pair, row.name, row.taste.tolist(), row.cut) for row in labels.rows])
    trained = train_policy(
        ready.base, ready.start, labels.rows, asked.dpo, asked.policy, asked.seed, looking, out / CHECKPOINT, identity,
        _stepped(watcher, asked.dpo.steps),
    )  # fmt: skip
    return trained, {"pairs": len(labels.rows), "opposed_pairs": labels.opposed}


def _by_grpo(
    ready: Ready, asked: Asked, run: Path, out: Path, cache: Path, looking: Callable[[Worn], Look], watcher: Watcher
) -> tuple[Trained, dict[str, int]]:
    """On the policy's own answers, scored by the reward as they come; and how many those are."""
    answers = asked.grpo.grpo_steps * asked.grpo.groups_per_step * asked.grpo.group_size
    watcher.said(f"{answers} answers of the policy, {asked.grpo.group_size} to each prompt and taste, will be scored")
    parts = [ready.prompts, ready.tastes.tolist(), *(_digest(run / name) for name in (SELECTOR, REWARDS))]
    reward = replace(ready.reward, cache=None)  # no answer comes twice, and a row read back may have other bits
    trained = train_policy_grpo(
        ready.base, ready.start, ready.prompts, ready.tastes, reward, asked.grpo, asked.policy, asked.sampling,
        asked.seed, looking, out / CHECKPOINT, _identity(asked, ready.base, parts),
        _stepped(watcher, asked.grpo.grpo_steps),
    )  # fmt: skip
    return trained, {"answers": answers}


def _stepped(watcher: Watcher, steps: int) -> Callable[[int, Mapping[str, float]], None]:
    def stepped(step: int, row: Mapping[str, float]) -> None:
        watcher.looked(row) if row else watcher.stage("training", step, steps)

    return stepped


def tastes_of(run: Path, reward: RewardModel, asked: Asked) -> tuple[tuple[str, ...], Float[Tensor, "tastes latent"]]:
    """The tastes that a run's policy is trained under, and their names; none where the reward knows no tastes."""
    if not isinstance(reward, SelectorReward):
        return (), torch.zeros(0, 0)
    selector = reward.selector
    if len(selector.prototypes):
        named = selector.axes_names or [f"p{i}" for i in range(len(selector.prototypes))]
        return tuple(unique_names(named)), selector.prototypes
    from sklearn.cluster import KMeans

    means = load((run / POSTERIORS).read_bytes())["means"]
    if len(means) < asked.align.tastes:
        raise ConfigError(f"tastes must be at most the number of people, {len(means)}, got {asked.align.tastes}")
    centres = KMeans(asked.align.tastes, n_init=10, random_state=asked.seed).fit(means.numpy()).cluster_centers_
    return tuple(f"group {i}" for i in range(len(centres))), torch.tensor(centres, dtype=torch.float32)


def _run_settings(run: Path, data: str | None) -> Settings:
    if not (run / "config.toml").exists() or not (run / "summary.json").exists():
        raise RunError(f"{str(run)!r} is no finished run; give the folder that motet run or motet demo wrote")
    asked = resolve(config=run / "config.toml", words={} if data is None else {"data": data})
    if asked.method == "feddpo":
        raise RunError(
            f"{str(run)!r} is a run of feddpo, which is a policy already: "
            "give it to motet say, motet export or motet judge as it is"
        )
    if reason := RECIPES[asked.data.recipe].unfit_for_policies:
        raise RunError(f"no policy is trained on {asked.data.recipe}: {reason}; use a run of another recipe")
    return asked


def _prompts(deal: Deal, asked: Asked, watcher: Watcher) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and prompts to look at the policy with; no prompt is in both, nor in anybody's pairs."""
    wanted = asked.align.prompts_used + asked.policy.validation_prompts
    held = [pair for person in deal.people for pair in (*person.train, *person.test)]
    held += [pair for pairs in deal.reserve.values() for pair in pairs]
    taken = {name for pair in held for name in (pair.group, prompt_group(pair.prompt))}  # data may name its own groups
    own, more = [pair.prompt for pair in deal.public], [*bundled_prompts("train")]
    if asked.align.prompts is not None:
        own, more = [*read_prompts(Path(asked.align.prompts))], []
    free: dict[str, Prompt] = {}
    for some in (own, more):  # the run's own come first: they are what its people ask
        for prompt in sorted(some, key=lambda prompt: _rank(prompt, asked.seed)):
            if prompt_group(prompt) not in taken:
                free.setdefault(prompt_group(prompt), prompt)
    kept = list(free.values())[:wanted]
    known = {prompt_group(prompt) for prompt in own}
    first = sum(prompt_group(prompt) in known for prompt in kept)
    said = f"{first} public prompts of the run and {len(kept) - first} bundled ones"
    if asked.align.prompts is not None:
        said = f"{first} prompts of {Path(asked.align.prompts).name}"
    if len(kept) < asked.policy.validation_prompts + 2:
        raise DataError(
            f"{len(kept)} prompts are left that stand in nobody's pairs, {asked.policy.validation_prompts + 2} are "
            "needed at least; give more with --set prompts=FILE or lower validation_prompts"
        )
    kept.sort(key=lambda prompt: _rank(prompt, asked.seed))
    split = asked.policy.validation_prompts
    watcher.said(f"{said}: {len(kept) - split} to train on, {split} to look at the policy with")
    return kept[split:], kept[:split]


def _rank(prompt: Prompt, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{prompt_group(prompt)}".encode()).hexdigest()


def sample_candidates(
    base: OpenBase, prompts: Sequence[Prompt], asked: Asked, cache: Path, watcher: Watcher
) -> list[list[Answer]]:
    """Answers of the bare base to each prompt; another method on the same prompts finds them in the cache."""
    count = asked.labels.answers_per_prompt
    wanted = [prompt for prompt in prompts for _ in range(count)]

    def watch(done: int, total: int) -> None:
        watcher.stage("sampling", done, total)

    drawn = sample_through(cache, base, wanted, asked.sampling, asked.seed, "candidates", watch=watch)
    return [drawn[start : start + count] for start in range(0, len(drawn), count)]


def _looker(
    base: OpenBase,
    reward: RewardModel,
    prompts: Sequence[Prompt],
    tastes: Tensor,
    asked: Asked,
    watcher: Watcher,
) -> Callable[[Worn], Look]:
    """How the policy is looked at: its answers against the base's, by the reward, at each prototype.

    The reward must keep nothing: what an interrupted look left in a cache was read in other batches, to other bits.
    """
    # all tastes in one batch, a taste a row: a pass over few rows costs nearly as much as one over many
    asked_of = [prompt for _ in range(max(1, len(tastes))) for prompt in prompts]
    each = tastes.repeat_interleave(len(prompts), dim=0) if len(tastes) else None
    baseline: list[str] = []

    def look(worn: Worn) -> Look:
        worn.model.eval()
        # the base's own random numbers: an adapter that changes nothing gains exactly nothing
        if not baseline:
            with worn.taken_off():
                drawn = sample(base, asked_of, asked.sampling, asked.seed, "look")
            baseline.extend(answer.text for answer in drawn)
        drawn = sample(base, asked_of, asked.sampling, asked.seed, "look", worn=worn, tastes=each)
        gain = _gain(reward, asked_of, [answer.text for answer in drawn], baseline, each)
        found = Look(float(gain), float(distance(base, asked_of, drawn, asked.sampling, worn, each).kl.mean()))
        watcher.looked(found._asdict())
        return found

    return look


def _gain(
    reward: RewardModel, prompts: Sequence[Prompt], texts: Sequence[str], baseline: Sequence[str], tastes: Tensor | None
) -> Tensor:
    """Mean reward of the answers minus that of the base's."""
    # in one call, for a vote is between the answers that stand in it
    both = reward.score(
        [*prompts, *prompts], [*texts, *baseline], taste=None if tastes is None else tastes.repeat(2, 1)
    )
    return (both[: len(prompts)] - both[len(prompts) :]).mean()


def _told(labels: Labels, prompts: int) -> str:
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(counts(labels).items()))
    return (
        f"{len(labels.rows)} labelled pairs of {prompts} prompts ({kinds}); {labels.opposed} carry opposite labels; "
        f"{labels.dropped} dropped as ties or too near"
    )


def _write_pairs(out: Path, labels: Labels) -> None:
    """``pairs.jsonl``: what the policy learns from, in TRL's form, and under which taste."""
    rows = [
        {"prompt": [turn._asdict() for turn in row.pair.prompt], "chosen": row.pair.chosen,
         "rejected": row.pair.rejected, "taste": row.name, "probability": round(row.probability, 4)}
        for row in labels.rows
    ]  # fmt: skip
    write_atomically(out / "pairs.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _identity(asked: Asked, base: OpenBase, parts: Sequence[object]) -> str:
    digest = hashlib.sha256(json.dumps([asked.tables(), weights_key(base)], sort_keys=True).encode())
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
