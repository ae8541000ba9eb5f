"""The pages say what the code does: tags, names, commands, settings, and every key of a run folder, both ways."""

import ast
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_args

import pytest
from safetensors import safe_open
from typer.main import get_command

from toy_run import read, toy_run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOUSE = ROOT / "src" / "motet"
PAGES = sorted([*DOCS.glob("*.md"), *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "README.md"))])
PAGES = [page for page in PAGES if page.exists()]
TAG = re.compile(r"\(E(\d+)\)")
ROOMS = sorted(path.stem for path in HOUSE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())
DOTTED = re.compile(rf"`(?:motet\.)?((?:{'|'.join(ROOMS)})(?:\.\w+)+)(?:\([^`]*\))?`")
PATHS = re.compile(r"`((?:src/motet/|tests/|scripts/|docs/|examples/)?[\w/-]+(?:\.py|/))`")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its rank or higher."""
    lines = text_of(DOCS / page).splitlines()
    start = lines.index(heading)
    rank = heading.split()[0]
    stop = next(
        (i for i, line in enumerate(lines[start + 1 :], start + 1) if re.match(rf"#{{1,{len(rank)}}} ", line)),
        len(lines),
    )
    return "\n".join(lines[start + 1 : stop])


def cells(text: str) -> list[list[str]]:
    """Rows of the Markdown tables in a text, without heads."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [row for i, row in enumerate(rows) if not _rule(row) and not (i + 1 < len(rows) and _rule(rows[i + 1]))]


