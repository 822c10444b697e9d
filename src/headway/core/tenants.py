"""Who has had how much of the device, in tokens, so that one tenant's flood does not drown another's drop.

After the virtual token counter (Sheng et al., Fairness in Serving Large Language Models, arXiv 2401.00588): served
tokens are counted per tenant, and one that comes back after a rest starts from the least served of those who are there,
since the device cannot be saved up. What a tenant has had beyond the least served is its debt; the policy orders its
requests as if they were due so much later. A tenant alone has none.
"""

from collections import Counter

MOST_REMEMBERED = 64  # tenants that have gone: beyond that, those who would owe nothing are forgotten


class Tenants:
    """Accounts of the tenants that have open requests; those of others are forgotten when nobody is left to compare."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}  # tokens
        self._open: Counter[str] = Counter()

    @property
    def num_active(self) -> int:
        return len(self._open)

    def enter(self, tenant: str) -> None:
        """One more open request."""
        if tenant not in self._open:
            if not self._open:
                self._served.clear()
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._least())
        self._open[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One open request fewer."""
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]
            if len(self._served) > MOST_REMEMBERED + 2 * len(self._open):
                least = self._least()
                self._served = {name: had for name, had in self._served.items() if name in self._open or had > least}

    def charge(self, tenant: str, num_tokens: int) -> None:
        """These tokens were computed for it."""
        self._served[tenant] += num_tokens

    def debts(self) -> dict[str, float]:
        """Tokens that each has had beyond the least served of those who are there. Empty if there is but one."""
        if len(self._open) < 2:
            return {}
        least = self._least()
        return {tenant: self._served[tenant] - least for tenant in self._open}

    def num_open(self, tenant: str) -> int:
        return self._open[tenant]

    def _least(self) -> float:
        return min((self._served[tenant] for tenant in self._open), default=0.0)
