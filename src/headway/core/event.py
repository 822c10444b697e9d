"""Everything that can happen to the scheduler, and everything it can ask for in return."""

from typing import NamedTuple

from headway.core.ledger import Record
from headway.core.request import Request
from headway.core.work import Commit, Outcome

# Events: what happened. The driver feeds each to `Scheduler.handle` exactly once.


class Arrived(NamedTuple):
    """`num_in_front`: so many others wait for what their answers must follow, and will arrive; `num_of_tenant` of them
    are its tenant's."""

    request: Request
    num_in_front: int = 0
    num_of_tenant: int = 0


class StepDone(NamedTuple):
    """The step of Work `work_id` ran to its end and took `busy_s` seconds of the device."""

    work_id: int
    outcome: Outcome
    busy_s: float


class StepFailed(NamedTuple):
    """The stage raised: every request in the Work ends as failed, with `cause`."""

    work_id: int
    cause: str


class Left(NamedTuple):
    """These dropped requests have left the running Work: their pages are no longer touched."""

    work_id: int
    request_ids: tuple[str, ...]


class Cancelled(NamedTuple):
    """The caller went away or asked to stop."""

    request_id: str


class Stopped(NamedTuple):
    """The door saw a stop string: the request is finished, not cancelled."""

    request_id: str


class Due(NamedTuple):
    """The instant that `Scheduler.next_due` named has come."""


class EngineLost(NamedTuple):
    """The engine is gone with all its pages: every open request ends as failed."""

    cause: str


class Draining(NamedTuple):
    """Admit nothing more; what is open may finish."""


Event = Arrived | StepDone | StepFailed | Left | Cancelled | Stopped | Due | EngineLost | Draining

# Effects: what the driver must carry out, in order.


class Admit(NamedTuple):
    """The request is in: open its sampling session at the stage, and tell the caller when to expect a token."""

    request: Request
    predicted_ttft_s: float


class Deliver(NamedTuple):
    """Hand these tokens to the caller."""

    commit: Commit


class Drop(NamedTuple):
    """Tell the running or parked Work that a member is to leave at the next layer boundary."""

    work_id: int
    request_id: str


class Abandon(NamedTuple):
    """Close the Work's generator: nobody waits for it any more."""

    work_id: int


class End(NamedTuple):
    """The request has ended: close its session, tell the caller. Comes exactly once per request."""

    record: Record


Effect = Admit | Deliver | Drop | Abandon | End
