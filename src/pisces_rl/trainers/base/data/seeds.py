"""Seeds of everything a trainer draws, by what they are for."""

import numpy as np


def sample_seed(*parts: int) -> int:
    """One 63-bit seed from integers, the same on every machine and number of processes.

    Their number is hashed too: SeedSequence takes [1], [1, 0] and [1, 0, 0] for the same.
    """
    entropy = [len(parts), *(p & 0xFFFFFFFF for p in parts)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
