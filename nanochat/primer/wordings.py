"""
How the primer says its facts. One block per relation, wordings separated by bars, by the letter in front:

    t  title of a list             s  statement                  r  the reply to a question (also a statement)
    n  noun phrase for the answer  q  question                   h  question held out for the quiz
    N, Q, H, R  the same from the answer back to the subject     X  as Q, but for multiple choice only

Fields: {s} subject, {a} answer, {an} and {aa} with "a" or "an", {p} plural of the subject, {x} and {y} the parts of
"x in y". Wordings are clauses without capital or full stop; questions end with their mark. A noun phrase goes into the
frames TRAIN_FRAMES and, for the quiz only, HELD_FRAMES: what is held out is the wording, never the fact.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from random import Random

from nanochat.primer.facts import COLOUR_NAMES, PLANETS, SMALL_NUMBERS, Fact, fact_table, plural

TRAIN_FRAMES = (
    "what is {}?", "what is {}?", "tell me {}.", "name {}.", "please tell me {}.", "do you know {}?", "give me {}.",
    "I want to know {}.", "can you name {}?", "tell me what {} is.", "could you tell me {}?", "do you know what {} is?",
    "I would like to know {}.", "say what {} is.", "{}?", "what would you say is {}?", "please name {}.",
    "I want to know what {} is.", "can you say what {} is?", "so what is {}?", "{} is what?",
)  # fmt: skip
HELD_FRAMES = (
    "can you tell me what {} is?", "I need to know {}.", "please say what {} is.", "could you name {}?",
    "I would like you to tell me {}.", "do you happen to know {}?",
)  # fmt: skip

# Around a question, its mark apart, and its choices: "Which city is it" + "?" + "Rome, Oslo, Bern or Minsk".
CHOICE_FRAMES = (
    "{question}: {any}{mark}", "{question}: {any}{mark}", "{question}{mark} {Any}?",
    "{question}{mark} Choose from {all}.", "Choose from {all}. {question}{mark}", "{Any}? {question}{mark}",
)  # fmt: skip
UNCLEAR = ("A", "I")  # letters and symbols that no choice may be: the same words may stand in any sentence

# Answers too close to be wrong beside one another: a fox's cub is also called a kit, an owlet is a chick.
AKIN = (
    {"cub", "pup", "kit", "puppy", "kitten"}, {"larva", "caterpillar", "maggot", "nymph", "tadpole"}, {"fry", "pup"},
    {"chick", "owlet", "eaglet", "squab", "poult", "duckling", "gosling", "cygnet"}, {"barn", "stable", "fold", "sty"},
    {"bark", "growl", "roar", "howl"}, {"chirp", "chatter", "squeak", "squawk", "screech", "caw", "coo", "sing"},
    {"grunt", "oink"}, {"click", "sing"}, {"nest", "drey", "eyrie", "roost", "loft", "hole", "hive"}, {"bleat", "moo"},
    {"den", "burrow", "hole", "sett", "lodge", "holt"}, {"pond", "sea"},
    {"less", "few"}, {"more", "many"}, {"soft", "easy"}, {"hard", "difficult"}, {"short", "small", "low", "shallow"},
    {"tall", "big", "high", "deep"}, {"in", "inside"}, {"out", "outside"}, {"thick", "wide"}, {"thin", "narrow"},
)  # fmt: skip

WORDINGS = """
capital
t countries and their capitals
s the capital city of {s} is {a} | {s} has the capital {a} | the country whose capital is {a} is {s}
r the capital of {s} is {a}
n the capital of {s} | the capital of {s} | the capital city of {s}
q which city is the capital of {s}? | what city is the capital of {s}? | {s} has which capital?
h which city is the capital city of {s}? | the capital of {s} is which city?
N the country whose capital is {a} | the country with the capital {a}
Q which country has the capital {a}? | {a} is the capital of which country? | of which country is {a} the capital?
H what country has the capital {a}? | {a} is the capital city of which country?
R {a} is the capital of {s}

continent
t countries and their continents
s {s} is a country in {a} | {s} lies in {a} | {s} is on the continent of {a} | the continent of {s} is {a}
r {s} is in {a}
n the continent of {s}
q on which continent is {s}? | which continent is {s} in? | which continent is {s} on?
q in which continent does {s} lie? | where is {s}? | {s} is on which continent?
h on which continent does {s} lie? | {s} lies on which continent?
X which of these countries is in {a}? | which country is in {a}?
R {s} is in {a}

