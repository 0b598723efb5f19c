"""The package as a user meets it: what importing it costs, and that the README's example runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from importlib import metadata, resources
from pathlib import Path

import pytest

import prefixloss

README = Path(__file__).parent.parent / "README.md"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_core_loads_no_extra() -> None:
    extras = ("transformers", "tokenizers", "rich", "typer", "matplotlib", "trl", "liger_kernel")
    loaded = run_python(f"import sys, prefixloss; print([m for m in {extras} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_kernels_are_installed_inside_the_package() -> None:
    assert run_python("import prefixloss._kernels as k; print(k.__name__)").strip() == "prefixloss._kernels"


def test_every_folder_of_the_package_is_in_a_wheel() -> None:
    root = README.parent
    text = (root / "pyproject.toml").read_text()
    listed = re.findall(r'"(prefixloss[\w.]*)"', text[text.index("packages = [") : text.index("package-dir]")])
    folders = {
        name if folder == "prefixloss" else name.replace(folder, f"prefixloss.{inside}", 1)
        for folder, inside in (("prefixloss", ""), ("csrc_triton", "_kernels"), ("bench", "_bench"))
        for path in (root / folder).rglob("__init__.py")
        if "_kernels" not in path.parts and "_bench" not in path.parts
        for name in [".".join(path.relative_to(root).parent.parts)]
    }
    assert set(listed) == folders


def test_the_benchmark_is_installed_inside_the_package() -> None:
    code = "import prefixloss._bench.speed.worker as w; print(w.__name__, w.Worker.__module__)"
    assert run_python(code).strip() == "prefixloss._bench.speed.worker prefixloss._bench.speed.worker"


def test_package_is_typed_and_knows_its_version() -> None:
    assert resources.files("prefixloss").joinpath("py.typed").is_file()
    assert metadata.version("prefixloss") == prefixloss.__version__


def test_public_names_are_all_there() -> None:
    assert all(hasattr(prefixloss, name) for name in prefixloss.__all__)


def test_readme_example_runs_and_learns_from_the_tokens_it_says() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    # every scored token of the four responses has an advantage: 10 + 20 + 8 + 12
    assert " 50 torch.Size([4, 20])" in run_python(example)


@pytest.mark.skipif(sys.platform != "linux", reason="the gloo back-end and file stores are tested on Linux")
def test_sharded_head_gets_the_sum_of_the_ranks_gradients(tmp_path: Path) -> None:
    # two ranks, the head split by rows, each rank with tokens of its own
    code = f"""
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from prefixloss import linear_prefix_loss

def data():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=g, dtype=torch.float64)
    hidden = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    return weight, hidden, torch.randint(6, (2, 5), generator=g), torch.randn(2, 5, generator=g)

def work(rank):
    dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
    weight, hidden, tokens, advantages = data()
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)]).requires_grad_()
    out = linear_prefix_loss(hidden[rank], sharded, tokens[rank], advantages[rank], normalizer=10)
    out.loss.backward()
    torch.save(sharded.grad.to_local(), f"{tmp_path}/{{rank}}.pt")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, nprocs=2)
    weight, hidden, tokens, advantages = data()
    weight.requires_grad_()
    linear_prefix_loss(hidden.reshape(10, 4), weight, tokens.reshape(10), advantages.reshape(10)).loss.backward()
    got = torch.cat([torch.load(f"{tmp_path}/{{rank}}.pt") for rank in range(2)])
    torch.testing.assert_close(got, weight.grad)
    print("equal")
"""
    script = tmp_path / "ranks.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=600)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.slow
def test_a_source_distribution_has_all_that_its_tests_read(tmp_path: Path) -> None:
    pytest.importorskip("build")
    root = README.parent
    files = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    if not any(files):
        pytest.skip("not in a checkout")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ("tests/", "examples/", "docs/", "bench/", "csrc_triton/", "prefixloss/")
    wanted = {name for name in files if name.startswith(folders) and (root / name).is_file()}
    assert len(wanted) > 200
    assert wanted - names == set()
