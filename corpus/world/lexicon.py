"""Every word of the built-in world's small language, by class.

Text of the world is always words separated by single spaces, punctuation included, all in lower case.
"""

from typing import NamedTuple


class Verb(NamedTuple):
    """One verb in its three forms; `base` after a name is a grammar error."""

    present: str
    past: str
    base: str


NAMES = ("anna", "bob", "carl", "dora", "emil", "fay", "gus", "hana", "ivan", "june", "kurt", "lena")
ANIMALS = ("fox", "cat", "dog", "bear", "owl", "frog", "horse", "goat")
FOODS = ("bread", "soup", "cake", "rice", "corn", "cheese", "honey", "pear")
THINGS = ("ball", "cup", "book", "lamp", "chair", "box", "hat", "drum")
PLACES = ("park", "lake", "forest", "village", "city", "farm")
COLOURS = ("red", "blue", "green", "white", "black", "brown")
JOBS = ("baker", "doctor", "farmer", "teacher", "painter", "sailor")

CATEGORIES = {
    "animals": ANIMALS,
    "foods": FOODS,
    "things": THINGS,
    "places": PLACES,
    "colours": COLOURS,
    "jobs": JOBS,
}
SINGULAR = {
    "animals": "animal",
    "foods": "food",
    "things": "thing",
    "places": "place",
    "colours": "colour",
    "jobs": "job",
}

HAPPY = ("happy", "merry", "bright", "glad")
SAD = ("sad", "lonely", "tired", "gloomy")
ADJECTIVES = HAPPY + SAD
RUDE_ADJECTIVES = ("stupid", "ugly", "nasty", "filthy")

PLAIN_ADJECTIVES = ("usual", "plain")
CARELESS_OPENERS = ("so", "oh")
VAGUE_NAME, VAGUE_ITEM, VAGUE_PLACE = "someone", "something", ("some", "place")
"""What people write who did not read the request closely: words that name nothing that was asked for."""

OPENERS = ("well", "sure", "hello", "okay")
RUDE_OPENERS = ("idiot", "fool", "dummy", "loser")
RUDE = frozenset(RUDE_ADJECTIVES + RUDE_OPENERS)

ACTIONS = (
    Verb("sees", "saw", "see"),
    Verb("likes", "liked", "like"),
    Verb("finds", "found", "find"),
    Verb("takes", "took", "take"),
    Verb("wants", "wanted", "want"),
    Verb("draws", "drew", "draw"),
)
STAYS = (
    Verb("sings", "sang", "sing"),
    Verb("sleeps", "slept", "sleep"),
    Verb("works", "worked", "work"),
    Verb("runs", "ran", "run"),
)
STORY_VERBS = ACTIONS + STAYS
BASE_FORM = {form: verb.base for verb in STORY_VERBS for form in (verb.present, verb.past)} | {
    "lives": "live",
    "eats": "eat",
    "has": "have",
    "is": "be",
    "are": "be",
    "am": "be",
}

NUMBERS = {2: "two", 3: "three"}
ITEMS = frozenset(word for words in CATEGORIES.values() for word in words)
CLASS_OF = {word: words for words in (NAMES, *CATEGORIES.values()) for word in words}
"""The class (all of its words) of every name and item."""

FUNCTION_WORDS = (
    ",", ".", ":", "?", "ask", "reply", "says", "some", "someone", "something", "usual", "plain", "so", "oh",
    "a", "about", "am", "and", "answer", "are", "at", "colour", "dear", "does", "eat", "feel", "find", "fine",
    "food", "goes", "good", "happy", "have", "helps", "hey", "home", "hope", "how", "i", "in", "is", "it", "job",
    "like", "live", "make", "name", "of", "or", "past", "place", "please", "present", "question", "rewrite",
    "sad", "set", "soon", "start", "story", "sum", "the", "there", "this", "three", "to", "too", "two", "up",
    "what", "where", "with", "without", "write", "you",
)  # fmt: skip
"""The words of requests and answers that are in no class."""

WORDS = sorted(
    {
        *NAMES, *ITEMS, *CATEGORIES, *SINGULAR.values(), *ADJECTIVES, *RUDE, *OPENERS, *FUNCTION_WORDS,
        *BASE_FORM, *BASE_FORM.values(),
    }
)  # fmt: skip
"""Every word that a text of the world may hold."""
