"""Seeds of all random draws of a trainer, derived from their purpose."""

import numpy as np


def sample_seed(*parts: int) -> int:
    """Return one 63-bit seed from integers, the same on every machine and for any number of processes.

    The number of parts is hashed too, because SeedSequence does not distinguish [1], [1, 0] and [1, 0, 0].
    """
    entropy = [len(parts), *(p & 0xFFFFFFFF for p in parts)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
