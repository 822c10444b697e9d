"""Which prompts share one prefill: several short ones cost little more than one, up to the device's saturation.

After Prepacking (arXiv 2404.09529), without its padding and mask: segments need none. What remains of it is the
question whom to take along, and the answer is: nobody who would make another late.
"""

import math
from collections.abc import Callable, Sequence

from headway.core.cost import Share

MAX_MEMBERS = 16  # of one pack: beyond that nothing is gained, and a decision must be quick


def pack(
    shares: Sequence[Share],
    slacks_s: Sequence[float],
    predict: Callable[[Sequence[Share]], float],
    max_tokens: int,
    max_s: float = math.inf,
) -> int:
    """How many of the first prompts, in their order, to run as one step: at least 1.

    `slacks_s[i]` is how long prompt i could still wait beyond its own prefill. The next one joins while the pack
    stays within `max_tokens` and takes no longer than `max_s`, and no member with slack is pushed past its deadline by
    the others.
    """
    taken = 1
    tokens = shares[0].num_tokens
    alone = [predict(shares[:1])]
    while taken < len(shares):
        tokens += shares[taken].num_tokens
        if tokens > max_tokens:
            break
        together = predict(shares[: taken + 1])
        alone.append(predict(shares[taken : taken + 1]))
        late = together > max_s or any(
            0 <= slack < together - own for slack, own in zip(slacks_s[: taken + 1], alone, strict=True)
        )
        if late:
            break
        taken += 1
    return taken
