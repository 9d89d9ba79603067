"""Who has how long. What is right matters more than how fast it is, and a network more than one more layer: what is
short is short for the rows of layers that are named last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

TOTAL = 580.0  # seconds of a whole check, where not told


class Share(NamedTuple):
    own: float  # seconds, of the shares' sum, that no other stage can take; of the layers', the build can
    goes_on: bool  # into what others left, up to what later ones own


# In the order in which they run. The layers are last and have what is left. A stage that prepares, or that says more of
# a small set, does not go on: it would take all that is left. Of eight minutes; others cut or stretch all alike.
SHARES = {
    "compile": Share(70, False),  # the build's jobs are 408 s of one core: 8 cores may need longer than this
    "tries": Share(50, False),  # took 36 s on an H200 with 16 cores
    "promises": Share(60, True),
    "checks": Share(110, True),
    "networks": Share(85, True),  # took 81 s
    "sanitizer": Share(40, False),  # took 29 s
    "probes": Share(10, False),
    "layers": Share(55, True),  # 1.3 to 2 s a row
}
_LAST = "layers"


@dataclass(frozen=True)
class Schedule:
    """`start` and all times on one clock."""

    total: float
    start: float

    def own(self, stage: str) -> float:
        return SHARES[stage].own * self.total / sum(share.own for share in SHARES.values())

    def end(self, stage: str, now: float) -> float:
        """When a stage that begins `now` has to be over."""
        own_end, latest = now + self.own(stage), self.latest(stage)
        if SHARES[stage].goes_on:
            own_end = max(own_end, latest - (0.0 if stage == _LAST else self.own(_LAST)))
        return min(own_end, latest)

    def latest(self, stage: str) -> float:
        """The end of what cannot be cut without losing the rest, as the build: it takes the layers' seconds too, and
        leaves every other stage its own."""
        names = list(SHARES)
        later = sum(self.own(name) for name in names[names.index(stage) + 1 :] if name != _LAST)
        return self.start + self.total - later
