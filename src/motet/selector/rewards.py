"""Linear rewards as something that can be kept: weights and whitening, as one object and as two files.

In:  what a method with linear rewards trained.
Out: margins for new answers; ``rewards.safetensors`` and ``rewards.json``, which hold everything but the frozen
     language model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from motet.config import settings as build
from motet.config import write_atomically
from motet.errors import RunError
from motet.selector.backbone import BackboneSettings
from motet.selector.trained import About
from motet.selector.whitening import Whitening

TENSORS, CONFIG = "rewards.safetensors", "rewards.json"
FORMAT = 1


@dataclass(frozen=True)
class LinearRewards:
    """One or several rewards, linear in the whitened embedding and in the scalars."""

    rewards: Float[Tensor, "rewards columns"]
    """Weights of the embedding's columns, then of the scalars'; no rows where a method keeps none at the server."""
    how: str
    """How they predict together: ``none`` (their mean), ``vote``, ``told`` (by true group), ``bayes``, ``fitted`` (to a
    person's own choices, with ``ridge``)."""
    whitening: Whitening
    log_weights: Float[Tensor, " rewards"] | None = None
    """Logs of the rewards' shares of the population, for ``bayes``; even where left out."""
    names: tuple[str, ...] = ()
    """What each reward stands for, where that is known."""
    ridge: float | None = None
    """For ``fitted``."""

    def margins(
        self,
        first: Float[Tensor, "pairs hidden"],
        second: Float[Tensor, "pairs hidden"],
        scalars: Float[Tensor, "pairs scalars"],
    ) -> Float[Tensor, "rewards pairs"]:
        """Log-odds, in nats, of each first answer under each reward.

        Args:
            first: Embeddings as the backbone gives them.
            second: The same of the other answers.
            scalars: What the backbone says of first minus second.
        """
        difference = self.whitening(first) - self.whitening(second)
        return self.rewards @ torch.cat([difference, scalars / self.whitening.scalar_scale], dim=1).T


def save_rewards(kept: LinearRewards, folder: Path, about: About) -> None:
    """Write ``rewards.safetensors`` and ``rewards.json``, each atomically."""
    tensors = {f"whitening.{name}": getattr(kept.whitening, name) for name in Whitening.__dataclass_fields__}
    tensors["rewards"] = kept.rewards.float()
    if kept.log_weights is not None:
        tensors["log_weights"] = kept.log_weights
    config = {
        "format": FORMAT,
        "how": kept.how,
        "names": list(kept.names),
        "ridge": kept.ridge,
        "backbone": about.backbone.model_dump(),
        "fingerprint": about.fingerprint,
        **about.notes,
    }
    payload = save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()})
    write_atomically(folder / TENSORS, payload)
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_rewards(folder: Path) -> tuple[LinearRewards, BackboneSettings, str]:
    """Rewards from their folder, the settings of the backbone that they need, and that backbone's fingerprint.

    Raises:
        RunError: The folder holds no finished rewards, or they are damaged.
    """
    if not (folder / TENSORS).exists() or not (folder / CONFIG).exists():
        raise RunError(
            f"there are no linear rewards in {str(folder)!r}: {TENSORS} and {CONFIG} must be there; "
            "give the folder of a finished run of fedbiscuit, mixture-em, shared, local, central or oracle"
        )
    try:
        config: Mapping[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise RunError(
                f"the rewards in {str(folder)!r} have format {config['format']!r}, this motet reads {FORMAT}; "
                "use the motet that wrote them, or run again in another folder"
            )
        tensors = load((folder / TENSORS).read_bytes())
        whitening = Whitening(**{name: tensors[f"whitening.{name}"] for name in Whitening.__dataclass_fields__})
        names, log_weights = tuple(config["names"]), tensors.get("log_weights")
        kept = LinearRewards(tensors["rewards"], config["how"], whitening, log_weights, names, config["ridge"])
        return kept, build(BackboneSettings, config["backbone"], f"[backbone] of {CONFIG}"), str(config["fingerprint"])
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RunError(
            f"the rewards in {str(folder)!r} are damaged ({error}); run it again in another folder"
        ) from None