language
t countries and their languages
s {a} is the main language of {s} | people in {s} speak {a}
r the main language of {s} is {a}
n the main language of {s} | the language of {s}
q which language do people in {s} speak? | what language is spoken in {s}? | what do people speak in {s}?
h which language is spoken in {s}? | what language do people in {s} speak?
X in which of these countries do people speak {a}?
R people in {s} speak {a}

symbol
t elements and their symbols
s {s} has the symbol {a} | the chemical symbol of {s} is {a} | the element with the symbol {a} is {s}
r the symbol of {s} is {a}
n the symbol of {s} | the chemical symbol of {s} | the symbol of the element {s}
q which symbol does {s} have? | what symbol stands for {s}?
h what symbol does {s} have? | which symbol stands for {s}?
N the element with the symbol {a} | the element whose symbol is {a}
Q which element has the symbol {a}? | {a} is the symbol of which element?
H what element has the symbol {a}? | the symbol {a} stands for which element?
R {a} is the symbol of {s}

atomic_number
t elements and their atomic numbers
s {s} has the atomic number {a} | {s} is element number {a} | element number {a} is {s}
r the atomic number of {s} is {a}
n the atomic number of {s} | the atomic number of the element {s} | the number of {s} in the table of elements
q which atomic number does {s} have? | which number does the element {s} have?
h what atomic number does {s} have? | {s} has which atomic number?
N the element with the atomic number {a} | element number {a}
Q which element has the atomic number {a}? | which element has number {a}?
H what element has the atomic number {a}?
R the element with the atomic number {a} is {s}

animal_class
t animals and their kinds
s every {s} is {aa} | the {s} is {aa}
r {an} is {aa}
n the class of the {s}
q what kind of animal is {an}? | to which class of animals does the {s} belong?
q is {an} a mammal, a bird, a fish or something else? | which class of animal is {an}?
h {an} is what kind of animal? | which kind of animal is {an}?
X which of these animals is {aa}? | which animal is {aa}?
R {an} is {aa}

young
t animals and their young
s the young of {an} is called {aa} | {aa} is a young {s} | a baby {s} is called {aa}
r a young {s} is called {aa}
n the name for a young {s} | the word for a baby {s}
q what is a young {s} called? | what is a baby {s} called? | what do you call a young {s}?
q how do we call the young of {an}?
h what do we call a baby {s}? | what name does a young {s} have?
N the animal whose young is called {aa}
Q which animal has a young called {aa}? | {aa} is the young of which animal?
H what animal has a young called {aa}?
R {aa} is a young {s}

sound
t animals and their sounds
s {p} can {a} | the sound that {p} make is to {a}
r {p} {a}
q what sound does {an} make? | what sound do {p} make? | what do {p} do to make a sound? | which sound does {an} make?
n the sound of {an} | the sound that {p} make
h which sound do {p} make? | {p} make what sound?
N the animal that can {a}
Q which animal can {a}? | which animal is known to {a}?
H what animal can {a}?
R {an} can {a}

home
t animals and their homes
s the {s} lives in the {a} | the {a} is the home of the {s} | {p} live in the {a}
r the home of {an} is the {a}
n the home of {an} | the name of the home of {an}
q where does {an} live? | where do {p} live? | in what does {an} live? | what is the home of {an} called?
h what do you call the home of {an}? | in what home do {p} live?
Q which animal lives in the {a}?
H what animal lives in the {a}?
R the {a} is the home of the {s}

legs
t animals and their legs
s {p} have {a} legs | the {s} has {a} legs | the number of legs of {an} is {a}
r {an} has {a} legs
n the number of legs of {an}
q how many legs does {an} have? | how many legs do {p} have? | how many legs has {an}? | count the legs of {an}.
h how many legs are there on {an}? | {an} has how many legs?
X which of these animals has {a} legs?
R {an} has {a} legs

opposite
t words and their opposites
s {s} is the opposite of {a} | {s} and {a} are opposites | the word {s} means the opposite of {a}
r the opposite of {s} is {a}
n the opposite of {s} | the opposite of {s} | the opposite of the word {s} | the word that means the opposite of {s}
q which word is the opposite of {s}? | what word is the opposite of {s}? | {s} is the opposite of which word?
q what is the contrary of {s}?
h which word means the opposite of {s}? | {s} is the opposite of what?

colour
t things and their colours
s {s} is {a} | {s} has the colour {a} | {a} is the colour of {s}
r the colour of {s} is {a}
n the colour of {s} | the colour of {s}
q what colour is {s}? | which colour is {s}? | which colour does {s} have? | {s} has which colour?
h what colour does {s} have? | {s} is what colour?
X which of these things is {a}?
R {s} is {a}

