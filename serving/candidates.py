"""The best of many candidates, where a candidate is one integer.

Sorting it sorts by score, then token, then beam, so ties are broken alike everywhere.
"""

import numpy as np

from serving.step_model import Floats, Ints

_BEAM_BITS, _TOKEN_BITS = 11, 21
MAX_BEAMS, MAX_VOCABULARY = 1 << _BEAM_BITS, 1 << _TOKEN_BITS
COLUMNS = np.arange(2 * MAX_BEAMS)


def best_candidates(scores: Floats, tokens: Ints, most: int) -> tuple[Floats, Ints, Ints]:
    """Returns scores, tokens and beams of the best `most` of (A, W, M), each (A, C)."""
    count, width, _ = scores.shape
    # As integers, floats of one sign are in order already, or in reverse; -0 becomes 0 first.
    bits = (scores + np.float32(0)).view(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    keys = (~bits).astype(np.int64)  # best first
    keys <<= _TOKEN_BITS
    keys |= tokens
    keys <<= _BEAM_BITS
    keys |= COLUMNS[:width, None]
    keys = np.sort(keys.reshape(count, -1), axis=1)[:, :most]
    beams = keys & (MAX_BEAMS - 1)
    keys >>= _BEAM_BITS
    tokens = keys & (MAX_VOCABULARY - 1)
    bits = ~(keys >> _TOKEN_BITS).astype(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    return bits.view(np.float32), tokens, beams
