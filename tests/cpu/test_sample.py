"""Drawing tokens: against plain formulas, against transformers' processors, and alone against in a batch."""

from collections.abc import Sequence
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headway.core.request import Request, Sampling
from headway.core.work import Commit
from headway.stages.sample import (
    Sampler,
    best_on_device,
    best_on_host,
    draw_on_device,
    drop_unlikely,
    inverse_cdf,
    token_logprobs,
    uniform,
)

PROMPT = (3, 1, 4, 1, 5)


def _request(name: str = "a", *, stop_ids: tuple[int, ...] = (), min_tokens: int = 0, **sampling: object) -> Request:
    return Request(
        id=name,
        prompt=PROMPT,
        max_tokens=1000,
        arrival=0.0,
        sampling=Sampling(**sampling),
        stop_ids=stop_ids,
        min_tokens=min_tokens,
    )


def _logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def _answer(request: Request, logits_RV: Tensor) -> list[Commit]:
    """One request alone, one row per token."""
    sampler = Sampler(logits_RV.shape[1])
    sampler.open(request)
    commits = []
    for position, row in zip(count(len(request.prompt)), logits_RV):
        commits += sampler.draw(row.unsqueeze(0), [request.id], [position])
    return commits


def _tokens(commits: Sequence[Commit]) -> list[int]:
    return [commit.tokens[0] for commit in commits]


# Greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_highest_logit_and_of_equal_ones_the_lowest_id(dtype):
    """bfloat16 logits have only 256 steps between powers of two: equal ones are common."""
    logits = _logits(40, 5000).to(dtype)
    logits[7, 100], logits[7, 42], logits[7, 4999] = 50.0, 50.0, 50.0
    got = _tokens(_answer(_request(temperature=0.0), logits))
    assert got[7] == 42
    assert got == [int(np.flatnonzero(row == row.max())[0]) for row in logits.float().numpy()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_and_device_agree_on_the_best(dtype):
    """Two ways to the same answer, equal logits and a NaN included; both run on any device."""
    logits = _logits(20, 500).to(dtype)
    logits[3, 40], logits[3, 30] = 60.0, 60.0
    logits[4, 7] = float("nan")
    tokens, highest = best_on_host(logits)
    assert tokens[3:5] == [30, 7]
    on_device, highest_on_device = best_on_device(logits)
    assert on_device == tokens
    np.testing.assert_array_equal(highest_on_device, highest)


def test_greedy_is_the_limit_of_little_temperature_and_of_keeping_one():
    """Also where logits are equal, and however small the temperature."""
    logits = _logits(30, 300).bfloat16()
    logits[:, 17], logits[:, 250] = 9.0, 9.0
    greedy = _tokens(_answer(_request(temperature=0.0), logits))
    for nearly in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0, "top_k": 1}, {"temperature": 1e-30, "top_k": 1}):
        assert _tokens(_answer(_request(**nearly), logits)) == greedy
    assert set(_tokens(_answer(_request(temperature=1e-300), logits))) == {17, 250}


# What is kept


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
@pytest.mark.parametrize(
    "chosen",
    [
        {"top_p": 0.9},
        {"top_p": 0.1},
        {"top_k": 5},
        {"top_k": 400},
        {"min_p": 0.05},
        {"temperature": 0.7, "min_p": 0.02, "top_k": 50, "top_p": 0.8},
        {"temperature": 1.8, "top_k": 300, "top_p": 0.95},
    ],
)
def test_the_kept_tokens_are_those_of_transformers(chosen, scale):
    """In vLLM's order: temperature, min_p, top_k, top_p, each over what the last has left."""
    for row in _logits(20, 1000, scale=scale):
        sampling = Sampling(**chosen)
        expected = TemperatureLogitsWarper(float(sampling.temperature))(None, row.unsqueeze(0))
        if sampling.min_p:
            expected = MinPLogitsWarper(sampling.min_p)(None, expected)
        if sampling.top_k:
            expected = TopKLogitsWarper(sampling.top_k)(None, expected)
        if sampling.top_p < 1:
            expected = TopPLogitsWarper(sampling.top_p)(None, expected)
        weights = _weights(row.numpy(), sampling.temperature)
        drop_unlikely(weights, sampling)
        assert np.array_equal(weights > 0, expected[0].isfinite().numpy())
        np.testing.assert_allclose(weights / weights.sum(), expected[0].softmax(-1).numpy(), rtol=1e-4, atol=1e-7)