mixture
t mixing paint
s {s} paint together make {a} | if you mix {s} paint, you get {a} | mixing {s} gives {a}
r {s} make {a}
n the colour you get from {s} | the mixture of {s}
q which colour do you get if you mix {s}? | what colour do {s} make? | what do you get when you mix {s} paint?
h what colour do you get if you mix {s}? | which colour do {s} make together?

month_days
t months and their days
s there are {a} days in {s} | the month of {s} has {a} days
r {s} has {a} days
n the number of days in {s} | the length of {s} in days
q how many days does {s} have? | how many days are there in {s}? | how many days has {s}? | how long is {s}?
h {s} has how many days? | how many days are in {s}?

month_order
t the months in order
s {s} comes {a} among the months of the year | the {a} month is {s}
r {s} is the {a} month of the year
n the place of {s} in the year
q which month of the year is {s}? | which place does {s} have in the year?
h what place does {s} have in the year?
N the {a} month | the {a} month of the year
Q which month is the {a} month of the year?
H what month is the {a} one of the year?
R the {a} month of the year is {s}

month_after
t the months that follow
s {a} follows {s} | {a} is the month after {s} | after {s} comes {a}
r the month after {s} is {a}
n the month after {s} | the month that follows {s}
q which month comes after {s}? | which month follows {s}? | what comes after {s}?
h what month comes after {s}? | after {s} comes which month?

month_before
t the months that come before
s {a} is the month before {s} | before {s} comes {a}
r the month before {s} is {a}
n the month before {s} | the month that comes before {s}
q which month comes before {s}? | which month is before {s}? | what comes before {s}?
h what month comes before {s}? | before {s} comes which month?

day_after
t the days that follow
s {a} follows {s} | after {s} comes {a} | if today is {s}, tomorrow is {a}
r the day after {s} is {a}
n the day after {s} | the day that follows {s}
q which day comes after {s}? | which day follows {s}? | today is {s}. What day is tomorrow?
h what day comes after {s}? | after {s} comes which day?

day_before
t the days that come before
s {a} is the day before {s} | before {s} comes {a} | if today is {s}, yesterday was {a}
r the day before {s} is {a}
n the day before {s} | the day that comes before {s}
q which day comes before {s}? | which day is before {s}? | today is {s}. What day was yesterday?
h what day comes before {s}? | before {s} comes which day?

planet
t the planets in order from the Sun
s {s} comes {a} among the planets, counted from the Sun | counted from the Sun, the {a} planet is {s}
r {s} is the {a} planet from the Sun
n the place of {s} among the planets
q which planet from the Sun is {s}? | which place does {s} have, counted from the Sun?
h what place does {s} have, counted from the Sun?
N the {a} planet | the {a} planet from the Sun
Q which planet is the {a} from the Sun?
H what planet is the {a} from the Sun?
R the {a} planet from the Sun is {s}

number_word
t numbers in words
s {s} is written {a} | the number {s} is called {a}
r {s} in words is {a}
n the word for {s} | the number {s} in words
q how do you write {s} in words? | write {s} in words. | how is {s} written in words?
h write the number {s} in words. | how do we write {s} in words?
N the number {a} in digits
Q write {a} in digits. | which number is {a}? | how do you write {a} in digits?
H write the number {a} in digits. | what number is {a}?
R {a} in digits is {s}

letter_after
t the alphabet
s in the alphabet, {a} follows {s} | the letter {a} comes after {s} | the letter {s} comes before {a}
r the letter after {s} is {a}
n the letter after {s} | the letter that follows {s}
q which letter comes after {s}? | which letter follows {s} in the alphabet?
h what letter comes after {s}? | which letter follows {s}?
N the letter before {a}
Q which letter comes before {a}?
H what letter comes before {a}?
R the letter before {a} is {s}

unit
t counting things
s {y} has {a} {x} | the number of {s} is {a}
r there are {a} {s}
n the number of {s}
q how many {x} are there in {y}? | how many {s}? | how many {x} does {y} have? | count the {s}.
h how many {x} are in {y}? | {y} has how many {x}?

