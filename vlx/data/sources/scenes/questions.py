"""Questions about a scene, with the answers that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from vlx.data.sources.scenes.words import NUMBERS, with_article
from vlx.data.sources.scenes.world import COLOURS, INVERSE, SHAPES, Scene

KINDS = ("existence", "count", "attribute", "comparison", "relation")


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    """One word or two: yes, no, a number in words, an attribute."""
    kind: str
    """One of `KINDS`."""
    about: tuple[int, ...] = ()
    """The objects that the question names, as places in `scene.objects`. An existence question
    about object k turns from yes to no in `scene.remove(k)`; the other existence questions keep
    their answers (BEAF)."""


def questions(scene: Scene) -> list[Question]:
    """All questions of the scene, the same each time; yes/no questions come in equal halves.

    Objects are named by colour and shape, which name one each. Relations are asked where they are
    clear, and denied where the opposite is.
    """
    random = Random(f"questions:{scene.seed}:{scene.index}")
    return [
        *_existence(scene, random),
        *_counts(scene, random),
        *_attributes(scene),
        *_comparisons(scene, random),
        *_relations(scene, random),
    ]


def _existence(scene: Scene, random: Random) -> list[Question]:
    """Every object, and as many that are not there.

    The absent ones are hard where the scene allows it: first those whose colour and shape are both
    in the scene, on different objects, then those that share one of the two.
    """
    there = {solid.kind for solid in scene.objects}
    colours, shapes = ({getattr(o, name) for o in scene.objects} for name in ("colour", "shape"))
    absent = [(c, s) for c in COLOURS for s in SHAPES if f"{c} {s}" not in there]
    absent = _shuffled(absent, random)
    absent.sort(key=lambda pair: -((pair[0] in colours) + (pair[1] in shapes)))
    found = [
        Question(f"Is there {with_article(solid.kind)}?", "yes", "existence", (k,))
        for k, solid in enumerate(scene.objects)
    ]
    return found + [
        Question(f"Is there {with_article(f'{colour} {shape}')}?", "no", "existence")
        for colour, shape in absent[: len(found)]
    ]


def _counts(scene: Scene, random: Random) -> list[Question]:
    """The number of objects, of every shape, of every colour there and of one that is not."""
    found = [Question("How many objects are there?", NUMBERS[len(scene.objects)], "count")]
    for shape in SHAPES:
        about = tuple(k for k, solid in enumerate(scene.objects) if solid.shape == shape)
        text = f"How many {shape}s are there?"
        found.append(Question(text, NUMBERS[len(about)], "count", about))
    there = {solid.colour for solid in scene.objects}
    missing = _shuffled([colour for colour in COLOURS if colour not in there], random)[:1]
    for colour in [*sorted(there), *missing]:
        about = tuple(k for k, solid in enumerate(scene.objects) if solid.colour == colour)
        text = f"How many {colour} objects are there?"
        found.append(Question(text, NUMBERS[len(about)], "count", about))
    return found


def _attributes(scene: Scene) -> list[Question]:
    shapes, colours = ([getattr(o, name) for o in scene.objects] for name in ("shape", "colour"))
    found = []
    for k, solid in enumerate(scene.objects):
        asked = [
            (f"Is the {solid.kind} small or large?", solid.size),
            (f"What is the surface of the {solid.kind} like?", solid.material),
        ]
        if shapes.count(solid.shape) == 1:
            asked.append((f"What colour is the {solid.shape}?", solid.colour))
        if colours.count(solid.colour) == 1:
            asked.append((f"What shape is the {solid.colour} object?", solid.shape))
        found += [Question(text, answer, "attribute", (k,)) for text, answer in asked]
    return found


def _comparisons(scene: Scene, random: Random) -> list[Question]:
    """Sizes of pairs, asked both ways round where they differ; numbers of two shapes."""
    found = []
    for i, one in enumerate(scene.objects):
        for j, two in enumerate(scene.objects):
            if one.scale > two.scale:
                for text, answer in (("larger", "yes"), ("smaller", "no")):
                    text = f"Is the {one.kind} {text} than the {two.kind}?"
                    found.append(Question(text, answer, "comparison", (i, j)))
    first, second = _shuffled(SHAPES, random)[:2]
    counts = [sum(o.shape == shape for o in scene.objects) for shape in (first, second)]
    if counts[0] != counts[1]:
        more, fewer = (first, second) if counts[0] > counts[1] else (second, first)
        found += [
            Question(f"Are there more {more}s than {fewer}s?", "yes", "comparison"),
            Question(f"Are there more {fewer}s than {more}s?", "no", "comparison"),
        ]
    return found


def _relations(scene: Scene, random: Random) -> list[Question]:
    """Every clear relation once: asked as it is, and as its opposite."""
    found = []
    for relation in scene.relations():
        if random.random() < 0.5:  # a relation is also listed from the other object's side
            continue
        pair = (relation.subject, relation.object)
        one, two = (scene.objects[k].kind for k in pair)
        for word, answer in ((relation.word, "yes"), (INVERSE[relation.word], "no")):
            found.append(Question(f"Is the {one} {word} the {two}?", answer, "relation", pair))
    return found


def _shuffled(options: Sequence, random: Random) -> list:
    return sorted(options, key=lambda _: random.random())
