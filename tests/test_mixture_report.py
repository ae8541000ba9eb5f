"""Laws of MoR's page: one file, no network; what is missing is left out and said; no file from outside the folder."""

import json
import re
from html import escape
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from rich.console import Console

from motet.config import write_toml
from motet.errors import RunError
from motet.report import summary_table, write_report
from motet.report.examples import MOST, taken_in_turn
from motet.report.fused import second, verdict
from motet.report.mixture_folder import read_mixture
from motet.report.routing import training

pytestmark = pytest.mark.medium

DOMAINS = ("detail", "medical", "tables", "charts", "shapes")
STYLES = {"detail": "explained", "medical": "terse", "tables": "terse", "charts": "explained", "shapes": "terse"}
KINDS = (
    ("VLM head", "eyes", True, 2_113),
    ("causal-LM head", "smollm2", False, 577),
    ("linear on pictures", "efficientnet-lite0", True, 1_281),
    ("linear on sentences", "minilm", False, 385),
    ("rule", "the answer is a number", False, 0),
)
ATTACKS = ("flipped", "negated", "noise", "times 100", "constant", "absent", "colluding")


def mixture_folder(
    folder: Path,
    domains: tuple[str, ...] = DOMAINS,
    per_domain: int = 2,
    steps: int = 120,
    examples: int = 12,
    learned: float = 0.934,
    conflict: bool = True,
    **evaluation: Any,
) -> Path:
    """A made-up run of MoR, as ``motet run mor`` would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    styles = {domain: STYLES.get(domain, "either") for domain in domains}
    clients = [
        {"client_id": place, "name": f"{domain}-{number + 1}", "domain": domain}
        for place, (domain, number) in enumerate((d, n) for n in range(per_domain) for d in domains)
    ]
    kinds = [KINDS[(place * 3 + place // 5) % len(KINDS)] for place in range(len(clients))]
    write_toml(
        folder / "config.toml",
        {
            "method": "mor",
            "seed": 3,
            "recipe": "mor",
            "domains": {"data": "data", "conflict": conflict, "pairs_per_client": 200, "public_pairs": 500},
            "router": {"kind": "learned", "temperature": 1.0, "top_k": 0, "entropy_weight": 0.01},
            "grpo": {"steps": steps, "kl_weight": 0.04, "answers": 8},
        },
    )
    write(
        folder / "deal.json",
        {
            "domains": domains,
            "styles": styles,
            "clients": [row | {"kind": kind[0], "pairs": 200} for row, kind in zip(clients, kinds, strict=True)],
            "public": 500,
            "test": 400 * len(domains),
            "questions": {"base": 2000, "public": 600, "test": 800},
            "said": ["read 3,120 questions of 1,040 pictures", "7 questions were dropped: their answer is a paragraph"],
        },
    )
    with (folder / "rounds.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            way = 1 - np.exp(-step / 40)
            line = {
                "round": step, "seconds": 2.1, "reward": -0.1 + 0.5 * way + 0.1 * rng.normal(), "reward_std": 0.8,
                "token_kl": 0.03 * way, "flat_groups": 0.1 + 0.1 * way, "answer_tokens": 9.0,
                "entropy": 0.9 + 0.05 * rng.normal(), "agreement": 0.15 + 0.1 * rng.normal(),
                "client_reward": {c["name"]: (10.0 ** (i % 3)) * (way + 0.3 * rng.normal()) - i
                                  for i, c in enumerate(clients)},
                "bytes_up": 2_560, "bytes_down": 410_000, "asked": len(clients), "absent": 0,
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
    load = {
        domain: weights(rng, clients, domain) for domain in domains
    }  # fmt: skip
    by_domain = {domain: learned + 0.02 * (place - 2) for place, domain in enumerate(domains)}
    found: dict[str, Any] = {
        "domains": domains,
        "styles": styles,
        "clients": [
            {
                "name": row["name"], "kind": kind[0], "domain": row["domain"], "model": kind[1], "sees": kind[2],
                "parameters": kind[3], "pairs": 200, "own": 0.93 + 0.03 * rng.normal(), "elsewhere": 0.46,
                "accuracy": {domain: 0.95 if domain == row["domain"] else 0.46 for domain in domains},
            }
            for row, kind in zip(clients, kinds, strict=True)
        ],
        "routers": [
            router("learned", "learned router", learned, by_domain, load, used=True, first_choice_right=0.962),
            router("uniform", "uniform mean", learned - 0.18, by_domain, None),
            router("best", "best single client", learned - 0.29, by_domain, None),
            router("oracle", "oracle routing", learned + 0.012, by_domain, None, first_choice_right=1.0),
            router("competence", "competence", learned - 0.03, by_domain, None, first_choice_right=0.88),
            router("prototypes", "domain prototypes", learned - 0.02, by_domain, None, first_choice_right=0.93),
            router("fedavg-reward", "FedAvg of reward models", learned - 0.22, by_domain, None),
        ],
        "controls": [
            {"name": "longer", "title": "longer answer", "accuracy": dict.fromkeys(domains, 0.502),
             "accuracy_mean": 0.502},
            {"name": "frequent", "title": "frequent answer", "accuracy": dict.fromkeys(domains, 0.588),
             "accuracy_mean": 0.588},
        ],
        "leave_one_out": {
            domain: {"accuracy": 0.61 - 0.05 * place, "accuracy_with": by_domain[domain]}
            for place, domain in enumerate(domains)
        },
        "robustness": [
            {"attack": attack, "hostile": count, "setting": setting, "who": [["shapes-2"]],
             "accuracy_mean": learned * kept, "kept": kept, "least_kept": kept - 0.01}
            for setting, harm in (("robust", 0.006), ("plain", 0.05))
            for place, attack in enumerate(ATTACKS)
            for count in (1, 2, 3)
            for kept in [1 - harm * count * (1 + place / 7)]
        ],
        "policy": policy(folder, rng, domains, clients, load, steps, examples),
        "bytes": {
            "query_per_step": 410_233, "answer_per_step": 2_560, "averaging_per_round": 38_400_000,
            "public": {"query": 9_410_233, "answer": 40_000},
            "parameters_per_client": {row["name"]: 4 * kind[3] for row, kind in zip(clients, kinds, strict=True)},
        },
        "warnings": ["medical: 180 held-out pairs only; its interval is wide."],
    }  # fmt: skip
    write(folder / "evaluation.json", found | evaluation)
    write(
        folder / "summary.json",
        {
            "method": "mor", "title": "MoR", "recipe": "mor", "seed": 3, "router": "learned", "clients": len(clients),
            "accuracy_mean": learned, "first_choice_right": 0.962, "entropy": 0.9,
            "robustness_kept": {"negated 2": 0.985, "colluding 3": 0.967}, "exact_before": 0.412, "exact_after": 0.53,
            "kl": 0.42, "kl_budget": 1.0, "bytes_query_per_step": 410_233, "bytes_answer_per_step": 2_560,
            "seconds": 812.0, "warnings": [],
        },
    )  # fmt: skip
    return folder


def weights(rng: np.random.Generator, clients: list[dict[str, Any]], domain: str) -> dict[str, float]:
    raw = [float(rng.uniform(0.5, 1) * (9 if row["domain"] == domain else 0.35)) for row in clients]
    return {row["name"]: value / sum(raw) for row, value in zip(clients, raw, strict=True)}


def router(
    name: str, title: str, mean: float, by_domain: dict[str, float], load: Any, used: bool = False, **more: Any
) -> dict[str, Any]:
    middle = sum(by_domain.values()) / len(by_domain)
    accuracy = {domain: min(1.0, mean + value - middle) for domain, value in by_domain.items()}
    return {
        "name": name, "title": title, "used": used, "accuracy": accuracy, "accuracy_mean": mean,
        "interval": [mean - 0.012, mean + 0.011], "accuracy_min": min(accuracy.values()), "accuracy_spread": 0.028,
        "accuracy_content": mean + 0.01, "accuracy_style": mean - 0.02, "first_choice_right": None, "load": load,
        **more,
    }  # fmt: skip


def policy(
    folder: Path, rng: np.random.Generator, domains: tuple[str, ...], clients: Any, load: Any, steps: int, count: int
) -> dict[str, Any]:
    def scores(base: float, gain: float = 0.0) -> dict[str, Any]:
        return {
            domain: {"exact": base + gain * (place + 1) / len(domains), "in_style": base / 2 + gain, "questions": 160,
                     "interval": [base + gain * (place + 1) / len(domains) - 0.04,
                                  base + gain * (place + 1) / len(domains) + 0.04]}
            for place, domain in enumerate(domains)
        }  # fmt: skip

    looks = range(0, steps + 1, max(1, steps // 6))
    return {
        "before": scores(0.41), "after": scores(0.41, 0.12), "blind_before": scores(0.18),
        "blind_after": scores(0.185), "kl": 0.42, "kl_budget": 1.0, "kept_step": list(looks)[-2],
        "gain": {
            domain: {"exact": 0.12 * (place + 1) / len(domains),
                     "interval": [0.12 * (place + 1) / len(domains) - 0.05, 0.12 * (place + 1) / len(domains) + 0.05]}
            for place, domain in enumerate(domains)
        },
        "curve": [{"step": at, "gain": 0.6 * (1 - float(np.exp(-at / 50))), "kl": 1.2 * (at / steps) ** 1.5}
                  for at in looks],
        "examples": [example(folder, rng, at, domains[at % len(domains)], clients, load) for at in range(count)],
    }  # fmt: skip


def example(folder: Path, rng: np.random.Generator, place: int, domain: str, clients: Any, load: Any) -> dict[str, Any]:
    names = [row["name"] for row in clients]
    return {
        "domain": domain, "question": f"How many shapes are there in the picture, and is number {place} blue?",
        "picture": None if place % 7 == 6 else drawing(folder, place), "answer": "3",
        "before": "two" if place % 3 else "The picture shows 3 shapes, so the answer is 3.", "after": "3",
        "right_before": place % 3 == 0, "right_after": place % 5 != 4,
        "rewards": {name: float(rng.normal()) for name in names}, "weights": load[domain],
    }  # fmt: skip


def drawing(folder: Path, place: int) -> str:
    name = f"pictures/{place:03d}.png"
    picture = Image.new("RGB", (96, 96 if place % 4 else 64), "#f4f4f0")
    pen = ImageDraw.Draw(picture)
    for at in range(3):
        pen.ellipse((8 + 28 * at, 10 + 7 * at + place, 30 + 28 * at, 34 + 7 * at + place), fill="#2f7fbe")
    (folder / "pictures").mkdir(exist_ok=True)
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    (folder / name).write_bytes(buffer.getvalue())
    return name


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def changed(folder: Path, name: str, **figures: Any) -> Path:
    write(folder / name, json.loads((folder / name).read_text()) | figures)
    return folder


def text_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def said_of(folder: Path) -> str:
    return verdict(read_mixture(folder)).replace("\u00a0", " ")


class Page(HTMLParser):
    """What a browser would make of a page."""

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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawing: it takes most of the time of a page."""
    monkeypatch.setattr("motet.report.routing.svg", lambda name, alt, *rest: f"<svg>{escape(alt)}</svg>")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = mixture_folder(tmp_path_factory.mktemp("runs") / "mor")
    write_report(folder)
    return folder