_WEIGHTS = st.lists(
    st.sampled_from([0.0, 1e-42, 1e-7, 0.03125, 0.25, 0.3, 1.0]) | st.floats(0, 1, width=32), min_size=1, max_size=60
).map(lambda values: np.array([1.0, *values], dtype=np.float32))


@given(_WEIGHTS, st.integers(1, 70))
def test_top_k_keeps_exactly_the_k_heaviest_of_equal_ones_the_lowest_ids(weights, k):
    best_first = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    expected = {token for token in best_first[:k] if weights[token] > 0}
    drop_unlikely(weights, Sampling(top_k=k))
    assert set(np.flatnonzero(weights)) == expected


@given(_WEIGHTS, st.floats(1e-6, 1 - 1e-6))
def test_top_p_keeps_the_fewest_that_reach_it(weights, top_p):
    before = weights.astype(np.float64)
    drop_unlikely(weights, Sampling(top_p=top_p))
    kept = before[weights > 0]
    slack = 1e-9 * before.sum()
    assert kept.sum() >= top_p * before.sum() - slack
    assert kept.sum() - kept.min() < top_p * before.sum() + slack, "one less would have been enough"
    assert kept.min() >= before[weights == 0].max(initial=0), "a heavier one was dropped"


def test_a_large_vocabulary_is_cut_as_a_small_one():
    """150,000 tokens, flat and peaked: the kept set is what sorting everything would give."""
    for scale in (0.3, 3.0):
        weights = _weights(_logits(1, 150_000, scale=scale)[0].numpy(), 1.0)
        order = np.argsort(-weights, kind="stable")
        reached = np.searchsorted(np.cumsum(weights[order], dtype=np.float64), 0.95 * weights.sum(dtype=np.float64))
        for sampling, number in ((Sampling(top_p=0.95), reached + 1), (Sampling(top_k=1234), 1234)):
            kept = weights.copy()
            drop_unlikely(kept, sampling)
            assert set(np.flatnonzero(kept)) == set(order[:number])


# The draw


@given(_WEIGHTS, st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_inverse_of_the_cumulative_weight(weights, u):
    sums = np.cumsum(weights, dtype=np.float64)
    token = inverse_cdf(weights, u)
    assert weights[token] > 0
    slack = 1e-12 * sums[-1]
    assert sums[token] - weights[token] - slack <= u * sums[-1] <= sums[token] + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"temperature": 0.3},
        {"top_p": 0.9},
        {"top_k": 7},
        {"min_p": 0.05},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.7},
        {"temperature": 1e-7},
        {"top_p": 1e-6},
        {"top_k": 1000},
    ],
)
def test_a_draw_on_the_device_is_that_on_the_host(chosen: dict[str, float], dtype: torch.dtype) -> None:
    """The same number, settings and logits, many of which are equal in bfloat16, give the same token: whole weights
    round otherwise by a millionth of a millionth."""
    logits_RV = _logits(300, 500, scale=3.0).to(dtype)
    request = _request(seed=5, **chosen)
    on_host = _tokens(_answer(request, logits_RV))
    numbers = [uniform(5, number) for number in range(300)]
    assert draw_on_device(logits_RV, [request.sampling] * 300, numbers).tolist() == on_host


def test_a_batch_elsewhere_is_drawn_from_as_one_here() -> None:
    """Greedy, free, with penalties, with logprobs, and a row that is damaged: each way gives what it gives here."""
    requests = [
        _request("greedy", temperature=0.0),
        _request("free", top_p=0.9, seed=3),
        _request("penalized", presence_penalty=0.6, seed=4),
        _request("told", num_logprobs=2, seed=5),
        _request("damaged", seed=6),
    ]
    rows = _logits(len(requests), 300, seed=8)
    rows[-1, 5] = float("nan")
    names = [request.id for request in requests]
    found = []
    for elsewhere in (False, True):
        sampler = Sampler(300)
        for request in requests:
            sampler.open(request)
        commits, left = sampler.draw_there(rows, names, [len(PROMPT)] * len(names)) if elsewhere else ((), range(5))
        assert list(left) == ([2, 3, 4] if elsewhere else [0, 1, 2, 3, 4])
        rest = sampler.draw(rows[list(left)], [names[row] for row in left], [len(PROMPT)] * len(left))
        found.append((*commits, *rest))
    assert found[0] == found[1]
    assert found[1][-1].failure is not None


