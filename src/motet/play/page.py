"""The page: three tabs over one language model.

In:  a ``Playable``.
Out: a ``gradio.Blocks``, not yet served.

**Dial** answers a prompt with several tastes side by side. **Teach it your taste** asks for choices and shows what they
say. **Export** writes the mixture of the sliders as an adapter. What a person does is kept in the page's own state, and
is gone when the page is closed. Errors that the person can put right are sentences on the page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any

from motet.errors import ConfigError, MotetError
from motet.play.contract import Map, Playable
from motet.play.dial import BASE, DIAL, MOST, STEP, choices, in_turns, on_sliders, tastes
from motet.play.pieces import answers, blend, card, escaped, map_picture, mixture, sentence, shares
from motet.play.teaching import Taught, Word, begin, chosen

LENGTHS = (16, 512, 128)
"""Shortest, longest and usual length of an answer, in tokens."""
FOLDER = "my-taste"
PAUSE = 0.08
"""Seconds between two pictures of growing answers: a browser that draws every token has no time for the Stop button."""


@dataclass(frozen=True)
class Handlers:
    """What the page does when something is pressed; each returns the new contents of what it changes."""

    session: Playable

    @cached_property
    def known(self) -> Map:
        """The map, made when it is first shown. It is the model's, the same for everybody."""
        return self.session.latent_map()

    def answer(
        self, prompt: str, ticked: Sequence[str], length: float, seed: float | None, *weights: float
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Answers as they grow; the sentence; the button to stop."""
        import gradio as gr

        on, off = gr.update(interactive=True), gr.update(interactive=False)
        names = self.session.names
        try:
            text = written(prompt, "the prompt", "write a question or an instruction, then press Answer")
            asked = tastes(names, ticked, weights)
            number = whole(seed)
            notes = {DIAL: blend(names, weights)}
            yield answers(choices(names), dict.fromkeys(asked, ""), set(asked), notes), "", on
            streams = {key: self.session.stream(text, mix, int(length), number) for key, mix in asked.items()}
            last = 0.0
            for turn in in_turns(streams):
                if turn.running and monotonic() - last < PAUSE:
                    continue
                last = monotonic()
                yield answers(choices(names), turn.texts, turn.running, notes), gr.skip(), gr.skip()
            yield gr.skip(), gr.skip(), off  # the sentence is left alone: it may say by now that the person stopped
        except MotetError as error:
            yield gr.skip(), sentence(str(error), "wrong"), off

    def teach(self, taught: Taught | None, again: bool = False) -> tuple[Any, ...]:
        """The first question; or, again, the first of other questions."""
        if taught is not None and not again:
            return self.taught(taught)
        try:
            return self.taught(begin(self.session, 0 if taught is None else taught.seed + 1))
        except MotetError as error:
            return self.taught(taught, str(error))

    def choose(self, taught: Taught | None, word: Word) -> tuple[Any, ...]:
        """One choice further."""
        try:
            return self.taught(chosen(self.session, taught or begin(self.session), word))
        except MotetError as error:
            return self.taught(taught, str(error))

    def taught(self, taught: Taught | None, wrong: str = "") -> tuple[Any, ...]:
        """State, progress, question, both answers, sentence, map, shares, and which buttons can be pressed."""
        import gradio as gr

        here = taught or Taught()
        question = here.question
        said = sentence(wrong, "wrong")
        if question is None and not wrong:
            said = sentence("No further questions. Use this taste, or start again with others.")
        pieces = [
            card(*piece) for piece in zip(("Prompt", "First answer", "Second answer"), question or (), strict=False)
        ]
        try:
            picture = map_picture(self.known, self.session.names, here.person, here.trail)
        except MotetError as error:
            picture = sentence(str(error), "wrong")
        counted = f"{len(here.choices)} choice{'' if len(here.choices) == 1 else 's'} made"
        asking = gr.update(interactive=question is not None)
        return (
            taught, sentence(counted), *(pieces or ["", "", ""]), said, picture,
            shares(self.session.names, here.person), asking, asking, asking,
            gr.update(interactive=here.person is not None),
        )  # fmt: skip

    def use(self, taught: Taught | None) -> tuple[Any, ...]:
        """The person's shares on the sliders; the sentence; and the tab with the dial comes to the front."""
        import gradio as gr

        positions = on_sliders(self.session.names, taught.shares if taught else {})
        return (*positions, sentence("The sliders stand at your taste now."), gr.update(selected="dial"))

    def export(self, folder: str, *weights: float) -> str:
        """What was written, or why not."""
        try:
            place = Path(written(folder, "the folder", f"name one, such as {FOLDER}")).expanduser()
            if not any(weights):
                raise ConfigError(
                    "at least one slider must be above 0, got all at 0, which is the base model; "
                    "move one on the tab Dial"
                )
            said = self.session.export(dict(zip(self.session.names, map(float, weights), strict=True)), place)
            return "".join(sentence(line) for line in said)
        except MotetError as error:
            return sentence(str(error), "wrong")
        except OSError as error:
            return sentence(f"{folder.strip()!r} cannot be written: {error.strerror}; name another folder", "wrong")


def written(text: str | None, what: str, do: str) -> str:
    """The text without the space around it.

    Raises:
        ConfigError: There is none.
    """
    if not text or not text.strip():
        raise ConfigError(f"{what} must not be empty; {do}")
    return text.strip()


def whole(seed: float | None) -> int:
    """The seed as a whole number.

    Raises:
        ConfigError: It is missing, negative, or not whole.
    """
    if seed is None or seed < 0 or seed != int(seed):
        shown = "nothing" if seed is None else f"{seed:g}"
        raise ConfigError(f"the seed must be a whole number of 0 or more, got {shown}; 0 will do")
    return int(seed)


def build(session: Playable) -> Any:
    """The page as a ``gradio.Blocks``.

    Raises:
        ConfigError: The model has no prototypes, so there is nothing to put on a dial.
    """
    import gradio as gr

    names = session.names
    if not names:
        raise ConfigError(
            f"the dial needs at least one prototype, got none in {session.title!r}; "
            "train with a method that has prototypes, such as fedvpa"
        )
    do = Handlers(session)
    even = on_sliders(names, dict.fromkeys(names, 1 / len(names)))  # at 0 the dial would say what the base model says
    calm: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    model: dict[str, Any] = {**calm, "concurrency_id": "model", "concurrency_limit": 1}  # it answers one page at a time
    with gr.Blocks(title=f"motet play: {session.title}", analytics_enabled=False) as page:
        gr.HTML(f"<header><h1>motet play</h1><p>{escaped(session.title)}</p></header>")
        taught = gr.State(None)
        with gr.Tabs(selected="dial") as tabs:
            with gr.Tab("Dial", id="dial"), gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=280, elem_classes="sheet"):
                    gr.HTML("<h2>Your dial</h2>")
                    sliders = [
                        gr.Slider(
                            0, 1, value=even[place], step=STEP, label=name, interactive=True, buttons=[],
                            elem_classes=["taste", f"c{place % 8}"],
                        )
                        for place, name in enumerate(names)
                    ]  # fmt: skip
                    mixed = gr.HTML(mixture(names, even))
                    gr.HTML("<h2>Answers</h2>")
                    length = gr.Slider(*LENGTHS[:2], value=LENGTHS[2], step=16, label="Length, in tokens", buttons=[])
                    seed = gr.Number(0, label="Seed", precision=0)
                with gr.Column(scale=3, min_width=420):
                    prompt = gr.Textbox(
                        label="Prompt",
                        lines=2,
                        max_lines=8,
                        placeholder="Ask something that people answer differently.",
                    )
                    usual = [BASE, *(key for _, key in choices(names)[1:-1][:MOST]), DIAL]
                    ticked = gr.CheckboxGroup(choices(names), value=usual, label="Who answers")
                    with gr.Row(elem_classes="buttons"):
                        go = gr.Button("Answer", variant="primary", scale=0, min_width=140)
                        stop = gr.Button("Stop", interactive=False, scale=0, min_width=110)
                    said = gr.HTML("")
                    shown = gr.HTML("", elem_classes="shown")
            with gr.Tab("Teach it your taste", id="teach") as teaching, gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=420):
                    asked = gr.HTML("")
                    with gr.Row(equal_height=True):
                        with gr.Column(min_width=240, elem_classes="side"):
                            first = gr.HTML("")
                            prefer_first = gr.Button("I prefer the first", variant="primary", interactive=False)
                        with gr.Column(min_width=240, elem_classes="side"):
                            second = gr.HTML("")
                            prefer_second = gr.Button("I prefer the second", variant="primary", interactive=False)
                    with gr.Row(elem_classes="buttons"):
                        neither = gr.Button("Neither", interactive=False, scale=0, min_width=140)
                        counted = gr.HTML("", elem_classes="counted")
                    wrong = gr.HTML("")
                with gr.Column(scale=2, min_width=360, elem_classes="sheet"):
                    gr.HTML("<h2>Your taste</h2>")
                    picture = gr.HTML("")
                    bars = gr.HTML("")
                    with gr.Row(elem_classes="buttons"):
                        use = gr.Button("Use this taste", variant="primary", interactive=False, scale=0, min_width=150)
                        again = gr.Button("Start again", scale=0, min_width=130)
            with gr.Tab("Export", id="export"), gr.Column(elem_classes="sheet narrow"):
                gr.HTML(
                    "<h2>Write the dial as an adapter</h2><p class='note'>A stock PEFT adapter with the mixture of the "
                    "sliders. It loads without motet.</p>"
                )
                exported = gr.HTML(mixture(names, even))
                folder = gr.Textbox(label="Folder", value=FOLDER, max_lines=1, info="New or empty.")
                with gr.Row(elem_classes="buttons"):
                    write = gr.Button("Write the adapter", variant="primary", scale=0, min_width=180)
                outcome = gr.HTML("")

        for slider in sliders:
            slider.change(lambda *weights: [mixture(names, weights)] * 2, sliders, [mixed, exported], **calm)
        # gradio streams what it sees to be a generator, and a checker of annotations around a method hides that
        grow = lambda *given: (yield from do.answer(*given))  # noqa: E731
        runs = [
            press(grow, [prompt, ticked, length, seed, *sliders], [shown, said, stop], **model)
            for press in (go.click, prompt.submit)
        ]
        stopped = sentence("Stopped.", "note stopped"), gr.update(interactive=False)
        stop.click(lambda: stopped, None, [said, stop], cancels=runs, **calm)
        lesson = [
            taught, counted, asked, first, second, wrong, picture, bars, prefer_first, prefer_second, neither, use
        ]  # fmt: skip
        teaching.select(do.teach, taught, lesson, **model)
        again.click(lambda state: do.teach(state, again=True), taught, lesson, **model)
        for button, word in ((prefer_first, "first"), (prefer_second, "second"), (neither, "neither")):
            button.click(_with(do, word), taught, lesson, **model)
        use.click(do.use, taught, [*sliders, said, tabs], **calm)
        write.click(do.export, [folder, *sliders], outcome, **model)
    return page


def _with(do: Handlers, word: Any) -> Any:
    return lambda state: do.choose(state, word)
