"""The engine over Flower: brings frames to SuperNodes and their answers back, with deadlines of its own.

In:  frames by the names of sites.
Out: the frames that came back in time, and a sentence for each one that did not.

Names are the sites' own. Flower's node ids say nothing, so each new node is asked who it is; where a key was registered
under a name (``flwr supernode register --name``), the node must answer with that name, and one name belongs to one
connected node, the first. A node that comes back with another id is asked again and found under its name.

Messages are pushed and pulled here, not by Flower's ``send_and_receive``, which sleeps 3 s between looks and, without a
timeout, for ever. A message lives as long as its deadline: one that nobody fetched is not worked on later.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from flwr.app import Message

from motet.engines.flower.frames import ACTION, WHO, Question, asked, read_answer
from motet.engines.flower.kits import NAME
from motet.messages import Failure

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
MEETING_SECONDS = 60.0
"""How long a new node may take to say who it is; Flower needs about 10 s, a busy machine longer."""

SILENT = Failure("failed", "the site's app failed before it could answer; the site's log says why")
FAILURES = {
    1: Failure("failed", "the site could not load motet's app; is the same version of motet[flower] installed there?"),
    2: Failure("failed", "the site's app failed to start; is the same version of motet[flower] installed there?"),
    3: Failure("timeout", "the message ran out of time before the site answered"),
    4: Failure("timeout", "the answer ran out of time on its way"),
    5: Failure("lost", "the site is no longer connected to the SuperLink"),
    7: Failure("refused", "the site does not trust the app that was sent to it (--trusted-entities)"),
    8: Failure("lost", "the site's process died while it worked on the message"),
}
"""By Flower's error codes. The text that comes with a code is the site's, and stays unread."""
GONE = FAILURES[5]


@runtime_checkable
class Post(Protocol):
    """What is used of Flower's ``Grid``."""

    def get_nodes(self) -> Iterable[Any]: ...
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...


class FlowerCarrier:
    """A ``Carrier`` over a SuperLink's connected nodes."""

    def __init__(
        self, grid: Post, poll_seconds: float = POLL_SECONDS, meeting_seconds: float = MEETING_SECONDS
    ) -> None:
        self.grid, self.poll_seconds, self.meeting_seconds = grid, poll_seconds, meeting_seconds
        self._names: dict[int, str] = {}
        self._asked: dict[int, float] = {}
        """When a stranger was last asked who it is."""
        self._pending: dict[str, int] = {}
        """Strangers' answers that may still come, by message."""

    def sites(self) -> Sequence[str]:
        """Names of the connected sites, ascending; new ones are asked first, for ``meeting_seconds`` at most."""
        self._meet(time.monotonic() + self.meeting_seconds)
        return sorted(self._names.values())

    def carry(
        self, kind: str, step: int, frames: Mapping[str, bytes], deadline: float
    ) -> tuple[dict[str, bytes], dict[str, Failure]]:
        """Frames that came back within ``deadline`` seconds, and why others did not; a site's failure is no error."""
        until = time.monotonic() + deadline
        if not set(frames) <= set(self._names.values()):
            self._meet(min(until, time.monotonic() + self.meeting_seconds))
        nodes = {name: node for node, name in self._names.items()}
        answers: dict[str, bytes | Failure] = {name: GONE for name in frames if name not in nodes}
        sent: dict[str, str] = {}
        for name in sorted(set(frames) & set(nodes)):
            message = self._push(nodes[name], Question(kind, step, frames[name]), until)
            if message is None:
                answers[name] = Failure("failed", "the SuperLink did not take the message; it may be too large")
            else:
                sent[message] = name
        while sent:
            for message, reply in self._pulled(sent):
                name = sent.pop(message)
                answers[name] = self._read(reply, name, nodes[name])
            if not sent or not self._rested(until):
                break
        late = Failure("timeout", f"no answer within {deadline:g} s")
        answers |= dict.fromkeys(sent.values(), late)
        ordered = sorted(answers.items())
        return (
            {name: answer for name, answer in ordered if isinstance(answer, bytes)},
            {name: answer for name, answer in ordered if isinstance(answer, Failure)},
        )

    def _push(self, node: int, question: Question, until: float) -> str | None:
        # One by one: a message that the SuperLink refuses takes no other with it.
        seconds = max(until - time.monotonic(), 0.1)
        message = Message(asked(question), node, f"query.{ACTION}", ttl=seconds, group_id=f"{question.step}")
        return next(iter(self.grid.push_messages([message])), None)

    def _pulled(self, waiting: Mapping[str, Any]) -> list[tuple[str, Message]]:
        """The answers that are there by now, each with the message that it answers; Flower hands each out once."""
        replies = [(reply.metadata.reply_to_message_id, reply) for reply in self.grid.pull_messages(list(waiting))]
        return [(message, reply) for message, reply in replies if message in waiting]

    def _rested(self, until: float) -> bool:
        """Sleep until the next look; False when there is no time for one."""
        left = until - time.monotonic()
        time.sleep(max(0.0, min(self.poll_seconds, left)))
        return left > 0

    def _read(self, reply: Message, name: str, node: int) -> bytes | Failure:
        if reply.has_error():
            failure = FAILURES.get(reply.error.code, SILENT)
            if failure is GONE:
                self._forget(node)
            return failure
        try:
            answer = read_answer(reply.content)
        except ValueError:
            return Failure("rejected", "the site's answer holds no frame")
        if not answer.frame:
            return SILENT
        if answer.site != name:
            self._forget(node)
            return Failure("lost", "another site answers from the node that this one had; the next call looks for it")
        return answer.frame

    def _forget(self, node: int) -> None:
        self._names.pop(node, None)
        self._asked.pop(node, None)

    def _meet(self, until: float) -> None:
        """Learn who is connected. Waits for those who are asked for the first time, and for nobody else."""
        online = {int(node.node_id): str(node.name) for node in self.grid.get_nodes()}
        for node in (set(self._names) | set(self._asked)) - set(online):
            self._forget(node)
        self._pending = {message: node for message, node in self._pending.items() if node in online}
        now, fresh = time.monotonic(), set()
        for node in sorted(set(online) - set(self._names)):
            before = self._asked.get(node)
            if before is not None and now - before < self.meeting_seconds:
                continue
            if before is None:
                fresh.add(node)
            self._asked[node] = now
            message = self._push(node, Question(WHO, 0, b""), now + self.meeting_seconds)
            if message is not None:
                self._pending[message] = node
        while self._pending:
            for message, reply in self._pulled(self._pending):
                node = self._pending.pop(message)
                fresh.discard(node)
                self._greet(node, reply, online[node])
            if not fresh or not self._rested(until):
                break

    def _greet(self, node: int, reply: Message, registered: str) -> None:
        if reply.has_error():
            failure = FAILURES.get(reply.error.code, SILENT)
            log.warning("node %s was asked who it is: %s", node, failure.reason)
            if failure.why in ("timeout", "lost"):
                self._forget(node)  # bad luck: the next call asks again
            return
        try:
            name = read_answer(reply.content).site
        except ValueError:
            name = ""
        if not NAME.fullmatch(name):
            log.warning("node %s is connected but does not say who it is; its log says why", node)
        elif registered and registered != name:
            log.warning("node %s calls itself %s, but its key is registered for %s; left out", node, name, registered)
        elif name in self._names.values():
            log.warning("node %s calls itself %s, as a connected node does already; left out", node, name)
        else:
            self._names[node] = name
            self._asked.pop(node, None)
