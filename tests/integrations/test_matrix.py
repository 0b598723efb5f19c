"""The installed TRL, whichever it is: what is found of it, what is refused; and a matrix of versions (slow)."""

# ruff: noqa: E402 (TRL may be missing)

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib
import re
import subprocess
import types
from importlib import metadata
from pathlib import Path

import matrix
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl", reason="these tests look at the installed TRL")

from trl.trainer import utils

from prefixloss.integrations import installed
from prefixloss.integrations.trl import head, logps, patch_trl, versions
from prefixloss.integrations.trl.logps import StandIn


@pytest.fixture(autouse=True)
def _looks_anew():
    """What was found of TRL is forgotten before and after each test."""
    for found in (versions.theirs, logps._tested):
        found.cache_clear()
    yield
    for found in (versions.theirs, logps._tested):
        found.cache_clear()


def test_ours_called_as_trl_calls_its_own_gives_the_same():
    their = versions.theirs()
    leaves, given = versions._few_numbers(their, "cpu")
    wanted, got = (versions._results_and_gradients(f, leaves, given) for f in (their.function, StandIn()))
    assert len(got) == len(leaves) + (5 if their.all_results else 2)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


# ---- functions of other versions ---------------------------------------------------------------------------


def dense(hidden, weight, bias, targets, temperature, softcap, scale):
    """(log-probs, entropies)"""
    z = (hidden @ weight.T if bias is None else hidden @ weight.T + bias) * scale
    logp = (softcap * torch.tanh(z / softcap) / temperature).log_softmax(1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


class Without:
    """As in TRL 1.9 to 1.13: no bias, two results, another name for the hidden states."""

    @staticmethod
    def forward(
        ctx, last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ): ...

    @staticmethod
    def apply(hidden, weight, targets, temperature, _, softcap, scale):
        return dense(hidden, weight, None, targets, temperature, softcap, scale)


class With(Without):
    """As in TRL 1.14."""

    @staticmethod
    def forward(
        ctx, last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ): ...

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, _, softcap, scale):
        return dense(hidden, weight, bias, targets, temperature, softcap, scale)


