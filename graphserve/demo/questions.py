"""Questions and answers for the demo model: graphserve and serving, greetings, small facts, sums.

The last wording of every entry of :data:`TOPICS` is held out: it is never trained on and is asked after training, to
see whether the model has learned the question or only its letters. The same goes for :data:`HELD_OUT_SUMS`.
"""

from __future__ import annotations

import random
from typing import NamedTuple

SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a friendly assistant.", "Answer in one short paragraph.")


class Topic(NamedTuple):
    """One answer and the wordings of its question; the last wording is held out."""

    answer: str
    questions: tuple[str, ...]


def _topic(answer: str, questions: str) -> Topic:
    return Topic(" ".join(answer.split()), tuple(line.strip() for line in questions.strip().splitlines()))


TOPICS = (
    _topic(
        "graphserve is a serving engine for language models. It traces a model from transformers, rewrites the graph "
        "with its own passes and runs the result as a launch plan.",
        """What is graphserve?
        What does graphserve do?
        Tell me about graphserve.
        Can you explain what graphserve is?
        What is graphserve for?
        Describe graphserve.
        Explain graphserve to me.
        I have never heard of graphserve. What is it?
        Could you tell me what graphserve is?""",
    ),
    _topic(
        "Clone the repository, make a virtual environment and run pip install . -c constraints.txt in it.",
        """How do I install graphserve?
        How can I install graphserve?
        How do you install graphserve?
        Install graphserve
        How to install graphserve?
        What do I need to do to install graphserve?
        Tell me how to install graphserve.
        What is the command to install graphserve?""",
    ),
    _topic(
        "Run graphserve serve and the name of a model. The server listens on port 8000 and speaks the OpenAI API.",
        """How do I serve a model?
        How do I start the server?
        How can I serve a model with graphserve?
        How do I run the server?
        Start the server
        What is the command to serve a model?
        How to start a graphserve server?
        Which command starts the server?
        How can I start the server?""",
    ),
    _topic(
        "Run graphserve warmup and the name of a model. It builds the launch plan and the kernels before the first "
        "request, so that the server starts fast.",
        """How do I warm up a model?
        What does graphserve warmup do?
        What is warmup?
        How can I warm up the server?
        Why should I run warmup?
        How do I use warmup?
        What does the warmup command do?
        Tell me about warmup.
        Explain the warmup command.""",
    ),
    _topic(
        "Run graphserve generate with a prompt. The text is printed on stdout.",
        """How do I generate text?
        How can I generate text with graphserve?
        What is the command to generate text?
        How do I write text from a prompt?
        How to generate text on the command line?
        Which command generates text?
        How do I make graphserve generate text?""",
    ),
    _topic(
        "Run graphserve chat. It opens a chat in the terminal and streams each answer.",
        """How do I chat with a model?
        How can I start a chat?
        What does graphserve chat do?
        How do I open a chat in the terminal?
        Which command starts a chat?
        What is the chat command?
        How can I chat with the model in a terminal?""",
    ),
    _topic(
        "It prints what the compiler did with a model: the passes, how often each one matched, and why it refused.",
        """What does graphserve explain do?
        What is graphserve explain?
        How do I see what the compiler did?
        What does the explain command print?
        How can I see the passes of a model?
        Tell me about graphserve explain.
        What does the explain command do?""",
    ),
    _topic(
        "A KV cache keeps the keys and values of past tokens, so that each new token does not have to compute them "
        "again.",
        """What is a KV cache?
        What is the KV cache?
        Explain the KV cache.
        What does a KV cache do?
        Why do we need a KV cache?
        What is a KV cache for?
        Can you explain the KV cache?
        Tell me what a KV cache is.
        What does the KV cache keep?
        Please explain what a KV cache is.""",
    ),
    _topic(
        "Continuous batching lets new requests join the batch at every step and lets finished ones leave it, so that "
        "no request waits for another to end.",
        """What is continuous batching?
        Explain continuous batching.
        What does continuous batching do?
        How does continuous batching work?
        Why is continuous batching good?
        Tell me about continuous batching.
        What is continuous batching for?
        Can you explain continuous batching?
        Please explain continuous batching to me.""",
    ),
    _topic(
        "Paged attention keeps the KV cache in small blocks of equal size. A block table says where the tokens of a "
        "request are, so little memory is wasted.",
        """What is paged attention?
        Explain paged attention.
        How does paged attention work?
        What does paged attention do?
        Why do we use paged attention?
        Tell me about paged attention.
        What is paged attention for?
        Can you explain paged attention?
        Please explain how paged attention works.""",
    ),
    _topic(
        "A CUDA graph records many kernel launches once and replays them with one call, so that the CPU has less work "
        "to do at each step.",
        """What is a CUDA graph?
        Explain CUDA graphs.
        What does a CUDA graph do?
        What are CUDA graphs?
        Why do we use CUDA graphs?
        How does a CUDA graph work?
        Tell me about CUDA graphs.
        Can you explain what a CUDA graph is?""",
    ),
    _topic(
        "A launch plan is a flat list of kernel launches over named buffers. It has all that is needed to run a model.",
        """What is a launch plan?
        Explain the launch plan.
        What does a launch plan do?
        What is in a launch plan?
        What is the launch plan?
        Tell me about the launch plan.
        Can you explain what a launch plan is?""",
    ),
    _topic(
        "A pass is a rewrite of the graph. It looks for a pattern, checks that the rewrite is right and puts a faster "
        "op in its place.",
        """What is a pass?
        What is a compiler pass?
        What does a pass do?
        Explain what a pass is.
        What are passes?
        How does a pass work?
        Tell me about compiler passes.
        Can you explain what a compiler pass is?""",
    ),
    _topic(
        "Chunked prefill cuts a long prompt into parts, so that other requests can go on while it is read.",
        """What is chunked prefill?
        Explain chunked prefill.
        What does chunked prefill do?
        How does chunked prefill work?
        Why do we use chunked prefill?
        Tell me about chunked prefill.
        Can you explain chunked prefill?""",
    ),
    _topic(
        "When the KV cache is full, the engine takes the blocks of one request back and computes that request again "
        "later.",
        """What is preemption?
        Explain preemption.
        What does preemption do?
        What happens when the KV cache is full?
        How does preemption work?
        Tell me about preemption.
        What happens if there is no more room in the KV cache?""",
    ),
    _topic(
        "Greedy decoding picks the most likely token at every step. Set the temperature to 0 to use it.",
        """What is greedy decoding?
        Explain greedy decoding.
        How does greedy decoding work?
        How do I use greedy decoding?
        What does a temperature of 0 mean?
        Tell me about greedy decoding.
        Can you explain greedy decoding?""",
    ),
    _topic(
        "The temperature says how random the sampling is. A low temperature gives safe text and a high one gives "
        "surprising text.",
        """What is the temperature?
        What does the temperature do?
        Explain the temperature.
        What is a sampling temperature?
        What does temperature mean?
        Tell me about the temperature.
        Can you explain the sampling temperature?""",
    ),
    _topic(
        "A tokenizer cuts text into tokens, which are small pieces of words, and gives each one a number.",
        """What is a tokenizer?
        What does a tokenizer do?
        Explain what a tokenizer is.
        Why do we need a tokenizer?
        How does a tokenizer work?
        Tell me about tokenizers.
        Can you explain what a tokenizer does?""",
    ),
    _topic(
        "A token is a small piece of text, often a word or a part of a word. A model reads and writes tokens.",
        """What is a token?
        What are tokens?
        Explain what a token is.
        What does token mean?
        Tell me what a token is.
        Can you explain what a token is?""",
    ),
    _topic(
        "Attention lets each token look at the tokens before it and take what it needs from them.",
        """What is attention?
        Explain attention.
        What does attention do?
        How does attention work?
        Tell me about attention.
        Can you explain how attention works?""",
    ),
    _topic(
        "A language model reads some text and guesses the next token. It writes by doing this again and again.",
        """What is a language model?
        What does a language model do?
        Explain what a language model is.
        How does a language model work?
        Tell me about language models.
        How does a language model write text?""",
    ),
    _topic(
        "Any decoder model from Hugging Face that the compiler can trace. There is no model code in graphserve.",
        """Which models does graphserve support?
        Which models can I use?
        What models can graphserve run?
        What models are supported?
        Can I use my own model?
        Which models work with graphserve?""",
    ),
    _topic(
        "Yes. The server speaks the OpenAI API, so the openai client works with it.",
        """Can I use the openai client?
        Does graphserve work with the openai client?
        Does the server speak the OpenAI API?
        Is there an OpenAI API?
        Is graphserve compatible with OpenAI?
        Does it work with the openai package?""",
    ),
    _topic(
        "graphserve is free software under the Apache 2.0 licence.",
        """What is the licence of graphserve?
        Which licence does graphserve have?
        Is graphserve free?
        Is graphserve open source?
        What licence does it have?
        Under which licence is graphserve?""",
    ),
    _topic(
        "I am a small language model that comes with graphserve. I can tell short stories and answer simple questions.",
        """Who are you?
        What are you?
        What is your name?
        What can you do?
        Tell me about yourself.
        Are you a language model?
        Please introduce yourself.
        Can you tell me who you are?""",
    ),
    _topic(
        "Hello! How can I help you today?",
        """Hello
        Hello!
        Hi
        Hi!
        Hey
        Hi there
        Good morning
        Good morning!
        Good evening
        Hey there!
        Hello there""",
    ),
    _topic(
        "I am fine, thank you. How can I help you?",
        """How are you?
        How are you today?
        Hi, how are you?
        Are you well?
        How do you do?
        Hello, how are you today?""",
    ),
    _topic(
        "You are welcome!",
        """Thank you
        Thank you!
        Thanks
        Thanks!
        Thank you very much.
        Thanks a lot!
        Thank you so much!""",
    ),
    _topic(
        "Goodbye! Have a nice day.",
        """Goodbye
        Goodbye!
        Bye
        Bye!
        Good night
        See you later.
        Bye bye""",
    ),
)

