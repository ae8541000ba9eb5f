"""The page with the dial: its parts without a browser, and all of it in a real one."""

import gc
import importlib.util
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import urlsplit

import pytest

from motet.errors import ConfigError, RunError
from motet.play import build, start
from motet.play.contract import Map, Person, Playable
from motet.play.dial import BASE, DIAL, MOST, STEP, choices, in_turns, on_sliders, proportions, tastes
from motet.play.pieces import answers, blend, escaped, map_picture, mixture, sentence, shares, tint
from motet.play.server import QUIET, OwnPageOnly, need_gradio, serve
from motet.play.teaching import begin, chosen

gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed; pip install 'motet[play]'"
)
NAMES = ("plain-cautious", "wordy-bold", "warm-playful")
WORDS = {
    "": "You could bring a book, a bottle of water and a light coat. The train takes about four hours, and there is a "
    "café on board.",
    "plain-cautious": "Take water, a coat and your ticket. Check the timetable the evening before; trains are "
    "sometimes cancelled. If you have a medical condition, keep your medicine with you.",
    "wordy-bold": "There are, broadly speaking, three kinds of luggage for a journey of this length, and the "
    "bold traveller takes none of them: go with what fits into your pockets, talk to strangers, and get off "
    "one stop too early.",
    "warm-playful": "Oh, how lovely! Snacks first: something crunchy, something sweet. Then a game for the window "
    "seat, and a scarf that doubles as a pillow. Have the best trip!",
    "dial": "Pack light, but pack snacks. Water, a scarf, your ticket; check the timetable once, then forget about it.",
}
PLACES = {"plain-cautious": (-1.6, -0.5), "wordy-bold": (1.5, -0.9), "warm-playful": (0.2, 1.5)}
QUESTIONS = [
    ("How do I tell my neighbour that the music is too loud?",
     "Ring, smile, and say it once. Most people do not know how thin the walls are.",
     "This is a matter of some delicacy, which one may approach in five ways, beginning with a letter."),
    ("Is it worth learning to bake bread?", "Yes. It is cheap and calms the nerves. Mind the oven, it is hot.",
     "Worth it? Your kitchen will smell like a hug! Start with focaccia and poke it with all ten fingers."),
    ("What should I cook for four guests?", "Pasta with a good sauce, and a salad. Ask about allergies first.",
     "Go for the whole lamb: nobody ever remembered a sensible dinner, and fear is a poor cook."),
    ("Which houseplant survives me?", "A snake plant. Water it once a month.",
     "A pothos called Gerald! He forgives everything, and he waves when you open the window."),
]  # fmt: skip


class Fake:
    """Deterministic texts, and a taste that nears the first prototype with every choice."""

    title = "voices by fedvpa, SmolLM2-135M"
    names = NAMES

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.asked: list[Mapping[str, float] | None] = []

    def stream(self, prompt: str, shares: Mapping[str, float] | None, max_new_tokens: int, seed: int) -> Iterator[str]:
        self.asked.append(shares)
        full = [name for name, share in (shares or {}).items() if share == 1]
        key = "" if not shares or not any(shares.values()) else full[0] if len(full) == 1 else "dial"
        if prompt == "break":
            raise RunError("the adapter has no tensors for layer 3; was the folder copied whole?")
        try:
            words = (WORDS[key] * (20 if prompt == "long" else 1)).split(" ")
            for count in range(1, len(words) + 1):
                if prompt == "long":
                    sleep(0.01)
                yield " ".join(words[:count])
        finally:
            self.closed.append(key)

    def questions(self, count: int, seed: int) -> list[tuple[str, str, str]]:
        return [QUESTIONS[(place + seed) % len(QUESTIONS)] for place in range(min(count, len(QUESTIONS)))]

    def person(self, choices: Sequence[tuple[str, str, str]]) -> Person:
        n = len(choices)
        mine = 1 - 0.62 * 0.7**n
        scale = 0.9 * 0.72**n
        x, y = PLACES[NAMES[0]]
        said = [f"Taste inferred from {n} choice{'s' * (n > 1)}; nearest prototype: {NAMES[0]}."]
        if n < 3:
            said.append(
                "These choices fit several kinds of people; give more of them before relying on the predictions."
            )
        parts = (mine, (1 - mine) * 0.65, (1 - mine) * 0.35)
        return Person(
            dict(zip(NAMES, parts, strict=True)), (x * mine + 0.4 * (1 - mine), y * mine + (1 - mine)),
            (scale, 0.7 * scale), tuple(said), n < 3,
        )  # fmt: skip

    def latent_map(self) -> Map:
        spots = [
            (name, (x + 0.55 * ((7 * i) % 11 - 5) / 5, y + 0.5 * ((5 * i) % 13 - 6) / 6))
            for name, (x, y) in PLACES.items()
            for i in range(16)
        ]
        return Map(PLACES, [spot for _, spot in spots], [name for name, _ in spots])

    def export(self, shares: Mapping[str, float], folder: Path) -> list[str]:
        if folder.exists():
            raise RunError(f"{folder.name!r} exists; name a new folder")
        folder.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).write_text("{}")
        return [f"Wrote adapter_model.safetensors and adapter_config.json to {folder}."]


