"""Published figures, as published: they stand beside ours in a column of their own, marked *reported*.

In:  a recipe and the names of methods.
Out: rows of win-rates.

They are no accuracies. A judge compared answers of the aligned language model with others and preferred so many of
them; our tables hold the accuracy of choices between given answers. The two cannot be compared, only looked at.
"""

from collections.abc import Iterable
from typing import Any

SOURCE = "Koo, Kim, Jang, Ok 2026, FedVPA-GP, arXiv 2605.30873, Table 1"
FIGURE = "win-rate by a judge, in percent"
RECIPES = ("hh-strict", "hh-mixed")
CLIENTS = (10, 50, 100)
WIN_RATES = {
    ("feddpo", "Qwen2-0.5B"): ((48.12, 77.34), (43.05, 69.22), (41.48, 67.15)),
    ("fedbiscuit", "Qwen2-0.5B"): ((48.85, 75.12), (44.21, 71.45), (42.33, 69.42)),
    ("fedvpl", "Qwen2-0.5B"): ((62.24, 84.56), (54.18, 78.12), (53.05, 77.34)),
    ("fedvpa", "Qwen2-0.5B"): ((66.45, 89.21), (58.32, 84.05), (55.18, 82.31)),
    ("feddpo", "Gemma-2B"): ((52.34, 83.12), (44.15, 78.45), (41.22, 75.33)),
    ("fedbiscuit", "Gemma-2B"): ((51.65, 82.45), (46.21, 78.12), (43.44, 76.05)),
    ("fedvpl", "Gemma-2B"): ((66.82, 89.15), (56.41, 84.34), (53.25, 80.42)),
    ("fedvpa", "Gemma-2B"): ((73.21, 96.34), (64.48, 95.12), (60.15, 92.45)),
}
"""(method, base model) -> (helpful, harmless) for each of ``CLIENTS``."""


def reported(recipe: str, methods: Iterable[str]) -> list[dict[str, Any]]:
    """Published rows of these methods on the data of this recipe; none where nothing was published."""
    if recipe not in RECIPES:
        return []
    return [
        {
            "method": method, "label": "reported", "figure": FIGURE, "base": base, "clients": clients,
            "helpful": helpful, "harmless": harmless, "source": SOURCE,
        }
        for wanted in methods
        for (method, base), rates in WIN_RATES.items()
        if method == wanted
        for clients, (helpful, harmless) in zip(CLIENTS, rates, strict=True)
    ]  # fmt: skip
