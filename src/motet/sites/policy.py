"""The policy of a mixture over sites: GRPO on public prompts, rewarded by the sites, live.

In:  the routed mixture of the sites' rewards, public pairs that the router was fitted to, and those that it was not.
Out: the adapter in ``policy/``, and the part of ``evaluation.json`` that tells of it: see ``answering``.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.alignment.mixture import MixtureReward
from motet.alignment.opened import open_base
from motet.config import write_atomically
from motet.data.questions import Question, Saying
from motet.mixing.card import mixture_card
from motet.mixing.server import POLICY, STEPS, keep_rounds, train_server, training_identity, write_adapter
from motet.mixing.settings import MixingSettings
from motet.records import Image, Pair
from motet.selector.backbone import find_device, find_dtype
from motet.sites.answering import before_and_after
from motet.sites.standing import Standing


def trained_policy(
    asked: MixingSettings,
    mixture: MixtureReward,
    base: str,
    public: Sequence[Pair],
    judged: Sequence[Pair],
    out: Path,
    standing: Standing,
) -> dict[str, Any]:
    """Train on the prompts of public pairs, judge on those of others, write the adapter.

    Args:
        asked: All settings.
        mixture: The sites behind one reward.
        base: Folder or name of the server's model.
        public: Pairs whose prompts it is trained on.
        judged: Pairs whose prompts it never sees in training.
        out: The run folder; what was begun there goes on.
        standing: Told of every step.

    Returns:
        What ``evaluation.json`` says of the policy.

    Raises:
        MotetError: See the message.
    """
    place = find_device(asked.server.base_device)
    opened = open_base(base, str(place), find_dtype(asked.server.base_dtype, place))
    questions = questions_of(public)
    identity = training_identity(opened, mixture, asked, [_named(questions)])
    keep_rounds(out)
    standing.said(f"GRPO on {len(questions)} public prompts, rewards by {len(mixture.clients)} sites")
    began, steps = time.perf_counter(), asked.server.policy_steps

    def looked(look: Mapping[str, float]) -> None:
        standing.said(f"a look: {look['gain']:+.3f} reward over the base, {look['kl']:.2f} nats from it")

    trained = train_server(
        opened, questions, mixture, asked, out, identity, lambda done, _: standing.now("training", done, steps), looked
    )
    seconds = time.perf_counter() - began
    write_atomically(out / STEPS, "".join(json.dumps(line) + "\n" for line in trained.log).encode())
    best = next(line for line in trained.log if line["step"] == trained.step)
    found: dict[str, Any] = {
        **before_and_after(asked, mixture, opened, trained.adapter, questions_of(judged), out, standing),
        "kl": best["kl"], "kl_budget": asked.policy.kl_budget, "kept_step": trained.step, "reward_gain": best["gain"],
        "curve": [dict(line) for line in trained.log],
    }  # fmt: skip
    write_adapter(opened, trained.adapter, out / POLICY, mixture_card(asked, opened.name, found, trained))
    return {**found, "seconds": seconds}


def questions_of(pairs: Sequence[Pair]) -> list[Question]:
    """The prompts of public pairs, each with its picture once."""
    found: dict[tuple[object, Image | None], Question] = {}
    for pair in pairs:
        if (pair.prompt, pair.image) not in found and (question := question_of(pair)) is not None:
            found[pair.prompt, pair.image] = question
    return list(found.values())


def question_of(pair: Pair) -> Question | None:
    """A public pair as a question about its prompt; nothing where its two answers are the same to a reader.

    Trainer and judge look at the prompt and its picture only; what the public pair chose stays with the router.
    """
    right, wrong = pair.chosen, pair.rejected
    try:
        explained = Saying(right, f"the answer is {right}")
        domain = pair.axis or "public"
        return Question(domain, pair.prompt, pair.image, explained, (Saying(wrong, wrong),), "public", pair.group)
    except ValueError:
        return None


def _named(questions: Sequence[Question]) -> list[object]:
    """Prompts, with their pictures where they have any."""
    return [q.prompt if q.image is None else (q.prompt, q.image.digest) for q in questions]
