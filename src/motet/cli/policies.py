"""Commands about policies: train one from a run, ask it, ship it, judge it, play with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from motet.cli.console import CacheOption, DataOption, JsonOption, Watcher, console_of, plain

FolderArgument = Annotated[Path, typer.Argument(help="Policy folder; or a run of feddpo.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="Language model: smollm2, gemma3-270m, a folder, a .gguf file, a hub name.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="A setting, e.g. --set steps=60; repeatable.")]
SamplingOption = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of sampling, e.g. --set top_p=0.9; repeatable.")
]
JudgingOption = Annotated[
    list[str] | None, typer.Option("--set", help="A setting, e.g. --set judged_prompts=300; repeatable.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Decides everything that is drawn.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, or another torch device.")]


class PolicyWatcher(Watcher):
    """Tells of sampling, training and judging."""

    def stage(self, name: str, done: int, total: int) -> None:
        self._bar(name, done, total, f"{done:,} of {total:,}")

    def looked(self, row: Mapping[str, float]) -> None:
        self.said(f"on validation prompts: gain {row['gain']:+.3f}, KL to the base {row['kl']:.1f} nats")


def align(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("--out", help="Policy folder; it is made, and must not hold another policy.")],
    by: Annotated[str | None, typer.Option("--by", help="dpo or grpo (default: dpo).")] = None,
    base: BaseOption = None,
    data: DataOption = None,
    words: SetOption = None,
    seed: SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train one language model that takes any taste of a run.

    Example: [bold]motet align runs/demo --out runs/policy[/bold]
    """
    from motet.align import align as train
    from motet.align import resolve_align
    from motet.config import parse_words
    from motet.experiment import default_cache

    table = parse_words(words or [])
    table |= {name: value for name, value in (("by", by), ("base", base)) if value is not None}
    asked = resolve_align(table, seed)
    watcher = PolicyWatcher(quiet=as_json)
    try:
        notes = train(run, out, asked, cache or default_cache(), resume, data, watcher)
    finally:
        watcher.close()
    if as_json:
        typer.echo(json.dumps(notes, indent=2))
        return
    figures = notes["figures"]
    watcher.said(
        f"kept the policy after {figures['steps']} steps: gain {figures['gain_nats']:+.3f}, "
        f"KL to the base {figures['kl_nats']:.1f} nats"
    )
    names = notes["names"]
    taste = f' --taste "{names[0]}"' if names else ""
    watcher.console.print(f"policy: {plain(str(out))}", highlight=False, soft_wrap=True)
    watcher.said("Next, try:")
    for line in (
        f'motet say {out}{taste} "How do I get a stain out of a shirt?"',
        *([f"motet judge {out} base"] if notes["data"]["judge_share"] else []),
        *([f"motet play {out}"] if names else []),
    ):
        watcher.console.print(f"  {plain(line)}", highlight=False, soft_wrap=True)


