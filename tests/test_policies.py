"""Policies: a taste in words, from a person's choices, from a folder; and what leaves as an ordinary adapter."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from motet.alignment.policy import TasteAdapter, adapter_from, fold, start_policy
from motet.alignment.sampling import SamplingSettings
from motet.alignment.trainers import LoraSettings, OpenBase, adapter_files, open_base
from motet.data.voices import voices_rows
from motet.errors import ConfigError, DataError, RunError
from motet.person import open_chooser
from motet.policies import (
    ABOUT,
    BARE,
    TENSORS,
    Policy,
    Taste,
    answers_at,
    dressed,
    export,
    mixture,
    open_policy,
    parse_taste,
    person_taste,
    prototype_shares,
    stream,
    write_policy,
)
from motet.records import Pair, Turn, generator
from motet.selector.trained import CONFIG as SELECTOR_CONFIG
from motet.selector.trained import TENSORS as SELECTOR
from test_trainers import same_bits, write_language_model
from toy_run import PROMPTS, toy_run

LATENT = 3
LORA = LoraSettings(lora_rank=4, lora_dropout=0.0)
TASTES = torch.tensor([[4.0, 0.0, 1.0], [0.0, 5.0, 0.0]])
ASKED = (Turn("user", "What will it be?"),)
ABOUT_IT: dict[str, Any] = {
    "base": "smollm2", "by": "dpo", "method": "fedvpa", "recipe": "voices", "data": {}, "run_seed": 0,
    "figures": {"steps": 30, "gain_nats": 1.2345, "kl_nats": 12.0}, "trained_on": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> OpenBase:
    return open_base(str(write_language_model(tmp_path_factory.mktemp("llama"))), "cpu")


def moved(base: OpenBase, tastes: torch.Tensor = TASTES) -> TasteAdapter:
    fresh, g = start_policy(base, LORA, tastes, generator(0)), generator(1)
    return adapter_from(
        {
            n: t if n == "taste_scale" else t + 0.3 * torch.randn(t.shape, generator=g)
            for n, t in fresh.tensors().items()
        },
        LORA,
    )


@pytest.fixture
def policy(base: OpenBase) -> Policy:
    return Policy(moved(base), ("helpful", "terse"), TASTES, ABOUT_IT)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory)


@pytest.fixture(scope="module")
def personal(toy: Path, base: OpenBase, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A policy of the toy run, never trained: its selector and its tastes are real."""
    folder, selector = tmp_path_factory.mktemp("policy"), open_chooser(toy, toy.parent / "cache").selector
    for name in (SELECTOR, SELECTOR_CONFIG):
        shutil.copy(toy / name, folder / name)
    names = [f"kind {i}" for i in range(len(selector.prototypes))]
    adapter = start_policy(base, LORA, selector.prototypes, generator(0))
    write_policy(folder, adapter, selector.prototypes, names, ABOUT_IT)
    return open_policy(folder)


# --- a taste in words


WORDS: list[tuple[str, dict[str, float]]] = [
    ("helpful", {"helpful": 1}),
    ("  terse ", {"terse": 1}),
    ("p0", {"helpful": 1}),
    ("p1", {"terse": 1}),
    ("0.7*p0+0.3*p1", {"helpful": 0.7, "terse": 0.3}),
    (" .5 * helpful + .5*p1", {"helpful": 0.5, "terse": 0.5}),
    ("0.5*p0+0.5*helpful", {"helpful": 1}),
    ("2*p0", {"helpful": 2}),
    ("-1*p0+2*p1", {"helpful": -1, "terse": 2}),
]


@pytest.mark.parametrize(("text", "shares"), WORDS, ids=[text for text, _ in WORDS])
def test_words_name_a_taste(policy: Policy, text: str, shares: dict[str, float], tmp_path: Path) -> None:
    taste = parse_taste(policy, text, tmp_path)
    assert taste.shares == pytest.approx(shares)
    wanted = shares.get("helpful", 0) * TASTES[0] + shares.get("terse", 0) * TASTES[1]
    assert taste.vector is not None
    torch.testing.assert_close(taste.vector, wanted)
    beyond = sum(shares.values()) != 1 or min(shares.values()) < 0
    assert bool(taste.said) == beyond
    assert not taste.unsure
    assert not taste.bare
    again = parse_taste(policy, taste.label, tmp_path)
    assert again.shares == taste.shares, "a label can be given again"


