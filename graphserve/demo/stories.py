"""A grammar of short children's stories: the generated half of the demo model's story text.

A story is one of :data:`graphserve.demo.plots.PLOTS` with its alternatives chosen and its slots filled. ``{a|b|c}``
stands for one of its alternatives (they may nest) and ``<slot>`` for a word of the cast. Every draw comes from the
caller's random generator, so a seed fixes the text.
"""

from __future__ import annotations

import random
import re

from graphserve.demo import plots

_REQUESTS = (
    "{Tell me|Please tell me|Can you tell me|Write|Write me|I want|Please write|Could you tell me} a "
    "{|short |little }story about <about>{.|.|}",
)
# Requests that are never trained on; they are asked after training.
HELD_OUT_REQUESTS = (
    "Tell me a story about a brave little robot.",
    "Tell me a story about a shy dragon named Zoe.",
    "Please write a short story about a penguin and a bee.",
    "Tell me a story about a clever turtle.",
)
# Subject, object and possessive of a hero, by whether the name is a girl's.
_PRONOUNS = {True: ("she", "her", "her"), False: ("he", "him", "his")}
_CHOICE = re.compile(r"\{([^{}]*)\}")
_SLOT = re.compile(r"<(\w+)>")


def with_article(noun: str) -> str:
    """Return the noun with "a" or "an" before it."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def expand(rng: random.Random, template: str, slots: dict[str, str]) -> str:
    """Choose among the alternatives of a template and fill its slots.

    Raises:
        KeyError: the template names a slot that is not given.
    """
    paragraphs = [" ".join(p.split()) for p in template.split("\n\n")]
    text = "\n\n".join(paragraphs) if len(paragraphs) > 1 else template
    while _CHOICE.search(text):
        text = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
    while _SLOT.search(text):
        text = _SLOT.sub(lambda match: slots[match[1]], text)
    return text


def draw_cast(rng: random.Random) -> dict[str, str]:
    """Draw hero, friend and things of one story, with the pronouns that go with their names."""
    kind = rng.choice(rng.choice([plots.ANIMALS, plots.ANIMALS, plots.WOMEN, plots.MEN]))
    is_classic = rng.random() < 0.15  # the hero that most real stories have
    if is_classic:
        kind = rng.choice(["girl", "girl", "girl", "boy"])
    friend_kind = rng.choice([animal for animal in plots.ANIMALS if animal != kind])
    names = plots.GIRLS if kind in plots.WOMEN else plots.BOYS if kind in plots.MEN else plots.GIRLS + plots.BOYS
    name = names[0] if is_classic else rng.choice(names)
    friend = rng.choice([other for other in plots.GIRLS + plots.BOYS if other != name])
    he, him, his = _PRONOUNS[name in plots.GIRLS]
    friend_he, _, friend_his = _PRONOUNS[friend in plots.GIRLS]
    adjective, other_adjective = rng.sample(plots.ADJECTIVES, 2)
    if is_classic:
        adjective = "little"
    thing = rng.choice(plots.OBJECTS)
    food = rng.choice(plots.FOODS)
    return {
        "kind": kind,
        "name": name,
        "Name": name,
        "fkind": friend_kind,
        "fname": friend,
        "fName": friend,
        "he": he,
        "He": he.capitalize(),
        "him": him,
        "his": his,
        "His": his.capitalize(),
        "fhe": friend_he,
        "fhis": friend_his,
        "adj2": other_adjective,
        "place": rng.choice(plots.PLACES),
        "object": thing,
        "thing": thing.split()[-1],
        "food": food,
        "a_kind": with_article(kind),
        "a_adj": with_article(adjective),
        "A_adj": with_article(adjective).capitalize(),
        "a_fkind": with_article(friend_kind),
        "a_object": with_article(thing),
        "a_food": with_article(food),
    }


def write_story(rng: random.Random) -> tuple[str, str]:
    """Write one story.

    Returns:
        A request that the story answers ("Tell me a story about a brave cat.") and the story.
    """
    slots = draw_cast(rng)
    slots["opening"] = expand(rng, rng.choice(plots.OPENINGS), slots)
    plot = rng.choice(list(plots.PLOTS))
    abouts = plots.ABOUT_PLOT[plot] if rng.random() < 0.3 else plots.ABOUT
    slots["about"] = expand(rng, rng.choice(abouts), slots)
    if rng.random() < 0.04:
        request = rng.choice(["Tell me a story.", "Tell me a story", "Tell me a short story.", "Please write a story."])
    else:
        request = expand(rng, rng.choice(_REQUESTS), slots)
        if request in HELD_OUT_REQUESTS:
            return write_story(rng)
    return request, expand(rng, plots.PLOTS[plot], slots)
