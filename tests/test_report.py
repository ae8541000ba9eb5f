"""Laws of the report: one file, no network, same bytes; what is missing is left out and said; every text is escaped."""

import json
import re
from html import escape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from motet.config import write_toml
from motet.errors import RunError
from motet.report import summary_table, write_report
from motet.report.accuracies import per_person
from motet.report.canvas import MIXED
from motet.report.colours import colours
from motet.report.folder import read_run
from motet.report.holdings import who_holds_what
from motet.report.tastes import assignment_map
from motet.report.verdict import byte_size, percent, verdict

AXES = ("helpful", "harmless", "terse", "explained")
HOSTILE = ("<script>alert(1)</script>", "Žofie & “Łukasz” $x$ 渡辺 🎼", '_" onload="x', "[bold]Ann[/bold]\x00\n")


def run_folder(
    folder: Path,
    axes: tuple[str, ...] = AXES[:2],
    seen: int = 9,
    unseen: int = 3,
    rounds: int = 20,
    accuracy: float = 0.97,
    names: tuple[str, ...] = (),
    finished: bool = True,
    **summary: Any,
) -> Path:
    """A made-up run, as ``motet run`` would leave it. Everybody's taste is near the prototype of its axis."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, people, latent = np.random.default_rng(0), seen + unseen, 8
    true = [number % len(axes) for number in range(people)]
    write_toml(
        folder / "config.toml",
        {
            "data": {"recipe": "voices", "clients": seen, "unseen_clients": unseen, "label_noise": 0.1},
            "backbone": {"name": "smollm2", "pooling": "mean"},
            "algorithm": {"name": "fedvpa", "latent": latent, "kl_weight": 0.001, "extractor": [512, 256, 128]},
            "run": {"rounds": rounds if finished else 2 * rounds, "seed": 3},
            "evaluation": {"contexts": [0, 1, 2, 4, 8, 16]},
        },
    )
    deal = []
    for person in range(people):
        train = int(rng.integers(12, 30))
        counts = rng.multinomial(
            train, rng.dirichlet([0.4 + 6 * (place == true[person]) for place in range(len(axes))])
        )
        deal.append(
            {
                "name": names[person] if person < len(names) else f"client {person}",
                "client_id": person,
                "seen": person < seen,
                "axis": axes[true[person]],
                "train": train,
                "test": 40,
                "shares": dict(zip(axes, (counts / train).tolist(), strict=True)),
            }
        )
    (folder / "deal.json").write_text(json.dumps(deal))
    with (folder / "rounds.jsonl").open("w") as file:
        known: set[int] = set()
        for round in range(1, rounds + 1):
            cohort = sorted(rng.choice(seen, size=max(1, seen // 3), replace=False).tolist())
            known |= set(cohort)
            right = rng.random(people) < 0.5 + 0.5 * round / rounds
            progress = 1 - np.exp(-round / 5)
            line = {
                "round": round,
                "cohort": cohort,
                "seconds": 0.2,
                "bytes_up": 412_345 * len(cohort),
                "bytes_down": 430_000 * len(cohort),
                "figures": {
                    "choice_loss": 0.69 - 0.6 * progress + 0.02 * rng.normal(),
                    "kl": 9 * progress + 0.3 * rng.normal(),
                    "orthogonal_loss": 25 - 20 * progress,
                },
                "assignment": {str(c): true[c] if right[c] else (true[c] + 1) % len(axes) for c in sorted(known)},
            }
            if round % 5 == 0:
                line["accuracy"] = {
                    axis: 0.5 + (accuracy - 0.5) * progress - 0.02 * place for place, axis in enumerate(axes)
                }
            file.write(json.dumps(line) + "\n")
    if not finished:
        return folder

    def interval(mean: float, width: float = 0.012) -> dict[str, float]:
        return {"mean": mean, "low": max(0, mean - width), "high": min(1, mean + width)}

    def row(method: str, kind: str, mean: float, unseen_too: bool = True) -> dict[str, Any]:
        each = {axis: interval(mean + 0.004 * place, 0.02) for place, axis in enumerate(axes)}
        last = interval(mean - 0.008, 0.02) if unseen and unseen_too else None
        return {"method": method, "kind": kind, "axes": each, "mean": interval(mean), "unseen": last}

    evaluation = {
        "axes": list(axes),
        "people": [
            {
                "client_id": dealt["client_id"],
                "name": dealt["name"],
                "seen": dealt["seen"],
                "axis": dealt["axis"],
                "accuracy": float(rng.binomial(40, accuracy) / 40),
                "pairs": 40,
                "prototype": true[place] if dealt["seen"] else None,
            }
            for place, dealt in enumerate(deal)
        ],
        "by_context": [
            {"context": n, "people": who, "inference": how, "accuracy": mean, "low": mean - 0.03, "high": mean + 0.03}
            for who in (("seen", "unseen") if unseen else ("seen",))
            for how, speed in (("amortised", 0.35), ("bayes", 0.8))
            for n in (0, 1, 2, 4, 8, 16)
            for mean in [0.5 + (accuracy - 0.5) * (1 - float(np.exp(-speed * n))) - 0.01 * (who == "unseen")]
        ],
        "table": [
            row("FedVPA-GP, amortised", "method", accuracy - 0.004),
            row("FedVPA-GP, Bayes", "method", accuracy),
            row("shared reward, no taste", "control", 0.5),
            row("length only (words)", "control", 0.512),
            row("length only (characters)", "control", 0.509),
            row("oracle (one reward per true axis)", "control", 0.98, unseen_too=False),
        ],
        "calibration": [
            {
                "low": low / 10,
                "high": low / 10 + 0.1,
                "confidence": low / 10 + 0.05,
                "accuracy": low / 10 + 0.03,
                "pairs": 20 * low,
            }
            for low in range(5, 10)
        ],
        "ece": 0.021,
        "same_pair_accuracy": None,
        "warnings": [],
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    figures: dict[str, Any] = {
        "method": "FedVPA-GP",
        "recipe": "voices",
        "seed": 3,
        "clients": seen,
        "rounds": rounds,
        "accuracy": dict.fromkeys(axes, accuracy),
        "accuracy_mean": accuracy,
        "accuracy_mean_interval": [accuracy - 0.012, accuracy + 0.012],
        "accuracy_unseen": accuracy - 0.008 if unseen else None,
        "shared_accuracy": 0.5,
        "length_accuracy": 0.512,
        "oracle_accuracy": 0.98,
        "gap_closed": (accuracy - 0.5) / 0.48,
        "active_units": 3,
        "adjusted_rand": 0.93,
        "kl": 8.7,
        "ece": 0.021,
        "labels": "true",
        "bytes_up_per_client_round": 412_345,
        "bytes_down_per_client_round": 430_000,
        "posterior_bytes": 256,
        "setup_bytes": 18_432,
        "seconds_per_round": 0.21,
        "feature_seconds": 34.5,
        "parameters_added": 103_456,
        "said": ["read 480 pairs of 240 prompts", "4 pairs were dropped: both answers are the same"],
    }
    (folder / "summary.json").write_text(json.dumps(figures | summary))
    prototypes = 5 * np.linalg.qr(rng.normal(size=(latent, len(axes))))[0].T
    means = prototypes[true] + 0.9 * rng.normal(size=(people, latent))
    tensors = {
        "ids": np.arange(people, dtype=np.int64),
        "means": means.astype(np.float32),
        "log_scales": rng.normal(-0.6, 0.2, size=means.shape).astype(np.float32),
        "prototypes": prototypes.astype(np.float32),
    }
    # safetensors writes the buffer as it lies, so a transposed array would come back shuffled
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "posteriors.safetensors")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_folder(tmp_path_factory.mktemp("runs") / "two")
    write_report(folder)
    return folder


def text_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def changed(folder: Path, name: str, **figures: Any) -> Path:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | figures))
    return folder


def said_of(tmp_path: Path, **figures: Any) -> str:
    return verdict(read_run(run_folder(tmp_path / "run", rounds=2, **figures))).replace("\u00a0", " ")


class Page(HTMLParser):
    """What a browser would make of a page: elements, their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_asks_nothing_of_a_network(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("src", "href", "xlink:href"))
    assert "http" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


