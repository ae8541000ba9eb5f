"""The model card of a server's model: what it is, whose scores it learnt from, and what it scored.

In:  settings and figures of a run.
Out: a README.md with the front matter that model hubs read.
"""

from collections.abc import Mapping
from typing import Any

from motet.alignment.stretches import Trained
from motet.mixing.settings import MixingSettings


def mixture_card(asked: MixingSettings, base: str, policy: Mapping[str, Any], trained: Trained) -> str:
    """The card.

    Args:
        asked: Settings of the run.
        base: Name of the base model.
        policy: What ``evaluation.json`` says of the policy.
        trained: Its training.
    """
    lines = [
        "---", f"base_model: {base}", "library_name: peft", "license: other", "tags:", "- lora",
        "- preference-alignment", "- motet", "- grpo", "---", "", f"# {base}, aligned by a mixture of rewards", "",
        f"An ordinary LoRA adapter, trained by GRPO with the scores of {asked.domains.clients} clients, mixed by the "
        f"router {asked.router.router!r}. Only scores left a client, and scores can tell of its data.",
        "", "```python", "from motet.selector.eyes import register", "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText", "",
        "register()  # where the base is motet's own small model",
        "base = AutoModelForImageTextToText.from_pretrained(BASE)", 'model = PeftModel.from_pretrained(base, ".")',
        "```", "", *_table(policy),
    ]  # fmt: skip
    lines += [
        "",
        f"KL to the base: {policy['kl']:.2f} nats an answer, of a budget of {policy['kl_budget']:g}; kept after "
        f"{trained.step} of {asked.server.policy_steps} steps. Recipe `{asked.recipe}`, seed {asked.seed}.",
        "", "Licences: the adapter may be used where the base and the data both allow it.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(policy: Mapping[str, Any]) -> list[str]:
    """What it scored by domain: right answers where somebody knows them, or else the reward that it was trained by."""
    if all("exact" in row for row in policy["before"].values()):
        lines = ["| domain | right before | right after | right and in style before | after |",
                 "| --- | --- | --- | --- | --- |"]  # fmt: skip
        for domain, before in policy["before"].items():
            after = policy["after"][domain]
            shares = [before["exact"], after["exact"], before["in_style"], after["in_style"]]
            lines.append(f"| {domain} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
        return [*lines, "", "Held-out questions about pictures that nobody trained on, answered greedily."]
    lines = ["| domain | reward before | reward after | gain |", "| --- | --- | --- | --- |"]
    for domain, gain in policy["gain"].items():
        rewards = [policy[when][domain]["reward"] for when in ("before", "after")]
        lines.append(f"| {domain} | {rewards[0]:+.2f} | {rewards[1]:+.2f} | {gain['reward']:+.2f} |")
    return [
        *lines, "",
        "The reward that it was trained by, of greedy answers to public prompts that it was not trained on; 1 is a "
        "typical margin between two public answers. Nobody knows right answers to them.",
    ]  # fmt: skip
