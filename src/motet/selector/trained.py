"""A trained selector: parameters, the population's prior and the whitening, as one object and as two files.

In:  what a run trained.
Out: tastes for new people from a few of their choices, probabilities for new answers; ``selector.safetensors`` and
     ``config.json``, which hold everything but the frozen language model.
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
from torch.nn import functional as F

from motet.config import settings as build
from motet.config import write_atomically
from motet.errors import RunError
from motet.latent.layers import Parameters
from motet.selector.backbone import BackboneSettings
from motet.selector.selector import (
    PriorTensors,
    SelectorSettings,
    answers,
    bayes_responsibilities,
    infer,
    margin,
)
from motet.selector.whitening import Whitening

TENSORS, CONFIG = "selector.safetensors", "config.json"
FORMAT = 2


@dataclass(frozen=True)
class Selector:
    """Everything that turns a person's few choices into predictions, given embeddings."""

    settings: SelectorSettings
    parameters: Parameters
    prior: PriorTensors
    """The population: merged posteriors of all known clients and the log of their shares. No rows where the method
    knows of no population (FedVPL); then there is no inference by Bayes either."""
    whitening: Whitening
    prototypes: Float[Tensor, "prototypes latent"]
    """The taste that each prototype stands for; no rows where the method has none."""
    axes_names: tuple[str, ...] = ()
    """What evaluation found each prototype to stand for; for people to read, never used in computing."""

    def infer(
        self, chosen: Float[Tensor, "pairs hidden"], rejected: Float[Tensor, "pairs hidden"]
    ) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
        """Amortised posterior of a person's taste: mean and log_scale. With no pairs: mean and spread of the prior.

        Args:
            chosen: Whitened embeddings of the answers that the person chose.
            rejected: Those of the answers it did not choose.
        """
        if chosen.shape[0] == 0:
            return self.population()
        difference = (
            answers(self.parameters, self.settings, chosen).features
            - answers(self.parameters, self.settings, rejected).features
        )
        return infer(self.parameters, self.settings, difference, torch.ones(difference.shape[0]))

    def population(self) -> tuple[Float[Tensor, " latent"], Float[Tensor, " latent"]]:
        """Mean and log_scale of the population as one Gaussian; N(0, I) where nobody is known."""
        if not self.prior.means.shape[0]:
            return torch.zeros(self.settings.latent), torch.zeros(self.settings.latent)
        weights = self.prior.log_mass.softmax(dim=0)
        mean = weights @ self.prior.means
        variance = weights @ ((2 * self.prior.log_scales).exp() + (self.prior.means - mean).square())
        return mean, variance.log() / 2

    def margins(
        self,
        tastes: Float[Tensor, "tastes latent"],
        first: Float[Tensor, "pairs hidden"],
        second: Float[Tensor, "pairs hidden"],
        scalars: Float[Tensor, "pairs scalars"],
    ) -> Float[Tensor, "tastes pairs"]:
        """Log-odds, in nats, of each first answer under each taste."""
        a, b = answers(self.parameters, self.settings, first), answers(self.parameters, self.settings, second)
        return margin(self.parameters, self.settings, tastes.unsqueeze(1), a, b, scalars)

    def margins_one_taste_each(
        self,
        tastes: Float[Tensor, "pairs latent"],
        first: Float[Tensor, "pairs hidden"],
        second: Float[Tensor, "pairs hidden"],
        scalars: Float[Tensor, "pairs scalars"],
    ) -> Float[Tensor, " pairs"]:
        """Log-odds of each first answer under a taste of its own."""
        a, b = answers(self.parameters, self.settings, first), answers(self.parameters, self.settings, second)
        return margin(self.parameters, self.settings, tastes, a, b, scalars)

    def log_likelihoods(
        self,
        chosen: Float[Tensor, "pairs hidden"],
        rejected: Float[Tensor, "pairs hidden"],
        scalars: Float[Tensor, "pairs scalars"],
    ) -> Float[Tensor, "components pairs"]:
        """Log-probability of each choice under each component of the population."""
        return -F.softplus(-self.margins(self.prior.means, chosen, rejected, scalars))

    def responsibilities(self, log_likelihood: Float[Tensor, " components"]) -> Float[Tensor, " components"]:
        """How likely each component is for a person whose context has these log-likelihoods."""
        return bayes_responsibilities(self.prior.log_mass, log_likelihood)


@dataclass(frozen=True)
class About:
    """What must be known beside a trained state to use it later."""

    backbone: BackboneSettings
    fingerprint: str
    whitening: Whitening
    names: tuple[str, ...]
    """For each prototype, what evaluation found it to stand for."""
    notes: Mapping[str, Any]
    """Kept in ``config.json`` as it is: recipe, method."""


def save_selector(selector: Selector, folder: Path, backbone: BackboneSettings, fingerprint: str, **notes: Any) -> None:
    """Write ``selector.safetensors`` and ``config.json``, each atomically."""
    tensors = {f"parameters.{name}": tensor for name, tensor in selector.parameters.items()}
    tensors |= {f"prior.{name}": tensor for name, tensor in selector.prior._asdict().items()}
    tensors |= {f"whitening.{name}": getattr(selector.whitening, name) for name in Whitening.__dataclass_fields__}
    tensors["prototypes.tastes"] = selector.prototypes
    payload = save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()})
    config = {
        "format": FORMAT,
        "selector": {name: getattr(selector.settings, name) for name in SelectorSettings.model_fields},
        "backbone": backbone.model_dump(),
        "fingerprint": fingerprint,
        "prototype_names": list(selector.axes_names),
        **notes,
    }
    write_atomically(folder / TENSORS, payload)
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_selector(folder: Path) -> tuple[Selector, BackboneSettings, str]:
    """A selector from its folder, the settings of the backbone that it needs, and that backbone's fingerprint.

    Raises:
        RunError: The folder holds no finished selector, or it is damaged.
    """
    if not (folder / TENSORS).exists() or not (folder / CONFIG).exists():
        raise RunError(
            f"there is no trained selector in {str(folder)!r}: {TENSORS} and {CONFIG} must be there; "
            "give the folder of a finished motet run of fedvpa or fedvpl"
        )
    try:
        config: Mapping[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise RunError(
                f"the selector in {str(folder)!r} has format {config['format']!r}, this motet reads {FORMAT}; "
                "use the motet that wrote it, or run again in another folder"
            )
        tensors = load((folder / TENSORS).read_bytes())
        shape = build(SelectorSettings, config["selector"], f"[selector] of {CONFIG}")
        backbone = build(BackboneSettings, config["backbone"], f"[backbone] of {CONFIG}")
        pick = {k: {n.removeprefix(k): t for n, t in tensors.items() if n.startswith(k)} for k in _PARTS}
        selector = Selector(
            shape,
            pick["parameters."],
            PriorTensors(**pick["prior."]),
            Whitening(**pick["whitening."]),
            tensors["prototypes.tastes"],
            tuple(config["prototype_names"]),
        )
        return selector, backbone, str(config["fingerprint"])
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RunError(
            f"the selector in {str(folder)!r} is damaged ({error}); run it again in another folder"
        ) from None


_PARTS = ("parameters.", "prior.", "whitening.")
