"""Which colour means whom, once for all figures of a page.

In:  a ``Run``.
Out: a colour for each axis of preference and for each prototype.

Prototypes have no names of their own. Each gets the colour of the axis that most of its people are of, one to one, the
clearest match first; those left over get colours that no axis has. True axes are used here and nowhere in training.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from motet.report.canvas import MIXED, colour
from motet.report.folder import Run


@dataclass(frozen=True)
class Colours:
    """Colours of axes and prototypes."""

    axes: Mapping[str, str]
    prototypes: Mapping[int, str]
    mostly: Mapping[int, str]
    """The axis that a prototype shares its colour with; absent where it has none."""

    def of(self, axis: object) -> str:
        """The colour of a person's axis; grey where it has no single one."""
        return self.axes.get(str(axis), MIXED)


def colours(run: Run) -> Colours:
    """The colours of a run, by its last assignment."""
    axes = {axis: colour(place) for place, axis in enumerate(run.axes)}
    people, assignments = run.people, run.assignments
    last = {client: int(row["prototype"]) for client, row in people.items() if row.get("prototype") is not None}
    if not last and assignments:
        last = assignments[max(assignments)]
    known = {prototype for assigned in (last, *assignments.values()) for prototype in assigned.values()}
    if run.posteriors is not None:
        known |= set(range(len(run.posteriors.prototypes)))
    together = Counter(
        (prototype, str(people[client]["axis"]))
        for client, prototype in last.items()
        if client in people and people[client].get("axis") is not None
    )
    mostly: dict[int, str] = {}
    for (prototype, axis), _ in sorted(together.items(), key=lambda item: (-item[1], item[0])):
        if prototype not in mostly and axis not in mostly.values():
            mostly[prototype] = axis
    spare = [colour(place) for place in range(len(axes), len(axes) + len(known))]
    rest = iter(spare)
    prototypes = {p: axes[mostly[p]] if p in mostly else next(rest) for p in sorted(known)}
    return Colours(axes, prototypes, mostly)