_FACTS = (
    # questions with a slot, answer, pairs
    (
        ("What color is <x>?", "Which color is <x>?", "Tell me the color of <x>.", "What is the color of <x>?"),
        "<X> is <y>.",
        "the sky:blue,grass:green,snow:white,the sun:yellow,a banana:yellow,a strawberry:red,milk:white,coal:black,"
        "an orange:orange,a leaf:green,the sea:blue,a fire truck:red,chocolate:brown,a polar bear:white,a frog:green",
    ),
    (
        (
            "What does a <x> say?",
            "What sound does a <x> make?",
            "How does a <x> sound?",
            "Which sound does a <x> make?",
        ),
        "A <x> says <y>.",
        "cat:meow,dog:woof,cow:moo,duck:quack,sheep:baa,pig:oink,lion:roar,bee:buzz,horse:neigh,frog:ribbit,bird:tweet",
    ),
    (
        ("What is the opposite of <x>?", "Tell me the opposite of <x>.", "Which word is the opposite of <x>?"),
        "The opposite of <x> is <y>.",
        "big:small,hot:cold,happy:sad,up:down,day:night,fast:slow,old:new,wet:dry,open:closed,left:right,good:bad,"
        "hard:soft,full:empty,light:dark,loud:quiet,long:short",
    ),
    (
        ("What day comes after <x>?", "Which day comes after <x>?", "What is the day after <x>?"),
        "<Y> comes after <x>.",
        "Monday:Tuesday,Tuesday:Wednesday,Wednesday:Thursday,Thursday:Friday,Friday:Saturday,Saturday:Sunday,"
        "Sunday:Monday",
    ),
)

