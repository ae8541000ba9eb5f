"""Model cards: what an adapter is, from what, for whom, under which licence; written beside every adapter.

In:  what is known of a policy, and the taste that was folded in.
Out: a README.md with the front matter that model hubs read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.algorithms import ALGORITHMS
from motet.data.recipes import RECIPES
from motet.selector.backbone import PACKAGED

HUB = {
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "gemma3-270m": ("google/gemma-3-270m", "gemma"),
}
"""Of the packaged bases: name and licence at the model hub."""


def card(
    about: Mapping[str, Any],
    base: str,
    label: str,
    shares: Mapping[str, float],
    judged: Sequence[tuple[str, str]] = (),
) -> str:
    """The card of an adapter.

    Args:
        about: What ``policy.json`` holds.
        base: Name of the base model.
        label: The taste, in words; empty for a policy that still takes any.
        shares: Of each prototype in that taste.
        judged: What judges said of it: who against whom, and the figure.
    """
    method, recipe = ALGORITHMS.get(about.get("method", "")), RECIPES.get(about.get("recipe", ""))
    asked = str(about["base"])
    at_hub = asked.count("/") == 1 and not asked.startswith((".", "/", "~")) and not Path(asked).exists()
    name, licence = HUB.get(asked, (asked if at_hub else base, "other"))
    if recipe is not None and recipe.licence not in ("Apache-2.0", "MIT"):
        licence = "other"  # the data's terms bind what was learnt from it, too
    by = str(about.get("by", "–"))
    gated = by in ("dpo", "grpo")
    lines = ["---", f"base_model: {name}", "library_name: peft", f"license: {licence}", "tags:"]
    lines += [f"- {tag}" for tag in ("lora", "preference-alignment", "motet")]
    short = name.rpartition("/")[2]
    title = f"{short} at the taste {label}" if label else f"{short}, taste-gated"
    lines += ["---", "", f"# {title}", ""]
    if label:
        lines += [
            "An ordinary LoRA adapter" + (": one taste of a policy that takes any, folded in." if gated else "."),
            "",
        ]
        lines += ["```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
        lines += [f'base = AutoModelForCausalLM.from_pretrained("{name}")', "# the folder of this card"]
        lines += ['model = PeftModel.from_pretrained(base, ".")', "```", ""]
        if asked in HUB:
            lines += [f"It was trained on the weights of {base}, unpacked; the hub's own differ by that rounding.", ""]
    else:
        lines += ["A LoRA adapter with gates: `motet say` and `motet play` ask it at any taste, `motet export` folds"]
        lines += ["one taste into an ordinary PEFT adapter.", ""]
    rows = [("Base", f"{name}; {_base_licence(asked)}"), ("Taste", label or "any")]
    rows += [(f"Share of {name}", f"{share:.2f}") for name, share in shares.items()]
    if method is not None:
        rows += [("Preferences by", f"{method.title}; {method.citation}")]
    if recipe is not None:
        rows += [("Data", f"{recipe.summary}; {recipe.citation}; licence: {recipe.licence}")]
    rows += [("Trained by", {"dpo": "DPO", "grpo": "GRPO", "feddpo": "FedDPO"}.get(by, by))]
    rows += [(name, _figure(value)) for name, value in about.get("figures", {}).items()]
    rows += judged
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
