"""litellm and langchain: whole answers, streams, forms, and errors as their own exceptions."""

import pytest
from served import Server

litellm = pytest.importorskip("litellm", reason="needs clients of others: make test-clients")
langchain = pytest.importorskip("langchain_openai", reason="needs clients of others: make test-clients")

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]
FORM = {
    "title": "Answer",
    "type": "object",
    "properties": {"name": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def base(server: Server) -> dict[str, str]:
    return {"base_url": f"{server.url}/v1", "api_key": "none"}


def test_litellm(server: Server) -> None:
    """Its chat, its stream and its completions say the same greedy text."""
    asked = {"model": "openai/embedded", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **base(server)}
    whole = litellm.completion(**asked)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens == 12
    parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
    assert len(parts) > 3
    assert "".join(parts) == text
    plain = litellm.text_completion(
        model="text-completion-openai/embedded", prompt="def add(a, b):", max_tokens=8, **base(server)
    )
    assert plain.choices[0].finish_reason in ("length", "stop")


def test_litellm_tells_what_is_wrong(server: Server) -> None:
    with pytest.raises(litellm.BadRequestError, match="max_tokens"):
        litellm.completion(model="openai/embedded", messages=MESSAGES, max_tokens=-3, **base(server))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/nobody", messages=MESSAGES, **base(server))


def test_langchain(server: Server) -> None:
    """Its chat model, its stream with usage, and its completions."""
    chat = langchain.ChatOpenAI(model="embedded", max_tokens=12, temperature=0, stream_usage=True, **base(server))
    whole = chat.invoke("def add(a, b):")
    assert whole.usage_metadata["output_tokens"] == 12
    chunks = list(chat.stream("def add(a, b):"))
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 12
    assert langchain.OpenAI(model="embedded", max_tokens=4, temperature=0, **base(server)).invoke("import ")


def test_langchain_gets_the_form_that_it_asked_for(server: Server) -> None:
    chat = langchain.ChatOpenAI(model="embedded", max_tokens=64, temperature=1, **base(server))
    answer = chat.with_structured_output(FORM, method="json_schema").invoke("a colour and a number")
    assert answer["name"] in ("red", "green")
    assert 0 <= answer["count"] <= 9