class CapsFirst(With):
    """Applies the scale behind the cap."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, _, softcap, scale):
        return dense(hidden, weight, bias, targets, temperature / scale, softcap, 1.0)


class GivesThree(With):
    @staticmethod
    def apply(*given):
        return (*With.apply(*given), given[0].sum(1))


class TakesMore(With):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, label_smoothing): ...


class TakesLess(With):
    @staticmethod
    def forward(ctx, logits, targets, temperature): ...


@pytest.mark.parametrize("older", [Without, With])
def test_an_older_signature_is_found_and_served(older, monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", older)
    with patch_trl():
        stand_in = utils._ChunkedLogProbFunction
        assert isinstance(stand_in, StandIn)
        their = versions.theirs()
        assert their.function is older
        assert their.all_results is False
        leaves, given = versions._few_numbers(their, "cpu")
        assert len(leaves) == (2 if older is Without else 3)
        assert len(stand_in.apply(*given)) == 2
        for a, b in zip(*(versions._results_and_gradients(f, leaves, given) for f in (stand_in, older)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert utils._ChunkedLogProbFunction is older


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (None, "with no trl.trainer.utils._ChunkedLogProbFunction"),
        (
            TakesMore,
            "with a log-prob function of hidden, weight, bias, targets, temperature, label_smoothing",
        ),
        (TakesLess, "with a log-prob function of logits, targets, temperature, expected"),
        (CapsFirst, r"whose result 0 differs from ours by [0-9.]+, expected what 1\.9 to 1\.16 have"),
        (GivesThree, "with 6 results and gradients of its log-prob function, where ours has 5"),
    ],
)
def test_what_is_not_known_is_refused_with_what_was_found(function, found, monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", function)
    with pytest.raises(ImportError, match=rf"trl: got {metadata.version('trl')} .*{found}"):
        patch_trl()
    assert utils._ChunkedLogProbFunction is function
    assert not logps._active


def test_a_function_that_does_not_run_here_is_said_not_to_be_compared(monkeypatch):
    class NeedsDriver(With):
        @staticmethod
        def apply(*given):
            raise RuntimeError("0 active drivers")

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", NeedsDriver)
    with pytest.warns(UserWarning, match=r"do not run on this machine \(0 active drivers\): ours were not"):
        patch_trl()()


# ---- versions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "got", "first"), [("trl", "1.8.0", "1.9"), ("transformers", "4.56.2", "4.57")])
def test_an_old_version_is_refused_by_name_before_trl_is_imported(package, got, first, monkeypatch):
    known = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: got if name == package else known(name))
    monkeypatch.setattr(installed.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(ImportError, match=rf"^{package}: got version {got}, expected {first} or newer"):
        patch_trl()


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r"^trl: got none installed, expected it: pip install trl"):
        patch_trl()


def test_what_does_not_import_is_refused_with_the_versions(monkeypatch):
    def fails(name):
        raise RuntimeError("cannot import name 'httpx'")

    monkeypatch.setattr(installed.importlib, "import_module", fails)
    found = rf"trl {metadata.version('trl')}, transformers {metadata.version('transformers')}"
    with pytest.raises(ImportError, match=rf"^trl\.trainer\.grpo_trainer: got {found}, which do not import .*httpx"):
        patch_trl()


@pytest.mark.parametrize(("a", "b"), [("1.9", "1.16.0"), ("4.57", "5.0.0"), ("1.9", "1.9.0.dev0"), ("0.9", "1.0")])
def test_versions_are_compared_as_numbers(a, b, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda _: b)
    installed.check_version("some", a)
    if a != "1.9" or b != "1.9.0.dev0":
        monkeypatch.setattr(metadata, "version", lambda _: a)
        with pytest.raises(ImportError):
            installed.check_version("some", b)


def test_a_function_with_other_parameters_is_refused_with_those_found(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda _: "0.12")
    installed.check_takes("verl.forward", lambda self, hidden, ids, temperature: None, ["self", "hidden", "ids"])
    with pytest.raises(ImportError, match=r"got verl\.forward\(self, ids, hidden\) in 0\.12, expected \(self,"):
        installed.check_takes("verl.forward", lambda self, ids, hidden: None, ["self", "hidden", "ids"])


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("verl", "verl.patch_head"),
        ("openrlhf", "openrlhf.patch"),
        ("skyrl", "skyrl.patch_head"),
        ("skyrl", "skyrl.register"),
    ],
)
def test_other_trainers_are_refused_by_version_before_they_are_imported(package, use, monkeypatch):
    module, _, name = use.partition(".")
    function = getattr(importlib.import_module(f"prefixloss.integrations.{module}"), name)
    monkeypatch.setattr(metadata, "version", lambda _: "0.2.1")
    with pytest.raises(ImportError, match=rf"^{package}: got version 0\.2\.1, expected 0\.\d+ or newer"):
        function()


def test_a_loss_that_was_another_one_is_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda _: "1.10.0")
    versions.refuse_losses("luspo")
    monkeypatch.setattr(metadata, "version", lambda _: "1.9.2")
    versions.refuse_losses("grpo")
    with pytest.raises(ValueError, match=r'^loss_type: got "luspo", which TRL 1\.9 averages'):
        versions.refuse_losses("luspo")


# ---- the head that older trainers are given ----------------------------------------------------------------


def tiny(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma2Config(vocab_size=31, head_dim=8, num_key_value_heads=1, **sizes, **options)
    return transformers.Gemma2ForCausalLM(config).eval()


def scored(model, entropy_counts, **options):
    """Log-probs, entropies and gradients by `per_token_logps`, of two prompts padded on the left."""
    trainer = types.SimpleNamespace(
        temperature=0.7, model_kwarg_keys={"logits_to_keep"}, _entropy_bonus_enabled=entropy_counts
    )
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 9])
    with logps.scored_by(logps.LogProbs()):
        made = head.per_token_logps(trainer, model, ids, seen, 5, compute_entropy=True, **options)
    return ids, seen, made


@pytest.mark.parametrize("batch_size", [None, 1])
def test_the_head_gives_the_log_probs_and_entropies_of_the_model_s_logits(batch_size):
    model = tiny(final_logit_softcapping=3.0)
    ids, seen, (logps_, entropy, aux) = scored(model, True, batch_size=batch_size)
    logits = model(input_ids=ids, attention_mask=seen).logits[:, -6:-1] / 0.7
    logp, mask = logits.log_softmax(-1), seen[:, -5:] != 0
    wanted = logp.gather(-1, ids[:, -5:, None])[..., 0] * mask, -(logp.exp() * logp).sum(-1) * mask
    assert aux is None
    for got, want in zip((logps_, entropy), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        g, h = (torch.autograd.grad(x.square().sum(), model.model.norm.weight, retain_graph=True) for x in (got, want))
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5)
    assert not scored(model, False)[2][1].requires_grad
    assert model.generate(ids, max_new_tokens=1, do_sample=False).shape == (2, 10)


def test_the_head_refuses_what_it_would_get_wrong():
    model = tiny()
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"^model: got Gemma2ForCausalLM, which scales its logits"):
        scored(model, True)
    with pytest.raises(ValueError, match=r"^pixel_values: got a value, expected None"):
        scored(tiny(), True, pixel_values=torch.zeros(1))


def test_a_patched_method_leaves_images_to_trl():
    method = head.patched(lambda *_, **__: "theirs", lambda *_, **__: "ours")
    assert method(None, None, 1, 2, 3, compute_entropy=True, num_images=None) == "ours"
    assert method(None, None, 1, 2, 3, image_sizes=torch.ones(1)) == "theirs"


# ---- the matrix --------------------------------------------------------------------------------------------


def test_the_table_in_the_docs_is_of_the_matrix():
    text = (Path(__file__).parents[2] / "docs/versions-table.md").read_text()
    assert text.startswith(matrix.HEAD)
    rows = text[len(matrix.HEAD) :].splitlines()
    assert len(rows) == len(matrix.PAIRS)
    for pair, row in zip(matrix.PAIRS, rows, strict=True):
        assert row.startswith(matrix.start(pair, {pair.trainer: pair.version, "transformers": pair.transformers}))
        assert re.search(r"\d+ passed(, \d+ skipped)? \|$", row)


@pytest.mark.slow
def test_one_pair_of_versions_runs_in_an_environment_of_its_own(tmp_path):
    row = matrix.run(matrix.PAIRS[0], tmp_path)
    assert row.failed == 0
    assert row.passed > 10
    assert row.versions["trl"] == matrix.PAIRS[0].version
    table = tmp_path / "table.md"
    matrix.write([row], table)
    assert table.read_text().splitlines()[-1].startswith(f"| TRL {matrix.PAIRS[0].version} |")


def test_a_pair_that_has_not_run_keeps_its_row(tmp_path):
    b, c = (pair for pair in matrix.PAIRS if pair.trainer in ("openrlhf", "skyrl"))
    table = tmp_path / "table.md"
    versions = {"tokenizers": "1", "torch": "2", "openrlhf": b.version, "skyrl": c.version}
    matrix.write([matrix.Row(x, 3, 0, 1, versions | {"transformers": x.transformers}) for x in (c, b)], table)
    before = table.read_text()
    assert before.startswith(
        matrix.HEAD + f"| OpenRLHF {b.version} | {b.transformers} | 1 | 2 | 3 passed, 1 skipped |\n"
    )
    matrix.write([matrix.Row(c, 4, versions=versions | {"transformers": c.transformers})], table)
    assert table.read_text() == before.replace(
        before.splitlines()[-1], before.splitlines()[-1].replace("3 passed, 1 skipped", "4 passed")
    )


@pytest.mark.slow
def test_an_older_trl_is_refused_in_an_environment_of_its_own(tmp_path):
    python = matrix.environment(tmp_path / "old", ["trl==1.8.0"])
    code = "import prefixloss.integrations.trl"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=600)
    assert "ImportError: trl: got version 1.8.0, expected 1.9 or newer" in done.stderr
