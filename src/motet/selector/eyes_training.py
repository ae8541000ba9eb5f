"""Training of the small model with eyes: questions in, a folder out; and what share of questions a model answers.

In:  questions, settings, a seed; or a folder and questions.
Out: model and processor as transformers saves them; exact answers, as a share.

Supervised: the next token of the right answer, in a style drawn anew in each step. The tower never changes, so a
picture goes through it once, and training reads its features.
"""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from motet.data.questions import Question, exact
from motet.errors import DataError
from motet.records import Image, Turn, generator
from motet.selector.eyes import SPECIALS, TEMPLATE, EyesSettings, Watch, image_processor, pretrained_tower, register
from motet.selector.reading import quiet_libraries

WARM_SHARE = 0.05
CONTEXT_TOKENS = 512
ASKED_AT_ONCE = 64


class Lesson(NamedTuple):
    """A question as tokens: what is asked, and its answer in two styles, with the end behind it."""

    prompt: list[int]
    answers: tuple[list[int], list[int]]
    picture: int
    """Row of its features; the last row, of zeros, where there is no picture."""


def train_eyes(
    questions: Sequence[Question], settings: EyesSettings, seed: int, out: Path, watch: Watch | None = None
) -> None:
    """Build the model, teach it the questions, and save it with its processor.

    Args:
        questions: Prompt, picture and right answer of each; every one should have a picture.
        settings: How large it is, and how it is trained.
        seed: Decides where its weights start and in which order it sees the questions.
        out: Folder to save in.
        watch: Told of each step.

    Raises:
        BackboneError: One of the packages it is built from is not installed.
        DataError: No questions, or none with a picture.
    """
    quiet_libraries()
    pictures = {question.image.digest: question.image for question in questions if question.image is not None}
    if not pictures:
        raise DataError(f"a model with eyes learns from questions about pictures, got {len(questions)} and no picture")
    processor = build_processor(questions, settings)
    model = build_model(processor, settings, seed)
    row = {name: place for place, name in enumerate(pictures)}
    features = _features(model, processor, list(pictures.values()))
    lessons = [_lesson(question, processor, row) for question in questions]
    _teach(model, lessons, _by_domain(questions, row), features, settings, seed, watch)
    model.save_pretrained(out)
    processor.save_pretrained(out)


def build_model(processor: Any, settings: EyesSettings, seed: int) -> Any:
    """The untrained model: ImageNet's tower, and weights drawn from the seed behind it."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    quiet_libraries()
    register()
    tower = pretrained_tower(settings.eyes_pixels)
    tokenizer = processor.tokenizer
    named = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.eyes_width, intermediate_size=3 * settings.eyes_width,
        num_hidden_layers=settings.eyes_layers, num_attention_heads=settings.eyes_heads,
        num_key_value_heads=settings.eyes_heads,
        max_position_embeddings=CONTEXT_TOKENS, tie_word_embeddings=True,
        initializer_range=settings.eyes_width**-0.5, **named,  # with the usual 0.02 it learns half as fast
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower.config, text_config=text, image_token_index=processor.image_token_id,
        image_seq_length=(settings.eyes_pixels // tower.config.patch_size) ** 2, vision_feature_layer=-1,
        vision_feature_select_strategy="full", **named,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        # the same for the projector's first layer, which is wider than the rest
        torch.nn.init.normal_(model.model.multi_modal_projector.linear_1.weight, std=tower.config.hidden_size**-0.5)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model


def build_processor(questions: Sequence[Question], settings: EyesSettings) -> Any:
    """Tokenizer and picture processor, with a chat template that takes texts, and lists of parts with pictures."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    texts = [text for question in questions for text in _texts(question)]
    if settings.eyes_vocabulary == "words":
        whole = Tokenizer(models.WordLevel({}, unk_token="<unknown>"))
        marks = pre_tokenizers.Split(Regex(r"[.,;:?!]+(?=\s|$)"), behavior="isolated")  # not the point inside 2.5
        whole.pre_tokenizer = pre_tokenizers.Sequence([marks, pre_tokenizers.WhitespaceSplit()])
        whole.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # blanks between words, none before a comma
        trainer: Any = trainers.WordLevelTrainer(
            vocab_size=settings.eyes_words, special_tokens=list(SPECIALS), show_progress=False
        )
    else:
        whole = Tokenizer(models.BPE())
        whole.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        whole.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=settings.eyes_words, special_tokens=list(SPECIALS), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    whole.normalizer = normalizers.Lowercase()
    whole.train_from_iterator(texts, trainer)
    whole.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", unk_token="<unknown>", bos_token="<begin>", eos_token="<end>",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=CONTEXT_TOKENS, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return LlavaProcessor(
        image_processor(settings.eyes_pixels), tokenizer, patch_size=32, vision_feature_select_strategy="full",
        chat_template=TEMPLATE, image_token="<image>", num_additional_image_tokens=0,
    )  # fmt: skip


