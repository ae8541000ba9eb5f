"""Model cards: what an adapter is, from what, for whom, under which licence; written beside every adapter.

In:  what is known of a policy, and the taste that was folded in.
Out: a README.md with the front matter that model hubs read.
"""

from collections.abc import Mapping
from typing import Any

from motet.algorithms import ALGORITHMS
from motet.data.recipes import RECIPES
from motet.selector.backbone import PACKAGED

LICENCES = {"smollm2": "apache-2.0", "gemma3-270m": "gemma"}
"""Of the packaged bases, as model hubs name them."""


def card(about: Mapping[str, Any], base: str, label: str, shares: Mapping[str, float]) -> str:
    """The card of an adapter.

    Args:
        about: What ``policy.json`` holds.
        base: Name of the base model.
        label: The taste, in words; empty for a policy that still takes any.
        shares: Of each prototype in that taste.
    """
    method, recipe = ALGORITHMS.get(about.get("method", "")), RECIPES.get(about.get("recipe", ""))
    licence = LICENCES.get(str(about["base"]), "other")
    by = str(about.get("by", "–"))
    gated = by in ("dpo", "grpo")
    lines = ["---", f"base_model: {base}", "library_name: peft", f"license: {licence}", "tags:"]
    lines += [f"- {tag}" for tag in ("lora", "preference-alignment", "motet")]
    title = f"{base} at the taste {label}" if label else f"{base}, taste-gated"
    lines += ["---", "", f"# {title}", ""]
    if label:
        lines += [
            "An ordinary LoRA adapter" + (": one taste of a policy that takes any, folded in." if gated else "."),
            "",
        ]
        lines += ["```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
        lines += [f'base = AutoModelForCausalLM.from_pretrained("{base}")', "# the folder of this card"]
        lines += ['model = PeftModel.from_pretrained(base, ".")', "```", ""]
    else:
        lines += [
            "A LoRA adapter with gates: `motet say` and `motet play` ask it at any taste, `motet export` folds",
            "",
        ]
        lines[-2] += " one taste into an ordinary PEFT adapter."
    rows = [("Base", f"{base}; {_base_licence(str(about['base']))}"), ("Taste", label or "any")]
    rows += [(f"Share of {name}", f"{share:.2f}") for name, share in shares.items()]
    if method is not None:
        rows += [("Preferences by", f"{method.title}; {method.citation}")]
    if recipe is not None:
        rows += [("Data", f"{recipe.summary}; {recipe.citation}; licence: {recipe.licence}")]
    rows += [("Trained by", {"dpo": "DPO", "grpo": "GRPO", "feddpo": "FedDPO"}.get(by, by))]
    rows += [(name, _figure(value)) for name, value in about.get("figures", {}).items()]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += [
        *_ORIGIN.get(by, ()),
        *(_POLICY if gated else ()),
        "Licences: the adapter may be used where the base and the data both allow it.",
        "",
    ]
    return "\n".join(lines)


_POLICY = (
    "prompts, never on anybody's texts. The figures are by the reward that it was trained for, so they flatter;",
    "`motet judge` asks judges that saw none of its data.",
    "",
)
_ORIGIN = {
    "dpo": (
        "The preferences were learnt by a frozen reward; the policy was trained on the base's own answers to public",
    ),
    "grpo": ("The preferences were learnt by a frozen reward; the policy was trained on its own answers to public",),
    "feddpo": ("Each client trained the adapter on its own pairs; the server averaged what they sent.", ""),
}
"""What an adapter was trained on; of a stranger's nothing is known."""


def _base_licence(base: str) -> str:
    return PACKAGED[base][2] if base in PACKAGED else "under the licence of its makers"


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