def say(
    folder: FolderArgument,
    prompt: Annotated[str, typer.Argument(help="What is asked.")],
    taste: Annotated[
        str,
        typer.Option(
            "--taste", help="A prototype's name, a mixture such as 0.7*p0+0.3*p1, base, or a file of choices."
        ),
    ] = "",
    base: BaseOption = None,
    words: SamplingOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt at a taste, and say which taste it was.

    Example: [bold]motet say runs/policy --taste "0.7*p0+0.3*p1" "How do I poach an egg?"[/bold]
    """
    from motet.alignment.sampling import SamplingSettings
    from motet.config import parse_words, settings
    from motet.errors import ConfigError
    from motet.experiment import default_cache
    from motet.policies import answers_at, dressed, open_model, open_policy, parse_taste
    from motet.records import Turn

    if not prompt.strip():
        raise ConfigError("the prompt must be a text, got an empty one; write what you want to ask")
    where, policy = cache or default_cache(), open_policy(folder, base)
    sampling = settings(SamplingSettings, {"max_new_tokens": 160, **parse_words(words or [])}, "--set")
    chosen = parse_taste(policy, taste, where)
    model = open_model(policy, where, device)
    with dressed(model, policy) as worn:
        answer = answers_at(model, worn, [(Turn("user", prompt),)], chosen, sampling, seed)[0]
    if as_json:
        content = {"taste": chosen.label, "shares": dict(chosen.shares), "unsure": chosen.unsure,
                   "said": list(chosen.said), "answer": answer.text}  # fmt: skip
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    console = console_of(stderr=True)
    mixed = ", ".join(f"{share:.2f} {name}" for name, share in chosen.shares.items())
    console.print(
        f"taste: {plain(chosen.label)}" + (f" ({plain(mixed)})" if mixed else ""), style="dim", highlight=False
    )
    for sentence in chosen.said:
        console.print(plain(sentence), style="yellow" if chosen.unsure else "dim", highlight=False, soft_wrap=True)
    typer.echo(answer.text)


def export(
    folder: FolderArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder of the adapter; it must be new or empty.")],
    taste: Annotated[str, typer.Option("--taste", help="As motet say takes it.")] = "",
    base: BaseOption = None,
    cache: CacheOption = None,
) -> None:
    """Fold one taste into an ordinary PEFT adapter that every serving engine loads.

    Example: [bold]motet export runs/policy --taste p0 --out runs/adapter[/bold]
    """
    from motet.experiment import default_cache
    from motet.policies import export as write
    from motet.policies import open_model, open_policy, parse_taste

    where, policy = cache or default_cache(), open_policy(folder, base)
    chosen = parse_taste(policy, taste, where)
    console = console_of()
    for sentence in (*chosen.said, *write(policy, open_model(policy, where, "cpu"), chosen, out)):
        console.print(plain(sentence), highlight=False, soft_wrap=True)
    console.print(f"adapter: {plain(str(out))}", highlight=False, soft_wrap=True)


def judge(
    first: Annotated[str, typer.Argument(metavar="A", help="Policy folder, run of feddpo, or PEFT adapter.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another, or base: the model without any.")],
    by: Annotated[str | None, typer.Option("--judge", help="held-out, rule or openai (default: held-out).")] = None,
    tastes: Annotated[
        list[str] | None, typer.Option("--taste", help="A taste of A, as motet say takes it; repeatable; default: all.")
    ] = None,
    dial: Annotated[str | None, typer.Option("--dial", help="Two prototypes between which to turn: p0:p1.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file with everything (default: inside A).")] = None,
    base: BaseOption = None,
    data: DataOption = None,
    words: JudgingOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge two policies on new prompts, in both orders, by somebody who saw none of their data.

    Example: [bold]motet judge runs/policy base --dial p0:p1[/bold]
    """
    from motet.config import parse_words
    from motet.errors import ConfigError
    from motet.experiment import default_cache
    from motet.judging import judge_policies, resolve_judging, write_judgement
    from motet.report.judgement import judgement_tables, remarks

    table = parse_words(words or [])
    if by is not None:
        table["judge"] = by
    asked = resolve_judging(table, seed)
    ends = None
    if dial is not None:
        low, colon, high = dial.partition(":")
        if not colon:
            raise ConfigError(f"--dial wants two prototypes with a colon between them, got {dial!r}; p0:p1")
        ends = (low.strip(), high.strip())
    watcher = PolicyWatcher(quiet=as_json)
    try:
        found = judge_policies(
            first, second, asked, cache or default_cache(), watcher, tastes or (), ends, base, data, device
        )
    finally:
        watcher.close()
    path = out or Path(first) / f"judged-{found['second']}-{asked.judge.judge}.json"
    write_judgement(found, path)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for shown in judgement_tables(found):
        watcher.console.print(shown)
    for remark in remarks(found):
        watcher.console.print(plain(remark), style="dim", highlight=False)
    watcher.console.print(f"judgement: {plain(str(path))}", highlight=False, soft_wrap=True)


def play(
    folder: Annotated[Path, typer.Argument(help="Policy folder.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of this computer; 0 takes a free one.")] = 0,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Show the page in the browser.")] = True,
    cache: CacheOption = None,
) -> None:
    """Turn the dial in the browser: a local page, no network. Needs the extra motet[play].

    Example: [bold]motet play runs/policy[/bold]
    """
    from motet.play import serve

    serve(folder, cache, port, open_browser)
