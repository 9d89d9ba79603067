"""A recipe names everything a run depends on: two runs of one recipe on one machine give the same weights."""

from __future__ import annotations

import builtins
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iessp.attach import METHODS, check_options, nearest
from iessp.data import DATASETS
from iessp.loss import check_schedule
from iessp.models import MODELS, own

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"
UNPRUNED = ("dense", "slim")  # trained without gates; slim is thinner throughout, to the same MACs

# What a run shares with the one it starts from, whatever the method and its trials changed.
PRETRAINED_ALIKE = (
    "model", "width", "data", "images", "resolution", "batch", "seed", "momentum", "weight_decay",
    "label_smoothing", "crop", "channels_last", "bfloat16",
)  # fmt: skip

# Where a field's number lies: from the first on, below the second.
_RANGES = {
    **dict.fromkeys(("epochs", "batch", "timed_batch", "trial_seeds"), (1, math.inf)),
    **dict.fromkeys(("images", "resolution", "crop", "trial_epochs"), (0, math.inf)),
    **dict.fromkeys(("lr", "gate_lr", "weight_decay", "kappa", "eta", "tolerance"), (0, math.inf)),
    **dict.fromkeys(("rise", "momentum", "label_smoothing"), (0, 1)),
    "seed": (0, 2**32),  # what every generator takes, times what is made of it
}


