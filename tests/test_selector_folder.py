"""A trained selector as two files: it comes back bit for bit, and damage has its sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from motet.errors import ConfigError, RunError
from motet.records import generator
from motet.selector.backbone import BackboneSettings
from motet.selector.selector import PriorTensors, SelectorSettings, start_parameters
from motet.selector.trained import CONFIG, TENSORS, Selector, load_selector, save_selector
from motet.selector.whitening import Whitening
from toy_run import toy_run

HIDDEN, LATENT = 5, 3
SHAPE = SelectorSettings(latent=LATENT, trunk=(4,), extractor=(6,), head="film")


def selector(components: int = 4) -> Selector:
    noise = generator(0, "noise")
    parameters = start_parameters(SHAPE, HIDDEN, 2, generator(0))
    means = torch.randn(components, LATENT, generator=noise)
    log_scales = 0.1 * torch.randn(components, LATENT, generator=noise)
    prior = PriorTensors(means, log_scales, torch.randn(components, generator=noise).log_softmax(0))
    whitening = Whitening(torch.randn(7, generator=noise), torch.randn(7, HIDDEN, generator=noise), torch.ones(2))
    tastes = torch.randn(2, LATENT, generator=noise)
    return Selector(SHAPE, parameters, prior, whitening, tastes, ("left", "right"))


def pairs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    noise = generator(1)
    return *torch.randn(2, count, HIDDEN, generator=noise), torch.randn(count, 2, generator=noise)


def test_a_selector_comes_back_bit_for_bit(tmp_path: Path) -> None:
    before, backbone = selector(), BackboneSettings(model="toy", depth=0.5)
    save_selector(before, tmp_path / "new" / "folder", backbone, "f00", recipe="mine")
    after, settings, fingerprint = load_selector(tmp_path / "new" / "folder")
    assert (settings, fingerprint, after.settings) == (backbone, "f00", SHAPE)
    assert after.axes_names == ("left", "right")
    assert after.parameters.keys() == before.parameters.keys()
    assert all(torch.equal(after.parameters[name], tensor) for name, tensor in before.parameters.items())
    assert all(torch.equal(a, b) for a, b in zip(after.prior, before.prior, strict=True))
    assert all(torch.equal(getattr(after.whitening, n), getattr(before.whitening, n)) for n in vars(before.whitening))
    tastes = torch.randn(3, LATENT)
    assert torch.equal(after.margins(tastes, *pairs(6)), before.margins(tastes, *pairs(6)))
    assert json.loads((tmp_path / "new" / "folder" / CONFIG).read_text())["recipe"] == "mine"


def test_a_finished_run_can_be_loaded_and_saved_to_the_same_bytes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = toy_run(tmp_path_factory)
    found, settings, fingerprint = load_selector(run)
    save_selector(found, tmp_path, settings, fingerprint, recipe="voices", method="fedvpa")
    for name in (TENSORS, CONFIG):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_responsibilities_and_probabilities() -> None:
    s = selector()
    likelihood = s.log_likelihoods(*pairs(6))
    assert likelihood.shape == (4, 6)
    assert (likelihood < 0).all()
    assert torch.allclose(likelihood, torch.sigmoid(s.margins(s.prior.means, *pairs(6))).log(), atol=1e-6)
    shares = s.responsibilities(likelihood.sum(dim=1))
    assert float(shares.sum()) == pytest.approx(1, abs=1e-6)
    assert (shares > 0).all()
    assert torch.allclose(s.responsibilities(torch.zeros(4)), s.prior.log_mass.exp(), atol=1e-6)
    sure = s.responsibilities(torch.tensor([-1000.0, -2000.0, -1000.0, -3000.0]))
    assert torch.isfinite(sure).all()
    assert float(sure[[0, 2]].sum()) == pytest.approx(1)


def test_no_choices_give_the_population() -> None:
    s = selector()
    mean, log_scale = s.infer(torch.zeros(0, HIDDEN), torch.zeros(0, HIDDEN))
    drawn = generator(0, "population")
    which = torch.multinomial(s.prior.log_mass.exp(), 200_000, replacement=True, generator=drawn)
    scales = s.prior.log_scales[which].exp()
    samples = s.prior.means[which] + scales * torch.randn(200_000, LATENT, generator=drawn)
    assert torch.allclose(mean, samples.mean(dim=0), atol=0.02)
    assert torch.allclose(log_scale.exp(), samples.std(dim=0), atol=0.02)
    nobody = selector(components=0)
    assert [part.tolist() for part in nobody.population()] == [[0.0] * LATENT] * 2


def test_margins_of_one_taste_each_are_the_diagonal() -> None:
    s, tastes = selector(), torch.randn(6, LATENT)
    whole = s.margins(tastes, *pairs(6))
    assert torch.allclose(s.margins_one_taste_each(tastes, *pairs(6)), whole.diagonal(), atol=1e-6)


def cut(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9])


def empty(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"")


def half_a_config(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:40])


def no_fingerprint(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["fingerprint"]
    (folder / CONFIG).write_text(json.dumps(config))


def a_list(folder: Path) -> None:
    (folder / CONFIG).write_text("[1, 2]")


def no_prior(folder: Path) -> None:
    tensors = load((folder / TENSORS).read_bytes())
    (folder / TENSORS).write_bytes(save({n: t for n, t in tensors.items() if not n.startswith("prior.")}))


@pytest.mark.parametrize("damage", [cut, empty, half_a_config, no_fingerprint, a_list, no_prior])
def test_a_damaged_selector_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save_selector(selector(), tmp_path, BackboneSettings(), "f00")
    damage(tmp_path)
    with pytest.raises(RunError) as error:
        load_selector(tmp_path)
    assert str(error.value).startswith(f"the selector in {str(tmp_path)!r} is damaged (")
    assert str(error.value).endswith("); run it again in another folder")


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_a_folder_without_a_selector_is_refused(tmp_path: Path, name: str) -> None:
    save_selector(selector(), tmp_path, BackboneSettings(), "f00")
    (tmp_path / name).unlink()
    with pytest.raises(RunError) as error:
        load_selector(tmp_path)
    assert str(error.value) == (
        f"there is no trained selector in {str(tmp_path)!r}: selector.safetensors and config.json must be there; "
        "give the folder of a finished motet run of fedvpa or fedvpl"
    )
    shutil.rmtree(tmp_path)
    with pytest.raises(RunError, match="there is no trained selector in"):
        load_selector(tmp_path)


def test_a_selector_of_another_format_is_refused(tmp_path: Path) -> None:
    save_selector(selector(), tmp_path, BackboneSettings(), "f00")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"format": 3}))
    with pytest.raises(RunError, match="has format 3, this motet reads 2; use the motet that wrote it"):
        load_selector(tmp_path)


def test_settings_of_another_version_are_named(tmp_path: Path) -> None:
    save_selector(selector(), tmp_path, BackboneSettings(), "f00")
    config = json.loads((tmp_path / CONFIG).read_text())
    config["selector"]["layers"] = 3
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"unknown setting 'layers' in \[selector\] of config.json"):
        load_selector(tmp_path)
