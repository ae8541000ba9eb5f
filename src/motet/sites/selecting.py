"""The server of FedVPA-GP and its kin over real sites: set up, rounds, judgement by the sites' own counts.

In:  a federation, settings, public pairs.
Out: the run folder: ``config.toml``, ``deal.json``, ``rounds.jsonl``, checkpoints, the trained selector or rewards,
     ``evaluation.json``, ``summary.json``.

The algorithm object and the rounds are those of the simulation; only the engine is another. Sites are clients in the
order of ``sites`` in ``coordinate.toml``. Accuracy is counted by each site on pairs that it never trains on.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from motet.algorithms import ALGORITHMS
from motet.algorithms.fedvpa import FedVPAState
from motet.config import write_atomically, write_json, write_toml
from motet.errors import MotetError
from motet.experiment import Settings
from motet.federated.contract import Ground
from motet.federated.server import ROUNDS, Progress, has_checkpoint, run_rounds
from motet.federated.sites import VISITS, Federation, SitesEngine
from motet.messages import Packet
from motet.records import Pair
from motet.selector.backbone import find_device, find_dtype
from motet.selector.features import text_key
from motet.selector.trained import About
from motet.selector.whitening import Whitening
from motet.sites.counting import evaluation_of, figures_of
from motet.sites.greeting import agree, greet, numbers_in
from motet.sites.hosted import version
from motet.sites.judging import Counts, exported, inferences, read
from motet.sites.public import Common, common_ground, read_public
from motet.sites.rules import judge_rule, setup_rule
from motet.sites.settings import Coordination
from motet.sites.standing import Standing
from motet.sites.texts import as_tensor

LATE, QUICK = VISITS - 2, VISITS - 1
"""The visits of a round in which late sites are set up, and in which all are asked how right they are so far."""


@dataclass(frozen=True, eq=False)
class Server:
    """All that the steps below share."""

    coordination: Coordination
    asked: Settings
    federation: Federation
    common: Common
    public: tuple[Pair, ...]
    standing: Standing
    out: Path
    pictured: list[str] = field(default_factory=list)
    """Who has pairs about pictures, as far as is known."""

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites, in the order that numbers them."""
        return self.coordination.federation.sites

    @property
    def numbers(self) -> dict[str, int]:
        """Client number of each site."""
        return {site: number for number, site in enumerate(self.sites)}

    @property
    def ground(self) -> Ground:
        """What every algorithm is told."""
        return Ground(self.common.hidden, self.common.scalars, self.asked.seed)

    def setup_packet(self, site: str) -> Packet:
        """What a site is told before the first round."""
        whitening = self.common.whitening
        tensors = {f"whitening.{field.name}": getattr(whitening, field.name) for field in fields(Whitening)}
        tensors["settings"] = as_tensor(json.dumps(self.asked.algorithm.model_dump(mode="json"), sort_keys=True))
        return Packet(
            {
                "version": version(), "method": self.asked.method, "fingerprint": self.common.fingerprint,
                "client": self.numbers[site], "seed": self.asked.seed, "hidden": self.common.hidden,
                "scalars": self.common.scalars,
            },
            tensors,
        )  # fmt: skip

    def judged(self, step: int, deadline: float) -> tuple[dict[str, Counts], tuple[str, ...]]:
        """What the sites count for the selector or the rewards in the run folder, and the columns of that."""
        about, tensors = exported(self.out)
        columns, settings = inferences(about, tensors), self.asked.evaluation
        packet = Packet(
            {"contexts": tuple(settings.contexts), "draws": settings.context_draws},
            {"about": as_tensor(about), **{f"trained/{name}": tensor for name, tensor in tensors.items()}},
        )
        answers = self.federation.ask(
            "judge", step, dict.fromkeys(self.sites, packet), deadline, self.needed(len(self.sites)),
            judge_rule(len(settings.contexts), len(columns)),
        )  # fmt: skip
        counts = {site: read(answer.meta, answer.tensors) for site, answer in answers.ok.items()}
        return {site: counts[site] for site in self.sites if site in counts}, columns

    def needed(self, asked: int) -> int:
        """Fewest answers of so many sites."""
        return self.coordination.federation.needed(asked)


