"""Context and target sets of a visit: which pairs each local step of each client looks at, and with what noise.

In:  the clients of a visit, the round, the shape of the selector.
Out: indices and draws of all local steps, from generators that only (seed, client, round) decide: a client draws the
     same in every engine, in any batch.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from motet.errors import MessageError
from motet.latent.prior import gumbel_noise
from motet.records import ClientData, generator
from motet.selector.selector import Draws, Rows, SelectorSettings


def draw_steps(
    settings: SelectorSettings, clients: Sequence[ClientData], round: int, seed: int, local_steps: int, components: int
) -> tuple[Tensor, Draws]:
    """Indices (clients x steps x context + target) and draws of all local steps.

    Args:
        settings: Sizes of sets, draws, dropout.
        clients: The clients of the visit.
        round: The round; with client and seed it names the generators.
        seed: Of the run.
        local_steps: Steps of the visit.
        components: Components of the prior, for the Gumbel noise; the broad one counts.
    """
    s, indices, drawn = settings, [], []
    widths = [(w, "both") for w in s.extractor] + [(w, "trunk") for w in s.trunk[:-1]]
    for client in clients:
        g = generator(seed, "client", client.client_id, "round", round)
        pairs, steps = len(client), local_steps
        order = torch.rand(steps, pairs, generator=g).argsort(dim=1)
        most = 0 if s.same_pair else min(s.context_pairs, pairs - 1)
        size = (torch.rand(steps, generator=g) * most).floor().long() + (1 if most else 0)
        context, context_mask = window(order, torch.zeros_like(size), size, s.context_pairs)
        target, target_mask = window(order, size, (pairs - size).clamp(max=s.target_pairs), s.target_pairs)
        indices.append(torch.cat([context, target], dim=1))
        rows = {"both": 2 * (s.context_pairs + s.target_pairs)}
        rows["trunk"] = s.target_pairs if s.same_pair else s.context_pairs
        drawn.append(
            Draws(
                context_mask,
                target_mask,
                torch.randn(steps, s.samples, s.latent, generator=g),
                gumbel_noise(torch.rand(steps, components, generator=g)),
                torch.randint(0, 2, (steps, s.target_pairs), generator=g).float() * 2 - 1,
                tuple(
                    (torch.rand(steps, rows[kind], width, generator=g) >= s.dropout).float() / (1 - s.dropout)
                    for width, kind in (widths if s.dropout else [])
                ),
            )
        )
    return torch.stack(indices), _stack_draws(drawn)


def window(order: Tensor, start: Tensor, size: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``width`` indices a step from ``order``, beginning at ``start``; the mask shows the first ``size`` of them."""
    offsets = torch.arange(width).expand(order.shape[0], width)
    mask = (offsets < size.unsqueeze(1)).float()
    places = (start.unsqueeze(1) + offsets).clamp(max=order.shape[1] - 1)
    return order.gather(1, places) * mask.long(), mask


def step_rows(data: tuple[Tensor, ...], index: Tensor, context: int) -> Rows:
    """Gather the pairs of one step; ``index`` is clients x (context + target)."""
    chosen, rejected, scalars = (
        torch.take_along_dim(rows, index.unsqueeze(-1).to(rows.device), dim=1) for rows in data[:3]
    )
    return Rows(
        chosen[:, :context], rejected[:, :context], chosen[:, context:], rejected[:, context:], scalars[:, context:]
    )


def step_draws(draws: Draws, step: int, device: torch.device) -> Draws:
    """The draws of one step, on a device."""
    plain = [part[:, step].to(device) for part in draws[:-1]]
    keep = tuple(mask[:, step].to(device) for mask in draws.keep)
    return Draws(plain[0], plain[1], plain[2], plain[3], plain[4], keep)


def stacked(many: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Tensors of many broadcasts, ``clients`` first."""
    if any(tensors.keys() != many[0].keys() for tensors in many):
        raise MessageError("broadcasts of one round hold different tensors; do all come from the same server?")
    return {name: torch.stack([tensors[name] for tensors in many]).to(device) for name in many[0]}


def inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _stack_draws(drawn: Sequence[Draws]) -> Draws:
    plain = [torch.stack(parts) for parts in list(zip(*drawn, strict=True))[:-1]]
    keep = tuple(torch.stack(masks) for masks in zip(*(d.keep for d in drawn), strict=True))
    return Draws(plain[0], plain[1], plain[2], plain[3], plain[4], keep)
