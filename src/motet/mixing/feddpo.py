"""The control FedDPO: clients train the server's own model on their pairs, and its adapter is averaged.

In:  what a mixture has prepared.
Out: of each held-out pair, whether the averaged model's implicit reward prefers the chosen answer.

The same pairs, the same base with its pictures, the same held-out pairs as the mixture. What it averages away is what
routing keeps apart; and it sends parameters both ways, where a mixture sends scores.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from motet.alignment.lora import start_adapter
from motet.alignment.opened import open_base
from motet.alignment.trainers import DPOSettings, implicit_margins, train_dpo
from motet.federated.contract import weighted_mean
from motet.mixing.scores import preferred
from motet.records import Pair, generator
from motet.selector.backbone import find_device, find_dtype

if TYPE_CHECKING:
    from motet.mixing.run import Ready, Watcher


def judge_feddpo(ready: "Ready", watcher: "Watcher") -> tuple[list[float], int]:
    """Train in rounds over all clients, and judge.

    Returns:
        Of each held-out pair 1, 0 or, for a tie, 1/2; and the bytes that adapters took, both ways.
    """
    asked = ready.asked
    place = find_device(asked.server.base_device)
    base = open_base(ready.base, str(place), find_dtype(asked.server.base_dtype, place))
    settings = DPOSettings(
        lora_rank=asked.policy.lora_rank, lora_alpha=asked.policy.lora_alpha, lora_dropout=0.0,
        lora_targets=asked.policy.lora_targets, local_steps=asked.server.feddpo_steps, batch_pairs=8, max_tokens=128,
        learning_rate=asked.server.feddpo_learning_rate,
    )  # fmt: skip

    def shown(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
        """Without the pictures, for a base that reads texts only."""
        return tuple(pairs if base.processor is not None else (replace(pair, image=None) for pair in pairs))

    adapter = start_adapter(base, settings, generator(asked.seed, "feddpo"))
    clients, traffic = ready.deal.clients, 0
    for number in range(asked.server.feddpo_rounds):
        sent, weights = [], []
        for dealt in clients:
            seed = int(torch.randint(2**31, (), generator=generator(asked.seed, "feddpo", dealt.name, number)))
            trained, _ = train_dpo(base, adapter, shown(dealt.train), settings, seed)
            sent.append(trained)
            weights.append(float(len(dealt.train)))
            done = number * len(clients) + len(sent)
            watcher.stage("FedDPO", done, asked.server.feddpo_rounds * len(clients))
        adapter = weighted_mean(sent, weights)
        traffic += 2 * len(clients) * sum(4 * tensor.numel() for tensor in adapter.values())
    margins = implicit_margins(base, adapter, shown(ready.test.pairs), settings)
    return preferred(margins), traffic
