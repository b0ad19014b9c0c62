"""A grammar of short children's stories: the generated half of the demo model's story text.

A story is one of :data:`PLOTS` with its alternatives chosen and its slots filled. ``{a|b|c}`` stands for one of its
alternatives (they may nest) and ``<slot>`` for a word of the cast. Every draw comes from the caller's random generator,
so a seed fixes the text.
"""

from __future__ import annotations

import random
import re

GIRLS = ["Lily", "Mia", "Anna", "Ruby", "Lucy", "Sara", "Ella", "Rose", "Nina", "Zoe", "Daisy", "Amy"]
BOYS = ["Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Tim", "Finn", "Bob", "Spot", "Oscar", "Hugo"]
ANIMALS = [
    "cat",
    "dog",
    "fox",
    "bear",
    "rabbit",
    "mouse",
    "frog",
    "duck",
    "bird",
    "lion",
    "elephant",
    "monkey",
    "turtle",
    "owl",
    "pig",
    "horse",
    "hen",
    "bee",
    "penguin",
    "squirrel",
    "kitten",
    "puppy",
    "dragon",
    "robot",
    "fish",
]
CHILDREN = {"girl": GIRLS, "boy": BOYS}
ADJECTIVES = ["little", "happy", "brave", "kind", "clever", "curious", "shy", "small", "funny", "gentle"]
OBJECTS = [
    "red ball",
    "blue kite",
    "yellow hat",
    "toy car",
    "silver key",
    "green boat",
    "soft blanket",
    "shiny coin",
    "red scarf",
    "wooden drum",
    "story book",
    "golden bell",
    "paper plane",
    "pink shell",
    "warm coat",
    "toy train",
    "round stone",
    "little lamp",
]
PLACES = [
    "park",
    "forest",
    "garden",
    "field",
    "beach",
    "farm",
    "village",
    "river",
    "hill",
    "meadow",
    "pond",
    "playground",
]
FOODS = ["apple", "cookie", "cake", "sandwich", "carrot", "pear", "pie", "banana", "berry", "piece of bread"]