def test_a_device_draws_nothing_from_a_row_that_is_not_finite() -> None:
    for bad in (float("nan"), float("inf")):
        logits_RV = _logits(2, 50)
        logits_RV[0, 7] = bad
        drawn = draw_on_device(logits_RV, [Sampling(top_p=0.9)] * 2, [0.5, 0.5]).tolist()
        assert (drawn[0], drawn[1] >= 0) == (-1, True)
    masked = torch.full((4, 50), float("-inf"))
    masked[:, [3, 9]] = 0.0
    assert draw_on_device(masked, [Sampling()] * 4, [0.0, 0.4, 0.6, 1 - 2**-53]).tolist() == [3, 3, 9, 9]


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000])
def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token_that_can_be(size):
    weights = np.zeros(size + 2, dtype=np.float32)
    weights[1], weights[size] = 1.0, 1e-3
    assert inverse_cdf(weights, 0.0) == 1
    assert inverse_cdf(weights, 1 - 2.0**-53) == size


def test_no_rounding_draws_a_token_that_was_dropped():
    """A block's sum and its running sum are rounded apart: the highest draw may fall behind the last weight."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        weights = np.exp(generator.normal(size=3000) * 10 - 20).astype(np.float32)
        weights[2800:] = 0
        token = inverse_cdf(weights, 1 - 2.0**-53)
        assert weights[token] > 0
        assert weights[token + 1 :].sum(dtype=np.float64) < 1e-12 * weights.sum(dtype=np.float64)


def test_a_draw_among_many_is_found_in_its_block():
    weights = _weights(_logits(1, 5000)[0].numpy(), 1.0)
    sums = np.cumsum(weights, dtype=np.float64)
    for u in np.linspace(0.001, 0.999, 200):
        assert inverse_cdf(weights, u) == np.searchsorted(sums, u * sums[-1], side="right")


def test_tokens_come_as_often_as_their_probabilities_say():
    """20,000 draws over 40 seeds, by chi-square: 15 degrees of freedom, exceeded by chance once in a thousand."""
    row = _logits(1, 16, seed=5, scale=1.0)
    seen = np.zeros(16)
    for seed in range(40):
        for token in _tokens(_answer(_request(seed=seed, temperature=0.8), row.expand(500, -1))):
            seen[token] += 1
    expected = (row[0] / 0.8).softmax(-1).double().numpy() * seen.sum()
    assert ((seen - expected) ** 2 / expected).sum() < 37.7


def test_the_random_stream_is_fixed_for_good():
    """The same seed must give the same text after an upgrade. Any integer is a seed."""
    assert [uniform(0, 0), uniform(0, 1), uniform(7, 0)] == [
        0.011546754286331562,
        0.5023796042735054,
        0.8720734548204873,
    ]
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)
    numbers = np.array([uniform(seed, drawn) for seed in range(50) for drawn in range(50)])
    assert len(set(numbers)) == 2500
    assert 0 <= numbers.min() < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02


# Penalties, bias, min_tokens


def test_penalties_follow_their_formulas():
    """Frequency and presence count what was answered; repetition what was asked as well, as transformers has it."""
    logits = _logits(60, 30, scale=1.0)
    sampling = {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.5}
    got = _tokens(_answer(_request(temperature=0.0, **sampling), logits))
    for turn, row in enumerate(logits):
        before = got[:turn]
        scores = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([[*PROMPT, *before]]), row.unsqueeze(0))[0]
        for token in set(before):
            scores[token] -= 0.3 * before.count(token) + 0.5
        assert got[turn] == scores.argmax()
    assert got != logits.argmax(-1).tolist(), "the penalties must have mattered"


@pytest.mark.parametrize("name", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_each_penalty_alone_keeps_a_token_from_coming_forever(name):
    """The same logits at every turn: greedy repeats itself, a penalty moves on."""
    row = torch.tensor([[2.0, 1.9, 1.8, 1.7, 0.1, 0.1]])
    assert set(_tokens(_answer(_request(temperature=0.0), row.expand(10, -1)))) == {0}
    assert len(set(_tokens(_answer(_request(temperature=0.0, **{name: 1.5}), row.expand(10, -1))))) > 1


def test_bias_comes_before_penalties():
    """A biased token that was seen is penalised with its bias: 1 + 2 halved is less than 1.9."""
    row = torch.tensor([[1.9, 1.0, 0.0, 0.0, 0.0, 0.0]])
    request = _request(temperature=0.0, repetition_penalty=2.0, logit_bias=((1, 2.0),))
    assert 1 in request.prompt
    assert _tokens(_answer(request, row)) == [0]
    assert _tokens(_answer(_request(temperature=0.0, logit_bias=((1, 2.0),)), row)) == [1]


def test_bias_forces_and_forbids():
    logits = _logits(50, 40)
    assert set(_tokens(_answer(_request(logit_bias=((9, 100.0),)), logits))) == {9}
    forbidden = tuple((token, -100.0) for token in range(38))
    assert set(_tokens(_answer(_request(logit_bias=forbidden), logits))) == {38, 39}


def test_an_answer_cannot_stop_before_min_tokens():
    row = torch.tensor([[0.0, 5.0, 9.0, 8.0]])
    request = _request(temperature=0.0, stop_ids=(2, 3), min_tokens=3)
    assert _tokens(_answer(request, row.expand(5, -1))) == [1, 1, 1, 2, 2]


def test_ids_beyond_the_vocabulary_have_no_effect():
    """A preset's end-of-text id may lie beyond what a small test model can draw."""
    logits = _logits(5, 40)
    strange = _request(temperature=0.0, logit_bias=((40, 100.0), (-1, 100.0)), stop_ids=(99,), min_tokens=9)
    assert _tokens(_answer(strange, logits)) == _tokens(_answer(_request(temperature=0.0), logits))


# Logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype):
    """Whatever changed the draw, what is reported is the model's own distribution."""
    logits = _logits(20, 1000).to(dtype)
    raw = logits.float().log_softmax(-1)
    commits = _answer(
        _request(num_logprobs=5, temperature=0.3, presence_penalty=1.0, logit_bias=((7, 5.0),), top_k=3), logits
    )
    for commit, row in zip(commits, raw, strict=True):
        (reported,) = commit.logprobs
        assert reported.logprob == pytest.approx(row[commit.tokens[0]].item(), abs=1e-5)
        ids = [token for token, _ in reported.top]
        assert ids == sorted(range(1000), key=lambda token: (-row[token].item(), token))[:5]
        assert [value for _, value in reported.top] == pytest.approx(row[ids].tolist(), abs=1e-5)


def test_logprobs_come_only_where_asked():
    logits = _logits(1, 50)
    for temperature in (0.0, 1.0):
        assert _answer(_request(temperature=temperature), logits)[0].logprobs == ()
        (chosen_only,) = _answer(_request(temperature=temperature, num_logprobs=0), logits)[0].logprobs
        assert chosen_only.top == ()
    assert len(token_logprobs(logits[0].numpy(), 3, 80).top) == 50, "no more than there are tokens"


def test_logprobs_of_hopeless_tokens_are_ranked_too():
    """Differences of hundreds: the weights of all but one token vanish, their logprobs do not."""
    row = np.array([-500.0, -300.0, -400.0, 0.0], dtype=np.float32)
    assert token_logprobs(row, 0, 4) == (-500.0, ((3, 0.0), (1, -300.0), (2, -400.0), (0, -500.0)))


# Independence


_SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_p": st.sampled_from([0.5, 0.95]),
        "top_k": st.integers(1, 40),
        "min_p": st.sampled_from([0.01, 0.2]),
        "repetition_penalty": st.sampled_from([1.2, 0.8]),
        "presence_penalty": st.sampled_from([0.6, -0.6]),
        "seed": st.integers(-(2**63), 2**63),
        "num_logprobs": st.integers(0, 3),
    },
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_SETTINGS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_no_token_depends_on_what_else_is_in_the_batch(all_settings, random):
    """Five turns in batches of random members and order, drawn from in two parts, in one of them as a device does, give
    each request what it gets alone, logprobs and all."""
    requests = [_request(f"r{number}", **chosen) for number, chosen in enumerate(all_settings)]
    logits = {request.id: _logits(5, 200, seed=number) for number, request in enumerate(requests)}
    alone = {request.id: _answer(request, logits[request.id]) for request in requests}

    sampler = Sampler(200)
    for request in requests:
        sampler.open(request)
    got: dict[str, list[Commit]] = {request.id: [] for request in requests}
    while waiting := [name for name, commits in got.items() if len(commits) < 5]:
        batch = random.sample(waiting, random.randint(1, len(waiting)))
        rows = torch.stack([logits[name][len(got[name])] for name in batch])
        positions = [len(PROMPT) + len(got[name]) for name in batch]
        cut = random.randint(0, len(batch))
        commits, left = sampler.draw_there(rows[:cut], batch[:cut], positions[:cut])
        left += range(cut, len(batch))
        rest = sampler.draw(rows[left], [batch[row] for row in left], [positions[row] for row in left])
        for commit in (*commits, *rest):
            got[commit.request_id].append(commit)
    assert got == alone


def test_a_step_that_was_given_up_leaves_no_trace():
    """Drawn once in a step that was then abandoned, again after its prefill was repeated: the same answer."""
    request = _request(seed=11, frequency_penalty=1.0, repetition_penalty=1.3)
    logits = _logits(6, 25)
    undisturbed = _tokens(_answer(request, logits))
    sampler = Sampler(25)
    sampler.open(request)
    got = []
    for turn in (0, 1, 2, 3, 3, 3, 1, 2, 3, 4, 5):
        (commit,) = sampler.draw(logits[turn : turn + 1], ["a"], [len(PROMPT) + turn])
        got[turn:] = commit.tokens
    assert got == undisturbed


def test_drawing_leaves_the_logits_as_they_were():
    """Rows are views of the stage's own tensor."""
    logits = _logits(1, 50)
    before = logits.clone()
    _answer(_request(logit_bias=((1, 5.0),), presence_penalty=1.0, top_p=0.5, num_logprobs=3), logits)
    assert torch.equal(logits, before)


def test_a_closed_request_may_be_closed_again_and_its_name_used_again():
    """A refused request is closed without ever having been opened."""
    sampler = Sampler(50)
    sampler.close("a")
    logits = _logits(2, 50)
    for _ in range(2):
        sampler.open(_request(seed=1))
        got = [sampler.draw(logits[turn : turn + 1], ["a"], [len(PROMPT) + turn])[0] for turn in range(2)]
        assert got == _answer(_request(seed=1), logits)
        sampler.close("a")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail_their_own_request_only(temperature, bad):
    """The middle one of three rows is broken: its request gets a failure and no token, the others what they get alone.
    Once its row is whole again, it may be drawn as if nothing had happened."""
    logits = _logits(3, 50)
    expected = [_answer(_request(name, temperature=temperature), logits[row : row + 1])[0] for row, name in _THREE]
    sampler = Sampler(50)
    for _, name in _THREE:
        sampler.open(_request(name, temperature=temperature))
    broken = logits.clone()
    broken[1, 20] = bad
    first, failed, third = sampler.draw(broken, ["a", "b", "c"], [len(PROMPT)] * 3)
    assert (first, third) == (expected[0], expected[2])
    assert (failed.request_id, failed.tokens, failed.logprobs) == ("b", (), ())
    assert "not finite" in failed.failure.message
    assert sampler.draw(logits[1:2], ["b"], [len(PROMPT)]) == (expected[1],)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_settings_overflow_fails_its_own_request_only():
    """A penalty so small that the logit of a token seen in the prompt overflows."""
    logits = _logits(1, 50).abs() + 1
    (commit,) = _answer(_request(temperature=0.0, repetition_penalty=1e-42), logits)
    assert commit.tokens == ()
    assert "not finite" in commit.failure.message


def test_what_min_tokens_masks_must_be_finite_too():
    """The stop id may not be drawn yet, but its logit would show in the logprobs of all others."""
    logits = _logits(1, 50)
    logits[0, 2] = float("nan")
    (commit,) = _answer(_request(stop_ids=(2,), min_tokens=1, num_logprobs=2), logits)
    assert "not finite" in commit.failure.message


_THREE = list(enumerate("abc"))


def _weights(scores: np.ndarray, temperature: float) -> np.ndarray:
    return np.exp((scores - scores.max()) / np.float32(temperature))
