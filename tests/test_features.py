"""The feature cache: computed once, never stale, never trusted when damaged, never lost to an interruption."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from motet.records import Turn
from motet.selector.backbone import ChoiceItem, Embedded, Item, ToyBackbone
from motet.selector.features import FeatureCache, choice_log_odds, embeddings, text_key


class Counting(ToyBackbone):
    """A toy that remembers what it was asked, and may be interrupted after some batches."""

    def __init__(self, hidden: int = 16, interrupted_after: int | None = None) -> None:
        super().__init__(hidden)
        self.asked: list[Item] = []
        self.compared: list[ChoiceItem] = []
        self.interrupted_after = interrupted_after

    def embed(self, items: Sequence[Item]) -> Iterator[tuple[list[int], Embedded]]:
        for number, (batch, said) in enumerate(super().embed(items)):
            if number == self.interrupted_after:
                raise KeyboardInterrupt
            self.asked += [items[i] for i in batch]
            yield batch, said

    def choices(self, items: Sequence[ChoiceItem]) -> Iterator[tuple[list[int], Tensor]]:
        self.compared += items
        yield from super().choices(items)


def some_items(count: int, start: int = 0) -> list[Item]:
    return [((Turn("user", f"question {i}"),), f"answer number {i} of many") for i in range(start, start + count)]


def shards(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def same(a: Embedded, b: Embedded) -> bool:
    return torch.equal(a.embedding, b.embedding) and torch.equal(a.log_likelihood, b.log_likelihood)


def test_what_is_cached_is_not_computed_again(tmp_path: Path) -> None:
    items, toy = some_items(100), Counting()
    first = embeddings(toy, items, tmp_path)
    assert len(toy.asked) == 100
    again = Counting()
    assert same(embeddings(again, items, tmp_path), first)
    assert again.asked == []
    assert same(embeddings(Counting(), items, None), first)
    assert first.embedding.shape == (100, 16)


def test_only_what_is_new_is_computed_and_the_order_is_the_askers(tmp_path: Path) -> None:
    embeddings(Counting(), some_items(40), tmp_path)
    mixed = [some_items(60)[i] for i in torch.randperm(60).tolist()]
    toy = Counting()
    assert same(embeddings(toy, mixed, tmp_path), embeddings(Counting(), mixed, None))
    assert sorted(toy.asked) == sorted(some_items(20, 40))


def test_repeated_texts_are_computed_once(tmp_path: Path) -> None:
    items = some_items(5)
    for cache in (tmp_path, None):
        toy = Counting()
        said = embeddings(toy, items + items[::-1], cache)
        assert len(toy.asked) == 5
        assert torch.equal(said.embedding[:5], said.embedding[5:].flip(0))


def test_another_model_or_text_never_meets_an_old_row(tmp_path: Path) -> None:
    embeddings(Counting(), some_items(10), tmp_path)
    other = Counting()
    other.fingerprint = "toy-of-tomorrow"
    embeddings(other, some_items(10), tmp_path)
    assert len(other.asked) == 10
    prompt, answer = some_items(1)[0]
    changed = [
        (prompt, answer + " "),
        ((Turn("user", "question 0 "),), answer),
        ((Turn("system", "question 0"),), answer),
        ((*prompt, Turn("user", "")), answer),
    ]
    toy = Counting()
    embeddings(toy, changed, tmp_path)
    assert len(toy.asked) == 4


def test_nothing_slides_from_one_field_to_the_next() -> None:
    keys = [
        text_key((Turn("user", "a"),), "b", "c"),
        text_key((Turn("user", "a"),), "bc"),
        text_key((Turn("usera", ""),), "b", "c"),
        text_key((Turn("user", "a"), Turn("user", "b")), "c"),
        text_key((Turn("user", 'a", "b'),), "c"),
        text_key((), "a", "b"),
        text_key((Turn("user", "\ud800"),), "lone surrogate"),
    ]
    assert len(set(keys)) == len(keys)


def damage_flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-5] ^= 0x10
    shard.write_bytes(content)


def damage_cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def damage_empty(shard: Path) -> None:
    shard.write_bytes(b"")


def damage_other(shard: Path) -> None:
    shard.write_text("this is no safetensors file, and never was; " * 20)


def damage_foreign(shard: Path) -> None:
    from safetensors.torch import save_file

    save_file({"embedding": torch.zeros(3, 16)}, shard)


@pytest.mark.parametrize("damage", [damage_flip, damage_cut, damage_empty, damage_other, damage_foreign])
def test_a_damaged_shard_is_seen_and_computed_again(tmp_path: Path, damage: object) -> None:
    items = some_items(30)
    first = embeddings(Counting(), items, tmp_path)
    [shard] = shards(tmp_path)
    damage(shard)  # type: ignore[operator]
    toy = Counting()
    with pytest.warns(
        UserWarning, match=rf"feature cache: {shard.name} is damaged \(.+\); its texts are computed again"
    ):
        again = embeddings(toy, items, tmp_path)
    assert same(again, first)
    assert len(toy.asked) == 30
    repaired = Counting()
    assert same(embeddings(repaired, items, tmp_path), first)
    assert repaired.asked == []


@pytest.mark.medium
def test_whichever_byte_turns_the_rows_are_right(tmp_path: Path) -> None:
    items = some_items(3)
    first = embeddings(Counting(), items, tmp_path)
    [shard] = shards(tmp_path)
    whole = shard.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in range(0, len(whole), 11):
            turned = bytearray(whole)
            turned[place] ^= 1 << (place % 8)
            for old in shards(tmp_path):
                old.unlink()
            shard.write_bytes(turned)
            assert same(embeddings(Counting(), items, tmp_path), first), place


def test_an_interrupted_extraction_goes_on_where_it_stopped(tmp_path: Path) -> None:
    items = some_items(200)
    with pytest.raises(KeyboardInterrupt):
        embeddings(Counting(interrupted_after=2), items, tmp_path)
    toy = Counting()
    assert same(embeddings(toy, items, tmp_path), embeddings(Counting(), items, None))
    assert toy.asked == items[128:]  # the toy's batches are of 64


def test_shards_are_written_as_soon_as_they_are_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motet.selector.features.SHARD_ROWS", 64)
    seen: list[int] = []
    embeddings(Counting(), some_items(200), tmp_path, lambda done, total: seen.append(len(shards(tmp_path))))
    assert seen == [1, 2, 3, 3]
    assert len(shards(tmp_path)) == 4


def test_progress_counts_the_tokens_that_are_missing(tmp_path: Path) -> None:
    items, told = some_items(100), []
    embeddings(Counting(), items[:50], tmp_path)
    embeddings(Counting(), items, tmp_path, lambda done, total: told.append((done, total)))
    tokens = sum(ToyBackbone().tokens(items[50:]))
    assert told == [(tokens, tokens)]


def test_no_items_at_all(tmp_path: Path) -> None:
    said = embeddings(Counting(), [], tmp_path)
    assert said.embedding.shape == (0, 16)
    assert said.log_likelihood.shape == (0,)
    assert choice_log_odds(Counting(), [], tmp_path).shape == (0,)
    assert shards(tmp_path) == []


def test_choices_are_cached_beside_the_answers(tmp_path: Path) -> None:
    prompt = (Turn("user", "which?"),)
    items: list[ChoiceItem] = [(prompt, "a b c", "d"), (prompt, "d", "a b c"), (prompt, "a b c", "d")]
    toy = Counting()
    odds = choice_log_odds(toy, items, tmp_path)
    assert len(toy.compared) == 2
    assert odds.tolist() == pytest.approx([2 / 50, -2 / 50, 2 / 50])
    again = Counting()
    assert torch.equal(choice_log_odds(again, items, tmp_path), odds)
    assert again.compared == []
    assert embeddings(Counting(), [(prompt, "d")], tmp_path).embedding.shape == (1, 16)


def test_a_cache_knows_what_it_was_given(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "model", "answers")
    cache.add(["one", "two"], {"embedding": torch.eye(2, 3).T.contiguous().T})
    for other in (cache, FeatureCache(tmp_path, "model", "answers")):
        assert torch.equal(other.rows["two"]["embedding"], torch.tensor([0.0, 1.0, 0.0]))
    assert FeatureCache(tmp_path, "model", "choices").rows == {}
