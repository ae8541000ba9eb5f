"""Sampling: answers of a language model to prompts, each at a taste of its own, in batches.

In:  an opened language model, bare or wearing a policy; prompts, with their pictures; tastes.
Out: texts and their tokens; how far they are from the base, in nats.

Each batch draws from a generator of its own name, so an interrupted sampling goes on to the same answers.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.alignment.opened import OpenBase
from motet.alignment.pictures import cut, picture_token, read, shown_beside
from motet.alignment.policy import Worn
from motet.alignment.trainers import own_randomness
from motet.config import Section, write_atomically
from motet.records import Image, Turn, generator
from motet.selector.backbone import batches

Prompt = tuple[Turn, ...]


class SamplingSettings(Section):
    """How answers are drawn."""

    max_new_tokens: int = Field(48, ge=1)
    """Most tokens of an answer; longer ones are cut there."""
    max_prompt_tokens: int = Field(256, ge=8)
    """Longer prompts lose their beginning; the tokens of a picture are not counted and stay."""
    sampling_temperature: float = Field(0.7, gt=0)
    """Below 1 the likely words become likelier (paper: 0.7)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest words that hold this share of the probability; 1 draws from all (paper: 1)."""
    batch_rows: int = Field(64, ge=1)
    """Answers that are drawn at once."""


class Answer(NamedTuple):
    """One sampled answer."""

    text: str
    tokens: tuple[int, ...]
    """With the end token, where the model came to an end by itself."""


class Distance(NamedTuple):
    """How far answers are from the base model."""

    kl: Float[Tensor, " answers"]
    """Nats, summed over the answer's tokens; each token's divergence is exact, over the whole vocabulary."""
    log_likelihood: Float[Tensor, " answers"]
    """Of the answer under the base, nats per token; the exponential of its negative mean is the perplexity."""


def sample(
    base: OpenBase,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    seed: int,
    *names: str | int,
    worn: Worn | None = None,
    tastes: Float[Tensor, "prompts latent"] | None = None,
    watch: Callable[[int, int], None] | None = None,
    images: Sequence[Image | None] | None = None,
    greedy: bool = False,
) -> list[Answer]:
    """One answer to each prompt, in their order.

    Args:
        base: The language model.
        prompts: Dialogues that end with the user's turn; a prompt that comes twice gets two answers.
        settings: How to draw.
        seed: With ``names`` it names the random numbers.
        names: What this sampling is for.
        worn: The policy that the model wears; left out, the model is asked as it stands.
        tastes: One a prompt; left out, taste 0.
        watch: Told (answers done, answers in all).
        images: One a prompt, for a model that sees; ``None`` for a prompt that is about none.
        greedy: Always the likeliest token: the temperature, ``top_p`` and the seed are without effect.

    Raises:
        ConfigError: A picture for a model that sees none.
    """
    answers: list[Answer | None] = [None] * len(prompts)
    done = 0
    batch_by_batch = sampled(
        base, prompts, settings, seed, *names, worn=worn, tastes=tastes, images=images, greedy=greedy
    )
    for rows, drawn in batch_by_batch:
        for row, answer in zip(rows, drawn, strict=True):
            answers[row] = answer
        done += len(rows)
        if watch is not None:
            watch(done, len(prompts))
    return [answer for answer in answers if answer is not None]


def sampled(
    base: OpenBase,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    seed: int,
    *names: str | int,
    worn: Worn | None = None,
    tastes: Float[Tensor, "prompts latent"] | None = None,
    skip: int = 0,
    images: Sequence[Image | None] | None = None,
    greedy: bool = False,
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Batch after batch: which prompts, and their answers. ``skip`` leaves out batches that are known already."""
    pictures = [None] * len(prompts) if images is None else images
    asked = zip(prompts, pictures, strict=True)
    ids = [prompt_ids(base, prompt, settings.max_prompt_tokens, image) for prompt, image in asked]
    lengths = [len(row) + settings.max_new_tokens for row in ids]
    budget = settings.batch_rows * max(lengths, default=1)
    for number, rows in enumerate(_even(lengths, settings.batch_rows, budget)):
        if number < skip:
            continue
        draw = int(torch.randint(2**31, (), generator=generator(seed, *names, "batch", number)))
        if worn is not None:
            worn.dial.turn(None if tastes is None else tastes[rows].to(base.device))
        shown = shown_beside(base, [pictures[row] for row in rows])
        yield (
            rows,
            _generate(base, worn, [ids[row] for row in rows], shown, generation_settings(base, settings, greedy), draw),
        )


