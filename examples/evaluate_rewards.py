"""Ask rewards what they measure: on clips with one thing wrong, by how much, and what must change nothing.

    python examples/evaluate_rewards.py                                             # the four rewards of tiny-vtm
    python examples/evaluate_rewards.py --dataset clips.jsonl --encoder ./internvideo2 --ot_map outputs/map
    python examples/evaluate_rewards.py --rewards my_rewards.py:score

Without a data set it asks about ShapeMotion, where every attribute can be broken alone. A data set has the columns
`video` (a path) and `caption`: there, another video of the set and corruptions of pixels and of time take their place.
Videos of one size are asked about as they are, others are scaled and cut to the encoder's frame.
Writes rewards.md, the reward against each corruption's strength (strength.png) and plans by word (plans.png).
`pisces-rl evaluate` is the same.
"""

import sys

from pisces_rl.cli.evaluate_command import main
from pisces_rl.cli.quiet import quiet

if __name__ == "__main__":
    quiet()
    main(sys.argv[1:])
