"""Registries: what a name leads to, and what an unknown name is told."""

from __future__ import annotations

import pytest

from hf_bitnet.quantizers import ACTIVATION_SCHEMES, SCALE_RULES, WEIGHT_SCHEMES
from hf_bitnet.registry import Registry
from hf_bitnet.relaxations import RELAXATIONS
from hf_bitnet.ste import ESTIMATORS

REGISTRIES = [WEIGHT_SCHEMES, SCALE_RULES, ACTIVATION_SCHEMES, ESTIMATORS, RELAXATIONS]


def _fruit() -> Registry[int]:
    fruit: Registry[int] = Registry("fruit")
    fruit.register("apple")(1)
    fruit.register("pear")(2)
    return fruit


def test_members_in_order_of_registration() -> None:
    fruit = _fruit()
    assert fruit.names() == ("apple", "pear") == tuple(fruit)
    assert fruit.get("pear") == 2
    assert "apple" in fruit and "plum" not in fruit and 3 not in fruit


def test_register_is_a_decorator_that_returns_its_member() -> None:
    @Registry("rule").register("halve")
    def halve(x: float) -> float:
        return x / 2

    assert halve(4.0) == 2.0


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fruit 'apple' is already registered; choose another name"):
        _fruit().register("apple")


@pytest.mark.parametrize("name", ["aple", "", None, 3, ["apple"]])
def test_an_unknown_name_lists_the_legal_ones(name: object) -> None:
    with pytest.raises(ValueError, match=r"unknown fruit .*; legal: 'apple', 'pear'\.") as error:
        _fruit().get(name)
    assert ("Did you mean 'apple'?" in str(error.value)) == (name in ("aple", ["apple"]))


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_members_of_the_package_are_found_by_name(registry: Registry) -> None:
    assert len(registry.names()) > 0
    assert all(registry.get(name) is not None and name == name.strip().lower() for name in registry)