def open_eyes(folder: Path) -> tuple[Any, Any]:
    """Model and processor, as anybody would open them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    quiet_libraries()
    register()
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def answers(model: Any, processor: Any, questions: Sequence[Question], most_tokens: int = 32) -> list[str]:
    """What a vision-language model answers, greedily; any one of transformers, if its processor takes pictures."""
    said: dict[int, str] = {}
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt[-1].content))
    for start in range(0, len(order), ASKED_AT_ONCE):
        batch = order[start : start + ASKED_AT_ONCE]
        for seeing in (True, False):
            rows = [i for i in batch if (questions[i].image is not None) == seeing]
            if rows:
                texts = [_chat(processor, questions[i].prompt, questions[i].image) for i in rows]
                pictures = [[image.pil()] for i in rows if (image := questions[i].image) is not None]
                said |= dict(zip(rows, _generate(model, processor, texts, pictures, most_tokens), strict=True))
    return [said[i] for i in range(len(questions))]


def accuracy(model: Any, processor: Any, questions: Sequence[Question]) -> float:
    """Share of the questions that the model answers exactly, in whichever style; greedily."""
    said = answers(model, processor, questions)
    return sum(map(exact, questions, said)) / len(questions)


def blind_accuracy(model: Any, processor: Any, questions: Sequence[Question], seed: int = 0) -> float:
    """The same with the pictures of each domain dealt out anew: what the texts alone give away to this model."""
    return accuracy(model, processor, shuffled(questions, seed))


def shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    """The same questions, with the pictures of each domain dealt out anew at random."""
    from dataclasses import replace

    dealt = list(questions)
    for domain in sorted({question.domain for question in questions}):
        places = [i for i, question in enumerate(questions) if question.domain == domain]
        order = torch.randperm(len(places), generator=generator(seed, "shuffled", domain)).tolist()
        for place, other in zip(places, order, strict=True):
            dealt[place] = replace(questions[place], image=questions[places[other]].image)
    return dealt


def _generate(model: Any, processor: Any, texts: list[str], pictures: list[list[Any]], most_tokens: int) -> list[str]:
    given = processor(
        text=texts, **({"images": pictures} if pictures else {}), return_tensors="pt", padding=True,
        padding_side="left", add_special_tokens=False,
    ).to(model.device)  # fmt: skip
    with torch.inference_mode():
        whole = model.generate(**given, do_sample=False, max_new_tokens=most_tokens)
    said: list[str] = processor.batch_decode(whole[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def _chat(processor: Any, prompt: Sequence[Turn], image: Image | None) -> str:
    first = next(place for place, turn in enumerate(prompt) if turn.role == "user")
    messages = [
        {"role": turn.role, "content": [{"type": "image"}] * (image is not None and place == first) + [
            {"type": "text", "text": turn.content}]}
        for place, turn in enumerate(prompt)
    ]  # fmt: skip
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _texts(question: Question) -> Iterator[str]:
    yield from (turn.content for turn in question.prompt)
    yield from (text for saying in (question.right, *question.wrong) for text in saying)


def _lesson(question: Question, processor: Any, row: Mapping[str, int]) -> Lesson:
    tokenizer, image = processor.tokenizer, question.image
    text = _chat(processor, question.prompt, image)
    if image is not None:
        patches = (processor.image_processor.size["height"] // processor.patch_size) ** 2
        text = text.replace(processor.image_token, processor.image_token * patches)
    terse, explained = (
        [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for said in question.right
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Lesson(prompt, (terse, explained), row[image.digest] if image is not None else len(row))


def _by_domain(questions: Sequence[Question], row: Mapping[str, int]) -> list[list[int]]:
    """For each question, the pictures of its domain."""
    rows: dict[str, dict[int, None]] = collections.defaultdict(dict)
    for question in questions:
        if question.image is not None:
            rows[question.domain][row[question.image.digest]] = None
    lists = {domain: list(places) for domain, places in rows.items()}
    return [lists.get(question.domain, [len(row)]) for question in questions]


def _features(model: Any, processor: Any, pictures: Sequence[Image]) -> Tensor:
    """What the tower says of each picture, in half precision to save memory; a row of zeros behind them."""
    rows = []
    for start in range(0, len(pictures), 16):
        shown = [picture.pil() for picture in pictures[start : start + 16]]
        pixels = processor.image_processor(shown, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            rows.append(model.model.vision_tower.features(pixels).half())
    return torch.cat([*rows, torch.zeros_like(rows[0][:1])]).clone()


def _teach(
    model: Any, lessons: Sequence[Lesson], same_domain: Sequence[Sequence[int]], features: Tensor,
    settings: EyesSettings, seed: int, watch: Watch | None,
) -> None:  # fmt: skip
    """AdamW on everything behind the tower."""
    weights = [weight for name, weight in model.named_parameters() if "vision_tower" not in name]
    decay = [weight for weight in weights if weight.dim() > 1]
    rest = [weight for weight in weights if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.eyes_learning_rate, betas=(0.9, 0.98),
    )  # fmt: skip
    dice = generator(seed, "eyes")
    order: list[int] = []
    model.train()
    for step in range(settings.eyes_steps):
        while len(order) < settings.eyes_batch:
            order += torch.randperm(len(lessons), generator=dice).tolist()
        batch, order = order[: settings.eyes_batch], order[settings.eyes_batch :]
        styles = (torch.rand(len(batch), generator=dice) < settings.explained_share).long().tolist()
        shown = [lessons[i].picture for i in batch]
        if settings.eyes_blind:
            draws = torch.rand(len(batch), generator=dice).tolist()
            shown = [same_domain[i][int(draw * len(same_domain[i]))] for i, draw in zip(batch, draws, strict=True)]
        loss = _loss(model, [lessons[i] for i in batch], styles, features[torch.tensor(shown)].float())
        for group in optimizer.param_groups:
            group["lr"] = settings.eyes_learning_rate * _share(step, settings.eyes_steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if watch is not None:
            watch(step + 1, settings.eyes_steps, float(loss.detach()))
    model.eval()


def _loss(model: Any, lessons: Sequence[Lesson], styles: Sequence[int], features: Tensor) -> Tensor:
    """Mean loss of the answers' tokens, in nats."""
    rows = [lesson.prompt + lesson.answers[style] for lesson, style in zip(lessons, styles, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [model.config.pad_token_id] * (width - len(row)) for row in rows])
    seen = model.model.multi_modal_projector(features)
    embedded = model.get_input_embeddings()(ids)
    places = ids == model.config.image_token_id
    seeing = places.any(dim=1)
    embedded = embedded.masked_scatter(places.unsqueeze(-1), seen[seeing])
    # no attention mask: padding stands on the right, and a causal model never looks there from the left
    states = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    spans = [
        (len(lesson.prompt) - 1, len(lesson.answers[style])) for lesson, style in zip(lessons, styles, strict=True)
    ]
    where = torch.tensor([(row, first + place) for row, (first, count) in enumerate(spans) for place in range(count)])
    logits = model.lm_head(states[where[:, 0], where[:, 1]])
    return F.cross_entropy(logits, ids[where[:, 0], where[:, 1] + 1])


def _share(step: int, steps: int) -> float:
    """Of the learning rate: up to 1, and down along half a cosine."""
    warm = max(1, round(WARM_SHARE * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