known
t what things are
s {a} is {s} | it is {a} that is {s}
r {s} is {a}
n {s} | {s} | {s}
q which is {s}?
h which one is {s}?
"""


@dataclass(frozen=True)
class Relation:
    """All facts of one kind, what they may be answered with, answers of one fact only, and the wordings by letter."""

    name: str
    facts: tuple[Fact, ...]
    pool: tuple[str, ...]
    unique: frozenset[str]
    wordings: dict[str, tuple[str, ...]]

    def say(self, letter: str, fact: Fact) -> list[str]:
        """The fact in every wording of this letter."""
        values = fields(fact)
        return [wording.format(**values) for wording in self.wordings.get(letter, ())]

    def ask(self, rng: Random, fact: Fact, held: bool = False, reverse: bool = False) -> str:
        """A question in the wordings of the training text, or those held out; framed or special, evenly."""
        phrases = self.say("N" if reverse else "n", fact)
        special = self.say(("Hh" if held else "Qq")[not reverse], fact)
        if phrases and (not special or rng.random() < 0.5):
            return sentence(rng.choice(HELD_FRAMES if held else TRAIN_FRAMES).format(rng.choice(phrases)))
        return sentence(rng.choice(special))

    def reply(self, fact: Fact, reverse: bool = False) -> str:
        return sentence(self.say("R" if reverse else "r", fact)[0])

    def statements(self, fact: Fact) -> list[str]:
        """Clauses; `sentence` makes sentences of them."""
        return self.say("s", fact) + self.say("r", fact) + (self.say("R", fact) if "X" not in self.wordings else [])

    def reversible(self, fact: Fact) -> bool:
        """Whether there are words to ask back, and the answer leads to one subject only."""
        return "Q" in self.wordings and fact.answer in self.unique

    def plain(self, fact: Fact) -> str:
        """The plainest question."""
        phrases = self.say("n", fact)
        return sentence(f"what is {phrases[0]}?" if phrases else self.say("q", fact)[0])

    def choices(self, rng: Random, fact: Fact, reverse: bool = False, said: str = "") -> list[str]:
        """
        Four choices in random order: the right one and three others of its kind that are wrong, none of them named by
        another or in what is `said` around them. Fewer where there are not so many.
        """
        right = fact.subject if reverse else fact.answer
        akin: set[str] = set().union(*(group for group in AKIN if fact.answer in group))
        if reverse:
            others = [f.subject for f in self.facts if f.answer != fact.answer and f.answer not in akin]
        else:
            others = [answer for answer in self.pool if answer != right and answer not in akin]
        choices = [right]
        for other in rng.sample(others, len(others)):
            clash = other in UNCLEAR or names(said, other)
            if not clash and not any(names(choice, other) or names(other, choice) for choice in choices):
                choices.append(other)
            if len(choices) == 4:
                break
        rng.shuffle(choices)
        return choices


def sentence(clause: str) -> str:
    """Capital first letter; a full stop unless it ends with a mark already."""
    return clause[0].upper() + clause[1:] + ("" if clause[-1] in ".?!" else ".")


def with_choices(rng: Random, question: str, choices: list[str]) -> str:
    """One text of a question, which ends with its mark, and its choices in words."""
    either, every = (f"{', '.join(choices[:-1])} {word} {choices[-1]}" for word in ("or", "and"))
    values = {"question": question[:-1], "mark": question[-1], "any": either, "all": every}
    return rng.choice(CHOICE_FRAMES).format(**values, Any=either[0].upper() + either[1:])


@cache
def _pattern(phrase: str) -> re.Pattern[str]:
    bare = re.sub("^(the|an|a) ", "", phrase)
    return re.compile(rf"(?<!\w){re.escape(bare)}(?!\w)", re.IGNORECASE)


def names(text: str, phrase: str) -> bool:
    """Whether the phrase, its article apart, stands in the text as whole words; capitals do not matter."""
    return _pattern(phrase).search(text) is not None


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def fields(fact: Fact) -> dict[str, str]:
    s, a = fact.subject, fact.answer
    x, _, y = s.partition(" in ")
    return {"s": s, "a": a, "an": article(s), "aa": article(a), "p": plural(s), "x": x, "y": y}


@cache
def relations() -> dict[str, Relation]:
    blocks: dict[str, dict[str, tuple[str, ...]]] = {}
    for block in WORDINGS.strip().split("\n\n"):
        name, *lines = block.split("\n")
        words = blocks.setdefault(name, {})
        for line in lines:
            words[line[0]] = words.get(line[0], ()) + tuple(line[2:].split(" | "))
    extra = {  # wrong choices where the answers alone are too few
        "month_days": ("29", "27"), "mixture": COLOUR_NAMES, "colour": COLOUR_NAMES, "legs": tuple(SMALL_NUMBERS[2:11]),
        "known:0": PLANETS,
    }  # fmt: skip
    found = {}
    for name, facts in fact_table().items():
        count = Counter(fact.answer for fact in facts)
        unique = frozenset(answer for answer in count if count[answer] == 1)
        pool = tuple(sorted({*count, *extra.get(name, ())}))
        found[name] = Relation(name, tuple(facts), pool, unique, blocks[name.split(":")[0]])
    return found