def serve_selectors(
    coordination: Coordination, federation: Federation, out: Path, cache: Path, standing: Standing
) -> dict[str, Any]:
    """Train over the sites and leave the run folder, but for its report.

    Args:
        coordination: All settings.
        federation: Reaches the sites.
        out: The run folder; a run that was begun there goes on.
        cache: Features of public texts, converted models.
        standing: Told of every step.

    Returns:
        The summary.

    Raises:
        MotetError: See the message.
    """
    asked = coordination.asked
    assert isinstance(asked, Settings)
    public, sentence = read_public(coordination, out / "quarantine.jsonl")
    standing.said(sentence)
    standing.now("reading public texts")
    common = common_ground(asked, public, cache)
    server = Server(coordination, asked, federation, common, public, standing, out)
    held = _set_up(server)
    write_toml(out / "config.toml", asked.tables())
    write_json(out / "deal.json", _deal(server, held))
    algorithm = ALGORITHMS[asked.method].build(asked.algorithm, server.ground)
    settings, most = coordination.federation, {site: own["pairs"] for site, own in held.items()}
    engine = SitesEngine(
        federation, algorithm, server.ground, server.sites, settings.deadline_seconds, server.needed(len(server.sites)),
        most,
    )  # fmt: skip
    for stale in ("summary.json", "evaluation.json", "report.html"):
        (out / stale).unlink(missing_ok=True)

    def watch(progress: Progress[Any]) -> Mapping[str, float] | None:
        round, run = progress.log.round, asked.run
        found = None
        _welcome(server, held, most, round)
        if run.evaluate_every and round % run.evaluate_every == 0 and round != run.rounds:
            found = _quick_look(server, algorithm, progress.state, round)
        loss = progress.log.figures.get("choice_loss")
        said = "" if loss is None else f", loss {loss:.3f}"
        said += f", accuracy {statistics.fmean(found.values()):.1%}" if found else ""
        standing.said(f"round {round} of {run.rounds}: {len(set(progress.log.cohort))} sites{said}")
        standing.now("training", round, run.rounds)
        return found

    standing.now("training", 0, asked.run.rounds)
    state = run_rounds(algorithm, engine, asked.run, asked.seed, out, _identity(server), watch, has_checkpoint(out))
    return _concluded(server, algorithm, state, held)


def _set_up(server: Server) -> dict[str, dict[str, int]]:
    """Greet all sites, then agree with each; numbers of pairs of those that did."""
    greeted = greet(server.federation, server.coordination, server.standing)
    pictured = [site for site, answer in greeted.items() if answer.meta["pictured"]]
    server.pictured.extend(["the server", *pictured] if any(p.image is not None for p in server.public) else pictured)
    if said := _unseen(server):
        server.standing.said(said)
    packets = {site: server.setup_packet(site) for site in greeted}
    agreed = agree(server.federation, server.coordination, server.standing, packets)
    return {site: numbers_in(answer) for site, answer in agreed.items()}


def _unseen(server: Server) -> str | None:
    """What is to be said of pictures that the model does not look at."""
    if server.common.sees or not server.pictured:
        return None
    return (
        f"Some pairs of {', '.join(server.pictured)} are about pictures, which the model "
        f"{server.asked.backbone.model!r} cannot see: it reads their texts only; a vision-language model as model in "
        "[backbone], at the server and all sites, would see them."
    )


def _welcome(server: Server, held: dict[str, dict[str, int]], most: dict[str, int], round: int) -> None:
    """Agree with sites that came late, if there are any: from the next round on they take part."""
    late = {s: server.setup_packet(s) for s in server.sites if s not in held and s in server.federation.sites()}
    if not late:
        return
    settings = server.coordination.federation
    agreed = server.federation.ask("setup", round * VISITS + LATE, late, settings.deadline_seconds, 0, setup_rule())
    for site, answer in agreed.ok.items():
        held[site] = numbers_in(answer)
        most[site] = held[site]["pairs"]
        server.standing.said(f"{site} takes part from round {round + 1} on")


def _quick_look(server: Server, algorithm: Any, state: Any, round: int) -> dict[str, float] | None:
    """Accuracy by site with the largest context, for the curve; nothing where too few sites answer."""
    _export(server, algorithm, state)
    try:
        counts, _ = server.judged(round * VISITS + QUICK, server.coordination.federation.deadline_seconds)
    except MotetError as error:
        server.standing.said(f"round {round}: no look at the accuracy, {error}")
        return None
    largest = server.asked.evaluation.contexts.index(max(server.asked.evaluation.contexts))
    return {site: float(count.right[largest, 0]) / count.pairs for site, count in counts.items()}


def _export(server: Server, algorithm: Any, state: Any) -> None:
    """What was trained, as a run folder keeps it; prototypes have numbers, for nobody knows what they stand for."""
    asked, method = server.asked, ALGORITHMS[server.asked.method]
    kind = str(find_dtype(asked.backbone.dtype, find_device(asked.backbone.device))).removeprefix("torch.")
    settled = asked.backbone.model_copy(update={"dtype": kind, "device": "auto"})
    groups = getattr(asked.algorithm, method.groups) if method.groups else 0
    names = tuple(f"prototype {number}" for number in range(groups))
    notes = {"recipe": "sites", "method": asked.method}
    algorithm.export(
        state, server.out, About(settled, server.common.fingerprint, server.common.whitening, names, notes)
    )


