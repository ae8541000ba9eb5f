"""Asking: rewards from sites over a network, as one reward model each, and all of them in one question.

In:  a federation; prompts, answers and pictures, all of them public.
Out: one number an answer and site; ``scores.safetensors``, what the sites say of the public pairs.

A question is cut where it would be larger than sites read: pictures make it so. Sites whose rewards read texts only are
sent no pictures, as in the simulation.
"""

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from motet.alignment.asked import RewardQuery, parts, query_of
from motet.alignment.mixture import See
from motet.config import write_atomically
from motet.errors import MotetError, RunError
from motet.federated.host import PUBLIC
from motet.federated.sites import Federation
from motet.messages import Packet
from motet.mixing.scores import Judged
from motet.records import Image, Pair, Turn, tensors_from
from motet.selector.features import text_key
from motet.sites.rules import FIRST_SCORE, score_rule
from motet.sites.settings import Coordination

SCORES = "scores.safetensors"
MOST_ANSWERS = 512
"""Answers in one question about public pairs."""
MOST_BYTES = 32 * 1024 * 1024
"""Texts and pictures in one question, at most: larger ones would be slow to ask again."""
HEAD_SHARE, HEAD_BYTES = 0.1, 1536
"""Of the largest question that a site reads, what is left for everything but texts and pictures, and at least that."""
LEAST_SECONDS = 1.0
"""For a part of a question, however long the parts before it took."""


