"""GRPO on the server: a taste-gated policy answers, is told how good its answers are at each taste, and learns.

In:  a frozen base, an adapter to start from, prompts and their pictures, tastes, a reward, a way to look at the policy
     between steps.
Out: the adapter that looked best within its KL budget, and a log of every look, see ``stretches``.

Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300). In a step some groups are asked: a prompt and a taste, and several
answers to them. An answer's advantage is its reward against its group's:

    A_i = (r_i - mean r) / (std r + 1e-4),
    w = p / p_old,  q = p_base / p,
    J = mean_i mean_t [ min(w A_i, clip(w, 1 - e, 1 + e) A_i) - b (q - log q - 1) ]                           (E22)

TRL's ``GRPOTrainer`` does the steps, told to do them as published. We differ in five ways:
1. each group has a taste, which its answers are drawn at, scored at and judged by, and perhaps a picture;
2. answers are drawn as everywhere in this house (``sampling``), from random numbers named by the step;
3. p is the policy at the sampling temperature, as answers are drawn from it; a ``top_p`` below 1 is not in it;
4. one step on each set of answers, so p_old is p, w is 1, and nothing is ever clipped;
5. where asked (``drop_flat_groups``), groups whose answers all got the same reward leave J, their divergence too.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.alignment.lora import lora_config
from motet.alignment.opened import OpenBase
from motet.alignment.pictures import shown_beside
from motet.alignment.policy import TasteAdapter, Worn
from motet.alignment.sampling import SamplingSettings, prompt_ids, sample
from motet.alignment.scored import Group, Scored, StepLog, logging_steps
from motet.alignment.stretches import (
    Look,
    PolicySettings,
    State,
    Trained,
    Training,
    Watch,
    check_finite,
    train_in_stretches,
)
from motet.alignment.trainers import quiet_arguments, trl_grpo
from motet.config import Section
from motet.errors import ConfigError
from motet.records import Image, Turn, generator
from motet.selector.reward import RewardModel

Prompt = tuple[Turn, ...]


class GRPOOnTastes(Section):
    """Group relative policy optimisation of one policy for all tastes, on the server."""

    grpo_steps: int = Field(60, ge=1)
    """Steps of AdamW; each draws new answers."""
    grpo_learning_rate: float = Field(5e-4, gt=0)
    """Of AdamW, constant after the warm-up (DeepSeekMath: 1e-6, for all weights of a large model)."""
    grpo_warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises from 0."""
    group_size: int = Field(8, ge=2)
    """Answers to one prompt at one taste, which are compared with each other (DeepSeekMath: 64)."""
    groups_per_step: int = Field(4, ge=1)
    """Groups in a step (DeepSeekMath: 16)."""
    group_mixtures: int = Field(1, ge=0)
    """In an epoch each prompt is asked at each prototype, and at so many random mixtures of them."""
    grpo_kl_weight: float = Field(0.04, ge=0)
    """Weight of the divergence from the base, a mean over tokens; more keeps the policy nearer (DeepSeekMath: 0.04)."""
    clip_range: float = Field(0.2, gt=0, lt=1)
    """Epsilon of the clipped ratio; without effect while each answer is used for one step only."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What an advantage is divided by: the standard deviation of its group (DeepSeekMath), or of the step, or 1."""
    drop_flat_groups: bool = False
    """Leave groups whose answers all got the same reward out of the loss, their divergence from the base too: it is a
    mean over the other answers, and a step without any changes nothing. No, as published, keeps their divergence."""
    answers_per_pass: int = Field(8, ge=1)
    """Most answers in one pass with gradients; fewer need less memory and give the same step."""


LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "reward_std": "reward_std",
    "token_kl": "kl",
    "flat_groups": "frac_reward_zero_std",
    "answer_tokens": "completions/mean_length",
}
"""What is kept of TRL's log, and how it calls it: means over the answers of a stretch. ``flat_groups`` is the share of
groups whose answers all got the same reward: nothing is learnt from them."""


ADVICE = "lower grpo_learning_rate or raise grpo_kl_weight"


