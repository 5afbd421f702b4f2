"""Test what rewards measure: whether they detect single corruptions, and how strongly.

    python examples/evaluate_rewards.py                                             # the four rewards of tiny-vtm
    python examples/evaluate_rewards.py --dataset clips.jsonl --encoder ./internvideo2 --ot_map outputs/map
    python examples/evaluate_rewards.py --rewards my_rewards.py:score

Without a dataset, it uses ShapeMotion, where each attribute can be corrupted alone. A dataset needs the columns
`video` (a path) and `caption`; its corruptions are another video of the set and changes to pixels and time. Videos are
scored as they are if all have the same size; otherwise they are scaled and cropped to the encoder's resolution.
Writes rewards.md, reward against corruption strength (strength.png) and transport plans by word (plans.png).
`pisces-rl evaluate` is equivalent.
"""

import sys

from pisces_rl.cli.evaluate_command import main
from pisces_rl.cli.quiet import quiet

if __name__ == "__main__":
    quiet()
    main(sys.argv[1:])