PLOTS = {
    "lost and found": """\
<opening> <Name> had a <object>. It was <his> favorite {thing|toy|thing in the world}. {<Name> took the <object>
everywhere.|Every day <he> played with the <object>.}

One day, <name> went to the <place>. {The wind blew hard|<He> ran and jumped all day|<He> fell asleep under a
tree}. {When <he> looked around, the <object> was gone.|Then <he> saw that the <object> was gone.} <Name> was very
sad and began to cry.

{A <fkind> named <fname> came by.|Then <fname> the <fkind> came along.} "Why are you sad?" asked <fname>. "I lost
my <object>," said <name>. "{Do not worry.|Don't cry.} I will help you {look for it|find it}," said <fname>.

They looked {under the bushes|behind the rocks|in the tall grass}. They looked {behind a big tree|near the water|by
the old fence}. {At last|Finally}, <fname> saw something. It was the <object>! <Name> was so happy. "Thank you,
<fname>!" <he> said. From that day on, <name> and <fname> were {best|good} friends.""",
    "sharing": """\
<opening> One {sunny|warm|bright} day, <name> went to the <place> with a big <food>. <He> {was very hungry|could
not wait to eat it}.

<Name> sat down {under a tree|on the grass|on a log}. Then <he> saw a <fkind> named <fname>. <fName> looked
{sad|tired and sad}. "What is wrong?" asked <name>. "I am hungry and I have no food," said <fname>.

<Name> {thought about it|looked at the <food>}. <He> wanted to eat it all. But <he> wanted to be kind, too. "{We
can share|You can have half}," said <name>. <He> {broke the <food> in two|cut the <food> in half} and gave a part
to <fname>.

They ate together and {laughed|smiled}. "{Thank you|You are very kind}, <name>," said <fname>. <Name> felt
{warm|happy} inside. <He> learned that {sharing makes everyone happy|food tastes better when you share it}.""",
    "afraid of the dark": """\
<opening> <Name> was {afraid of|scared of} the dark. Every night, <he> {hid under the blanket|could not sleep}.

One night, <name> heard a {soft|strange} sound {outside|at the window}. "Who is there?" asked <name>. "It is me,
<fname> the <fkind>," said a small voice. "{I am lost|I can't find my way home}. Can you help me?"

<Name> was scared, but <he> wanted to help. <He> took a {little light|lamp} and went outside. {They walked together
in the dark.|They walked and walked under the moon.} "Look at the stars!" said <fname>. The stars were {bright and
beautiful|shining in the sky}.

Soon they found <fname>'s home. "Thank you! You are very brave," said <fname>. <Name> smiled. The dark was not {so
scary|scary} anymore. That night, <name> slept very well.""",
    "try again": """\
<opening> {One day|One morning}, <name> wanted to build a {tall tower|little house|big castle} {near|by} the
<place>. <He> {worked all morning|worked very hard}.

{Then|But then} a strong wind came. Whoosh! {Everything fell down.|It all fell down.} <Name> was {sad|upset}. "I
can't do it," <he> said.

<fName> the <fkind> {saw what happened|came to see}. "{Don't give up|You can try again}," said <fname>. "{I will
help you|We can do it together}." So they {tried again|started again}. <Name> found {big stones|strong sticks} and
<fname> {put them in place|made it strong}.

{Soon|At the end of the day}, it was {done|ready}. The wind came again, but {nothing fell down|this time it did not
fall}. "We did it!" said <name>. {They danced and laughed.|They were very proud.} <Name> learned to never give up.""",
    "helping": """\
<opening> {One day|One afternoon}, <name> was {walking|playing} {in|near} the <place>. <He> heard a tiny voice.
"Help! Help!" it said.

<Name> looked {around|up and down}. <He> saw a little <fkind> {stuck in the mud|stuck in a hole|with a foot under a
rock}. "{Please help me|Can you help me}?" said the <fkind>. "My name is <fname>."

"{Don't worry|Stay calm}," said <name>. <He> {found a long stick|found a strong rope} and pulled and pulled.
{Pop!|At last,} <fname> was free. "Thank you for saving me!" said <fname>. "{You are a hero|You are so kind}."

The next day, <name> {could not find the way home|fell into the water}. <fName> {saw <him> and came to help|came
fast and helped <him>}. "You helped me, and now I help you," said <fname>. They {hugged|smiled} and were friends
{forever|from that day on}.""",
    "learning": """\
<opening> <Name> wanted to learn {to swim|to sing|to dance|to ride a bike|to bake a pie|to draw}. All <his> friends
could do it, but <name> could not.

{On Monday, <name> tried|The first time, <name> tried}, but it {did not work|was too hard}. "{I am not good at
this|I will never learn}," <he> said. <His> friend <fname> the <fkind> {smiled|laughed softly}. "Nobody can do it
the first time," said <fname>. "{Let me show you|We can practice together}."

So they {practiced every day|went to the <place> every day and practiced}. {Little by little|Day by day}, <name>
got better. {One day|One bright morning}, <name> did it! "Look at me!" <he> shouted. {Everyone clapped.|<fName>
clapped and cheered.}

<Name> was very proud. "{Thank you for helping me|I am glad I did not stop}," <he> said. And <he> was {happy all
day|the happiest <kind> in the <place>}.""",
    "the gift": """\
<opening> {It was Mom's birthday.|Tomorrow was Mom's birthday.} <Name> wanted to give her {a gift|a nice gift}, but
<he> had no money.

<Name> {went to the <place>|walked to the <place>} to think. There <he> met <fname> the <fkind>. "{What can I give
my mom?|My mom has a birthday. What can I give her?}" asked <name>. "{Make something with love|You can make
something}," said <fname>.

So <name> {picked pretty flowers|painted a picture|made a card} and <fname> helped. {Then|After that} they baked a
small cake. It {smelled so good|was sweet and warm}.

<Name> ran home. "Happy birthday, Mom!" <he> said. Mom {smiled a big smile|was so surprised}. "{This is the best
gift ever|I love it}," she said and gave <name> a big hug. <Name> was {very happy|happy, too}.""",
    "listening": """\
<opening> "Do not go to the <place> alone," said Mom. But <name> {did not listen|wanted to go}. <He> {saw a
<object> there|wanted to find a <object>}.

<Name> went {far, far away|very far}. {Soon it started to rain.|Soon it got dark.} <He> did not know the way home.
<Name> {was cold and scared|felt very small and scared}.

Then <fname> the <fkind> {came by|found <him>}. "{Are you lost?|Why are you here alone?}" asked <fname>. "{Yes|I
want to go home}," said <name>. "{Follow me|Come with me}," said <fname>. "I know the way."

Mom was waiting at the door. "I am sorry, Mom," said <name>. "{I should listen to you|Next time I will listen}."
Mom {hugged <him>|gave <him> a hug and warm soup}. {They thanked <fname>|<Name> thanked <fname>}, and <name> always
listened to Mom after that day.""",
    "the discovery": """\
<opening> {One day|One morning}, <name> found a <object> {in the <place>|near the <place>}. {It was old and
dusty.|It was very pretty.} "{Whose is it?|Who lost this?}" <name> asked.

<Name> {asked the birds|asked a kind old man}, but {they|nobody} did not know. Then <he> {asked|met} <fname> the
<fkind>. "{That is mine!|Oh, my <object>!}" said <fname>. "I lost it {last week|a long time ago}. I
{looked|searched} everywhere."

<Name> {liked the <object> very much|wanted to keep the <object>}. But <he> knew it was right to give it back.
"Here you are," said <name>. <fName> {jumped with joy|was so happy}. "You are very honest," said <fname>. "{Let's
play with it together|Come and play with me}!"

They played {all day|until the sun went down}. <Name> {was glad|felt good}, because {a friend is better than a
<object>|now <he> had a new friend}.""",
    "the race": """\
<opening> {One day|One sunny day}, there was a {big race|race} {at|near} the <place>. <fName> the <fkind> was {very
fast|the fastest of all}. "{You will never win|You are too slow}," <fname> said to <name>.

<Name> {was a little sad|did not get angry}. "I will do my best," <he> said. "Ready, set, go!" {Everyone ran.|They
all ran as fast as they could.} <fName> was {first|far ahead}.

But then <fname> {fell over a rock|tripped and fell}. "Ouch! My leg!" <fname> cried. <Name> stopped. <He> did not
{think about|care about} the race. <He> helped <fname> get up. They {walked|went} to the end together.

"{I am sorry I was mean|I am sorry for what I said}," said <fname>. "{You are a good friend|You have a big heart}."
{Everyone clapped for <name>.|They both got a prize.} <Name> learned that being kind is better than winning.""",
}

