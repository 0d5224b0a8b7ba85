"""A scene in English, in three levels of detail."""

from __future__ import annotations

from random import Random

from vlx.data.sources.scenes.world import Scene, Solid

LEVELS = ("terse", "medium", "full")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
_MOST_RELATIONS = 3  # in a full caption: six objects then stay within CLIP's 77 tokens


def captions(scene: Scene) -> list[str]:
    """One caption a level of `LEVELS`; objects in order of prominence.

    Terse names the first object and counts the others, medium names all by colour and shape, full
    gives every attribute and up to three relations.
    """
    if not scene.objects:
        return ["an empty scene"] * len(LEVELS)
    kinds = [with_article(solid.kind) for solid in scene.objects]
    details = [with_article(described(solid)) for solid in scene.objects]
    return [_terse(scene), listed(kinds), "; ".join([listed(details), *_relations(scene)])]


def described(solid: Solid) -> str:
    """`small striped red cube`."""
    return f"{solid.size} {solid.material} {solid.kind}"


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(nouns: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([part for part in (", ".join(nouns[:-1]), nouns[-1]) if part])


def _terse(scene: Scene) -> str:
    first, others = with_article(scene.objects[0].kind), len(scene.objects) - 1
    if others == 0:
        return first
    return f"{first} and {'another object' if others == 1 else f'{NUMBERS[others]} other objects'}"


def _relations(scene: Scene) -> list[str]:
    """At most one sentence an object, on how it stands to a more prominent one."""
    random = Random(f"words:{scene.seed}:{scene.index}")
    known = scene.relations()
    sentences = []
    for k in range(1, len(scene.objects)):
        options = [r for r in known if r.subject == k and r.object < k]
        if options and len(sentences) < _MOST_RELATIONS:
            relation = options[int(random.random() * len(options))]
            subject, other = scene.objects[k], scene.objects[relation.object]
            sentences.append(f"the {subject.kind} is {relation.word} the {other.kind}")
    return sentences
