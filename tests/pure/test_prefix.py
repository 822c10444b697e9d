"""Names of page contents: equal beginnings share a name, and nothing else does."""

from hypothesis import given
from hypothesis import strategies as st

from headway.core.prefix import extend_keys, root_key

TOKENS = st.lists(st.integers(0, 200_000), max_size=40)


def keys_of(tokens: list[int], page_tokens: int = 4, root: bytes | None = None) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, root_key() if root is None else root, tokens, page_tokens)
    return keys


def test_equal_prompts_have_equal_names() -> None:
    """Two callers of one tenant send the same text: every full page of it has one name."""
    assert keys_of(list(range(10))) == keys_of(list(range(10)))
    assert len(keys_of(list(range(10)))) == 2, "the half page at the end has no name"


@given(TOKENS, TOKENS, TOKENS, st.integers(1, 8))
def test_names_agree_exactly_as_far_as_the_tokens_do(shared: list[int], a: list[int], b: list[int], size: int) -> None:
    """Two prompts begin alike and part somewhere: so do their names, at the page in which they part."""
    first, second = shared + a, shared + b
    num_equal = next(
        (place for place, (x, y) in enumerate(zip(first, second, strict=False)) if x != y),
        min(len(first), len(second)),
    )
    ours, theirs = keys_of(first, size), keys_of(second, size)
    assert ours[: num_equal // size] == theirs[: num_equal // size]
    assert not set(ours[num_equal // size :]) & set(theirs[num_equal // size :])


@given(TOKENS, st.lists(st.integers(0, 40), max_size=5), st.integers(1, 8))
def test_naming_as_the_answer_grows_is_naming_at_once(tokens: list[int], stops: list[int], size: int) -> None:
    """Keys are extended after every step; the result is the same as naming the whole text in one go."""
    keys: list[bytes] = []
    for length in [*sorted(stops), len(tokens)]:
        extend_keys(keys, root_key(), tokens[:length], size)
    assert keys == keys_of(tokens, size)


def test_the_same_words_later_in_a_text_are_another_page() -> None:
    """A page is named after everything before it, not after its own tokens alone."""
    first, second = keys_of([1, 2, 3, 4] * 2)
    assert first != second


def test_tenants_adapters_and_images_do_not_share() -> None:
    """The same tokens under another tenant, adapter or image are another content: five names for five situations."""
    roots = [
        root_key(),
        root_key(tenant="a"),
        root_key(adapter="a"),
        root_key(media=[b"a"]),
        root_key(tenant="a", adapter="a"),
    ]
    names = [keys_of(list(range(8)), root=root) for root in roots]
    assert len({name for pair in names for name in pair}) == 10


def test_parts_of_the_root_do_not_run_into_each_other() -> None:
    """Tenant "ab" with adapter "c" is not tenant "a" with adapter "bc", nor are two images one longer image."""
    assert root_key("ab", "c") != root_key("a", "bc")
    assert root_key(media=[b"x", b"y"]) != root_key(media=[b"xy"])