_OPENINGS = (
    "Once upon a time, there was a <adj> <kind> named <name>. {<Name> lived {near a <place>|by the <place>}.|"
    "<He> loved to play outside.|<He> lived with <his> mom and dad.}",
    "Once upon a time, in a {small|quiet} <place>, there lived a <adj> <kind> named <name>.",
    "There was once a <adj> <kind>. <His> name was <name>. "
    "{<He> liked to play with <his> friends.|<He> lived {near|by} a <place>.}",
    "<Name> was a <adj> <kind> who {lived {near|by} a <place>|loved to play outside}.",
)
_REQUESTS = (
    "{Tell me|Please tell me|Can you tell me|Write|Write me|I want|Please write|Could you tell me} a "
    "{|short |little }story about {<about>|<about>|<about>}{.|.|}",
)
_ABOUT = (
    "<a_kind>",
    "<a_adj> <kind>",
    "<a_kind> named <name>",
    "<a_adj> <kind> named <name>",
    "<name> the <kind>",
    "<a_kind> and <a_fkind>",
    "<a_kind> named <name> and <a_fkind> named <fname>",
)
# Requests that are never trained on; they are asked after training.
HELD_OUT_REQUESTS = (
    "Tell me a story about a brave little robot.",
    "Tell me a story about a shy dragon named Zoe.",
    "Please write a short story about a penguin and a bee.",
    "Tell me a story about a clever turtle.",
)
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
    """Draw hero, friend and things of one story, with the pronouns that go with the hero's name."""
    kind = rng.choice([*ANIMALS, "girl", "boy", "girl", "boy"])
    friend_kind = rng.choice([animal for animal in ANIMALS if animal != kind])
    name = rng.choice(CHILDREN.get(kind, GIRLS + BOYS))
    friend = rng.choice([other for other in GIRLS + BOYS if other != name])
    female = name in GIRLS
    he, him, his = ("she", "her", "her") if female else ("he", "him", "his")
    adjective, place = rng.choice(ADJECTIVES), rng.choice(PLACES)
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
        "adj": adjective,
        "place": place,
        "object": rng.choice(OBJECTS),
        "food": rng.choice(FOODS),
        "a_kind": with_article(kind),
        "a_adj": with_article(adjective),
        "a_fkind": with_article(friend_kind),
    }


def write_story(rng: random.Random) -> tuple[str, str]:
    """Write one story.

    Returns:
        A request that the story answers ("Tell me a story about a brave cat.") and the story.
    """
    slots = draw_cast(rng)
    slots["opening"] = expand(rng, rng.choice(_OPENINGS), slots)
    slots["about"] = expand(rng, rng.choice(_ABOUT), slots)
    plot = rng.choice(list(PLOTS.values()))
    if rng.random() < 0.04:
        request = rng.choice(["Tell me a story.", "Tell me a story", "Tell me a short story.", "Please write a story."])
    else:
        request = expand(rng, rng.choice(_REQUESTS), slots)
        if request in HELD_OUT_REQUESTS:
            return write_story(rng)
    return request, expand(rng, plot, slots)
