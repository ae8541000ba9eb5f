"""Whom to cite for what a run uses."""

from pathlib import Path

from motet.algorithms import ALGORITHMS
from motet.config import read_toml
from motet.data.recipes import RECIPES
from motet.experiment import resolve
from motet.mixing.settings import MixingSettings, resolve_mixing

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
MIXTURE = {
    "method mor": "Lu, Wang, Zhang, Yang, Zheng, Tong, Xu, Zheng 2026, MoR: mixture of rewards, arXiv 2605.03426",
    "GRPO": "Shao et al. 2024, DeepSeekMath: pushing the limits of mathematical reasoning, arXiv 2402.03300",
    "comparable rewards": (
        "Liu et al. 2026, GDPO: group reward-decoupled normalization policy optimization, arXiv 2601.05242"
    ),
    "competence routing": "FedGRPO 2026, arXiv 2602.12014",
    "vision tower": (
        "Tan, Le 2019, EfficientNet: rethinking model scaling for convolutional neural networks, ICML, "
        "arXiv 1905.11946 (EfficientNet-Lite0, Apache-2.0)"
    ),
    "small model with eyes": (
        "Liu, Li, Wu, Lee 2023, Visual instruction tuning, NeurIPS, arXiv 2304.08485 (its architecture)"
    ),
}
MIXTURE_DATA = {
    "detail": "Lin et al. 2014, Microsoft COCO: common objects in context, ECCV, arXiv 1405.0312",
    "medical": (
        "Lau, Gayen, Ben Abacha, Demner-Fushman 2018, A dataset of clinically generated visual questions and answers "
        "about radiology images, Scientific Data 5"
    ),
    "tables": (
        "Lu et al. 2023, Dynamic prompt learning via policy gradient for semi-structured mathematical reasoning, ICLR, "
        "arXiv 2209.14610 (TabMWP, CC BY-NC-SA 4.0)"
    ),
    "charts": (
        "Satyanarayan, Moritz, Wongsuphasawat, Heer 2017, Vega-Lite: a grammar of interactive graphics, IEEE TVCG 23"
    ),
    "shapes": (
        "Suhr, Lewis, Yeh, Artzi 2017, A corpus of natural language for visual reasoning, ACL; Andreas, Rohrbach, "
        "Darrell, Klein 2016, Neural module networks, CVPR, arXiv 1511.02799; Zhou 2019, easy-VQA"
    ),
}
SELF = "The motet authors 2026, motet: federated preference alignment that keeps conflicting tastes apart"


def citations(config: Path | None = None) -> list[dict[str, str]]:
    """What to cite: for one run's ``config.toml``, or for everything.

    Raises:
        ConfigError: The file is missing or is not a run's settings.
    """
    mixture = config is not None and read_toml(config).get("method") == "mor"
    if config is not None and mixture:
        return [{"for": "this library", "citation": SELF}, *_of_mixture(resolve_mixing(None, {}, config))]
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
    return found if config is not None else found + _of_mixture(None)


def _of_mixture(asked: MixingSettings | None) -> list[dict[str, str]]:
    """What a mixture stands on; without settings, everything that one can."""
    found = [{"for": part, "citation": text} for part, text in MIXTURE.items()]
    if asked is None or asked.recipe == "mor":
        wanted = MIXTURE_DATA if asked is None or asked.domains.domains is None else asked.domains.domains
        found += [{"for": f"domain {name}", "citation": MIXTURE_DATA[name]} for name in wanted if name in MIXTURE_DATA]
    kinds = {"causal": "smollm2", "sentence": "minilm"}
    models = [kinds[word.partition(":")[0]] for word in asked.clients.kinds if word in kinds] if asked else []
    return found + [{"for": f"language model {name}", "citation": BACKBONES[name]} for name in dict.fromkeys(models)]