def sample_through(
    cache: Path,
    base: OpenBase,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    seed: int,
    *names: str | int,
    worn: Worn | None = None,
    tastes: Float[Tensor, "prompts latent"] | None = None,
    watch: Callable[[int, int], None] | None = None,
    images: Sequence[Image | None] | None = None,
    greedy: bool = False,
) -> list[Answer]:
    """The same as :func:`sample`, kept on disk batch by batch: asked again, or after a Ctrl-C, it goes on from there.

    The name of the file is everything that decides an answer: weights, adapter, tastes, prompts, pictures, settings,
    seed.
    """
    adapter = None if worn is None else hashlib.sha256(worn.adapter().packed()).hexdigest()
    shown = [None if tastes is None else tastes.tolist(), [list(map(list, prompt)) for prompt in prompts]]
    if images is not None and any(image is not None for image in images):
        shown.append([None if image is None else image.digest for image in images])
    parts = [weights_key(base), adapter, settings.model_dump(mode="json"), seed, list(names), shown]
    parts += ["greedy"] if greedy else []
    path = cache / "answers" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.jsonl"
    found: list[Answer | None] = [None] * len(prompts)
    lines = {line["batch"]: line for line in _whole_lines(path)}  # two at work at once may draw a batch twice
    known = next(number for number in range(len(lines) + 1) if number not in lines)
    for number in range(known):
        line = lines[number]
        for row, text, tokens in zip(line["rows"], line["texts"], line["tokens"], strict=True):
            found[row] = Answer(text, tuple(tokens))
    path.parent.mkdir(parents=True, exist_ok=True)
    going_on = sampled(
        base, prompts, settings, seed, *names, worn=worn, tastes=tastes, skip=known, images=images, greedy=greedy
    )
    for number, (rows, drawn) in enumerate(going_on, start=known):
        line = {
            "batch": number,
            "rows": rows,
            "texts": [a.text for a in drawn],
            "tokens": [list(a.tokens) for a in drawn],
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for row, answer in zip(rows, drawn, strict=True):
            found[row] = answer
        if watch is not None:
            watch(len(found) - found.count(None), len(prompts))
    return [answer for answer in found if answer is not None]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """What is kept; a line that an interruption cut off is taken away, and drawn again."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
            break
    return lines


@functools.lru_cache(maxsize=2)
def weights_key(base: OpenBase) -> str:
    """A name for what decides a base's answers: its weights, their type, its tokenizer and template, its processor.

    Kept for the last two bases, for their weights are frozen, and each taste of each sampling asks.
    """
    digest = hashlib.sha256()
    bare = {name.replace(".base_layer", ""): t for name, t in base.model.state_dict().items() if ".lora_" not in name}
    for name, tensor in sorted(bare.items()):  # the same whether it wears an adapter or not
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(f"{base.tokenizer.chat_template}{len(base.tokenizer)}".encode())
    if base.processor is not None:
        digest.update(f"{base.processor.chat_template}{base.processor.image_processor.to_json_string()}".encode())
    return digest.hexdigest()[:24]


def _even(lengths: Sequence[int], rows: int, budget: int) -> Iterator[list[int]]:
    """Batches of similar length with at most so many rows."""
    for batch in batches(lengths, budget):
        for start in range(0, len(batch), rows):
            yield batch[start : start + rows]


def prompt_ids(base: OpenBase, prompt: Prompt, most: int, image: Image | None = None) -> list[int]:
    """A prompt through the chat template, up to where the answer begins."""
    return cut(base, read(base, prompt, image), most)


def end_tokens(base: OpenBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and what the model names beside it (chat models often have two)."""
    named = base.model.generation_config.eos_token_id
    more = named if isinstance(named, list) else [named]
    return sorted({token for token in (base.tokenizer.eos_token_id, *more) if token is not None})


def generation_settings(base: OpenBase, settings: SamplingSettings, greedy: bool = False) -> Any:
    """Everything that decides a draw is said; of what a model brings along only its end tokens are used.

    A picture's token is never drawn: the model would have no picture to put there.
    """
    from transformers import GenerationConfig

    how = (
        {"do_sample": False}
        if greedy
        else {"do_sample": True, "temperature": settings.sampling_temperature, "top_k": 0, "top_p": settings.top_p}
    )
    return GenerationConfig(
        **how,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=end_tokens(base),
        pad_token_id=base.tokenizer.pad_token_id,
        bos_token_id=base.tokenizer.bos_token_id,
        suppress_tokens=None if base.processor is None else [picture_token(base)],
    )


def _generate(
    base: OpenBase, worn: Worn | None, rows: Sequence[list[int]], shown: dict[str, Any], wanted: Any, seed: int
) -> list[Answer]:
    model = base.model if worn is None else worn.model
    width, pad = max(map(len, rows)), base.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=base.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=base.device)
    training = model.training
    model.eval()
    try:
        with own_randomness(), torch.no_grad(), _no_habits(base.model, model):
            torch.manual_seed(seed)
            drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=wanted, **shown)
    finally:
        model.train(training)
    return [_answer(base, row) for row in drawn[:, width:].tolist()]