@pytest.mark.medium
def test_a_run_of_mor_is_recognised_and_asks_nothing_of_a_network(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in addresses)
    assert "http" not in text
    assert "@import" not in text
    body = text[text.index("<body>") :]
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", body)
    for name in re.findall(r"var\(--(\w+)\)", text):
        assert text.count(f"--{name}:") == 3, f"--{name} wants a value for light, dark and paper"
    ids = re.findall(r' id="([^"]*)"', body)
    assert len(ids) == len(set(ids))


def test_the_page_holds_the_figures_of_the_run(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    for words in (
        "MoR on the recipe mor · 10 clients · 5 domains · conflict setting · 120 steps of GRPO · seed 3",
        "Where domains want opposite styles, the learned router is right on 93.4 % of held-out pairs: 18.0 points "
        "above the uniform mean, 29.0 points above the best single client and 1.2 points below the oracle; its first "
        "choice is right for 96.2 %.",
        "exact answers rise on tables (+7.2 points), charts (+9.6 points) and shapes (+12.0 points), 0.42 nats",
        "medical: 180 held-out pairs only",
        "<dd>41.0 % → 48.2 %</dd>",
        "learned router · used",
        "<b>93.4</b><span>92.2–94.5</span>",
        "<b>+12.0</b><span>+7.0 to +17.0</span>",
        "<b>18.5</b>",
        "The least kept: 96.7 % in the robust setting and 72.1 % in the plain setting",
        "<td>400.6 KiB</td><td>410,233</td>",
        "1.1 % of what one round of averaging would",
        "read 3,120 questions of 1,040 pictures",
        "arXiv 2605.03426",
        "no published figures to compare with",
        "<th scope=row>kl_weight</th><td>0.04</td>",
    ):
        assert words in text, words


def test_each_figure_has_a_caption_and_says_itself_in_words(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
    assert [re.findall(r"<h3>(.*?)</h3>", figure)[0] for figure in figures] == [
        *("Who is asked about what", "What routing brings", "Exact answers, before and after", "Gain at each look"),
        *("KL at each look", "Reward", "Spread of the weights", "Agreement of the clients", "KL while training"),
        "Reward of each client",
    ]
    for figure in figures:
        assert len(re.findall(r'role="img" aria-label="[^"]{20,}"', figure)) == 1
        assert len(re.findall(r"<figcaption>[^<]{30,}</figcaption>", figure)) == 1


def test_the_map_shows_clients_in_the_order_of_their_domains(finished: Path) -> None:
    run = read_mixture(finished)
    assert [row["name"] for row in run.clients][:4] == ["detail-1", "detail-2", "medical-1", "medical-2"]
    text = (finished / "report.html").read_text(encoding="utf-8")
    drawing = text[text.index("Who is asked about what") :]
    labels = re.findall(r">(\w+-[12])</text>", drawing[: drawing.index("</svg>")])
    assert labels == [f"{domain}-{number}" for domain in DOMAINS for number in (1, 2)]
    own = re.findall(r"together they have (\d+)\u00a0% of the weight", drawing)
    assert 80 < int(own[0]) < 95


def test_example_pictures_lie_in_the_page_and_answers_are_marked(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,iVBOR') == 11  # of twelve, one has no picture
    assert text.count("✓ right") == 4 + 10
    assert text.count("✗ wrong") == 8 + 2
    assert re.search(r"Most say: shapes-1 \d+\u00a0% \(prefers (after|before)\), then shapes-2", text)


@pytest.mark.usefixtures("undrawn")
def test_an_example_never_brings_a_file_from_outside_the_folder(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path / "run", examples=4, steps=2)
    found = json.loads((folder / "evaluation.json").read_text())
    outside = tmp_path / "private.png"
    outside.write_bytes((folder / "pictures/000.png").read_bytes())
    (folder / "pictures/link.png").symlink_to(outside)
    (folder / "pictures/words.png").write_text("no picture")
    for row, name in zip(
        found["policy"]["examples"],
        ("../private.png", str(outside), "pictures/link.png", "pictures/words.png"),
        strict=True,
    ):
        row["picture"] = name
    write(folder / "evaluation.json", found)
    text = text_of(folder)
    assert "data:image" not in text
    assert text.count("The picture is not in the folder.") == 4
    assert str(tmp_path) not in text


@pytest.mark.usefixtures("undrawn")
def test_of_many_examples_some_of_each_domain_are_shown(tmp_path: Path) -> None:
    rows = [{"domain": "a", "n": n} for n in range(5)] + [{"domain": "b", "n": 9}]
    assert [row["n"] for row in taken_in_turn(rows, 3)] == [0, 9, 1]
    text = text_of(mixture_folder(tmp_path / "run", examples=MOST + 7, steps=2))
    assert f"{MOST} of the {MOST + 7} examples" in text
    assert text.count('<article class="card example">') == MOST


@pytest.mark.usefixtures("undrawn")
def test_every_text_of_the_logs_is_escaped(tmp_path: Path) -> None:
    bad = '<script>alert(1)</script>" onload="x'
    folder = mixture_folder(tmp_path / "run", domains=(bad, "渡辺 $x$"), examples=2, steps=3, warnings=[bad])
    found = json.loads((folder / "evaluation.json").read_text())
    for row in (*found["clients"], *found["routers"], *found["controls"], *found["policy"]["examples"]):
        row |= dict.fromkeys({"title", "kind", "model", "question", "answer", "before", "after"} & set(row), bad)
    found["robustness"][0]["attack"] = bad
    write(folder / "evaluation.json", found)
    changed(folder, "deal.json", said=[bad])
    changed(folder, "summary.json", recipe=bad)
    page = Page(text_of(folder))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert bad in "".join(page.words)


def test_where_normalisation_makes_the_mean_reward_nought_its_spread_is_drawn(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path / "run", steps=4)
    lines = [json.loads(line) | {"reward": 1e-9} for line in (folder / "rounds.jsonl").read_text().splitlines()]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (first, *_) = training(read_mixture(folder))
    assert first.title == "Reward: its spread within a group"
    assert "The mean is nought in each group" in first.caption


@pytest.mark.usefixtures("undrawn")
def test_an_unfinished_run_says_what_is_left_out(tmp_path: Path) -> None:
    write_toml(tmp_path / "config.toml", {"method": "mor", "recipe": "mor-demo", "seed": 1})
    text = text_of(tmp_path)
    assert "MoR on the recipe mor-demo · no policy trained · seed 1" in text
    assert "there is no verdict" in text
    assert "it has no deal.json, evaluation.json and summary.json yet. Left out: the deal, routers, clients" in text
    assert "<figure" not in text
    with pytest.raises(RunError, match=r"has no evaluation\.json with routers yet; let it finish"):
        summary_table(tmp_path)
    full = mixture_folder(tmp_path / "full", steps=12)
    for name in ("evaluation.json", "summary.json"):
        (full / name).unlink()
    assert "Reward of each client" in text_of(full)


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_done_is_left_out_and_said(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path / "run", policy=None, robustness=[], leave_one_out={}, steps=2)
    (folder / "rounds.jsonl").unlink()
    text = text_of(folder)
    assert (
        "Not done in this run, and left out: answers, examples and the steps of GRPO (no policy was trained), attacks "
        "and a domain left out."
    ) in text
    for heading in ("Examples", "Attacks", "GRPO, step by step", "A domain left out", "Answers, before and after"):
        assert f"<h2>{heading}</h2>" not in text
    assert "Who is asked about what" in text


def test_nulls_and_figures_that_are_no_numbers_do_no_harm(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path / "run", domains=("shapes",), per_domain=1, steps=1, examples=1)
    found = json.loads((folder / "evaluation.json").read_text())
    for row in found["routers"]:
        row |= {"interval": None, "accuracy_min": None, "first_choice_right": None, "load": None}
    for row in found["clients"]:
        row |= {"own": None, "elsewhere": float("nan"), "parameters": None, "sees": None}
    found["policy"] |= dict.fromkeys(("blind_before", "blind_after", "gain", "curve", "kl", "kept_step"))
    found["policy"]["examples"][0] |= {"weights": None, "rewards": None, "before": None, "picture": None}
    found["bytes"] = {"query_per_step": None}
    write(folder / "evaluation.json", found)
    changed(folder, "summary.json", robustness_kept=None, kl=None, kl_budget=None)
    text = text_of(folder)
    assert "1 client · 1 domain" in text
    assert "<i>nothing</i>" in text
    assert "None" not in "".join(Page(text).words)
    assert "nan" not in "".join(Page(text).words)


def test_the_verdict_follows_the_figures(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path / "run", conflict=False, steps=2)
    assert said_of(folder).startswith("The learned router is right on 93.4 % of held-out pairs: 18.0 points above")
    found = json.loads((folder / "evaluation.json").read_text())
    rows = {row["name"]: row for row in found["routers"]}

    def told(**means: float) -> str:
        for name, mean in means.items():
            rows[name]["accuracy_mean"] = mean
        write(folder / "evaluation.json", found)
        return said_of(folder)

    assert "level with the uniform mean" in told(uniform=0.93)
    rows["learned"]["interval"] = [0.90, 0.96]
    assert "1.9 points above the uniform mean (within chance)" in told(uniform=0.915)
    assert "4.6 points below the best single client and" in told(best=0.98)
    assert "A control without a model reaches 94.0 %" not in said_of(folder)
    rows["learned"]["used"], rows["uniform"]["used"] = False, True
    assert told().startswith("The uniform mean is right on 91.5 %")
    found["controls"][0]["accuracy_mean"] = 0.94
    write(folder / "evaluation.json", found)
    assert second(read_mixture(folder)).endswith("reaches 94.0\u00a0%, so this says little about routing.")


def test_no_gain_of_the_policy_is_said_as_such(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path / "run", steps=2)
    found = json.loads((folder / "evaluation.json").read_text())
    for row in found["policy"]["gain"].values():
        row |= {"exact": 0.01, "interval": [-0.03, 0.05]}
    write(folder / "evaluation.json", found)
    assert second(read_mixture(folder)) == "By GRPO, exact answers change nowhere by more than chance."
    found["policy"]["gain"]["shapes"] = {"exact": -0.1, "interval": [-0.15, -0.05]}
    write(folder / "evaluation.json", found)
    assert second(read_mixture(folder)).startswith("By GRPO, exact answers fall on shapes (−10.0 points), 0.42 nats")


def test_the_terminal_table_sets_controls_apart(finished: Path) -> None:
    console = Console(width=160, record=True, file=StringIO())
    console.print(summary_table(finished))
    lines = console.export_text().splitlines()
    assert "93.4 92.2–94.5" in lines[4]
    place = next(place for place, line in enumerate(lines) if line.startswith("├─"))
    assert "longer answer" in lines[place + 1]


@pytest.mark.usefixtures("undrawn")
def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again = (mixture_folder(tmp_path / name, steps=3, examples=2) for name in ("a", "b"))
    assert write_report(first).read_bytes() == write_report(again).read_bytes()