def keys(text: str) -> list[str]:
    """All names in backticks of the tables' first column."""
    return [name for row in cells(text) for name in re.findall(r"`([^`]+)`", row[0])]


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language; ``""`` for those without one."""
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if name == language]


def _rule(row: list[str]) -> bool:
    return all(set(cell) <= set("-: ") for cell in row)


def found(dotted: str) -> Any:
    """What a dotted name of the pages stands for."""
    first, *rest = dotted.split(".")
    here: Any = importlib.import_module(f"motet.{first}")
    for name in rest:
        if not hasattr(here, name) and inspect.ismodule(here):
            importlib.import_module(f"{here.__name__}.{name}")
        here = getattr(here, name)
    return here


# every page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page: Path) -> None:
    text = text_of(page)
    for dotted in DOTTED.findall(text):
        if dotted.split(".")[-1] in ("py", "md", "toml", "json", "jsonl", "safetensors", "html"):
            continue
        try:
            found(dotted)
        except (AttributeError, ModuleNotFoundError):
            pytest.fail(f"{name_of(page)} names {dotted}, which does not exist")
    for name in PATHS.findall(text):
        if name.startswith(("runs/", "path/")):
            continue
        assert (ROOT / name).exists() or (HOUSE / name).exists(), f"{name_of(page)} names {name}, which does not exist"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_imports_shown_on_a_page_work(page: Path) -> None:
    for code in blocks(text_of(page), "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("motet"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{name_of(page)}: {node.module} has no {alias.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "motet":
                assert hasattr(importlib.import_module("motet"), node.attr), (
                    f"{name_of(page)}: there is no motet.{node.attr}"
                )


def test_the_index_lists_every_page() -> None:
    listed = re.findall(r"^- \[([\w-]+\.md)\]\(\1\): .+\.", text_of(DOCS / "README.md"), re.M)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md") if page.name != "README.md")


def test_the_picture_of_the_walk_is_the_same_in_the_readme() -> None:
    picture = blocks(text_of(DOCS / "walk.md"), "")[0]
    assert picture.isascii()
    readme = ROOT / "README.md"
    if readme.exists() and "one line of a file" in text_of(readme):
        assert picture in text_of(readme)


def test_the_public_names_are_on_the_walk_and_back() -> None:
    import motet

    assert sorted(keys(section("walk.md", "## The same from Python"))) == sorted(motet.__all__)
    assert all(inspect.getdoc(getattr(motet, name)) for name in motet.__all__)


# equations and words


def test_every_equation_of_the_code_is_on_the_page_and_back() -> None:
    code = {tag for path in HOUSE.rglob("*.py") for tag in TAG.findall(text_of(path))}
    headings = re.findall(r"^## \(E(\d+)\) ", text_of(DOCS / "equations.md"), re.M)
    assert sorted(headings, key=int) == headings, "the equations stand in order, each once"
    assert set(headings) == code
    assert set(TAG.findall(text_of(DOCS / "equations.md"))) == code


def equations() -> Iterator[tuple[str, list[str]]]:
    for tag, body in re.findall(r"^## \(E(\d+)\) .*?\n(.*?)(?=^## |\Z)", text_of(DOCS / "equations.md"), re.M | re.S):
        line = next(line for line in body.splitlines() if line.startswith("Code: "))
        yield tag, re.findall(r"`([^`]+)`", line)


@pytest.mark.parametrize(("tag", "functions"), list(equations()), ids=[f"E{tag}" for tag, _ in equations()])
def test_the_functions_of_an_equation_exist_and_know_their_tag(tag: str, functions: list[str]) -> None:
    documented = [inspect.getdoc(found(name)) or "" for name in functions]
    assert f"(E{tag})" in documented[0], f"the docstring of {functions[0]} does not mention (E{tag})"


def test_every_axis_of_a_shape_is_a_word() -> None:
    used: set[str] = set()
    for path in HOUSE.rglob("*.py"):
        for axes in re.findall(r'(?:Float|Int|Bool)\[Tensor, "([^"]*)"', text_of(path)):
            used |= {axis.lstrip("*") for axis in axes.split()}
    known = set(keys(section("symbols.md", "## Axes of shapes")))
    assert not used - known, "docs/symbols.md lacks these axes"
    assert not known - used, "docs/symbols.md has axes that no signature uses"


# settings


def script() -> ModuleType:
    path = ROOT / "scripts" / "settings-page"
    loader = importlib.machinery.SourceFileLoader("settings_page", str(path))
    spec = importlib.util.spec_from_loader("settings_page", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_page_of_settings_is_what_the_script_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    assert text_of(DOCS / "settings.md") == script().page(), "run scripts/settings-page --write"


def all_tables() -> list[tuple[str, Any, Mapping[str, Any] | None]]:
    """Every table of settings, with what preset ``paper`` sets in it; ``None`` where it does not reach."""
    from motet.algorithms import ALGORITHMS
    from motet.align import TABLES as ALIGNMENT
    from motet.experiment import PRESETS, TABLES
    from motet.judging import TABLES as JUDGING
    from motet.mixing.settings import TABLES as MIXTURE

    own = [(f"algorithm of {name}", method.settings, method.paper) for name, method in ALGORITHMS.items()]
    return (
        [(name, kind, PRESETS["paper"].get(name, {})) for name, kind in TABLES.items()]
        + own
        + [(name, kind, None) for name, kind in {**ALIGNMENT, **JUDGING, **MIXTURE}.items()]
    )


def test_every_table_is_on_the_page_once() -> None:
    headings = re.findall(r"^## \[(\w+)\]( of [\w-]+)?$", text_of(DOCS / "settings.md"), re.M)
    assert sorted(name + own for name, own in headings) == sorted(name for name, _, _ in all_tables())


def test_every_setting_has_a_meaning() -> None:
    for name, kind, _ in all_tables():
        for setting, field in kind.model_fields.items():
            assert (field.description or "").endswith("."), f"{setting} of [{name}] needs a sentence under it"


def test_what_a_setting_calls_the_papers_value_is_what_the_preset_sets() -> None:
    for _, kind, paper in all_tables():
        for setting, field in kind.model_fields.items():
            said = re.search(r"paper: ([^)]+)\)", field.description or "")
            if said is None or paper is None:
                continue
            value = paper.get(setting, field.default)
            for word in (said[1], f'"{said[1]}"', f"[{said[1]}]"):
                try:
                    stated = tomllib.loads(f"value = {word}")["value"]
                except tomllib.TOMLDecodeError:
                    continue
                if isinstance(stated, type(value)) or (isinstance(stated, list | int) and not isinstance(value, str)):
                    shown = list(value) if isinstance(value, tuple) else value
                    assert stated == shown, f"{setting}: the docstring says {stated!r}, preset paper sets {shown!r}"
                    break


# commands


@functools.cache
def commands() -> Mapping[str, Any]:
    from motet.cli import app

    return get_command(app).commands  # type: ignore[attr-defined, no-any-return]


def test_every_command_is_on_the_page_and_back() -> None:
    headings = re.findall(r"^## motet (\S+)$", text_of(DOCS / "cli.md"), re.M)
    assert headings == list(commands()), "in the order of motet --help"


@pytest.mark.parametrize("name", list(commands()))
def test_a_command_is_documented_word_for_word(name: str) -> None:
    command, text = commands()[name], section("cli.md", f"## motet {name}")
    help_text = re.sub(r"\[/?bold\]", "", command.help or "")
    summary, _, example = help_text.partition("\n\n")
    assert example.startswith("Example: motet "), f"the help of motet {name} needs an Example"
    assert summary in " ".join(text.split())
    assert example.removeprefix("Example: ").strip() in text.splitlines()
    page = {re.findall(r"`([^`]+)`", row[0])[0]: row[1] for row in cells(text)}
    code = {
        (part.opts[0] if part.opts[0].startswith("--") else (part.metavar or part.opts[0]).upper()): part.help
        for part in command.params
    }
    assert page == code


def test_every_benchmark_is_on_the_page_and_back() -> None:
    from motet.bench import BENCHES

    [line] = re.findall(r"^The benchmarks are (.*?)\.", section("cli.md", "## motet bench"), re.M | re.S)
    assert re.findall(r"`([^`]+)`", line) == list(BENCHES)


def command_lines() -> Iterator[tuple[str, str]]:
    """Every ``motet …`` line in a code block or in backticks of a page, and in the help itself."""
    for page in PAGES:
        text = text_of(page)
        lines = [
            line for body in blocks(text, "") + blocks(text, "bash") + blocks(text, "sh") for line in body.splitlines()
        ]
        lines += re.findall(r"`(motet [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        yield from ((name_of(page), line.strip()) for line in lines if re.match(r"\s*(\$ )?motet \w", line))
    for name, command in commands().items():
        yield name, re.findall(r"\[bold\](.*?)\[/bold\]", command.help or "")[0]


def settle(command: str, words: list[str]) -> None:
    """Refuse settings that a command does not know."""
    from motet.align import resolve_align
    from motet.alignment.sampling import SamplingSettings
    from motet.config import parse_words, settings
    from motet.errors import ConfigError
    from motet.experiment import resolve
    from motet.judging import resolve_judging
    from motet.mixing.settings import resolve_mixing

    ways: Mapping[str, Callable[[dict[str, Any]], object]] = {
        "align": resolve_align,
        "judge": resolve_judging,
        "say": lambda given: settings(SamplingSettings, given, "--set"),
    }
    given = parse_words(words)
    if command in ways:
        ways[command](given)
        return
    try:
        resolve(None, given)
    except ConfigError:  # the settings of a mixture are others
        resolve_mixing("mor-demo", given)


@pytest.mark.medium
def test_command_lines_on_the_pages_parse() -> None:
    seen = 0
    for place, line in command_lines():
        words = [word for word in shlex.split(line.removeprefix("$ "), comments=True)[1:] if word != "--debug"]
        assert words[0] in commands(), f"{place}: there is no command {words[0]!r}, in {line!r}"
        options = {name for part in commands()[words[0]].params for name in part.opts}
        for word in words[1:]:
            option = word.partition("=")[0]
            assert not word.startswith("-") or option in options | {"--help"}, (
                f"{place}: no option {word!r} in {line!r}"
            )
        settings = [after for word, after in itertools.pairwise(words) if word == "--set"]
        settle(words[0], settings)
        values = {
            name for part in commands()[words[0]].params for name in part.opts if not getattr(part, "is_flag", False)
        }
        if len(words) > 1 and words[-1] not in values:  # a whole line, not the mention of a command or of an option
            context = commands()[words[0]].make_context(words[0], words[1:])
            context.close()
        seen += 1
    assert seen > 15


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_given_on_a_page_exist(page: Path) -> None:
    from motet.errors import ConfigError

    for word in re.findall(r"--set ([a-z_.]+=[^\s`;]+)", text_of(page)):
        refused = []
        for command in ("run", "align", "judge"):
            try:
                settle(command, [word])
            except ConfigError as error:
                refused.append(str(error))
        assert len(refused) < 3, refused


# a run folder


class Left(NamedTuple):
    """What a tiny run left."""

    folder: Path
    summary: Mapping[str, Any]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = toy_run(tmp_path_factory)
    return Left(folder, read(folder, "summary.json"))


def is_share_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and is_number(v) for name, v in value.items())


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] <= value[1]


TYPES: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": is_number,
    "interval": is_interval,
    "numbers by name": is_share_map,
    "intervals by name": lambda value: isinstance(value, dict) and all(map(is_interval, value.values())),
    "list of texts": lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value),
}


def test_the_summary_has_the_keys_of_the_page(left: Left) -> None:
    assert list(left.summary) == keys(section("run-folder.md", "## summary.json"))


def test_the_summary_has_the_types_of_the_page(left: Left) -> None:
    for name, kind, meaning, unit, null, stable in cells(section("run-folder.md", "## summary.json")):
        value = left.summary[name.strip("`")]
        assert stable in ("yes", "no")
        assert meaning
        if value is None:
            assert null != "never", f"{name} is null, the page says never"
            continue
        assert TYPES[kind](value), f"{name} must be {kind}, is {value!r}"
        if unit == "share" and kind == "number":
            assert name == "`gap_closed`" or 0 <= value <= 1


def test_headline_keys_and_their_intervals_are_keys(left: Left) -> None:
    opening = section("run-folder.md", "## summary.json").split("|")[0]
    headline = re.findall(r"`(\w+)`", opening)
    assert "accuracy_mean" in headline
    for name in headline:
        assert name in left.summary
        assert name == "gap_closed" or f"{name}_interval" in left.summary


def test_a_run_leaves_the_files_of_the_page(left: Left) -> None:
    table = text_of(DOCS / "run-folder.md").split("\n## ")[0]
    always = {name for row in cells(table) if "if any" not in row[1] for name in re.findall(r"`([^`]+)`", row[0])}
    assert {path.name for path in left.folder.iterdir()} == always


def test_logs_have_the_keys_of_the_page(left: Left) -> None:
    lines = (left.folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(json.loads(lines[-1])) == keys(section("run-folder.md", "## rounds.jsonl"))
    assert list(read(left.folder, "deal.json")[0]) == keys(section("run-folder.md", "## deal.json"))
    assert list(read(left.folder, "evaluation.json")) == keys(section("run-folder.md", "## evaluation.json"))
    for row, meaning in cells(section("run-folder.md", "## evaluation.json")):
        if row in ("`people`", "`by_context`", "`table`", "`calibration`"):
            first = read(left.folder, "evaluation.json")[row.strip("`")][0]
            unnamed = {name for name in first if f"`{name}`" not in row + meaning}
            assert not unnamed, f"docs/run-folder.md does not say what {unnamed} of {row} is"
    named = [
        name for name in keys(section("run-folder.md", "## selector.safetensors and config.json")) if "." not in name
    ]
    assert list(read(left.folder, "config.json")) == named


def test_tensors_have_the_names_of_the_page(left: Left) -> None:
    def names(file: str) -> tuple[set[str], dict[str, str]]:
        with safe_open(left.folder / file, framework="pt") as tensors:
            return set(tensors.keys()), tensors.metadata() or {}

    assert names("posteriors.safetensors")[0] == set(keys(section("run-folder.md", "## posteriors.safetensors")))
    held = names("selector.safetensors")[0]
    page = keys(section("run-folder.md", "## selector.safetensors and config.json"))
    assert {re.sub(r"^parameters\..*", "parameters.…", name) for name in held} == {name for name in page if "." in name}
    newest = sorted((left.folder / "checkpoints").iterdir())[-1]
    tensors, _ = names(f"checkpoints/{newest.name}/state.safetensors")
    text = section("run-folder.md", "## checkpoints")
    assert {name.split("/")[0] for name in tensors} == set(re.findall(r"`(\w+)/…`", text))
    manifest = json.loads((newest / "manifest.json").read_bytes())
    assert all(f"`{name}`" in text for name in (*manifest, *manifest["about"], *manifest["files"]))


def test_a_reply_holds_what_the_page_on_privacy_says() -> None:
    import torch

    from motet.algorithms.fedvpa import FIGURES, FedVPA, FedVPASettings
    from motet.federated.contract import Ground
    from motet.records import ClientData

    settings = FedVPASettings(local_steps=1)
    algorithm = FedVPA(settings, Ground(6, 1, 0))
    state = algorithm.start(1)
    data = ClientData(0, torch.randn(5, 6), torch.randn(5, 6), torch.randn(5, 1))
    (reply,), _ = algorithm.client_update([algorithm.broadcast(state, 1, 0)], [data], [{}])
    page = keys(section("privacy.md", "## What leaves a client"))
    sent = {name.split(".")[0] + ".…" if name.startswith("parameters.") else name for name in reply.tensors}
    assert sent == set(page)
    posterior = [reply.tensors[f"posterior.{name}"] for name in ("mean", "log_scale")]
    assert sum(part.numel() * part.element_size() for part in posterior) == 256
    assert len(FIGURES) == reply.tensors["figures"].numel() == 3
    assert reply.tensors["evidence"].numel() == settings.prototypes
    assert reply.weight == 5


def test_presets_and_kinds_named_in_help_are_the_ones_there_are() -> None:
    from motet.data.recipes import RECIPES, DataSettings
    from motet.experiment import PRESETS
    from motet.mixing import MIXTURES

    texts = {part.opts[0]: part.help for part in commands()["run"].params}
    assert re.findall(r"[\w-]+", texts["--preset"].replace(" or ", " ")) == list(PRESETS)
    known, mixed = texts["recipe"].split(";")
    assert [word for word in re.findall(r"[\w-]+", known) if word != "or"] == list(RECIPES)
    assert {word for word in re.findall(r"[\w-]+", mixed) if word != "or"} == set(MIXTURES)
    assert set(get_args(DataSettings.model_fields["labels"].annotation)) == {"true", "coin-flip"}