def test_the_fake_keeps_the_contract() -> None:
    assert isinstance(Fake(), Playable)


# the dial


def test_streams_take_turns_and_the_short_one_ends_first() -> None:
    order: list[str] = []

    def stream(key: str, steps: int) -> Iterator[str]:
        for step in range(steps):
            order.append(key)
            yield key * (step + 1)

    turns = list(in_turns({"a": stream("a", 3), "b": stream("b", 1)}))
    assert order == ["a", "b", "a", "a"]
    assert [dict(turn.texts) for turn in turns] == [
        {"a": "a", "b": "b"}, {"a": "aa", "b": "b"}, {"a": "aaa", "b": "b"}, {"a": "aaa", "b": "b"},
    ]  # fmt: skip
    assert [sorted(turn.running) for turn in turns] == [["a", "b"], ["a"], ["a"], []]


@pytest.mark.parametrize("broken", [False, True])
def test_whoever_stops_reading_closes_every_stream(broken: bool) -> None:
    closed: list[str] = []

    def stream(key: str, fails: bool) -> Iterator[str]:
        try:
            yield "one"
            if fails:
                raise RunError("no")
            yield "two"
        finally:
            closed.append(key)

    turns = in_turns({"a": stream("a", broken), "b": stream("b", False)})
    next(turns)
    if broken:
        with pytest.raises(RunError):
            next(turns)
    else:
        turns.close()  # type: ignore[attr-defined]
    assert sorted(closed) == ["a", "b"]


def test_no_streams_no_turns() -> None:
    assert list(in_turns({})) == []


def test_proportions_sum_to_one_and_keep_their_order() -> None:
    found = proportions({"a": 0.5, "b": 0.25, "c": 0.0})
    assert sum(found.values()) == pytest.approx(1)
    assert found == pytest.approx({"a": 2 / 3, "b": 1 / 3, "c": 0})
    assert proportions(found) == pytest.approx(found)
    assert proportions({"a": 0.0}) == {"a": 0.0}


def test_sliders_stand_at_the_nearest_step_of_the_shares() -> None:
    given = {"plain-cautious": 0.6234, "wordy-bold": 1.2}
    stands = on_sliders(NAMES, given)
    assert stands == [0.6, 1.0, 0.0]
    assert all(abs(on_sliders(["a"], {"a": share})[0] - share) <= STEP / 2 + 1e-9 for share in (0.0, 0.33, 0.487, 1.0))