@contextlib.contextmanager
def _no_habits(*models: Any) -> Iterator[None]:
    """Without the models' generation_config.json, from which transformers takes whatever is left unsaid."""
    from transformers import GenerationConfig

    kept = [(model, model.generation_config) for model in models]
    try:
        for model in models:
            model.generation_config = GenerationConfig()
        yield
    finally:
        for model, habits in kept:
            model.generation_config = habits


def _answer(base: OpenBase, tokens: list[int]) -> Answer:
    ends = end_tokens(base)
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return Answer(base.tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip(), tuple(tokens[: stop + 1]))


def distance(
    base: OpenBase,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    settings: SamplingSettings,
    worn: Worn | None = None,
    tastes: Float[Tensor, "prompts latent"] | None = None,
    token_budget: int = 2048,
    images: Sequence[Image | None] | None = None,
) -> Distance:
    """KL of the policy from the base along answers that the policy gave, and what the base thinks of them.

    The sum over an answer's tokens of KL(policy || base) given what stands before: averaged over answers drawn from the
    policy at temperature 1 it is the KL of the two models; along answers drawn at a lower temperature it is that of the
    path which was taken. Zero where nothing is worn.
    """
    pictures = [None] * len(prompts) if images is None else images
    both = zip(prompts, pictures, strict=True)
    asked = [prompt_ids(base, prompt, settings.max_prompt_tokens, image) for prompt, image in both]
    lengths = [len(ids) + len(answer.tokens) for ids, answer in zip(asked, answers, strict=True)]
    kl, likelihood = torch.zeros(len(answers)), torch.zeros(len(answers))
    for rows in batches(lengths, token_budget):
        width, first = max(lengths[row] for row in rows), min(len(asked[row]) for row in rows) - 1
        ids = [[*asked[row], *answers[row].tokens, *[0] * (width - lengths[row])] for row in rows]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(ids, device=base.device), "use_cache": False, "logits_to_keep": width - first,
            **shown_beside(base, [pictures[row] for row in rows]),
        }  # fmt: skip
        with torch.inference_mode():
            if worn is None:
                before, after = base.model(**inputs).logits, None
            else:
                worn.dial.turn(None if tastes is None else tastes[rows].to(base.device))
                after = worn.model(**inputs).logits
                with worn.taken_off():
                    before = worn.model(**inputs).logits
        for place, row in enumerate(rows):
            start, stop = len(asked[row]) - 1 - first, lengths[row] - 1 - first
            if stop == start:
                continue
            known = before[place, start:stop].float().log_softmax(dim=-1)
            truth = torch.tensor(answers[row].tokens, device=known.device)
            likelihood[row] = known.gather(1, truth.unsqueeze(1)).mean().cpu()
            if after is not None:
                new = after[place, start:stop].float().log_softmax(dim=-1)
                kl[row] = (new.exp() * (new - known)).sum().cpu()
    return Distance(kl, likelihood)
