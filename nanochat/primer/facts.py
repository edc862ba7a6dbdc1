"""
The facts of the primer: countries, elements, animals, colours and so on.

`fact_table()` combines the lists of facts.txt with facts that are computed, such as which month follows which.
"""

from collections.abc import Iterable
from functools import cache
from string import ascii_uppercase

from nanochat.primer.data import FACTS, Fact, load_entries, load_facts, read_sections

ANIMAL_RELATIONS = ("animal_class", "young", "sound", "home", "legs")  # the columns of [animals]
COLOUR_NAMES = ("red", "blue", "yellow", "green", "orange", "purple", "pink", "brown", "black", "white", "grey")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
SMALL_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
PLURALS = dict(load_facts("plurals"))
SPELLING_WORDS = (*load_entries("spelling words")[0].split(), *dict(load_facts("animals")))


def number_words(number: int) -> str:
    """
    Returns a number from 0 to 100 as text.

    >>> number_words(47)
    'forty-seven'
    """
    if number < 20:
        return SMALL_NUMBERS[number]
    if number == 100:
        return "one hundred"
    tens, ones = divmod(number, 10)
    if ones == 0:
        return TENS[tens - 2]
    return f"{TENS[tens - 2]}-{SMALL_NUMBERS[ones]}"


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


@cache
def fact_table() -> dict[str, list[Fact]]:
    """Returns all facts by relation. The relations known:0, known:1, … share the wordings of "known"."""
    table: dict[str, list[Fact]] = {"capital": [], "continent": []}
    for section in read_sections(FACTS):
        if section.startswith("countries of "):
            continent = section.removeprefix("countries of ")
            table["capital"] += [fact for fact in load_facts(section) if fact.answer != "-"]
            table["continent"] += [Fact(country, continent) for country, _ in load_facts(section)]
    table["language"] = load_facts("language")
    table["symbol"] = [Fact(*entry.split()) for entry in load_entries("elements")]
    table["atomic_number"] = [Fact(name, str(number)) for number, (name, _) in enumerate(table["symbol"], 1)]
    for animal, columns in load_facts("animals"):
        for relation, answer in zip(ANIMAL_RELATIONS, columns.split(", "), strict=True):
            if answer != "-":
                table.setdefault(relation, []).append(Fact(animal, answer))
    table["opposite"] = load_facts("opposites") + [Fact(b, a) for a, b in load_facts("opposites")]
    table["colour"] = load_facts("colour")
    swapped = [Fact(" and ".join(reversed(colours.split(" and "))), mixed) for colours, mixed in load_facts("mixtures")]
    table["mixture"] = load_facts("mixtures") + swapped
    table["month_days"] = load_facts("month_days")
    months = [month for month, _ in load_facts("month_days")]
    table["month_order"] = _pair(months, ORDINALS)
    table["month_after"] = _pair(months, months[1:] + months[:1])
    table["month_before"] = _pair(months, months[-1:] + months[:-1])
    table["day_after"] = _pair(DAYS, DAYS[1:] + DAYS[:1])
    table["day_before"] = _pair(DAYS, DAYS[-1:] + DAYS[:-1])
    table["planet"] = _pair(PLANETS, ORDINALS)
    table["number_word"] = [Fact(str(n), number_words(n)) for n in (*range(41), *range(50, 101, 10))]
    table["letter_after"] = _pair(ascii_uppercase, ascii_uppercase[1:])
    table["unit"] = load_facts("unit")
    for section in read_sections(FACTS):
        if section.startswith("known:"):
            table[section] = load_facts(section)
    return table


def _pair(subjects: Iterable[str], answers: Iterable[str]) -> list[Fact]:
    return [Fact(*pair) for pair in zip(subjects, answers, strict=False)]
