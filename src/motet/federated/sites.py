"""Real sites: questions to many of them over any engine, and the server's rounds on top of that.

In:  a carrier of frames, a gate, packets by site, a deadline and a quorum.
Out: answers that the gate let in, by site; or ``QuorumError``, after which the run can go on from its checkpoint.

``Federation`` is all that server code sees of an engine. ``SitesEngine`` makes it an engine of ``run_rounds``, so that
the same algorithm objects run over it unchanged. Nothing depends on the order in which answers arrive. A site that did
not answer in time is left out until it says hello again. A question that was settled before the server was killed is
put to the same sites again, so that a resumed run ends in the same bits.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from motet.errors import ConfigError, MessageError, RunError
from motet.federated.contract import Algorithm, Ground
from motet.federated.host import HELLO
from motet.federated.journal import Journal, Settled
from motet.messages import Answers, Carrier, Failure, Packet, enveloped
from motet.records import Broadcast, ClientData, Memory, Reply, generator
from motet.trust.gate import Declined, Gate, Rejected, Rule, TensorRule, WordRule

VISITS = 8
"""Visits that a round can have at most; the step of a visit is round * VISITS + visit."""
MOST_PAIRS = 1_000_000
"""Pairs that a site can claim, where nothing else is known of it."""
LONGEST_PAIR = 1_000.0
"""Norm of one whitened pair, chosen minus rejected, that no honest data reach: it is about the root of its columns."""
FASTEST = 1.2
"""Learning rates by which one step of AdamW moves a number at most: 1.17 with betas of 0.9 and 0.95 (Cauchy-Schwarz on
its two running means)."""
FIRST_WAIT = 0.05
"""Seconds before a site that failed at once is asked again; they double."""
MOST_WAITING = 16
"""Visits between two hellos to a site that does not answer, at most."""

LIMITS: Mapping[str, Mapping[str, Any]] = {
    "posterior.mean": {"norm": 100.0},
    "posterior.log_scale": {"least": -4.0, "most": 3.0},
    "evidence": {"least": -1e4, "most": 1e4, "each_pair": True},
    "losses": {"least": 0.0, "most": 1e4},
    "moment": {"norm": LONGEST_PAIR, "each_pair": True},
    "spread": {"least": 0.0, "most": LONGEST_PAIR**2, "each_pair": True},
    "curvature": {"least": 0.0, "most": 0.25001, "each_pair": True},
    "bend": {"least": 0.0, "most": LONGEST_PAIR**2 / 4, "each_pair": True},
    "pull": {"norm": 1e9, "each_pair": True},
    "figures": {"least": -1e6, "most": 1e6},
}
"""What tensors of these names can be, whoever sends them: wide enough that no honest site meets a limit, and narrow
enough that no sum overflows. An algorithm that knows better has ``limits`` of its own."""


class QuorumError(RunError):
    """Too few sites gave an answer that can be used. Nothing was computed: the run goes on from its checkpoint."""

    def __init__(self, kind: str, step: int, answers: Answers[Packet], quorum: int) -> None:
        asked = len(answers.ok) + len(answers.failed)
        reasons = "; ".join(f"{site}: {failure.why}, {failure.reason}" for site, failure in answers.failed.items())
        super().__init__(
            f"{len(answers.ok)} of {asked} sites gave a usable answer to {kind!r} at step {step}, {quorum} are needed "
            f"({reasons}); look at these sites' logs, then resume the run"
        )
        self.kind, self.step, self.answers = kind, step, answers


class Federation:
    """Asks sites, and gives back what passed the gate.

    Args:
        carrier: The engine.
        run: The run's name: letters, digits, dots and dashes.
        gate: What every answer must pass.
        journal: Where accepted answers are written down; what is there already counts.
        retries: Times that a site that failed, or a quorum that was missed, is tried again.
        said: Told, in a sentence, who is left out and why.
        hello_seconds: How long a visit waits for a hello of those that were left out.
    """

    def __init__(
        self,
        carrier: Carrier,
        run: str,
        gate: Gate,
        journal: Journal | None = None,
        retries: int = 2,
        said: Callable[[str], None] = lambda line: None,
        hello_seconds: float = 2.0,
    ) -> None:
        self.carrier, self.run, self.gate, self.journal = carrier, run, gate, journal
        self.retries, self.said, self.hello_seconds = retries, said, hello_seconds
        self._benched: dict[str, tuple[int, int]] = {}  # the visit that greets them next, and the visits they missed
        self._visits = 0
        self._settled: dict[tuple[str, int], Settled] = {}
        for settled in journal.records if journal is not None else ():
            self._settled[settled.kind, settled.step] = settled
            for site, digest in settled.accepted.items():
                gate.remember(site, settled.kind, settled.step, settled.requests[site], digest)
                gate.count_visit(site, rejected=False)
            for site in settled.rejected:
                gate.count_visit(site, rejected=True)
        if journal is not None and journal.said:
            said(journal.said)

    def sites(self) -> Sequence[str]:
        """Names of all sites, ascending, whether or not they answer just now."""
        return sorted(self.carrier.sites())

    def ask(
        self,
        kind: str,
        step: int,
        packets: Mapping[str, Packet],
        deadline: float,
        quorum: int,
        rule: Rule | Mapping[str, Rule],
    ) -> Answers[Packet]:
        """Put one question to many sites.

        Args:
            kind: Of the question.
            step: Counts visits.
            packets: What each site is asked.
            deadline: Seconds in which sites answer, retries and hellos within them. Only a missed quorum takes longer:
                each of ``retries`` further tries has as long again, and asks those left out as well.
            quorum: Usable answers that are needed.
            rule: What an honest answer looks like, for all or by site.

        Raises:
            QuorumError: Fewer sites than that gave a usable answer.
            ConfigError: The quorum is larger than the number of sites asked.
        """
        if not 0 <= quorum <= len(packets):
            raise ConfigError(f"quorum must be between 0 and the {len(packets)} sites asked, got {quorum}; lower it")
        named = {site: enveloped(packets[site], self.run, site, kind, step) for site in sorted(packets)}
        requests = {site: request for site, (_, request) in named.items()}
        self._visits += 1
        before = self._settled.get((kind, step))
        again = before is not None and before.requests == requests
        wanted = {site for site in named if before is None or not again or site in before.accepted}
        ok: dict[str, Packet] = {}
        failed = {site: Failure("lost", "was left out when this was first asked") for site in set(named) - wanted}
        ends = time.monotonic() + deadline
        for site in self._absent(wanted, step, ends):
            failed[site] = Failure("timeout", "does not answer, and says no hello")
            wanted.discard(site)
        asked, tried = sorted(wanted), set[str]()
        for attempt in range(1 + self.retries):
            if attempt:
                missing = [site for site in named if site not in ok and failed[site].why != "refused"]
                if len(ok) < quorum:  # whoever was left out so far is needed now
                    asked, ends = missing, time.monotonic() + deadline
                else:  # those that failed at once, as long as there is time
                    asked = [site for site in missing if site in wanted and failed[site].why != "timeout"]
                if not asked or time.monotonic() >= ends:
                    break
                time.sleep(max(0.0, min(FIRST_WAIT * 2 ** (attempt - 1), ends - time.monotonic())))
            for site in [site for site in asked if self.gate.suspended(site)]:
                failed[site] = Failure("rejected", "is not heard any more: too many of its answers were rejected")
                asked.remove(site)
            tried |= set(asked)
            left = max(0.0, ends - time.monotonic())
            frames = {site: named[site][0] for site in asked}
            back, lost = self.carrier.carry(kind, step, frames, left) if asked else ({}, {})
            for site in asked:
                own = rule if isinstance(rule, Rule) else rule[site]
                found = self._admitted(site, kind, step, named[site][1], back, lost, own)
                if isinstance(found, Packet):
                    ok[site] = found
                    failed.pop(site, None)
                else:
                    failed[site] = found
        answers = Answers({site: ok[site] for site in sorted(ok)}, {site: failed[site] for site in sorted(failed)})
        self._settle(kind, step, requests, answers, tried)
        if len(ok) < quorum:
            raise QuorumError(kind, step, answers, quorum)
        return answers

    def _admitted(
        self,
        site: str,
        kind: str,
        step: int,
        request: str,
        back: Mapping[str, bytes],
        lost: Mapping[str, Failure],
        rule: Rule,
    ) -> Packet | Failure:
        """What a site said, or why that is nothing."""
        if site not in back:
            return lost.get(site, Failure("lost", "the engine says nothing of it"))
        try:
            return self.gate.admit(site, kind, step, request, back[site], rule)
        except Rejected as error:
            return Failure("rejected", f"{error.check}: {error.reason}")
        except Declined as error:
            return Failure(error.why, error.reason)

    def _absent(self, wanted: set[str], step: int, ends: float) -> list[str]:
        """Those who did not answer lately and, if it is time to greet them again, say no hello."""
        benched = sorted(wanted & set(self._benched))
        greeted = [site for site in benched if self._benched[site][0] <= self._visits]
        if greeted:
            frames = {site: enveloped(Packet(), self.run, site, HELLO, step)[0] for site in greeted}
            left = max(0.0, min(self.hello_seconds, ends - time.monotonic()))
            back, _ = self.carrier.carry(HELLO, step, frames, left)
            for site in greeted:
                if site in back:  # what it says is worth nothing yet: its answer goes through the gate
                    benched.remove(site)
                    self.said(f"{site} is back at step {step}")
                else:
                    self._bench(site)
        return benched

    def _bench(self, site: str) -> None:
        """Leave a site out, twice as long after each visit that it missed: it must not cost a hello in each."""
        missed = self._benched.get(site, (0, 0))[1] + 1
        self._benched[site] = self._visits + min(2 ** (missed - 1), MOST_WAITING), missed

    def _settle(
        self, kind: str, step: int, requests: Mapping[str, str], answers: Answers[Packet], tried: set[str]
    ) -> None:
        """Remember how it ended; when this returns it is on the disk."""
        for site, failure in answers.failed.items():
            self.said(f"{kind} at step {step}: {site} is left out, {failure.why}: {failure.reason}")
            if site in tried and failure.why in ("timeout", "lost"):
                if self._benched.get(site, (0, 0))[0] <= self._visits:
                    self._bench(site)
            elif failure.why == "rejected":
                self.gate.count_visit(site, rejected=True)
        for site in answers.ok:
            self._benched.pop(site, None)
            self.gate.count_visit(site, rejected=False)
        if self.journal is not None and answers.ok:
            accepted = {site: self.gate.accepted(site, kind, step, requests[site]) for site in answers.ok}
            rejected = tuple(site for site, failure in answers.failed.items() if failure.why == "rejected")
            self.journal.append(Settled(kind, step, requests, accepted, rejected))


class SitesEngine:
    """An engine for ``run_rounds``: client i is the i-th site. Memories live at the sites.

    Args:
        federation: Asks.
        algorithm: Whose visits these are; it tells what an honest reply looks like.
        ground: Widths, as the algorithm was told them.
        order: Sites by client number; ascending by name where it is left out.
        deadline: Seconds for one visit.
        quorum: Usable replies that a visit needs, or all of a smaller cohort; left out, half of those visited.
        most_pairs: Pairs that a site can claim, for all or by site, e.g. what it said when it joined.
    """

    def __init__(
        self,
        federation: Federation,
        algorithm: Algorithm[Any],
        ground: Ground,
        order: Sequence[str] | None = None,
        deadline: float = 600.0,
        quorum: int | None = None,
        most_pairs: int | Mapping[str, int] = MOST_PAIRS,
    ) -> None:
        self.federation, self.algorithm, self.ground = federation, algorithm, ground
        self.order = tuple(federation.sites() if order is None else order)
        self.deadline, self.quorum, self.most_pairs = deadline, quorum, most_pairs
        self._place = (0, 0)  # round and visit
        self._templates: dict[str, Rule] = {}

    @property
    def memories(self) -> Mapping[int, Memory]:
        """Nothing: memories never leave the sites."""
        return {}

    @memories.setter
    def memories(self, given: Mapping[int, Memory]) -> None:
        self._place = (0, 0)  # whoever puts memories back begins a round anew

    def sites(self) -> Sequence[int]:
        """Numbers of all clients."""
        return range(len(self.order))

    def ask(self, kind: str, step: int, packets: Mapping[int, Broadcast]) -> tuple[list[Reply], dict[int, str]]:
        """One visit of round ``step``; replies in ascending order of clients, and why others gave none.

        Raises:
            QuorumError: Too few replies.
            ConfigError: The algorithm's replies cannot be checked, or a round has too many visits.
        """
        round, visit = self._place[0], self._place[1] + 1
        if step != round:
            visit = 0
        self._place = (step, visit)
        if visit >= VISITS:
            raise ConfigError(f"a round must have at most {VISITS} visits to go to sites, got more in round {step}")
        if not packets:
            return [], {}
        seen, first = {self.order[client]: client for client in sorted(packets)}, packets[min(packets)]
        template = self._template(first)
        rules = {
            site: allowed(template, self.algorithm, packets[client], self._most(site)) for site, client in seen.items()
        }
        asked = {
            site: Packet({"client": client, "round": packets[client].round}, packets[client].tensors)
            for site, client in seen.items()
        }
        quorum = math.ceil(len(seen) / 2) if self.quorum is None else min(self.quorum, len(seen))
        answers = self.federation.ask(kind, step * VISITS + visit, asked, self.deadline, quorum, rules)
        replies = [
            Reply(seen[site], float(_number(packet.meta["pairs"])), packet.tensors)
            for site, packet in answers.ok.items()
        ]
        failed = {seen[site]: f"{failure.why}, {failure.reason}" for site, failure in answers.failed.items()}
        return sorted(replies, key=lambda reply: reply.client_id), dict(sorted(failed.items()))

    def _template(self, broadcast: Broadcast) -> Rule:
        """Made once for broadcasts that look alike; single numbers count too, for they can be switches."""
        key = repr(
            [
                (name, tensor.dtype, tuple(tensor.shape), tensor.tolist() if tensor.numel() == 1 else None)
                for name, tensor in sorted(broadcast.tensors.items())
            ]
        )
        if key not in self._templates:
            self._templates[key] = template_rule(self.algorithm, self.ground, broadcast)
        return self._templates[key]

    def _most(self, site: str) -> int:
        return self.most_pairs if isinstance(self.most_pairs, int) else self.most_pairs.get(site, 1)


def template_rule(algorithm: Algorithm[Any], ground: Ground, broadcast: Broadcast) -> Rule:
    """Names, types and shapes of an honest reply to a broadcast: those of two made-up clients who answer it here.

    Raises:
        ConfigError: The algorithm cannot answer for somebody who has embedded pairs only, or its reply grows with the
            number of pairs, that is, it sends data.
    """
    draw = generator(0, "template")
    made_up = []
    for pairs in (4, 7):
        chosen, rejected = torch.randn(2, pairs, ground.hidden, generator=draw)
        made_up.append(ClientData(0, chosen, rejected, torch.zeros(pairs, ground.scalars)))
    try:
        replies, _ = algorithm.client_update([broadcast] * 2, made_up, [{}, {}])
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"{algorithm.name!r} cannot go to sites: its replies cannot be foreseen ({type(error).__name__}: {error})"
        ) from None
    shapes = [{name: (t.dtype, tuple(t.shape)) for name, t in reply.tensors.items()} for reply in replies]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{algorithm.name!r} cannot go to sites: its reply is larger the more pairs a client holds, it sends data"
        )
    return Rule({}, {name: TensorRule(*shapes[0][name]) for name in sorted(shapes[0])})


def allowed(template: Rule, algorithm: Algorithm[Any], broadcast: Broadcast, most_pairs: int) -> Rule:
    """The rule for one site: the template's tensors, the limits of their names, and how far local steps can move.

    What a site was sent and sends back, under the same name (or as the one row of its plural), is held near what it
    was sent: AdamW moves no number by more than about a learning rate a step.
    """
    limits = {**LIMITS, **getattr(algorithm, "limits", {})}
    settings = getattr(algorithm, "settings", None)
    rate, steps, decay = (getattr(settings, name, None) for name in ("learning_rate", "local_steps", "weight_decay"))
    tensors = {}
    for name, rule in template.tensors.items():
        own: dict[str, Any] = dict(limits.get(name, {}))
        sent, row = broadcast.tensors.get(name), broadcast.tensors.get(f"{name}s")
        if sent is None and row is not None and tuple(row.shape) == (1, *rule.shape):
            sent = row[0]
        if not own and rate and steps and sent is not None and tuple(sent.shape) == rule.shape:
            step = FASTEST * rate * steps * math.sqrt(sent.numel())
            shrunk = rate * steps * (decay or 0.0) * (float(torch.linalg.vector_norm(sent.double())) + step)
            own = {"norm": step + shrunk, "centre": sent.detach().cpu()}
        tensors[name] = TensorRule(rule.dtype, rule.shape, **own)
    return Rule({"pairs": WordRule(int, 1, most_pairs)}, tensors)


def _number(word: Any) -> int:
    if type(word) is not int:
        raise MessageError(f"a number of pairs must be whole, got {word!r}")  # the gate lets no other in
    return word
