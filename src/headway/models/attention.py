"""Attention of a block of queries over all the keys they may see. One path for a prompt's block and for one token.

Grouped query heads are folded into rows, so that keys and values are read once per key-value head and never expanded.
Shape legend: R query rows, T keys, H query heads, K key-value heads, G = H / K, D head size.
"""

import torch
from torch import Tensor


def attend(q_RHD: Tensor, k_KTD: Tensor, v_KTD: Tensor, first_key: int, first_query: int, window: int | None) -> Tensor:
    """Causal attention, (R, H, D). Queries carry the scale already.

    Query r stands at position first_query + r, key t at first_key + t; the last key is the last query's own. A window
    w lets a query see itself and the w - 1 positions before it.
    """
    num_rows, num_heads, head_size = q_RHD.shape
    num_kv_heads, num_keys, _ = k_KTD.shape
    groups = num_heads // num_kv_heads
    folded = q_RHD.view(num_rows, num_kv_heads, groups, head_size).permute(1, 2, 0, 3)
    scores = torch.bmm(folded.reshape(num_kv_heads, groups * num_rows, head_size), k_KTD.transpose(1, 2))
    blocked = _blocked(num_rows, num_keys, first_key, first_query, window, q_RHD.device)
    if blocked is not None:
        columns = scores.view(num_kv_heads, groups, num_rows, num_keys)[..., num_keys - blocked.shape[1] :]
        columns.masked_fill_(blocked, float("-inf"))
    mixed = torch.bmm(torch.softmax(scores, dim=-1), v_KTD)
    return mixed.view(num_kv_heads, groups, num_rows, head_size).permute(2, 0, 1, 3).reshape(num_rows, num_heads, -1)


def _blocked(
    num_rows: int, num_keys: int, first_key: int, first_query: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Which of the last columns a row may not see, (R, columns), or None if every row sees every key."""
    reaches_back = window is not None and first_query + num_rows - window > first_key
    if not reaches_back:
        if num_rows == 1:
            return None
        return torch.ones(num_rows, num_rows, dtype=torch.bool, device=device).triu_(1)  # only its own block's future
    assert window is not None
    rows = torch.arange(first_query, first_query + num_rows, device=device).unsqueeze(1)
    keys = torch.arange(first_key, first_key + num_keys, device=device)
    return (keys > rows) | (keys <= rows - window)
