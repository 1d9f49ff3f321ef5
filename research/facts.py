"""Minimal pairs about the world, not about grammar: both sentences are grammatical, one is false.

``python -m research.facts > facts.jsonl`` writes pairs of the form that BLiMP's files have.
"""

import json

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Portugal": "Lisbon",
    "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Belgium": "Brussels", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Kenya": "Nairobi", "Iran": "Tehran", "Iraq": "Baghdad",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Canada": "Ottawa", "Australia": "Canberra",
    "Argentina": "Buenos Aires", "Turkey": "Ankara", "Ukraine": "Kyiv",
}  # fmt: skip
LANGUAGES = {
    "Brazil": "Portuguese", "Mexico": "Spanish", "Austria": "German", "Iran": "Persian",
    "Egypt": "Arabic", "Japan": "Japanese", "Greece": "Greek", "Poland": "Polish",
    "Hungary": "Hungarian", "Turkey": "Turkish", "Finland": "Finnish", "Sweden": "Swedish",
    "Italy": "Italian", "Russia": "Russian", "Vietnam": "Vietnamese", "Korea": "Korean",
}  # fmt: skip
KINDS = {
    "dog": "animal", "horse": "animal", "elephant": "animal", "apple": "fruit", "banana": "fruit",
    "pear": "fruit", "hammer": "tool", "saw": "tool", "screwdriver": "tool", "violin": "instrument",
    "trumpet": "instrument", "piano": "instrument", "rose": "flower", "tulip": "flower",
    "daisy": "flower", "sparrow": "bird", "eagle": "bird", "robin": "bird", "salmon": "fish",
    "trout": "fish", "shark": "fish", "chair": "piece of furniture", "table": "piece of furniture",
    "sofa": "piece of furniture", "car": "vehicle", "truck": "vehicle", "bus": "vehicle",
    "shirt": "piece of clothing", "jacket": "piece of clothing",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "blood": "red", "coal": "black", "milk": "white",
    "the sky on a clear day": "blue", "a ripe banana": "yellow", "chocolate": "brown",
}  # fmt: skip
SYMBOLS = {
    "hydrogen": "H", "oxygen": "O", "carbon": "C", "gold": "Au", "silver": "Ag", "iron": "Fe",
    "sodium": "Na", "potassium": "K", "helium": "He", "lead": "Pb",
}  # fmt: skip
FACTS = (
    ("capital", "The capital of {} is {}.", CAPITALS),
    ("language", "Most people in {} speak {}.", LANGUAGES),
    ("kind", "The {} is a kind of {}.", KINDS),
    ("colour", "The colour of {} is {}.", COLOURS),
    ("symbol", "The chemical symbol of {} is {}.", SYMBOLS),
)
SHIFTS = (1, 3)
"""A false sentence takes what is said of the entry so many places on."""


def pairs() -> list[dict[str, str]]:
    """Return all pairs: what differs stands at the end of the sentence."""
    found = []
    for name, sentence, facts in FACTS:
        said = list(dict.fromkeys(facts.values()))
        for what, true in facts.items():
            for shift in SHIFTS:
                false = said[(said.index(true) + shift) % len(said)]
                found.append(
                    {"sentence_good": sentence.format(what, true),
                     "sentence_bad": sentence.format(what, false), "UID": f"fact_{name}"}
                )  # fmt: skip
    return found


if __name__ == "__main__":
    print("\n".join(map(json.dumps, pairs())))
