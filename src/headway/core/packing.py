"""Which prompts share one prefill: several short ones cost little more than one, up to the device's saturation.

After Prepacking (arXiv 2404.09529), without its padding and mask: segments need none. What remains of it is the
question whom to take along, and the answer is: nobody who would make another late.
"""

import math
from collections.abc import Sequence

from headway.core.cost import Amount, CostModel, Share

MAX_MEMBERS = 16  # of one pack: beyond that nothing is gained, and a decision must be quick


def pack(
    shares: Sequence[Share], slacks_s: Sequence[float], cost: CostModel, max_tokens: int, max_s: float = math.inf
) -> int:
    """How many of the first prompts, in their order, to run as one step: at least 1.

    `slacks_s[i]` is how long prompt i could still wait beyond its own prefill. The next one joins while the pack
    stays within `max_tokens` and takes no longer than `max_s`, and no member with slack is pushed past its deadline by
    the others.
    """
    together, first_due_s = Amount(), math.inf
    for taken, (share, slack_s) in enumerate(zip(shares, slacks_s, strict=True)):
        together = together.plus(share)
        if taken and together.tokens > max_tokens:
            return taken
        if slack_s >= 0:
            first_due_s = min(first_due_s, slack_s + cost.of(Amount().plus(share)))
        if taken and cost.of(together) > min(first_due_s, max_s):
            return taken
    return len(shares)
