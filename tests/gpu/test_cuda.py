"""The same stage on CUDA: the CPU's logits, and not a bit lost by being suspended. Skipped where there is no device."""

import pytest
import torch

from headway.bench.exactness import SLOW, Bench, isolated, packed_as_alone, small_config, suspended_anywhere
from headway.core.request import Request, Sampling
from headway.models import weights
from headway.stages.sample import Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(scope="module")
def model():
    return weights.random_decoder(small_config(), 0, torch.float32, "cuda")


@torch.inference_mode()
def test_the_logits_are_those_of_the_cpu(model):
    """One prompt of 100 tokens on either device, in float32."""
    logits = []
    for here in (model, weights.random_decoder(small_config(), 0, torch.float32)):
        bench = Bench(here, SLOW)
        bench.finish(bench.stage.run(bench.work(bench.prompt("r", [7 * n % 331 for n in range(100)], range(7)))))
        logits.append(bench.sampler.logits["r"][0].cpu())
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_suspended_at_every_tile(model):
    done = suspended_anywhere(model, SLOW, num_tokens=150, stops=40, follow=8)
    assert done.num_stops == 40
    assert done.num_differences == 0


@torch.inference_mode()
def test_packs(model):
    assert packed_as_alone(model, SLOW, (1, 17, 64, 3), follow=32)[:2] == (4, 0)
    assert isolated(model, SLOW, 37, 21, trials=6) == (6, 0)


@torch.inference_mode()
def test_tokens_are_drawn_on_the_device_as_on_the_host():
    """A vocabulary of 150,000, 64 requests of several settings: the same tokens, whoever draws them."""
    logits = torch.randn(64, 150_000, generator=torch.Generator().manual_seed(0)) * 3
    settings = [Sampling(seed=n, top_p=(1.0, 0.9)[n % 2], top_k=(0, 50, 0)[n % 3]) for n in range(64)]
    names, found = [f"r{n}" for n in range(64)], []
    for rows in (logits, logits.cuda()):
        sampler = Sampler(150_000)
        for name, sampling in zip(names, settings, strict=True):
            sampler.open(Request(name, (1,), 9, 0.0, sampling=sampling))
        if rows.device.type == "cpu":
            commits = sampler.draw(rows, names, [1] * 64)
        else:
            commits, left = sampler.draw_there(rows, names, [1] * 64)
            assert left == []
        found.append({commit.request_id: commit.tokens for commit in commits})
    assert found[0] == found[1]
