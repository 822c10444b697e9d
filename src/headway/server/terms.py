"""On which terms a request is to be served: its targets, its class, its priority, and on whose account.

What is said in a header goes before what the body says, since a gateway in front may set it; both go before what the
class says. Nothing that cannot be understood is ignored.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from headway.config import SloClass
from headway.core.request import SLO
from headway.server.errors import bad_request
from headway.server.schema import Body

CLASS_HEADER = "x-slo-class"
TENANT_HEADERS = ("x-gateway-inference-fairness-id", "x-tenant-id")  # the gateway's own goes first
_TENANT = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,126}[\x21-\x7e])?")
_NUMBER = re.compile(r"\+?[0-9]{1,20}(\.[0-9]{0,20})?([eE][+-]?[0-9]{1,3})?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")


class Terms(NamedTuple):
    """`slo_class` and `tenant` are empty if none was named."""

    slo: SLO
    priority: int
    slo_class: str
    tenant: str


def terms_of(body: Body, headers: Mapping[str, str], classes: Mapping[str, SloClass]) -> Terms:
    """Raises ApiError 400 that names the header or the field."""
    named = _class(body, headers, classes)
    slo = SLO(
        ttft_s=_seconds("ttft", body, headers, named),
        tpot_s=_seconds("tpot", body, headers, named),
        total_s=_seconds("total", body, headers, named),
    )
    return Terms(slo, _priority(body, headers, named), "" if named is None else named.name, tenant_of(headers))


def tenant_of(headers: Mapping[str, str]) -> str:
    """On whose account; empty if nobody was named. The body's `user` is not asked: it tells persons apart, not
    accounts, and each would read the same instructions into a cache of their own."""
    for header in TENANT_HEADERS:
        tenant = headers.get(header)
        if tenant is not None:
            if not _TENANT.fullmatch(tenant):
                raise bad_request(f"The header {header} must be 1 to 128 printable ASCII characters.", header)
            return tenant
    return ""


def _class(body: Body, headers: Mapping[str, str], classes: Mapping[str, SloClass]) -> SloClass | None:
    name, param = headers.get(CLASS_HEADER), CLASS_HEADER
    if name is None and body.slo is not None:
        name, param = body.slo.class_name, "slo.class"
    if name is None:
        return None
    if name in classes:
        return classes[name]
    if not classes:
        message = f"No classes are configured here: leave `{param}` out, or start the server with --slo-classes."
    else:
        message = f"The class {name[:40]!r} is not configured here: choose from {', '.join(classes)}."
    raise bad_request(message, param, "unknown_slo_class")


def _seconds(target: str, body: Body, headers: Mapping[str, str], named: SloClass | None) -> float | None:
    field, header = f"{target}_ms", f"x-slo-{target}-ms"
    value = headers.get(header)
    if value is None:
        said = None if body.slo is None else getattr(body.slo, field)
        milliseconds = getattr(named, field, None) if said is None else said
        return None if milliseconds is None else float(milliseconds) / 1000
    milliseconds = float(value) if _NUMBER.fullmatch(value) else math.nan
    if not 0 < milliseconds <= 1e9:
        raise bad_request(f"The header {header} must be a positive number of milliseconds.", header)
    return milliseconds / 1000


def _priority(body: Body, headers: Mapping[str, str], named: SloClass | None) -> int:
    value = headers.get("x-vllm-priority")
    if value is None:
        if body.priority is not None:
            return body.priority
        return 0 if named is None else named.priority
    priority = int(value) if _INTEGER.fullmatch(value) else 2**63
    if not -(2**63) <= priority < 2**63:
        raise bad_request("The header x-vllm-priority must be a 64-bit integer; lower is earlier.", "x-vllm-priority")
    return priority