@pytest.mark.slow
def test_the_same_folder_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    again = run_folder(tmp_path / "elsewhere")
    assert write_report(again).read_bytes() == (finished / "report.html").read_bytes()
    assert str(tmp_path) not in (again / "report.html").read_text(encoding="utf-8")
    assert not [path for path in again.iterdir() if path.name.startswith(".")]


def test_the_page_holds_the_figures_of_the_run(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    for words in (
        "A personal taste lifts accuracy from 50.0 % (one shared reward) to 97.0 %, 98 % of the way to the oracle; "
        "people never seen reach 96.2 %.",
        "FedVPA-GP on the recipe voices · 9 people in training, 3 kept unseen · 20 rounds · seed 3",
        "<b>97.4</b><span>95.4–99.4</span>",
        "length only (characters)",
        "adjusted Rand index at the end is 0.93",
        "Expected calibration error: 2.1 %",
        "<td>256 B</td><td>256</td>",
        "one shared reward, 50.0 %",
        "read 480 pairs of 240 prompts",
        "arXiv 2605.30873",
        "motet run --config config.toml --out",
        "<th scope=row>kl_weight</th><td>0.001</td>",
    ):
        assert words in text, words
    up, down = (sum(json.loads(line)[f"bytes_{way}"] for line in open_lines(finished)) for way in ("up", "down"))
    assert f"{up + down + 18_432:,}" in text


def open_lines(folder: Path) -> list[str]:
    return (folder / "rounds.jsonl").read_text().splitlines()


def test_each_figure_has_a_caption_and_says_itself_in_words(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
    titles = [re.findall(r"<h3>(.*?)</h3>", figure)[0] for figure in figures]
    assert titles == [
        *("Map of tastes", "Assignment over the rounds", "From few pairs", "Accuracy per person", "Calibration"),
        *("Choice loss", "KL from posterior to prior", "Orthogonal loss", "Accuracy", "Who holds what"),
        "Traffic so far",
    ]
    for figure in figures:
        assert len(re.findall(r'role="img" aria-label="[^"]{20,}"', figure)) == 1
        assert len(re.findall(r"<figcaption>[^<]{30,}</figcaption>", figure)) == 1


def test_figures_follow_the_page_in_colour_and_have_ids_of_their_own(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    body = text[text.index("<body>") :]
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", body)
    for name in re.findall(r"var\(--(\w+)\)", text):
        assert text.count(f"--{name}:") == 3, f"--{name} wants a value for light, dark and paper"
    ids = re.findall(r' id="([^"]*)"', body)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', body)) <= set(ids)


@pytest.mark.medium
def test_every_text_of_the_logs_is_escaped(tmp_path: Path) -> None:
    axes = ("<b>Hilfe</b> & $x$", "渡辺")
    folder = run_folder(tmp_path / "run", axes=axes, names=HOSTILE, rounds=3, recipe="<i>r</i>", said=["<u>s</u>"])
    warnings = ["<marquee>w</marquee>"]
    changed(folder, "evaluation.json", warnings=warnings, calibration=[], by_context=[], same_pair_accuracy=0.999)
    (folder / "rounds.jsonl").unlink()
    text = text_of(folder)
    assert "accuracy would read 99.9\u00a0%: that leaks the label" in text
    page = Page(text)
    assert not {"script", "marquee", "i", "u"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for words in ("<i>r</i>", "<u>s</u>", "<marquee>w</marquee>", axes[0]):
        assert escape(words) in text
        assert words in "".join(page.words)
    assert {"Žofie & “Łukasz” $x$ …", '_" onload="x', "[bold]Ann[/bold]"} <= set(map(str.strip, page.words))
    assert "\x00" not in text


@pytest.mark.medium
def test_an_unfinished_run_says_what_is_left_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", finished=False, rounds=10)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 11, "cohort": [1, ')  # a crash cuts the last line off
    text = text_of(folder)
    assert "it has no evaluation.json, posteriors.safetensors and summary.json yet. Left out: results" in text
    assert "there is no verdict. Accuracy at the last look" in text
    assert "10 of 20 rounds" in text
    assert "Choice loss" in text
    assert "Map of tastes" not in text
    assert "<thead><tr><td></td><th scope=col>helpful" not in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    write_toml(tmp_path / "config.toml", {"data": {"recipe": "voices"}, "run": {"rounds": 5}})
    text = text_of(tmp_path)
    assert "voices · 0 of 5 rounds" in text
    assert "it has no rounds.jsonl, deal.json, evaluation.json, posteriors.safetensors and summary.json yet" in text
    assert "<figure" not in text


@pytest.mark.medium
def test_one_person_and_one_round_suffice(tmp_path: Path) -> None:
    text = text_of(run_folder(tmp_path / "run", axes=("helpful",), seen=1, unseen=0, rounds=1))
    assert "1 person in training · 1 round" in text
    assert "Map of 1 people" in text
    assert "never seen reach" not in text


@pytest.mark.medium
def test_many_people_are_drawn_as_histograms(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", axes=AXES, seen=96, unseen=24, rounds=12, accuracy=0.86)
    run = read_run(folder)
    shades = colours(run)
    deal, assigned, people = who_holds_what(run, shades), assignment_map(run, shades), per_person(run, shades)
    assert deal is not None
    assert assigned is not None
    assert people is not None
    assert "How many people hold how many training pairs" in deal.caption
    assert "prototype 3, mostly explained" in [text for _, _, text in assigned.key]
    assert "people, best first" in people.drawing
    assert sum(len(picture.drawing) for picture in (deal, assigned, people)) < 200_000


def test_people_without_an_axis_are_grey(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", rounds=2)
    for name in ("deal.json", "evaluation.json"):
        content = json.loads((folder / name).read_text())
        for row in content if isinstance(content, list) else content["people"]:
            row["axis"] = None
        (folder / name).write_text(json.dumps(content))
    run = read_run(folder)
    people, assigned = per_person(run, colours(run)), assignment_map(run, colours(run))
    assert people is not None
    assert assigned is not None
    assert ("dot", MIXED, "no single axis") in people.key
    assert "mixed (" in assigned.drawing


def test_a_line_written_twice_counts_once(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", rounds=4)
    lines = open_lines(folder)
    (folder / "rounds.jsonl").write_text("\n".join([*lines, *lines[2:]]) + "\n")
    assert [row["round"] for row in read_run(folder).rounds] == [1, 2, 3, 4]


def test_the_verdict_follows_the_figures(tmp_path: Path) -> None:
    assert "all the way to the oracle; people" in said_of(tmp_path, accuracy=0.98)
    assert said_of(tmp_path, accuracy=0.505).startswith(
        "A personal taste brings nothing that can be told from chance: 50.5 %, against 50.0 % of one shared reward"
    )
    assert said_of(tmp_path, accuracy=0.45).startswith("A personal taste does harm here: 45.0 %, against 50.0 %")
    assert "Length alone reaches 97.5 %" in said_of(tmp_path, length_accuracy=0.975)
    assert said_of(tmp_path, shared_accuracy=None, accuracy_unseen=None) == "With a personal taste, accuracy is 97.0 %."


def test_coin_flips_are_a_test_and_not_a_result(tmp_path: Path) -> None:
    assert said_of(tmp_path, labels="coin-flip", accuracy=0.506).endswith("It is 50.6 %: passed, no label leaks.")
    assert "It is 71.0 %: failed." in said_of(tmp_path, labels="coin-flip", accuracy=0.71)


def test_the_terminal_table_sets_controls_apart(finished: Path) -> None:
    console = Console(width=120, record=True, file=StringIO())
    console.print(summary_table(finished))
    lines = console.export_text().splitlines()
    assert [word for word in lines[2].split() if word.isalpha()] == ["helpful", "harmless", "mean", "unseen"]
    assert "97.0 95.0–99.0" in lines[5]
    assert lines[6].startswith("├─")
    assert "shared reward, no taste" in lines[7]
    assert "50.0 48.8–51.2" in lines[7]


def test_the_terminal_table_takes_names_as_they_are(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", axes=("[red]a[/red]", "b"), rounds=1)
    console = Console(width=140, record=True, file=StringIO())
    console.print(summary_table(folder))
    assert "[red]a[/red]" in console.export_text()


def test_what_is_no_run_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run folder, it has no config\.toml; give the folder that motet run"):
        write_report(tmp_path)
    with pytest.raises(RunError, match=r"is not a run folder, it does not exist"):
        summary_table(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    folder = run_folder(tmp_path / "run", finished=False, rounds=3)
    with pytest.raises(RunError, match=r"has no evaluation\.json with a table yet; let it finish"):
        summary_table(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.toml", b"[data\n", r"config\.toml' is not TOML"),
        ("summary.json", b'{"method": ', r"summary\.json' is not JSON"),
        ("deal.json", b"{}", r"deal\.json' should hold a JSON list, not dict"),
        ("rounds.jsonl", b'{"round": 1}\n{"rou\n{"round": 3}\n', r"rounds\.jsonl' has a line 2 that is not a round"),
        ("posteriors.safetensors", b"12345678", r"posteriors\.safetensors' is not safetensors"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = run_folder(tmp_path / "run", rounds=1)
    (folder / name).write_bytes(content)
    with pytest.raises(RunError, match=message):
        write_report(folder)


def test_sizes_and_shares_read_as_people_write_them() -> None:
    assert [byte_size(n).replace("\u00a0", " ") for n in (256, 16_384, 3 * 2**20, None)] == [
        *("256 B", "16.0 KiB", "3.0 MiB", "–")
    ]
    assert percent(0.98249).replace("\u00a0", " ") == "98.2 %"
    assert percent(float("nan")) == "–"
