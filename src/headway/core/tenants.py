"""Who has had how much of the device, in tokens, so that one tenant's flood does not drown another's drop.

After the virtual token counter (Sheng et al., Fairness in Serving Large Language Models, arXiv 2401.00588): served
tokens are counted per tenant, and one that comes to wait after a rest starts from the least served of those who wait,
since the device cannot be saved up: who wants nothing while it is idle has no claim to that later. What a tenant has
had beyond the least served is its debt; the policy orders its requests as if they were due so much later. A tenant
that waits alone has none.
"""

from collections import Counter
from collections.abc import Mapping

MOST_REMEMBERED = 64  # tenants that wait no more: beyond that, those who would owe nothing are forgotten


class Tenants:
    """Accounts of the tenants that wait; those of others are forgotten when nobody is left to compare with."""

    def __init__(self) -> None:
        self.version = 0  # grows with each change of what they owe
        self._served: dict[str, float] = {}  # tokens
        self._waiting: Counter[str] = Counter()
        self._known: tuple[int, float, dict[str, float]] = (-1, 0.0, {})  # debts: of which version, at which worth

    @property
    def num_active(self) -> int:
        """How many of them wait."""
        return len(self._waiting)

    def enter(self, tenant: str) -> None:
        """One more request of it waits."""
        if tenant not in self._waiting:
            self.version += 1
            if not self._waiting:
                self._served.clear()
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._least())
        self._waiting[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One request fewer waits."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            self.version += 1
            del self._waiting[tenant]
            if len(self._served) > MOST_REMEMBERED + 2 * len(self._waiting):
                least = self._least()
                self._served = {name: had for name, had in self._served.items() if name in self._waiting or had > least}

    def charge(self, tenant: str, num_tokens: int) -> None:
        """These tokens were computed for it."""
        self.version += 1
        self._served[tenant] = self._served.get(tenant, 0.0) + num_tokens

    def debts(self, newcomer: str | None = None, worth: float = 1.0) -> Mapping[str, float]:
        """Tokens that each has had beyond the least served of those who wait, times what one is worth; with a newcomer,
        as if it waited too. Empty if there is but one. A decision asks several times: kept until they change."""
        is_new = newcomer is not None and newcomer not in self._waiting
        if self.num_active + is_new < 2:
            return {}
        version, of_worth, debts = self._known
        if (version, of_worth) != (self.version, worth):
            least, served = self._least(), self._served
            debts = {tenant: (served[tenant] - least) * worth for tenant in self._waiting}
            self._known = self.version, worth, debts
        if newcomer is None or not is_new:
            return debts
        return debts | {newcomer: self.debt(newcomer) * worth}

    def debt(self, tenant: str) -> float:
        """The same of one of them, or of one that does not wait yet, were it to."""
        if self.num_active + (tenant not in self._waiting) < 2:
            return 0.0
        return max(0.0, self._served.get(tenant, 0.0) - self._least())

    def num_waiting(self, tenant: str) -> int:
        return self._waiting[tenant]

    def _least(self) -> float:
        return min(map(self._served.__getitem__, self._waiting), default=0.0)