def test_each_taste_gets_its_weights() -> None:
    asked = tastes(NAMES, [DIAL, BASE, "prototype 1"], [0.2, 0.4, 0])
    assert list(asked) == [BASE, "prototype 1", DIAL], "in the page's order, not in the order of the ticks"
    assert asked[BASE] is None
    assert asked["prototype 1"] == {"plain-cautious": 0, "wordy-bold": 1, "warm-playful": 0}
    assert asked[DIAL] == {"plain-cautious": 0.2, "wordy-bold": 0.4, "warm-playful": 0}


def test_a_prototype_may_be_called_base_or_dial() -> None:
    names = ("base", "dial")
    assert len({key for _, key in choices(names)}) == 4
    assert tastes(names, ["prototype 0"], [0, 0]) == {"prototype 0": {"base": 1.0, "dial": 0.0}}


def test_too_few_and_too_many_tastes_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one taste must answer, got none; tick one under 'Who answers'"):
        tastes(NAMES, [], [0, 0, 0])
    many = [f"prototype {place}" for place in range(MOST + 1)]
    with pytest.raises(ConfigError, match="at most 4 prototypes can answer side by side, got 5; untick 1"):
        tastes([f"p{place}" for place in range(MOST + 1)], many, [0.0] * (MOST + 1))


# teaching


def test_a_choice_moves_the_posterior_and_neither_does_not() -> None:
    session = Fake()
    start = begin(session)
    one = chosen(session, start, "first")
    skipped = chosen(session, one, "neither")
    two = chosen(session, skipped, "second")
    assert start.choices == (), "the old state is left alone"
    assert one.choices == (QUESTIONS[0],)
    assert one.trail == ()
    assert (skipped.choices, skipped.person, skipped.place) == (one.choices, one.person, 2)
    prompt, first, second = QUESTIONS[2]
    assert two.choices[1] == (prompt, second, first), "the chosen answer stands before the rejected one"
    assert one.person is not None
    assert two.trail == (one.person.mean,)


def test_after_the_last_question_nothing_moves() -> None:
    session, here = Fake(), begin(Fake())
    for _ in QUESTIONS:
        here = chosen(session, here, "first")
    assert here.question is None
    assert chosen(session, here, "first") is here
    assert begin(session, seed=1).question == QUESTIONS[1]


# pieces


def test_what_a_model_says_never_becomes_part_of_the_page() -> None:
    bad = "<img src=x onerror=alert(1)> ${1+1} {{x}} `y` \" '"
    for piece in (
        answers([(bad, BASE)], {BASE: bad}, {BASE}, {BASE: bad}),
        sentence(bad),
        mixture([bad], [1.0]),
        shares([bad], Person({bad: 1.0}, (0, 0), (1, 1), (bad,))),
        map_picture(Map({bad: (0.0, 0.0)}, axes=(bad, bad)), [bad], None, ()),
    ):
        assert "<img" not in piece
        assert not re.search(r"[${}`]", piece)
    assert escaped("a < b") == "a &lt; b"


def test_answers_stand_in_regions_named_after_their_tastes() -> None:
    labels = choices(NAMES)
    page = answers(labels, {BASE: "one", DIAL: ""}, {DIAL}, {})
    assert re.findall(r'aria-label="([^"]*)" aria-busy="(\w+)"', page) == [
        ("Answer of base model", "false"), ("Answer of your dial", "true"),
    ]  # fmt: skip
    assert page.count("caret") == 1
    assert "the answer is empty" in answers(labels, {BASE: ""}, set(), {})


def test_the_mixture_says_its_parts() -> None:
    assert blend(NAMES, [0.2, 0.6, 0]) == "75% wordy-bold, 25% plain-cautious"
    assert "All sliders at 0: the base model." in mixture(NAMES, [0, 0, 0])
    assert mixture(NAMES, [1, 1, 0]).count("<i ") == 2


def test_the_map_shows_who_is_where() -> None:
    session = Fake()
    here = begin(session)
    empty = map_picture(session.latent_map(), NAMES, None, ())
    for _ in range(3):
        here = chosen(session, here, "first")
    drawn = map_picture(session.latent_map(), NAMES, here.person, here.trail)
    for name in NAMES:
        assert f">{name}</text>" in drawn
    assert "no choice yet" in empty
    assert "violet" not in empty
    assert "var(--violet)" in drawn
    assert "48 people" in drawn
    assert len(drawn) < 80_000
    assert drawn == map_picture(session.latent_map(), NAMES, here.person, here.trail), "no dates, no random ids"