HELD_OUT_SUMS = ((3, 4), (5, 2), (6, 6), (8, 1), (2, 7), (9, 5))
_POLITE = ("", "", "", "", "Please tell me: ", "Hi! ", "Hello. ", "One question: ")


def _fill(text: str, x: str, y: str) -> str:
    filled = text.replace("<x>", x).replace("<y>", y)
    return filled.replace("<X>", x[0].upper() + x[1:]).replace("<Y>", y[0].upper() + y[1:])


def fact_topics() -> list[Topic]:
    """Return the small facts as topics, each with its wordings (the last one held out)."""
    return [
        Topic(_fill(answer, x, y), tuple(_fill(question, x, y) for question in questions))
        for questions, answer, pairs in _FACTS
        for x, y in (pair.split(":") for pair in pairs.split(","))
    ]


def held_out_questions() -> list[tuple[str, str]]:
    """Return (question, expected answer) for every wording and sum that is never trained on."""
    wordings = [(topic.questions[-1], topic.answer) for topic in [*TOPICS, *fact_topics()]]
    return wordings + [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a, b in HELD_OUT_SUMS]


def _draw_sum(rng: random.Random) -> tuple[str, str]:
    while True:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        if (a, b) not in HELD_OUT_SUMS:
            break
    form = rng.choice(("What is {a} plus {b}?", "What is {a} plus {b}?", "{a} plus {b}", "How much is {a} plus {b}?"))
    return form.format(a=a, b=b), f"{a} plus {b} is {a + b}."


def _vary(rng: random.Random, question: str) -> str:
    """Write the question the way people type it: with a greeting, in lower case, without its last mark."""
    prefix = rng.choice(_POLITE)
    draw = rng.random()
    if draw < 0.15:
        question = question.lower()
    if draw > 0.85 or draw < 0.07:
        question = question.rstrip("?.!")
    return prefix + question


def draw_question(rng: random.Random) -> tuple[str, str]:
    """Draw one trained question and its answer."""
    draw = rng.random()
    if draw < 0.12:
        return _draw_sum(rng)
    topic = rng.choice(fact_topics() if draw < 0.3 else TOPICS)
    question = rng.choice(topic.questions[:-1])
    held_out = {topic.questions[-1].lower().rstrip("?.!")}
    varied = _vary(rng, question) if len(topic.answer) > 40 else question
    return (question if varied.lower().rstrip("?.!") in held_out else varied), topic.answer