def train_policy_grpo(
    base: OpenBase,
    start: TasteAdapter,
    prompts: Sequence[Prompt],
    tastes: Float[Tensor, "prototypes latent"],
    reward: RewardModel,
    settings: GRPOOnTastes,
    policy: PolicySettings,
    sampling: SamplingSettings,
    seed: int,
    look: Callable[[Worn], Look],
    checkpoint: Path,
    identity: str,
    watch: Watch | None = None,
    images: Sequence[Image | None] | None = None,
    step_log: StepLog | None = None,
) -> Trained:
    """Train, look every so often, keep the best.

    Args:
        base: The frozen model.
        start: The adapter before the first step; step 0 is looked at too, so that harm is never kept.
        prompts: What is asked.
        tastes: The prototypes; no rows for a reward that knows no taste.
        reward: Scores the answers of each group at the group's taste. It should keep no cache: no answer comes twice.
        settings: Steps and sizes.
        policy: When to look, and the budget.
        sampling: How answers are drawn.
        seed: Decides the order of the groups, the mixtures and the answers.
        look: Told to look at the worn policy; it must leave it as it was.
        checkpoint: A file; one that is there and of the same identity is gone on from.
        identity: Names all that the training depends on.
        watch: Told after each step: (step, figures).
        images: What each prompt is about; the reward is shown it, and so is the policy, where the base sees at all.
        step_log: Told after each step: its number from 1, and its figures, see ``scored.logging_steps``. What
            ``reward.statistics()`` says after the step's scoring, where it has one, is among them. Steps after the last
            look are done again when an interrupted training goes on, and told again: with the same figures, but for
            the seconds.

    Returns:
        The best; its log has the means in ``LOGGED``.

    Raises:
        KeyboardInterrupt: On Ctrl-C, with a sentence; the checkpoint holds everything up to the last look.
        RunError: The policy ran away.
    """
    groups = plan(prompts, tastes, settings, seed, images)

    def build(state: State, steps: int, folder: str) -> Any:
        now = groups[state.step * settings.groups_per_step : (state.step + steps) * settings.groups_per_step]
        return _build(base, state, now, reward, settings, sampling, steps, seed, folder)

    def fit(trainer: Any, worn: Worn) -> None:
        trainer.worn = worn
        if step_log is not None:
            trainer.add_callback(logging_steps(trainer, trainer.first, step_log))

    training = Training(
        settings.grpo_steps, settings.grpo_learning_rate, settings.grpo_warmup_steps, build, fit,
        {name: key for name, key in LOGGED.items() if settings.grpo_kl_weight or key != "kl"},
        ADVICE,
    )  # fmt: skip
    return train_in_stretches(base, start, training, policy, look, checkpoint, identity, watch)


def plan(
    prompts: Sequence[Prompt],
    tastes: Float[Tensor, "prototypes latent"],
    settings: GRPOOnTastes,
    seed: int,
    images: Sequence[Image | None] | None = None,
) -> list[Group]:
    """Which group comes when: epoch after epoch, each in an order of its own.

    Mixtures are uniform over the convex combinations of the prototypes (flat Dirichlet), and new in each epoch.
    """
    known = [*tastes] if len(tastes) else [tastes.new_zeros(0)]
    kinds = len(known) + (settings.group_mixtures if len(tastes) > 1 else 0)
    shown = [None] * len(prompts) if images is None else list(images)
    if len(shown) != len(prompts):
        raise ConfigError(
            f"images must be one a prompt, got {len(shown)} for {len(prompts)}; say None where there is none"
        )
    wanted, epoch = settings.grpo_steps * settings.groups_per_step, 0
    found: list[Group] = []
    while len(found) < wanted:
        order = torch.randperm(len(prompts) * kinds, generator=generator(seed, "epoch", epoch)).tolist()
        draw = generator(seed, "mixtures", epoch)
        for prompt, kind in (divmod(place, kinds) for place in order):
            if kind < len(known):
                taste = known[kind]
            else:
                shares = -torch.log(1 - torch.rand(len(tastes), generator=draw))  # exponentials over their sum
                taste = (shares / shares.sum()) @ tastes
            found.append(Group(prompts[prompt], taste, shown[prompt]))
        epoch += 1
    return found[:wanted]


def grpo_arguments(
    base: OpenBase, settings: GRPOOnTastes, sampling: SamplingSettings, steps: int, seed: int, folder: str
) -> dict[str, Any]:
    """Settings of TRL's trainer; everything that decides a number is said, and is the published GRPO."""
    answers = settings.group_size * settings.groups_per_step
    # the loss is a mean over answers, so passes of equal size add up to the same step
    together = max(size for size in range(1, settings.answers_per_pass + 1) if answers % size == 0)
    return quiet_arguments(base, steps, seed, folder) | {
        # no autocast, on a GPU either: the base's weights carry the type, as they did when the answers were drawn
        "bf16": False,
        "fp16": False,
        "per_device_train_batch_size": together,
        "gradient_accumulation_steps": answers // together,
        "learning_rate": settings.grpo_learning_rate,
        "loss_type": "grpo",
        "beta": settings.grpo_kl_weight,
        "use_bias_correction_kl": False,  # True since TRL 1.10, and another gradient
        "scale_rewards": settings.scale_rewards,
        "multi_objective_aggregation": "sum_then_normalize",
        "importance_sampling_level": "token",
        "num_generations": settings.group_size,
        "num_iterations": 1,
        "epsilon": settings.clip_range,
        "epsilon_high": None,
        "delta": None,
        "mask_truncated_completions": False,  # small models seldom come to an end in time
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "off_policy_mask_threshold": None,
        "router_aux_loss_coef": 0.0,
        "sync_ref_model": False,
        "max_completion_length": sampling.max_new_tokens,
        "temperature": sampling.sampling_temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "use_vllm": False,
        "shuffle_dataset": False,  # the order is ours
        "remove_unused_columns": False,  # the taste is one
        "pad_to_multiple_of": None,
        "log_completions": False,
    }