def _concluded(server: Server, algorithm: Any, state: Any, held: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Have the sites judge what was trained, and write down all that a run folder has."""
    asked, method, out = server.asked, ALGORITHMS[server.asked.method], server.out
    server.standing.now("judging")
    _export(server, algorithm, state)
    posterior_bytes = _write_posteriors(algorithm, state, out)
    settings = server.coordination.federation
    counts, columns = server.judged((asked.run.rounds + 1) * VISITS, settings.deadline_seconds)
    headline = asked.evaluation.inference if asked.evaluation.inference in columns else columns[0]
    assigned = algorithm.assignment(state)
    silent = [site for site in server.sites if site not in counts]
    warnings = [
        f"This run was a deployment: {len(held)} of {len(server.sites)} sites over the engine {settings.engine!r}. "
        "Each site counted right answers on pairs of its own; no pair, and no control that pools pairs, was seen here."
    ]
    if unseen := _unseen(server):
        warnings.append(unseen)
    if silent:
        warnings.append(f"Not judged, for they did not answer: {', '.join(silent)}.")
    evaluation = evaluation_of(
        counts, method.title, columns, asked.evaluation.contexts, headline, server.numbers, assigned, warnings
    )
    write_json(out / "evaluation.json", evaluation)
    logs = [json.loads(line) for line in (out / ROUNDS).read_text(encoding="utf-8").splitlines()]
    visits = max(sum(len(log["cohort"]) for log in logs), 1)
    summary: dict[str, Any] = {
        "method": asked.method, "recipe": "sites", "engine": settings.engine, "sites": list(held),
        "preset": asked.run.preset, "labels": "true", "seed": asked.seed, "clients": len(server.sites),
        "unseen_clients": 0, "rounds": asked.run.rounds, **figures_of(evaluation, headline),
        "kl": algorithm.figures(state).get("kl"),
        "bytes_up_per_client_round": sum(log["bytes_up"] for log in logs) / visits,
        "bytes_down_per_client_round": sum(log["bytes_down"] for log in logs) / visits,
        "posterior_bytes": posterior_bytes,
        "setup_bytes": len(server.setup_packet(server.sites[0]).serialised()),
        "seconds_per_round": statistics.median(log["seconds"] for log in logs),
        "feature_seconds": server.common.seconds, "texts": server.common.texts,
        "parameters_added": algorithm.parameters_added(state), "backbone": asked.backbone.model,
        "fingerprint": server.common.fingerprint, "said": [line["said"] for line in server.standing.content["said"]],
        "warnings": warnings,
    }  # fmt: skip
    write_json(out / "summary.json", summary)
    return summary


def _write_posteriors(algorithm: Any, state: Any, out: Path) -> int | None:
    """The taste of each site, as the server knows it; its bytes on the wire. Nothing where a method has no taste."""
    if not isinstance(state, FedVPAState):
        return None
    tastes = algorithm.selector(state, Whitening.none(algorithm.ground.hidden, algorithm.ground.scalars)).prototypes
    tensors: dict[str, Tensor] = {
        "ids": state.ids, "means": state.means, "log_scales": state.log_scales, "prototypes": tastes,
    }  # fmt: skip
    write_atomically(out / "posteriors.safetensors", save({n: t.clone().contiguous() for n, t in tensors.items()}))
    return 2 * state.means.shape[1] * state.means.element_size()


def _deal(server: Server, held: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Who holds how much; of what kind, nobody here knows."""
    nothing = {"pairs": 0, "held_out": 0}
    return [
        {
            "name": site, "seen": True, "axis": site, "train": held.get(site, nothing)["pairs"],
            "test": held.get(site, nothing)["held_out"], "shares": {site: 1.0},
        }
        for site in server.sites
    ]  # fmt: skip


def _identity(server: Server) -> str:
    """Names all that the rounds depend on and the server knows: settings, sites, public texts, model."""
    tables = server.asked.tables()
    for name in ("rounds", "checkpoint_every", "evaluate_every", "batch_clients"):
        tables["run"].pop(name)
    for name in ("evaluation", "data"):
        tables.pop(name)
    tables["backbone"], tables["sites"] = server.common.fingerprint, list(server.sites)
    digest = hashlib.sha256(json.dumps(tables, sort_keys=True).encode())
    for pair in server.public:
        digest.update(text_key(pair.prompt, pair.chosen, pair.rejected, image=pair.image).encode())
    return digest.hexdigest()
