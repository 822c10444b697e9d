"""Names for page contents: a page's key stands for everything from the request's start to the page's end.

Two requests share a page exactly when their keys are equal, so the hash is a cryptographic one (BLAKE2b, 128 bit):
a collision would answer one caller with another's text. The first link carries what else the content depends on.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def root_key(tenant: str = "", adapter: str | None = None, media: Sequence[bytes] = (), *, salt: str = "") -> bytes:
    """The key before the first page: equal tokens under another tenant, salt, adapter or image share nothing."""
    digest = blake2b(digest_size=16)
    for part in (tenant.encode(), salt.encode(), (adapter or "").encode(), *media):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def extend_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], page_tokens: int) -> None:
    """Append to `keys` the key of every further full page of `tokens`; `keys` already covers the first len(keys)."""
    first, end = len(keys) * page_tokens, len(tokens) // page_tokens * page_tokens
    if first >= end:
        return
    key = keys[-1] if keys else root
    content = array("I", tokens[first:end])
    page_bytes, content_bytes = page_tokens * content.itemsize, content.tobytes()
    for at in range(0, len(content_bytes), page_bytes):
        key = blake2b(key + content_bytes[at : at + page_bytes], digest_size=16).digest()
        keys.append(key)