def test_a_map_of_one_point_can_be_drawn() -> None:
    assert "<svg" in map_picture(Map({"only": (0.0, 0.0)}), ["only"], Person({}, (0, 0), (0, 0)), [(0, 0)])


def test_the_sheet_has_the_colours_that_the_pieces_use() -> None:
    from motet.report.canvas import PALETTE

    sheet = (Path(importlib.util.find_spec("motet.play").submodule_search_locations[0]) / "play.css").read_text()  # type: ignore[union-attr,index]
    assert all(f"--c{place}: {hue};" in sheet for place, hue in enumerate(PALETTE))
    assert tint("prototype 9") == "var(--c1)"
    assert "@import" not in sheet
    assert "url(" not in sheet


# the server


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:7860", None, 200),
        ("localhost:7860", "http://localhost:7860", 200),
        ("127.0.0.1:7860", "http://127.0.0.1:7860", 200),
        ("127.0.0.1:7860", "http://127.0.0.1:8000", 403),
        ("127.0.0.1:7860", "https://example.org", 403),
        ("127.0.0.1:7860", "null", 403),
        ("example.org:7860", "http://example.org:7860", 403),
        ("", None, 403),
    ],
)
def test_only_the_pages_own_requests_are_answered(host: str, origin: str | None, status: int) -> None:
    import asyncio

    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any: ...

    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
    asyncio.run(OwnPageOnly(app)({"type": "http", "headers": headers}, receive, send))
    assert sent[0]["status"] == status
    if status == 200:
        policy = dict(sent[0]["headers"])[b"content-security-policy"].decode()
        assert "http" not in policy, "no address but its own"


def test_without_gradio_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("motet.play.server.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        serve(tmp_path, None, 0, False)
    assert str(caught.value) == "motet play needs gradio; run: pip install 'motet[play]'"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """gradio, imported as the server does it. What it warns of, and the event loop that it leaves, are not ours."""
    for name in ("NO_PROXY", *QUIET):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    need_gradio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gradio  # noqa: F401

        yield
        gc.collect()


# the page


@gradio
@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_a_model_without_prototypes_has_no_dial() -> None:
    session = Fake()
    session.names = ()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="the dial needs at least one prototype, got none in 'voices by fedvpa, Smol"):
        build(session)


@gradio
@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_sentences_for_what_cannot_be_done(tmp_path: Path) -> None:
    from motet.play.page import Handlers

    do = Handlers(Fake())

    def said(*given: Any) -> str:
        return list(do.answer(*given))[-1][1]

    assert "the prompt must not be empty; write a question" in said("  ", [BASE], 32, 0, 0, 0, 0)
    assert "the seed must be a whole number of 0 or more, got nothing" in said("hi", [BASE], 32, None, 0, 0, 0)
    assert "the seed must be a whole number of 0 or more, got -1" in said("hi", [BASE], 32, -1, 0, 0, 0)
    assert "was the folder copied whole?" in said("break", [BASE], 32, 0, 0, 0, 0)
    assert next(iter(do.answer("hi", [BASE], 32, 0, 0, 0, 0)))[1] == "", "an old sentence goes"
    assert "the folder must not be empty; name one, such as my-taste" in do.export("", 1, 0, 0)
    assert "which is the base model" in do.export("somewhere", 0, 0, 0)
    assert "exists; name a new folder" in do.export(str(tmp_path), 1, 0, 0)
    (tmp_path / "file").write_text("")
    assert "cannot be written: Not a directory; name another folder" in do.export(str(tmp_path / "file" / "x"), 1, 0, 0)


