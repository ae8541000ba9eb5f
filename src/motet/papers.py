"""Whom to cite for what a run uses."""

from pathlib import Path

from motet.algorithms import ALGORITHMS
from motet.data.recipes import RECIPES
from motet.experiment import resolve

PARTS = {
    "variational preference learning (the posterior over taste)": (
        "Poddar, Wan, Ivison, Gupta, Jaques 2024, Personalizing reinforcement learning from human feedback with "
        "variational preference learning, NeurIPS, arXiv 2408.10075"
    ),
    "federated averaging": (
        "McMahan, Moore, Ramage, Hampson, Agüera y Arcas 2017, Communication-efficient learning of deep networks from "
        "decentralized data, AISTATS, arXiv 1602.05629"
    ),
}
BACKBONES = {
    "smollm2": ("Allal et al. 2025, SmolLM2: when smol goes big, arXiv 2502.02737 (SmolLM2-135M-Instruct, Apache-2.0)"),
    "minilm": (
        "Reimers, Gurevych 2019, Sentence-BERT: sentence embeddings using siamese BERT-networks, EMNLP, "
        "arXiv 1908.10084; Wang, Wei, Dong, Bao, Yang, Zhou 2020, MiniLM: deep self-attention distillation for "
        "task-agnostic compression of pre-trained transformers, NeurIPS, arXiv 2002.10957 "
        "(all-MiniLM-L6-v2, Apache-2.0)"
    ),
    "gemma3-270m": "Gemma Team 2025, Gemma 3 technical report, arXiv 2503.19786 (Gemma Terms of Use)",
}
SELF = "The motet authors 2026, motet: federated preference alignment that keeps conflicting tastes apart"


def citations(config: Path | None = None) -> list[dict[str, str]]:
    """What to cite: for one run's ``config.toml``, or for everything.

    Raises:
        ConfigError: The file is missing or is not a run's settings.
    """
    if config is None:
        methods, recipes, backbones = list(ALGORITHMS), list(RECIPES), list(BACKBONES)
    else:
        asked = resolve(config=config)
        methods, recipes, backbones = [asked.method], [asked.data.recipe], [asked.backbone.model]
    found = [{"for": "this library", "citation": SELF}]
    found += [{"for": f"method {name}", "citation": ALGORITHMS[name].citation} for name in methods]
    found += [{"for": part, "citation": text} for part, text in PARTS.items()]
    found += [{"for": f"data {name}", "citation": RECIPES[name].citation} for name in recipes]
    found += [{"for": f"language model {name}", "citation": BACKBONES[name]} for name in backbones if name in BACKBONES]
    return found