@dataclass(eq=False)
class Asking:
    """Asks sites for rewards, all that are wanted in one question; in several where it would be too large."""

    federation: Federation
    coordination: Coordination
    step: int = FIRST_SCORE
    """Of the next question."""
    seconds: list[float] = field(default_factory=list)
    """That each question took."""
    largest: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the largest question that a site reads, where it has said so."""

    def bound(self, site: str) -> int:
        """Bytes of texts and pictures in one question to a site."""
        largest = self.largest.get(site, 2 * MOST_BYTES)
        return min(MOST_BYTES, largest - max(HEAD_BYTES, int(HEAD_SHARE * largest)))

    def together(self, queries: Mapping[str, RewardQuery]) -> Mapping[str, Tensor | MotetError]:
        """Rewards of each site for its query, or why it gives none. See ``alignment.mixture.Together``.

        Raises:
            QuorumError: Too few sites answer; training stops, and goes on from its checkpoint.
        """
        settings = self.coordination.federation
        needed = min(settings.needed(len(settings.sites)), len(queries))
        until = time.monotonic() + settings.deadline_seconds
        waiting = {site: parts(query, self.bound(site)) for site, query in queries.items()}
        said: dict[str, list[Tensor]] = {site: [] for site in queries}
        failed: dict[str, MotetError] = {}
        while waiting:
            whole = len(queries) - len(waiting) - len(failed)  # have answered all that they were asked
            left = max(until - time.monotonic(), LEAST_SECONDS)  # one wait for all parts, or a slow site holds up all
            asked = {site: some.pop(0) for site, some in waiting.items()}
            for site, told in self._together(asked, max(needed - whole, 0), left).items():
                if isinstance(told, MotetError):
                    failed[site] = told
                else:
                    said[site].append(told)
            waiting = {site: some for site, some in waiting.items() if some and site not in failed}
        return {site: failed[site] if site in failed else torch.cat(some) for site, some in said.items()}

    def _together(
        self, queries: Mapping[str, RewardQuery], needed: int, deadline: float
    ) -> dict[str, Tensor | MotetError]:
        """The same in one question, which must not be too large."""
        began = time.perf_counter()
        packets = {
            site: Packet({"provenance": PUBLIC, "answers": len(query.answers)}, tensors_from(query.serialised()))
            for site, query in queries.items()
        }
        rules = {site: score_rule(len(query.answers)) for site, query in queries.items()}
        self.step += 1
        found = self.federation.ask("score", self.step - 1, packets, deadline, needed, rules)
        self.seconds.append(time.perf_counter() - began)
        said: dict[str, Tensor | MotetError] = {site: answer.tensors["rewards"] for site, answer in found.ok.items()}
        return said | {site: RunError(f"{failure.why}: {failure.reason}") for site, failure in found.failed.items()}


@dataclass(frozen=True, eq=False)
class FarReward:
    """The reward model of one site."""

    name: str
    asking: Asking
    knows_tastes: bool = False

    def score(
        self,
        prompts: Sequence[tuple[Turn, ...]],
        answers: Sequence[str],
        images: Sequence[Image | None] | None = None,
        taste: Float[Tensor, "*answers latent"] | None = None,
    ) -> Float[Tensor, " answers"]:
        """See :class:`RewardModel`.

        Raises:
            RunError: The site gives none.
        """
        said = self.asking.together({self.name: query_of(prompts, answers, images)})[self.name]
        if isinstance(said, MotetError):
            raise said
        return said


def public_scores(
    asking: Asking,
    sites: Sequence[str],
    blind: Collection[str],
    fitted: Sequence[Pair],
    judged: Sequence[Pair],
    see: See,
    out: Path,
) -> tuple[Judged, Judged]:
    """What the sites say of all public answers, asked once: a run that goes on has the same router.

    Args:
        asking: Asks them.
        sites: Whom to ask, ascending.
        blind: Those whose rewards read texts only; they are sent no pictures.
        fitted: Pairs that the router is fitted to.
        judged: Pairs that it is judged on.
        see: How the router looks at prompts.
        out: The run folder; scores that are kept there are not asked for again.

    Raises:
        RunError: The scores in the folder are of other pairs or sites.
    """
    pairs = [*fitted, *judged]
    digest = hashlib.sha256(
        "".join(text_key(p.prompt, p.chosen, p.rejected, image=p.image) for p in pairs).encode()
    ).hexdigest()
    kept = _kept(out / SCORES, digest)
    if kept is None:
        prompts, answers = [p.prompt for p in pairs] * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs]
        images = [p.image for p in pairs] * 2
        found: dict[str, list[Tensor]] = {site: [] for site in sites}
        for start in range(0, len(answers), MOST_ANSWERS):
            some = slice(start, start + MOST_ANSWERS)
            shown = images[some] if any(image is not None for image in images[some]) else None
            queries = {site: query_of(prompts[some], answers[some], None if site in blind else shown) for site in found}
            for site, said in asking.together(queries).items():
                if isinstance(said, MotetError):
                    del found[site]  # whoever has not scored them all cannot be routed to
                else:
                    found[site].append(said)
        kept = {site: torch.cat(rows).view(2, -1) for site, rows in found.items()}
        write_atomically(out / SCORES, save(kept, metadata={"pairs": digest}))
    missing = [site for site in kept if site not in sites]
    if missing:
        raise RunError(
            f"the router of this run knows the sites {', '.join(sorted(kept))}, and {', '.join(missing)} does not "
            "answer; start it, then start again, or choose another run folder"
        )
    rewards = torch.stack([kept[site] for site in sorted(kept)])
    embedding = see([pair.prompt for pair in pairs], [pair.image for pair in pairs]).float()
    cut = len(fitted)
    return (
        Judged(tuple(fitted), (), embedding[:cut], rewards[:, :, :cut]),
        Judged(tuple(judged), ("content",) * len(judged), embedding[cut:], rewards[:, :, cut:]),
    )


def _kept(path: Path, digest: str) -> dict[str, Tensor] | None:
    """Scores that were asked for before, if they are of these pairs."""
    from safetensors import safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            of = (file.metadata() or {}).get("pairs")
        tensors = dict(load_file(path))
    except SafetensorError:
        return None  # asked anew
    if of != digest:
        raise RunError(f"{path.name} in {str(path.parent)!r} is of other public pairs; choose another run folder")
    return tensors
