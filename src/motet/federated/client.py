"""One visit to a batch of clients: local steps of AdamW, each client on its own copy of the parameters.

In:  parameters with a leading axis ``clients``, the loss of *one* client as a pure function, its inputs by step.
Out: the parameters after the local steps, and the mean of the figures that the loss reports.

The loss runs for all clients at once with ``torch.func.vmap``. Clients share no entry of any tensor, so the gradient of
the sum of their losses is every client's own gradient, and AdamW, which works entry by entry, is every client's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from motet.records import ClientData

Loss = Callable[..., tuple[Tensor, Tensor]]
"""(shared parameters, own parameters, *inputs) of one client -> its loss, and figures for the log."""


def train_together(
    loss: Loss,
    shared: dict[str, Tensor],
    own: dict[str, Tensor],
    inputs: Callable[[int], tuple[Any, ...]],
    local_steps: int,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Train a batch of clients side by side.

    Args:
        loss: The loss of one client.
        shared: Parameters that came with the broadcast, ``clients`` first.
        own: Parameters that each client keeps for itself (its memory), ``clients`` first.
        inputs: What the loss is given in a step, every tensor with ``clients`` first.
        local_steps: Number of steps; 0 leaves everything as it came.
        learning_rate: Of AdamW, above 0.
        weight_decay: Decoupled, on matrices of the shared parameters only: not on biases, prototypes or memory.
        betas: Of AdamW (the papers: 0.9, 0.95).

    Returns:
        Shared and own parameters after the last step, and the figures, averaged over steps: ``clients x figures``.
    """
    shared = {name: tensor.detach().clone().requires_grad_() for name, tensor in shared.items()}
    own = {name: tensor.detach().clone().requires_grad_() for name, tensor in own.items()}
    decays = [t for name, t in shared.items() if (t.dim() > 2 or name == "selector.shared") and name != "prototypes"]
    rest = [t for t in (*shared.values(), *own.values()) if not any(t is d for d in decays)]
    optimiser = torch.optim.AdamW(
        [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=betas,
        fused=True,  # one pass over memory in place of a dozen: the update is what a large batch waits for
    )
    batched = torch.func.vmap(loss)
    total: Tensor | None = None
    for step in range(local_steps):
        optimiser.zero_grad(set_to_none=True)
        losses, figures = batched(shared, own, *inputs(step))
        torch.autograd.backward(losses.sum())
        optimiser.step()
        total = figures.detach() if total is None else total + figures.detach()
    mean = total / local_steps if total is not None else torch.zeros(0)
    return {n: t.detach() for n, t in shared.items()}, {n: t.detach() for n, t in own.items()}, mean


def padded(clients: Sequence[ClientData]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen, rejected and scalars of many clients as one batch, and the mask that hides the padding."""
    most = max(len(client) for client in clients)

    def stack(rows: list[Tensor]) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, most - row.shape[0])) for row in rows])

    mask = torch.stack([(torch.arange(most) < len(client)).float() for client in clients])
    chosen = stack([client.chosen for client in clients])
    return (
        chosen,
        stack([client.rejected for client in clients]),
        stack([client.scalars for client in clients]),
        mask.to(chosen.device),
    )