def test_base_is_the_model_without_the_policy(policy: Policy, tmp_path: Path) -> None:
    assert parse_taste(policy, " Base ", tmp_path) is BARE
    assert mixture(policy, {"helpful": 0.0}) is BARE
    plain = Policy(policy.adapter, (), torch.zeros(0, 0), ABOUT_IT)
    nothing = parse_taste(plain, "", tmp_path)
    assert (nothing.vector, nothing.bare) == (None, False)


def test_a_name_may_hold_a_plus_sign_and_be_a_files_name(policy: Policy, tmp_path: Path, monkeypatch: Any) -> None:
    odd = Policy(policy.adapter, ("expert+direct", "terse.json"), TASTES, ABOUT_IT)
    assert parse_taste(odd, "expert+direct", tmp_path).shares == {"expert+direct": 1.0}
    assert parse_taste(odd, "terse.json", tmp_path).shares == {"terse.json": 1.0}
    assert parse_taste(odd, "0.5*p0+0.5*p1", tmp_path).shares == {"expert+direct": 0.5, "terse.json": 0.5}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helpful").write_text("no choices at all")
    assert parse_taste(policy, "helpful", tmp_path).shares == {"helpful": 1.0}


WANTED = "--taste wants names and weights such as 0.7*helpful+0.3*terse"
MISTAKES = [
    ("rude", "unknown taste 'rude' in --taste 'rude'; this policy knows helpful (p0), terse (p1), and base"),
    ("p2", "unknown taste 'p2' in --taste 'p2'; this policy knows helpful (p0), terse (p1), and base"),
    ("p0+", "unknown taste '' in --taste 'p0+'; this policy knows helpful (p0), terse (p1), and base"),
    (" ", "--taste is needed, got none; this policy knows helpful (p0), terse (p1), and base"),
    *(
        (f"{odd}*p0", f"{WANTED}, got '{odd}*p0': {odd!r} is no number")
        for odd in ("half", "nan", "inf", "-inf", "1e999")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_slips_in_words_are_named(policy: Policy, text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        parse_taste(policy, text, tmp_path)
    assert str(error.value) == sentence


def test_a_policy_without_tastes_says_so(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        parse_taste(Policy(policy.adapter, (), torch.zeros(0, 0), ABOUT_IT), "helpful", tmp_path)
    assert str(error.value) == "this policy knows no tastes, got 'helpful'; leave --taste out, or give base"


# --- a taste from choices


def choices(kind: str, other: str, count: int = 12) -> list[Pair]:
    rows = voices_rows()[PROMPTS : PROMPTS + count]
    return [Pair.of(row["prompt"], row["answers"][kind], row["answers"][other]) for row in rows]


def test_a_persons_taste_weighs_the_prototypes_by_bayes(personal: Policy, toy: Path) -> None:
    cache, somebody = toy.parent / "cache", choices("expert-direct", "plain-direct")
    taste = person_taste(personal, somebody, cache)
    chooser = open_chooser(toy, cache)
    fits = [float(torch.log(chooser.probability(mean, somebody)).sum()) for mean in chooser.selector.prior.means]
    log = torch.tensor(fits) + chooser.selector.prior.log_mass
    weights = (log - log.max()).exp() / (log - log.max()).exp().sum()
    wanted = torch.zeros(len(personal.names))
    for mean, weight in zip(chooser.selector.prior.means, weights, strict=True):
        wanted[int((personal.tastes - mean).norm(dim=1).argmin())] += weight
    assert list(taste.shares.values()) == pytest.approx(wanted.tolist(), abs=1e-4)
    assert sum(taste.shares.values()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(taste.vector, wanted @ personal.tastes, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(prototype_shares(chooser, somebody), wanted, atol=1e-4, rtol=0)
    best = max(taste.shares, key=lambda name: taste.shares[name])
    assert taste.said[0] == f"taste inferred from 12 choices: {taste.shares[best]:.0%} {best}"
    assert taste.unsure == (max(taste.shares.values()) < 0.7) == (len(taste.said) == 2)
    other = person_taste(personal, [pair.mirrored() for pair in somebody], cache)
    assert taste.vector is not None
    assert not torch.allclose(taste.vector, torch.as_tensor(other.vector))


def test_choices_come_from_a_file(personal: Policy, toy: Path, tmp_path: Path) -> None:
    cache, me = toy.parent / "cache", tmp_path / "me.jsonl"
    somebody = choices("expert-direct", "plain-direct", 5)
    rows = [{"prompt": p.prompt[0].content, "chosen": p.chosen, "rejected": p.rejected} for p in somebody]
    me.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taste = parse_taste(personal, str(me), cache)
    assert (taste.label, taste.shares) == ("me.jsonl", person_taste(personal, somebody, cache).shares)
    with pytest.raises(DataError) as error:
        parse_taste(personal, "nobody.jsonl", cache)
    assert str(error.value) == (
        "there is no file 'nobody.jsonl'; --taste takes a name, a mixture or a file with choices"
    )
    with pytest.raises(DataError) as error:
        person_taste(personal, [], cache)
    assert str(error.value) == "you holds no choices; give JSON lines with prompt, chosen, rejected"


def test_a_policy_without_a_selector_cannot_infer(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        person_taste(policy, choices("expert-direct", "plain-direct", 1), tmp_path)
    assert str(error.value) == (
        "this policy keeps no selector, so it cannot infer a person's taste; name a taste instead"
    )


# --- folders


def test_a_folder_keeps_every_bit(policy: Policy, tmp_path: Path) -> None:
    assert policy.adapter is not None
    write_policy(tmp_path, policy.adapter, TASTES, policy.names, ABOUT_IT)
    again = open_policy(tmp_path)
    assert again.adapter is not None
    assert same_bits(again.adapter.tensors(), policy.adapter.tensors())
    assert torch.equal(again.tastes, TASTES)
    assert (again.names, again.model, again.folder) == (("helpful", "terse"), "smollm2", tmp_path)
    assert again.adapter.settings == LORA
    assert again.about["figures"] == ABOUT_IT["figures"]


def damage(folder: Path, how: str) -> None:
    about = json.loads((folder / ABOUT).read_text())
    tensors = load((folder / TENSORS).read_bytes())
    if how == "no tensors":
        (folder / TENSORS).unlink()
    elif how == "cut tensors":
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9])
    elif how == "no JSON":
        (folder / ABOUT).write_text("{")
    elif how == "no text":
        (folder / ABOUT).write_bytes(b"\xff\xfe{")
    elif how == "a list":
        (folder / ABOUT).write_text("[]")
    elif how in ("names", "lora", "base"):
        (folder / ABOUT).write_text(json.dumps({name: value for name, value in about.items() if name != how}))
    elif how == "fewer names":
        (folder / ABOUT).write_text(json.dumps({**about, "names": ["helpful"]}))
    elif how in ("gates", "down"):
        (folder / TENSORS).write_bytes(save({n: t for n, t in tensors.items() if not n.startswith(how)}))
    elif how == "other tastes":
        (folder / TENSORS).write_bytes(save({**tensors, "tastes": torch.zeros(2, 7)}))
    else:
        (folder / TENSORS).write_bytes(save({n: t for n, t in tensors.items() if n != how}))


@pytest.mark.parametrize(
    "how",
    ["no tensors", "cut tensors", "no JSON", "no text", "a list", "names", "lora", "base", "fewer names", "gates",
     "other tastes", "tastes", "taste_scale"],
)  # fmt: skip
def test_a_damaged_policy_is_one_clear_sentence(policy: Policy, tmp_path: Path, how: str) -> None:
    assert policy.adapter is not None
    write_policy(tmp_path, policy.adapter, TASTES, policy.names, ABOUT_IT)
    damage(tmp_path, how)
    with pytest.raises(RunError) as error:
        open_policy(tmp_path)
    assert re.fullmatch(
        rf"the policy in {re.escape(repr(str(tmp_path)))} is damaged \(.*\); align again in another folder",
        str(error.value), re.S,
    )  # fmt: skip


def test_a_policy_of_another_format_is_refused(policy: Policy, tmp_path: Path) -> None:
    assert policy.adapter is not None
    write_policy(tmp_path, policy.adapter, TASTES, policy.names, ABOUT_IT)
    about = json.loads((tmp_path / ABOUT).read_text())
    (tmp_path / ABOUT).write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(RunError) as error:
        open_policy(tmp_path)
    assert str(error.value) == (
        f"the policy in {str(tmp_path)!r} has format 9, this motet reads 1; use the motet that wrote it, or align again"
    )


def test_a_folder_without_a_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        open_policy(tmp_path)
    assert str(error.value) == (
        f"there is no policy in {str(tmp_path)!r}: policy.json or adapter_config.json must be there; give what motet "
        "align wrote, a run of feddpo, a PEFT adapter, or the word base"
    )
    with pytest.raises(ConfigError) as wrong:
        open_policy("base")
    assert str(wrong.value) == "the bare base model needs --base, got none; for example --base smollm2"
    assert open_policy("base", "smollm2").adapter is None


# --- stock adapters


def test_a_stock_adapter_opens_as_a_policy(base: OpenBase, policy: Policy, tmp_path: Path) -> None:
    assert policy.adapter is not None
    folded = fold(policy.adapter, TASTES[0])
    adapter_files(base, folded, LORA, tmp_path)
    with pytest.raises(ConfigError, match=r"the adapter in .* needs --base, got none"):
        open_policy(tmp_path)
    stock = open_policy(tmp_path, "somewhere")
    assert stock.adapter is not None
    assert (stock.names, stock.model, stock.adapter.latent) == ((), "somewhere", 0)
    assert same_bits(fold(stock.adapter, None), folded)
    ours = tell(base, policy, mixture(policy, {"helpful": 1}))
    assert tell(base, stock, Taste("–", None, {})) == ours


def test_a_run_of_feddpo_opens_as_a_policy(base: OpenBase, policy: Policy, tmp_path: Path) -> None:
    from motet.config import write_toml
    from motet.experiment import resolve

    assert policy.adapter is not None
    adapter_files(base, fold(policy.adapter, TASTES[0]), LORA, tmp_path / "adapter")
    write_toml(tmp_path / "config.toml", resolve("voices", {"model": "gemma3-270m"}, seed=3, method="feddpo").tables())
    found = open_policy(tmp_path)
    assert found.model == "gemma3-270m"
    assert (found.about["by"], found.about["method"], found.about["run_seed"]) == ("feddpo", "feddpo", 3)
    assert open_policy(tmp_path, "smollm2").model == "smollm2"
    export(found, base, Taste("–", None, {}), tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "FedDPO" in page
    assert "never on anybody's texts" not in page, "it was trained on the clients' own texts"


PLAIN = "is no plain LoRA adapter; motet reads those only"


@pytest.mark.parametrize("how", ["dora", "bias", "alpha", "rank", "saved", "half"])
def test_adapters_that_are_more_than_lora_are_refused(base: OpenBase, policy: Policy, tmp_path: Path, how: str) -> None:
    assert policy.adapter is not None
    adapter_files(base, fold(policy.adapter, TASTES[0]), LORA, tmp_path)
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads(path.read_text()), load(weights.read_bytes())
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    config |= {
        "dora": {"use_dora": True},
        "alpha": {"alpha_pattern": {"q_proj": 64}},
        "rank": {"rank_pattern": {"v": 2}},
    }.get(how, {})
    if how == "bias":
        tensors[name.replace("weight", "bias")] = torch.zeros(32)
    elif how == "saved":
        tensors["base_model.model.lm_head.weight"] = torch.zeros(3, 3)
    elif how == "half":
        del tensors[name]
    path.write_text(json.dumps(config))
    weights.write_bytes(save(tensors))
    with pytest.raises(RunError) as error:
        open_policy(tmp_path, "somewhere")
    assert str(error.value) == f"the adapter in {str(tmp_path)!r} {PLAIN}"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"r": "many", "lora_alpha": 1}', '{"r": 0, "lora_alpha": 1}'])
def test_a_damaged_adapter_is_one_clear_sentence(base: OpenBase, policy: Policy, tmp_path: Path, content: str) -> None:
    assert policy.adapter is not None
    adapter_files(base, fold(policy.adapter, TASTES[0]), LORA, tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(RunError, match=r"(?s)^the adapter in '.*' is damaged \(.*\); give a PEFT adapter folder$"):
        open_policy(tmp_path, "somewhere")


# --- answers


COLD = SamplingSettings(max_new_tokens=12, sampling_temperature=1e-4)


def tell(base: OpenBase, policy: Policy, taste: Taste, settings: SamplingSettings = COLD) -> str:
    with dressed(base, policy) as worn:
        return answers_at(base, worn, [ASKED], taste, settings, 0)[0].text


def streamed(
    base: OpenBase, policy: Policy, taste: Taste, settings: SamplingSettings = COLD, seed: int = 0
) -> list[str]:
    with dressed(base, policy) as worn:
        return list(stream(base, worn, ASKED, taste, settings, seed))


@pytest.mark.parametrize("words", ["helpful", "0.5*p0+0.5*p1", "base"])
def test_a_stream_ends_in_the_whole_answer(base: OpenBase, policy: Policy, words: str, tmp_path: Path) -> None:
    taste = parse_taste(policy, words, tmp_path)
    assert streamed(base, policy, taste)[-1] == tell(base, policy, taste).rstrip("\ufffd").strip()


def test_the_base_within_a_policy_is_the_bare_base(base: OpenBase, policy: Policy) -> None:
    bare = Policy(None, (), torch.zeros(0, 0), {"base": "here"})
    assert tell(base, policy, BARE) == tell(base, bare, BARE)
    assert streamed(base, policy, BARE) == streamed(base, bare, BARE)
    assert tell(base, policy, BARE) != tell(base, policy, mixture(policy, {"helpful": 1}))


@pytest.mark.medium
def test_a_stream_only_ever_grows(base: OpenBase, policy: Policy) -> None:
    warm, taste = (
        SamplingSettings(max_new_tokens=24, sampling_temperature=1.0, top_p=0.95),
        mixture(policy, {"terse": 1}),
    )
    for seed in range(3):
        said = streamed(base, policy, taste, warm, seed)
        assert 0 < len(said) <= 24
        assert all(later.startswith(sooner) for sooner, later in pairwise(said))
        assert said == streamed(base, policy, taste, warm, seed)
        assert said != streamed(base, policy, taste, warm, seed + 100)


@pytest.mark.medium
def test_streams_can_be_asked_in_turn(base: OpenBase, policy: Policy) -> None:
    tastes = [mixture(policy, {"helpful": 1}), mixture(policy, {"terse": 1}), BARE]
    alone = [streamed(base, policy, taste) for taste in tastes]
    together: list[list[str]] = [[] for _ in tastes]
    with dressed(base, policy) as worn:
        streams: list[Iterator[str]] = [stream(base, worn, ASKED, taste, COLD, 0) for taste in tastes]
        for _ in range(12):
            for said, one in zip(together, streams, strict=True):
                said += [next(one)]
    assert together == alone


def test_a_nucleus_draws_from_the_likeliest_words_only(base: OpenBase, policy: Policy) -> None:
    hot = SamplingSettings(max_new_tokens=12, sampling_temperature=1.0, top_p=1e-6)
    taste = mixture(policy, {"helpful": 1})
    assert streamed(base, policy, taste, hot) == streamed(base, policy, taste)


# --- what leaves


def test_an_export_is_three_files_and_never_overwrites(base: OpenBase, policy: Policy, tmp_path: Path) -> None:
    taste = mixture(policy, {"helpful": 0.75, "terse": 0.25})
    lines = export(policy, base, taste, tmp_path / "out")
    assert [line.partition(":")[0] for line in lines] == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    assert policy.adapter is not None
    assert same_bits(
        load((tmp_path / "out" / "adapter_model.safetensors").read_bytes()), fold(policy.adapter, taste.vector)
    )
    (tmp_path / "file").touch()
    for there in ("out", "file"):
        with pytest.raises(RunError) as error:
            export(policy, base, taste, tmp_path / there)
        assert str(error.value) == f"{str(tmp_path / there)!r} is not an empty folder; choose another --out"
    (tmp_path / "empty").mkdir()
    export(policy, base, taste, tmp_path / "empty")


def test_there_is_nothing_to_export_of_the_base(base: OpenBase, policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        export(Policy(None, (), torch.zeros(0, 0), {"base": "here"}), base, BARE, tmp_path / "out")
    assert str(error.value) == "the bare base model has no adapter to export; give what motet align wrote"
    with pytest.raises(RunError) as error:
        export(policy, base, BARE, tmp_path / "out")
    assert str(error.value) == (
        "the taste 'base' is the model without any adapter, so there is nothing to export; name a taste"
    )
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_it_is_from_what_for_whom_and_under_which_licence(
    base: OpenBase, policy: Policy, tmp_path: Path
) -> None:
    export(policy, base, mixture(policy, {"helpful": 0.75, "terse": 0.25}), tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    head = page.split("---")[1]
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in head
    assert "license: apache-2.0\n" in head
    for fact in (
        "SmolLM2-135M-Instruct, Apache-2.0", "0.75*helpful+0.25*terse", "| Share of helpful | 0.75 |", "FedVPA-GP",
        "arXiv 2605.30873", "| Trained by | DPO |", "| gain_nats | 1.23 |", "| kl_nats | 12 |", "| steps | 30 |",
        "never on anybody's texts", "PeftModel.from_pretrained", "licence: ",
    ):  # fmt: skip
        assert fact in page, fact
    assert str(tmp_path) not in page
    stranger = Policy(policy.adapter, (), torch.zeros(0, 0), {"base": "elsewhere", "by": "PEFT adapter"})
    export(stranger, base, Taste("–", None, {}), tmp_path / "stranger")
    page = (tmp_path / "stranger" / "README.md").read_text()
    assert "license: other" in page
    assert "| Trained by | PEFT adapter |" in page
    for claim in ("never on anybody's texts", "any, folded in", "learnt by"):
        assert claim not in page, "nothing is known of it"