@dataclass(frozen=True)
class Recipe:
    """Shares (warmup, meet, settle, ...) are of the whole schedule, which is `epochs` passes over the
    training images."""

    name: str
    model: str = "vgg16"  # or package.module:factory, path/file.py:factory
    width: float = 1.0  # of every layer's channels
    data: str = "digits"
    method: str = "iem"
    options: dict[str, Any] = field(default_factory=dict)  # of the method
    budget: float | str = (
        0.2412  # share of the convolutions' MACs to keep (the paper's cut is 75.88 %), or "2.5 ms"
    )
    timed_batch: int = 1  # images that a budget in milliseconds is for
    pointwise: bool = False  # prune 1x1 convolutions too, where a stripe is a whole filter

    images: int = 0  # train on about so many of the training images; 0: on all
    resolution: int = 0  # the size that all images are brought to, whatever they are used for; 0: as they are
    pretrain: dict[str, Any] = field(default_factory=dict)  # fields of the dense run to start from
    epochs: int = 16
    batch: int = 64
    seed: int = 0
    lr: float = 0.05  # peak; rises over `rise`, then falls linearly to zero
    rise: float = 0.15
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gate_lr: float = 0.005  # Adam's, constant
    label_smoothing: float = 0.0
    sizes: tuple[tuple[float, int], ...] = ()  # (from this share on, train at this size); empty: as the data
    crop: int = 0  # pixels a training image is shifted by at most
    channels_last: bool = False
    bfloat16: bool = False  # autocast
    packed: bool = True  # once the skeletons are settled, go on training on the stripe kernels

    warmup: float = 0.1  # gates switch on
    meet: float = 0.5  # the budget is met
    settle: float = 0.75  # the skeletons are fixed
    kappa: float = 1.0
    eta: float = 10.0
    tolerance: float = 0.5
    adaptive: bool = True

    # What `iessp reproduce` tries for a method before its runs, for how many epochs and how often: method -> changes.
    trials: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    trial_epochs: int = 0
    trial_seeds: int = 3  # one run chooses by luck: two learning rates are often closer than two seeds of one

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            self._check_type(f.name, str(f.type))
        for kind, given, valid in (
            ("model", self.model, MODELS),
            ("data set", self.data, DATASETS),
            ("method", self.method, (*METHODS, *UNPRUNED)),
        ):
            if given not in valid and not (kind == "model" and own(given)):
                raise ValueError(nearest(kind, given, valid))
        for name, (low, high) in _RANGES.items():
            if not low <= (value := getattr(self, name)) < high:
                raise ValueError(f"{name} must be at least {low} and below {high}, got {value}")
        check_schedule(self.warmup, self.meet, self.settle)
        if self.pruned:
            check_options(self.method, self.options)
        elif self.options:
            raise ValueError(f"{self.method} has no options, got {self.options}")
        if self.method == "slim" and own(self.model):
            raise ValueError(f"slim is for the built-in networks: {self.model} has one width")
        if self.milliseconds and self.method in ("slim", "l1-filter"):
            raise ValueError(
                f"{self.method} has no budget in milliseconds, got {self.budget!r}: give a share of MACs"
            )
        object.__setattr__(self, "sizes", self._checked_sizes())

    def _check_type(self, name: str, annotation: str) -> None:
        """Raises ValueError where a field holds something else than it is declared to; TOML knows no tuples."""
        value, kinds = getattr(self, name), annotation.split("[")[0].split(" | ")
        taken = {"float": (float, int), "tuple": (tuple, list)}
        types = tuple(t for k in kinds for t in taken.get(k, (getattr(builtins, k),)))
        if not isinstance(value, types) or (isinstance(value, bool) and "bool" not in kinds):
            raise ValueError(f"{name} takes {' or '.join(kinds)}, got {value!r}")

    def _checked_sizes(self) -> tuple[tuple[float, int], ...]:
        try:
            sizes = tuple((float(share), int(size)) for share, size in self.sizes)
        except (TypeError, ValueError):
            sizes = ((math.nan, 0),)
        if not all(0 <= share <= 1 and size >= 1 for share, size in sizes) or list(sizes) != sorted(sizes):
            raise ValueError(
                f"sizes takes [[share, size], ...], the shares 0..1 in order, got {self.sizes!r}"
            )
        return sizes

    @property
    def milliseconds(self) -> float | None:
        """The budget in milliseconds, if that is how it is given; raises ValueError for what is no budget."""
        text = self.budget if isinstance(self.budget, str) else ""
        try:
            value = float(text.removesuffix("ms")) if text.endswith("ms") else 0.0
        except ValueError:
            value = 0.0
        if 0 < value < math.inf:
            return value
        if not isinstance(self.budget, str) and 0 < self.budget <= 1:
            return None
        raise ValueError(
            f'budget is a share of MACs in (0, 1] or a time such as "2.5 ms", got {self.budget!r}'
        )

    @property
    def pruned(self) -> bool:
        return self.method not in UNPRUNED

    def size(self, done: float) -> int | None:
        """Image size to train at when the share `done` of the schedule is over; None: as the data are."""
        reached = [size for share, size in self.sizes if share <= done]
        return reached[-1] if reached else None

    def but(self, **changes: Any) -> Recipe:
        """The same recipe with some fields changed; raises ValueError for a field that does not exist.

        Options are those of the method: another method begins without any.
        """
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ValueError(nearest("recipe field", name, names))
        if changes.get("method", self.method) != self.method:
            changes.setdefault("options", {})
        return dataclasses.replace(self, **changes)

    def changed(self, changes: dict[str, Any]) -> Recipe:
        """As `but`; options of the method are added to those that are there, not put in their place."""
        options = {**self.options, **changes.get("options", {})}
        return self.but(**{**changes, "options": options})

    def untried(self) -> Recipe:
        """The same recipe without its trials: what one run is, whatever was tried before it."""
        return self.but(trials={}, trial_epochs=0, trial_seeds=Recipe.trial_seeds)

    def before(self) -> Recipe | None:
        """The recipe of the run that this one starts from: dense, or as thin as `slim` is."""
        if not self.pretrain:
            return None
        same = {name: getattr(self, name) for name in PRETRAINED_ALIKE}
        if self.method == "slim":
            same |= {"method": "slim", "budget": self.budget}
        return Recipe(self.name, method="dense").but(**{**same, **self.pretrain})

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Recipe:
        values = dict(values)
        return Recipe(name=values.pop("name", "unnamed")).but(**values)


def bundled() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read(name_or_path: str) -> Recipe:
    """A bundled recipe by name, or a TOML file by path. Raises ValueError when it is neither or names an
    unknown field."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = RECIPES / f"{name_or_path}.toml"
        if not path.exists():
            raise ValueError(nearest("recipe", name_or_path, bundled()))
    if not path.exists():
        raise ValueError(f"recipe file {path} does not exist")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"{path} is not TOML: {error}") from error
    return Recipe.from_dict({"name": path.stem, **values})


def parse_changes(assignments: list[str]) -> dict[str, Any]:
    """["epochs=3", "model=resnet20"] -> {"epochs": 3, "model": "resnet20"}: values as in TOML, bare words as
    strings."""
    changes = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise ValueError(f'"{assignment}" is not KEY=VALUE')
        try:
            changes[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = value
    return changes