def _build(
    base: OpenBase,
    state: State,
    groups: Sequence[Group],
    reward: RewardModel,
    settings: GRPOOnTastes,
    sampling: SamplingSettings,
    steps: int,
    seed: int,
    folder: str,
) -> Any:
    from datasets import Dataset

    trainer_class, config_class = _on_tastes()
    scored = Scored(base, reward, groups, settings.group_size)
    draw = int(torch.randint(2**31, (), generator=generator(seed, "stretch", state.step)))
    trainer = trainer_class(
        model=base.model,
        reward_funcs=scored,
        args=config_class(**grpo_arguments(base, settings, sampling, steps, draw, folder)),
        train_dataset=Dataset.from_dict(
            {
                "prompt": [[turn._asdict() for turn in group.prompt] for group in groups],
                "group": list(range(len(groups))),
            }
        ),
        processing_class=base.tokenizer,
        peft_config=lora_config(base, state.adapter.settings),
    )
    trainer.base, trainer.sampling, trainer.seed, trainer.first = base, sampling, seed, state.step
    trainer.groups, trainer.scored, trainer.drop_flat = groups, scored, settings.drop_flat_groups
    return trainer


@functools.lru_cache(maxsize=1)
def _on_tastes() -> tuple[Any, Any]:
    """The guarded trainer, which draws and scores each answer at its taste, by its picture.

    TRL shuffles the answers of a step and cuts them into passes. So the number of its group travels with each answer,
    as one more tensor of the batch, and the dial is turned inside the one method through which every scoring goes.
    What is shown is added there too: so no pass has a picture too many, however a processor lays them out.
    """
    trainer_class, config_class = trl_grpo()

    class OnTastes(trainer_class):  # type: ignore[misc, valid-type]
        base: OpenBase
        worn: Worn
        sampling: SamplingSettings
        seed: int
        first: int
        """Steps before this stretch."""
        groups: Sequence[Group]
        """Of this stretch."""
        scored: Scored
        drop_flat: bool
        rows: list[Group]
        """Group of each row that is drawn or scored at the moment."""
        share = 1.0
        """Of the step's answers that are in the loss."""
        drawing_seconds = 0.0

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            numbers = [row["group"] for row in inputs]
            self.rows = [self.groups[number] for number in numbers]
            found = super()._generate_and_score_completions(inputs)
            device, kept = self.accelerator.device, self.scored.kept()
            if self.drop_flat:
                self.share = float(kept.float().mean())
                found["kept"] = kept.to(device)
            return {**found, "taste": self._tastes(self.rows), "group": torch.tensor(numbers, device=device)}

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            most = self.sampling.max_prompt_tokens
            return [prompt_ids(self.base, row.prompt, most, self._seen(row)) for row in self.rows], None, {}

        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            started, step = time.perf_counter(), self.first + self.state.global_step
            check_finite(self.worn.adapter(), step + 1, ADVICE)  # before torch is asked to draw from no distribution
            asked, images = [row.prompt for row in self.rows], [self._seen(row) for row in self.rows]
            more: dict[str, Any] = {"images": images} if any(image is not None for image in images) else {}
            drawn = sample(
                self.base, asked, self.sampling, self.seed, "group", step,
                worn=self.worn, tastes=self._tastes(self.rows), **more,
            )  # fmt: skip
            self.drawing_seconds = time.perf_counter() - started
            return [list(answer.tokens) for answer in drawn], None

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            """A mean over the answers of the pass; where flat groups leave, over those that stay, by their number."""
            kept = inputs.get("kept")
            weight = 1.0
            if kept is not None:
                if not bool(kept.any()):
                    return torch.zeros((), device=kept.device, requires_grad=True)  # reaches no weight at all
                weight = float(kept.float().mean()) / self.share
                inputs = {
                    name: value[kept] if isinstance(value, Tensor) and value.ndim else value
                    for name, value in inputs.items()
                }
            self.rows = [self.groups[number] for number in inputs["group"].tolist()]
            return weight * super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: Tensor,
            attention_mask: Tensor,
            logits_to_keep: int,
            batch_size: int | None = None,
            **more: Any,
        ) -> Any:
            """In passes of our own, so that each has the tastes and the pictures of its rows, whoever asks."""
            size, logps, entropies = batch_size or len(input_ids), [], []
            for first in range(0, len(input_ids), size):
                part = slice(first, first + size)
                rows = self.rows[part]
                self.worn.dial.turn(self._tastes(rows))
                shown = shown_beside(self.base, [self._seen(row) for row in rows])
                logp, entropy, _ = super()._get_per_token_logps_and_entropies(
                    functools.partial(model, **shown), input_ids[part], attention_mask[part], logits_to_keep, **more
                )
                logps.append(logp)
                entropies.append(entropy)
            return torch.cat(logps), None if entropies[0] is None else torch.cat(entropies), None

        def _tastes(self, rows: Sequence[Group]) -> Tensor:
            return torch.stack([row.taste for row in rows]).to(self.accelerator.device)

        def _seen(self, row: Group) -> Image | None:
            """A text model is asked without the picture."""
            return row.image if self.base.processor is not None else None

    return OnTastes, config_class
