"""The grammar of ShapeMotion: words, scenes, and conversion between scenes and prompts.

    PROMPT   := GROUP [RELATION GROUP] ["on a" BACKGROUND "background"]
    GROUP    := ("a" | "two" | "three") [SIZE] [COLOR] SHAPE [MOTION]
    MOTION   := "staying still" | "growing" | "shrinking" | "moving" ("left" | "right" | "up" | "down") [SPEED]
    RELATION := "and" | "to the left of" | "to the right of" | "above" | "below"

Two groups name two different colors, so that pixels identify the objects and the verifier is exact. Attributes that a
prompt does not name (`None` in a `Group` or `Scene`) are drawn at random by the renderer and ignored by the verifier.
"""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
MOTIONS = ("staying still", "moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = ("black", "gray", "white")
RELATIONS = ("and", "to the left of", "to the right of", "above", "below")
COUNT_WORDS = ("a", "two", "three")
PLURALS = ("circles", "squares", "triangles", "crosses")

#: Compositions that appear in no training prompt or clip; each single word does.
HELD_OUT_COLOR_SHAPE = frozenset({("red", "triangle"), ("green", "cross"), ("blue", "circle"), ("yellow", "square")})
HELD_OUT_SHAPE_MOTION = frozenset(
    {("circle", "moving up"), ("square", "moving left"), ("triangle", "moving right"), ("cross", "moving down")}
)

_PHRASES = (*MOTIONS, *SPEEDS, *BACKGROUNDS, *RELATIONS, *COUNT_WORDS, *SIZES, *COLORS, *SHAPES, *PLURALS)
#: The 44 tokens of a word tokenizer for this world, in the order of their ids.
VOCABULARY = ("<pad>", "</s>", "<unk>", *sorted({w for p in _PHRASES for w in p.split()} | {"on", "background"}))


@dataclass(frozen=True)
class Group:
    """One to three identical objects.

    Args:
        shape: one of `SHAPES`.
        count: 1, 2 or 3.
        size: one of `SIZES`, or None if the prompt does not name it; the same holds for the other attributes.
        color: one of `COLORS`, or None.
        motion: one of `MOTIONS`, or None.
        speed: one of `SPEEDS`, or None. A speed needs a "moving" motion.

    Raises:
        ValueError: a value is not in the grammar.
    """

    shape: str
    count: int = 1
    size: str | None = None
    color: str | None = None
    motion: str | None = None
    speed: str | None = None

    def __post_init__(self):
        _check("shape", self.shape, SHAPES)
        _check("count", self.count, (1, 2, 3))
        _check("size", self.size, (*SIZES, None))
        _check("color", self.color, (*COLORS, None))
        _check("motion", self.motion, (*MOTIONS, None))
        _check("speed", self.speed, (*SPEEDS, None))
        if self.speed and not (self.motion or "").startswith("moving"):
            raise ValueError(
                f"speed={self.speed!r} needs a motion that moves, but motion is {self.motion!r}: drop the speed or "
                "choose one of 'moving left', 'moving right', 'moving up', 'moving down'."
            )

    def phrase(self) -> str:
        """Return the words of this group, such as "two small red crosses moving left slowly"."""
        noun = self.shape if self.count == 1 else PLURALS[SHAPES.index(self.shape)]
        words = (COUNT_WORDS[self.count - 1], self.size, self.color, noun, self.motion, self.speed)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Scene:
    """The content of a prompt: one or two groups, their relation, and the background.

    Args:
        groups: one `Group`, or two with different colors.
        relation: position of the first group relative to the second, one of `RELATIONS`; None with one group.
        background: one of `BACKGROUNDS`, or None if the prompt does not name it.

    Raises:
        ValueError: groups, relation or background are not in the grammar.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "groups", tuple(self.groups))
        _check("the number of groups", len(self.groups), (1, 2))
        _check("background", self.background, (*BACKGROUNDS, None))
        if len(self.groups) == 1:
            _check("relation of one group", self.relation, (None,))
            return
        _check("relation", self.relation, RELATIONS)
        first, second = (group.color for group in self.groups)
        if first is None or second is None or first == second:
            raise ValueError(
                f"the groups have colors {first!r} and {second!r}: two groups need two different colors of {COLORS}, "
                "so that pixels tell which is which."
            )

    def prompt(self) -> str:
        """Return the text of this scene; `parse(scene.prompt()) == scene`."""
        text = f" {self.relation} ".join(group.phrase() for group in self.groups)
        return text + (f" on a {self.background} background" if self.background else "")


def held_out(scene: Scene) -> tuple[bool, bool]:
    """Return whether `scene` names a held-out pair of color and shape, and one of shape and motion."""
    color_shape = any((group.color, group.shape) in HELD_OUT_COLOR_SHAPE for group in scene.groups)
    shape_motion = any((group.shape, group.motion) in HELD_OUT_SHAPE_MOTION for group in scene.groups)
    return color_shape, shape_motion


def parse(prompt: str) -> Scene:
    """Parse a prompt into its scene, ignoring case and spacing as the tokenizer does.

    Raises:
        ValueError: the prompt is empty or not in the grammar; the message names the prompt and the word.
    """
    return _Reader(prompt).scene()


class _Reader:
    """Recursive descent over the words of one prompt."""

    def __init__(self, prompt: str):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"prompt={prompt!r} is empty or not text; allowed: a sentence such as 'a red circle moving left'."
            )
        self.prompt, self.words, self.at = prompt, prompt.lower().split(), 0

    def scene(self) -> Scene:
        groups, relation, background = [self.group()], self.optional(RELATIONS), None
        if relation:
            groups.append(self.group())
        if self.optional(("on a",)):
            background = self.required(BACKGROUNDS)
            self.required(("background",))
        if self.at < len(self.words):
            self.fail("nothing" if background else "the end, or 'on a black|gray|white background'")
        try:
            return Scene(tuple(groups), relation, background)
        except ValueError as error:
            raise ValueError(f"prompt={self.prompt!r} is outside the grammar of ShapeMotion: {error}") from None

    def group(self) -> Group:
        count = COUNT_WORDS.index(self.required(COUNT_WORDS)) + 1
        size, color = self.optional(SIZES), self.optional(COLORS)
        nouns = SHAPES if count == 1 else PLURALS
        shape = SHAPES[nouns.index(self.required(nouns))]
        motion = self.optional(MOTIONS)
        speed = self.optional(SPEEDS) if motion and motion.startswith("moving") else None
        return Group(shape, count, size, color, motion, speed)

    def optional(self, phrases: tuple[str, ...]) -> str | None:
        for phrase in phrases:
            words = phrase.split()
            if self.words[self.at : self.at + len(words)] == words:
                self.at += len(words)
                return phrase
        return None

    def required(self, phrases: tuple[str, ...]) -> str:
        return self.optional(phrases) or self.fail("one of " + ", ".join(phrases))

    def fail(self, expected: str):
        word = repr(self.words[self.at]) if self.at < len(self.words) else "its end"
        raise ValueError(
            f"prompt={self.prompt!r} is outside the grammar of ShapeMotion at {word} (word {self.at + 1}); "
            f"allowed there: {expected}. See pisces_rl.shapemotion.grammar for the whole grammar."
        )


def _check(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")