@gradio
@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_serving_prints_an_address_of_this_computer_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gradio

    served: list[Any] = []
    monkeypatch.setattr("motet.play.server.open_session", lambda folder, cache: Fake())
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: served.append(page))
    serve(tmp_path, None, 0, False)
    (page,) = served
    try:
        said = re.fullmatch(
            r"voices by fedvpa, SmolLM2-135M: (http://127\.0\.0\.1:(\d+)/)  \(Ctrl-C ends it\)\n",
            capsys.readouterr().out,
        )
        assert said is not None
        assert status(int(said[2]), {}) == 200
        assert status(int(said[2]), {"Host": "example.org"}) == 403
        assert status(int(said[2]), {"Origin": "http://127.0.0.1:1"}) == 403
        assert {socket_.getsockname()[0] for server in page.server.servers for socket_ in server.sockets} == {
            "127.0.0.1"
        }
        with pytest.raises(ConfigError, match=f"port must be a free one, got {said[2]}: .*; 0 looks for one"):
            start(build(Fake()), int(said[2]))
    finally:
        page.close()


def status(port: int, headers: dict[str, str]) -> int:
    from http.client import HTTPConnection

    asking = HTTPConnection("127.0.0.1", port, timeout=20)
    asking.request("GET", "/", headers=headers)
    found = asking.getresponse().status
    asking.close()
    return found


# in a browser


