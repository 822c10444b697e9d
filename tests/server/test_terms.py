"""On which terms: targets, classes, priority and tenants, by header, body or class, and in which order they count."""

from typing import Any

import pytest
from desk import Desk, run

from headway.config import SloClass
from headway.core.prefix import root_key
from headway.core.request import SLO, Request

COMPLETIONS = "/v1/completions"
CHAT = SloClass("chat", ttft_ms=250, tpot_ms=100, priority=-1)
BATCH = SloClass("batch", priority=5)


async def understood(desk: Desk, slo: dict[str, Any] | None = None, headers: Any = None, **more: Any) -> Request:
    """What the engine gets to know of such a request."""
    body = {"prompt": "x", **more} | ({} if slo is None else {"slo": slo})
    response = await desk.post(COMPLETIONS, body, **(headers or {}))
    assert response.status_code == 200, response.text
    return desk.link.requests[-1]


def test_a_class_stands_for_its_targets_and_its_priority() -> None:
    """By header or by body, in both of the APIs; one without targets is best effort."""

    async def story() -> None:
        desk = await Desk("ok", slo_classes=(CHAT, BATCH)).start()
        for request in (
            await understood(desk, {"class": "chat"}),
            await understood(desk, headers={"x_slo_class": "chat"}),
        ):
            assert (request.slo_class, request.slo, request.priority) == ("chat", SLO(0.25, 0.1), -1)
        request = await understood(desk, {"class": "batch"})
        assert (request.slo_class, request.slo, request.priority) == ("batch", SLO(), 5)
        request = await understood(desk)
        assert (request.slo_class, request.slo, request.priority) == ("", SLO(), 0)
        await desk.chat(slo={"class": "chat"})
        assert desk.link.requests[-1].slo_class == "chat"

    run(story)


def test_a_header_goes_before_the_body_and_the_body_before_the_class() -> None:
    async def story() -> None:
        desk = await Desk("ok", slo_classes=(CHAT, BATCH)).start()
        request = await understood(desk, {"class": "batch"}, {"x_slo_class": "chat"})
        assert request.slo_class == "chat"
        request = await understood(desk, {"class": "chat", "ttft_ms": 500, "total_ms": 9000})
        assert request.slo == SLO(0.5, 0.1, 9.0)
        request = await understood(desk, {"class": "chat", "ttft_ms": 500}, {"x_slo_ttft_ms": "750"})
        assert request.slo == SLO(0.75, 0.1)
        request = await understood(desk, {"class": "chat"}, priority=0)
        assert request.priority == 0, "a zero that was said is not an absence"
        request = await understood(desk, {"class": "chat"}, {"x_vllm_priority": "7"}, priority=3)
        assert request.priority == 7

    run(story)


@pytest.mark.parametrize(("where", "param"), [("header", "x-slo-class"), ("body", "slo.class")])
def test_a_class_that_nobody_configured_is_refused_with_what_there_is(where: str, param: str) -> None:
    async def story() -> None:
        for classes, words in (((CHAT, BATCH), "chat, batch"), ((), "--slo-classes")):
            desk = await Desk("ok", slo_classes=classes).start()
            if where == "header":
                response = await desk.post(COMPLETIONS, {"prompt": "x"}, x_slo_class="chatt")
            else:
                response = await desk.post(COMPLETIONS, {"prompt": "x", "slo": {"class": "chatt"}})
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, "unknown_slo_class", param)
            assert words in error["message"]
            assert desk.link.requests == []

    run(story)


@pytest.mark.parametrize("targets", [{"ttft": 200}, {"ttft_s": 0.2}, {"klass": "chat"}])
def test_a_target_that_is_misspelt_is_not_taken_for_none(targets: dict[str, Any]) -> None:
    """Served as best effort, it would be late and nobody would know why."""

    async def story() -> None:
        desk = await Desk("ok", slo_classes=(CHAT,)).start()
        response = await desk.post(COMPLETIONS, {"prompt": "x", "slo": targets})
        assert response.status_code == 400
        assert next(iter(targets)) in response.json()["error"]["message"]
        assert desk.link.requests == []

    run(story)


def test_a_tenant_is_named_by_the_gateways_header_or_ours() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        assert (await understood(desk)).tenant == ""
        assert (await understood(desk, headers={"x_tenant_id": "a"})).tenant == "a"
        both = {"x_tenant_id": "a", "x_gateway_inference_fairness_id": "b c"}
        assert (await understood(desk, headers=both)).tenant == "b c"
        request = await understood(desk, headers={"x_tenant_id": "a"}, cache_salt="pepper")
        assert (request.tenant, request.cache_salt) == ("a", "pepper"), "the share is the tenant's, whatever the salt"

    run(story)


@pytest.mark.parametrize("header", ["x_tenant_id", "x_gateway_inference_fairness_id"])
@pytest.mark.parametrize("tenant", ["", "x" * 129, "tab\there", "naïve".encode("latin-1")])
def test_a_tenant_must_be_printable_and_short(header: str, tenant: Any) -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        response = await desk.post(COMPLETIONS, {"prompt": "x"}, **{header: tenant})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, header.replace("_", "-"))

    run(story)


def test_equal_prompts_of_two_tenants_share_no_page_whatever_their_salts() -> None:
    """Tenant and salt name the pages together: neither can stand in for the other."""

    async def story() -> None:
        desk = await Desk("ok").start()
        roots = set()
        for tenant, salt in (("", ""), ("a", ""), ("", "a"), ("a", "a"), ("ab", "c"), ("a", "bc")):
            headers = {"x_tenant_id": tenant} if tenant else {}
            request = await understood(desk, headers=headers, **({"cache_salt": salt} if salt else {}))
            roots.add(root_key(request.tenant, request.adapter, salt=request.cache_salt))
        assert len(roots) == 6

    run(story)
