"""Recipes: fields, changes to them, the methods of `iessp reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iessp import reproduce
from iessp.data import load
from iessp.recipe import Recipe, bundled, parse_changes, read


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [("epochs", "abc", "int"), ("epochs", 1.5, "int"), ("lr", "fast", "float"), ("sizes", 3, "tuple"),
     ("budget", [], "float or str"), ("adaptive", 1, "bool"), ("seed", True, "int")],
)  # fmt: skip
def test_a_recipe_says_what_a_field_takes(field: str, value: object, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{field} takes {kind}, got "):
        read("digits").but(**{field: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [({"rise": 1.0}, "rise must be at least 0 and below 1, got 1.0"), ({"rise": -0.1}, "rise must be"),
     ({"momentum": 1}, "momentum must be"), ({"label_smoothing": 1.5}, "label_smoothing must be"),
     ({"lr": float("nan")}, "lr must be"), ({"gate_lr": -1}, "gate_lr must be"), ({"crop": -1}, "crop must be"),
     ({"weight_decay": -1e-4}, "weight_decay must be"), ({"tolerance": -1}, "tolerance must be"),
     ({"batch": 0}, "batch must be at least 1"), ({"timed_batch": 0}, "timed_batch must be"),
     ({"warmup": 0.6}, "need 0 <= warmup < meet <= settle <= 1, got 0.6, 0.5, 0.65"),
     ({"meet": 0.9}, "need 0 <="), ({"settle": 1.1}, "need 0 <="), ({"budget": 0}, "budget is a share of MACs in"),
     ({"budget": 1.5}, "budget is a share"), ({"budget": "inf ms"}, "budget is a share"),
     ({"budget": "2 s"}, "budget is a share"), ({"sizes": [16]}, r"sizes takes \[\[share, size\]"),
     ({"sizes": [[0.8, 32], [0, 16]]}, "sizes takes"), ({"sizes": [[0, 0]]}, "sizes takes"),
     ({"seed": -1}, "seed must be at least 0"),
     ({"options": {"module": "False"}}, "option module of iem takes bool, got 'False'"),
     ({"method": "dense", "options": {"seed": 1}}, "dense has no options, got {'seed': 1}"),
     ({"method": "slim", "model": "net.py:make"}, "slim is for the built-in networks: net.py:make has one width")],
)  # fmt: skip
def test_a_recipe_says_what_makes_no_sense(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read("digits").but(**change)


def test_bundled_recipes_are_valid() -> None:
    assert {"digits", "vgg16-cifar10", "resnet56-cifar10"} <= set(bundled())
    for name in bundled():
        recipe = read(name)
        assert recipe.name == name
        assert Recipe.from_dict(recipe.as_dict()) == recipe


def test_changes_are_values_as_in_toml() -> None:
    changes = parse_changes(["epochs=3", "lr=1e-2", "model=resnet20", "sizes=[[0.0, 16]]", "packed=false"])
    assert changes == {"epochs": 3, "lr": 0.01, "model": "resnet20", "sizes": [[0.0, 16]], "packed": False}
    assert read("digits").but(**changes).size(0.5) == 16


def test_another_method_begins_without_options() -> None:
    recipe = read("digits")
    assert recipe.options == {"exact": False}
    assert recipe.but(epochs=1).options == recipe.options
    assert recipe.but(method="magnitude").options == {}
    assert recipe.but(method="magnitude", options={}).options == {}
    assert recipe.but(method="random", options={"seed": 1}).options == {"seed": 1}


def test_methods_with_parts_taken_away() -> None:
    recipe = reproduce.with_method(read("digits"), "iem(message=false, gain=2.0)")
    assert (recipe.method, recipe.options) == ("iem", {"message": False, "gain": 2.0})
    fixed = reproduce.with_method(recipe, "iem(adaptive=false, kappa=0, message=false)")
    assert (fixed.adaptive, fixed.kappa, fixed.options) == (False, 0, {"message": False})
    assert all(reproduce.with_method(recipe, method).method == "iem" for method in reproduce.ABLATION)
    with pytest.raises(ValueError, match=r'"iem\[" is not METHOD'):
        reproduce.with_method(recipe, "iem[")


def test_options_that_a_method_was_written_with_outlast_its_trials() -> None:
    chosen = {"lr": 0.3, "options": {"alpha": 0.01}}
    cell = reproduce.cell_of(read("digits"), "filter-skeleton(decay=0)", chosen, 7)
    assert (cell.seed, cell.lr, cell.options) == (7, 0.3, {"decay": 0, "alpha": 0.01})
    cell = reproduce.cell_of(read("digits"), "filter-skeleton(alpha=0.003, decay=0)", chosen, 7)
    assert (cell.lr, cell.options) == (0.3, {"decay": 0, "alpha": 0.003})


def test_a_record_names_what_was_changed() -> None:
    recipe = read("vgg10-few-cifar10").but(
        budget="2 ms", packed=False, sizes=[[0, 8]], options={"hard": True}, pretrain={"epochs": 3}, trials={}
    )
    changes = reproduce.changed(recipe)
    assert len(changes) == 6
    assert read(recipe.name).but(**parse_changes(changes)) == recipe
    assert reproduce.changed(Recipe("mine", epochs=3)) == []


def test_what_is_wrong_with_a_method_is_said_before_any_is_trained(tmp_path: Path) -> None:
    trials = {"iem": [{"lr": 0.1}], "magnitude": [{"lrr": 0.1}]}
    recipe = read("digits").but(trials=trials, trial_epochs=1)
    for methods, said in (
        (["iem", "magnitudee"], 'unknown method "magnitudee"'),
        (["iem", "iem(module=False)"], "option module of iem takes bool, got 'False'"),
        (["iem", "magnitude"], 'unknown recipe field "lrr"'),
    ):
        with pytest.raises(ValueError, match=said):
            reproduce.run(recipe, load("digits"), tmp_path, methods, 1, "cpu")
    assert not list(tmp_path.iterdir())


def test_methods_that_a_recipe_cannot_have_are_left_out_of_the_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reproduce.possible(read("digits")) == list(reproduce.DEFAULT)
    own = read("digits").but(model="net.py:make", width=1.0)
    assert [m for m in reproduce.DEFAULT if m not in reproduce.possible(own)] == ["slim"]
    assert "slim is left out: slim is for the built-in networks" in capsys.readouterr().out
    timed = read("digits").but(budget="2 ms")
    assert [m for m in reproduce.DEFAULT if m not in reproduce.possible(timed)] == ["l1-filter", "slim"]