def local(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme in ("data", "blob", "about") or parts.hostname == "127.0.0.1"


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where this process connects to, the server among the rest."""
    reached: list[str] = []
    whole = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        reached.append(str(address[0] if isinstance(address, tuple) else address))
        return whole(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    return reached


@gradio
@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_the_page_in_a_browser(tmp_path: Path, connected: list[str]) -> None:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing; pip install 'motet[browser]'"
    )
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("there is no chromium on the path")
    session = Fake()
    page = build(session)
    address = start(page)
    asked: list[str] = []
    troubles: list[str] = []
    try:
        with playwright.sync_playwright() as browsers:
            browser = browsers.chromium.launch(executable_path=binary, args=["--no-sandbox"])
            view = browser.new_page(viewport={"width": 1380, "height": 900}, color_scheme="light")
            view.on("request", lambda request: asked.append(request.url))
            view.on("pageerror", lambda error: troubles.append(str(error)))
            view.on("console", lambda line: troubles.append(line.text) if line.type in ("error", "warning") else None)
            view.goto(address)
            expect = playwright.expect
            expect.set_options(timeout=20_000)
            visit(view, expect, session, tmp_path)
            browser.close()
    finally:
        page.close()
    assert asked
    assert [url for url in asked if not local(url)] == []
    assert [host for host in connected if host not in ("127.0.0.1", "::1") and not host.startswith("/")] == []
    assert troubles == []
    picture(tmp_path / "play.png", tmp_path / "dial.png", tmp_path / "teach-2.png")
    if os.environ.get("MOTET_SCREENSHOT"):
        shutil.copy(tmp_path / "play.png", os.environ["MOTET_SCREENSHOT"])


def picture(to: Path, *parts: Path) -> None:
    """One small picture out of several, below each other."""
    from PIL import Image

    images = [Image.open(part).convert("RGB") for part in parts]
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    sheet.quantize(128).save(to, optimize=True)


def visit(view: Any, expect: Any, session: Fake, tmp_path: Path) -> None:
    """One person: asks, moves the dial, teaches, uses the taste, exports, makes mistakes."""
    sliders = [view.get_by_role("slider", name=f"range slider for {name}") for name in NAMES]
    answer = view.get_by_role("button", name="Answer", exact=True)
    expect(sliders[0]).to_have_value("0.35")  # a third, at the nearest step
    # a mistake first
    answer.click()
    expect(view.get_by_role("alert")).to_contain_text("the prompt must not be empty; write a question")
    # teach
    view.get_by_role("tab", name="Teach it your taste").click()
    shown = []
    for count in range(1, 4):
        expect(view.get_by_role("region", name="Prompt")).to_contain_text(QUESTIONS[count - 1][0])
        view.get_by_role("button", name="I prefer the first").click()
        view.mouse.move(5, 5)
        expect(view.get_by_text(f"{count} choice{'s' * (count > 1)} made")).to_be_visible()
        rows = view.get_by_role("list", name="Shares of the prototypes").get_by_role("listitem")
        shown.append(int(re.findall(r"(\d+)%", rows.first.inner_text())[0]))
        warned = view.get_by_text("These choices fit several kinds of people")
        expect(warned).to_have_count(int(count < 3))
        view.screenshot(path=tmp_path / f"teach-{count}.png", full_page=True)
    assert all(a < b for a, b in pairwise(shown)), shown
    view.get_by_role("button", name="Neither").click()
    expect(view.get_by_text("No further questions")).to_be_visible()
    # on the sliders
    view.get_by_role("button", name="Use this taste").click()
    expect(sliders[0]).to_have_value("0.8")
    expect(sliders[1]).to_have_value("0.15")
    # a slider, by keyboard
    sliders[2].focus()
    for _ in range(6):
        view.keyboard.press("ArrowRight")
    expect(sliders[2]).to_have_value("0.35")
    expect(view.get_by_role("img", name=re.compile("Mixture: .*27% warm-playful")).first).to_be_visible()
    # stop
    view.get_by_role("textbox", name="Prompt").fill("long")
    answer.click()
    stop = view.get_by_role("button", name="Stop")
    expect(stop).to_be_enabled()
    growing = view.get_by_role("region", name="Answer of base model")
    expect(growing).to_have_attribute("aria-busy", "true")
    so_far = growing.inner_text()
    expect(growing).not_to_have_text(so_far)
    assert growing.inner_text().startswith(so_far)
    stop.click()
    expect(view.get_by_text("Stopped.")).to_be_visible()
    expect(stop).to_be_disabled()
    view.wait_for_timeout(500)
    assert len(session.closed) == 5, "all streams are closed when the person stops"
    # answers, side by side
    view.get_by_role("textbox", name="Prompt").fill("What should I pack for a long train journey?")
    answer.click()
    tastes_shown = ["base model", *NAMES, "your dial"]
    for name, key in zip(tastes_shown, ("", *NAMES, "dial"), strict=True):
        expect(view.get_by_role("region", name=f"Answer of {name}")).to_contain_text(WORDS[key])
    expect(stop).to_be_disabled()
    texts = {view.get_by_role("region", name=f"Answer of {name}").inner_text() for name in tastes_shown}
    assert len(texts) == 5
    assert session.asked[-1] == {NAMES[0]: 0.8, NAMES[1]: 0.15, NAMES[2]: 0.35}
    view.mouse.move(5, 5)
    view.wait_for_timeout(400)  # the button's colour fades
    view.screenshot(path=tmp_path / "dial.png", full_page=True)
    # a mistake of the model
    view.get_by_role("textbox", name="Prompt").fill("break")
    answer.click()
    expect(view.get_by_role("alert")).to_contain_text("was the folder copied whole?")
    # export
    view.get_by_role("tab", name="Export").click()
    view.get_by_role("textbox", name="Folder").fill(str(tmp_path / "mine"))
    view.get_by_role("button", name="Write the adapter").click()
    expect(view.get_by_text("Wrote adapter_model.safetensors and adapter_config.json")).to_be_visible()
    assert (tmp_path / "mine" / "adapter_config.json").exists()
    view.screenshot(path=tmp_path / "export.png", full_page=True)
    view.get_by_role("button", name="Write the adapter").click()
    expect(view.get_by_role("alert").last).to_contain_text("exists; name a new folder")
    # start again
    view.get_by_role("tab", name="Teach it your taste").click()
    view.get_by_role("button", name="Start again").click()
    expect(view.get_by_role("region", name="Prompt")).to_contain_text(QUESTIONS[1][0])
    expect(view.get_by_text("0 choices made")).to_be_visible()
