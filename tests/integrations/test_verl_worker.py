"""verl's training worker updates a tiny model on the CPU with our losses, credit and head, as the formula does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="these tests run verl's worker")
transformers = pytest.importorskip("transformers")

# what the worker is told, whose module can only be imported in a process of its own
STEPS, RATE, ENTROPY, KL, CLIP, DUAL = 3, 1e-2, 0.01, 0.05, 0.2, 3.0
PROMPTS, RESPONSES = [2, 3, 1, 2], [3, 5, 4, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and out.pt with what verl's worker did to it."""
    folder = tmp_path_factory.mktemp("worker")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    command = [sys.executable, str(Path(__file__).with_name("verl_worker.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return torch.load(folder / "out.pt", weights_only=True)


def log_probs(model, ids):
    """Of all tokens of each response, and the entropies there; one sequence at a time."""
    logps, entropies = [], []
    for row, start in zip(ids, PROMPTS, strict=True):
        logp = model(row[None]).logits[0, start - 1 : -1].log_softmax(-1)
        logps.append(logp.gather(-1, row[start:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


def plain(folder, advantages):
    """The same steps by the formula in float64: losses, gradient norms, old log-probs, weights before and after."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    flat = lambda: torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    before, random = flat(), torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 31, (p + r,), generator=random) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    old, losses, norms = log_probs(model, ids)[0].detach(), [], []
    a = torch.cat([row[:r] for row, r in zip(advantages.double(), RESPONSES, strict=True)])
    for _ in range(STEPS):
        new, entropy = log_probs(model, ids)
        ratio = torch.exp(new - old)
        surrogate = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP))
        surrogate = torch.where(a < 0, torch.minimum(surrogate, -a * DUAL), surrogate)
        kl = torch.exp(old - new) - (old - new) - 1
        loss = (surrogate - ENTROPY * entropy + KL * kl).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(float(loss))
    return losses, norms, old, before, flat()


@pytest.mark.parametrize("kind", ["verl", "loss", "loss and head"])
def test_verl_s_worker_makes_the_formula_s_steps(folder, runs, kind):
    run = runs[kind]
    losses, norms, old, before, after = plain(folder, run["advantages"])
    scored = torch.cat([row[:r] for row, r in zip(run["old"].double(), RESPONSES, strict=True)])
    torch.testing.assert_close(scored, old, rtol=1e-5, atol=1e-6)
    # float32 to the last digits at first; Adam divides by gradients that are nearly 0, and steps carry that on
    assert run["losses"] == pytest.approx(losses, abs=1e-5)
    assert run["norms"] == pytest.approx(norms, rel=1e-3)
    moved = (after - before).norm()
    assert moved > 0.1
    assert (run["weights"].double() - after).norm() < 1e-3 * moved
    assert abs(losses[0] - losses[-1]) > 0.01


def test_verl_s_worker_with_our_loss_moves_the_weights_as_with_its_own(runs):
    theirs, *ours = (runs[kind]["weights"] for kind in ("verl", "loss", "loss and head"))
    for weights in ours:
        # sums in another order, after three steps; weights are of the size 0.02, and moved by 0.03
        torch.testing.assert_close(weights, theirs, rtol=1e-4, atol=1e-5)
    assert "actor/learning_share" in runs["loss"]["names"]
    assert "actor/learning_share" not in runs["verl"]["names"]


def test_verl_s_worker_is_given_credit_up_to_the_first_error(runs):
    # prompt a: averages 1 and 0.5 * 2 / 5, baseline 0.6; from the third token on 0 is left
    a = runs["loss"]["advantages"]
    torch.testing.assert_close(a[0], torch.tensor([0.4] * 3 + [0.0] * 3))
    torch.testing.assert_close(a[1], torch.tensor([-0.1] * 2 + [-0.6] * 3 + [0.0]))
