"""The picture of what each token gets: `python docs/pictures.py`. Its numbers are those of `prefixloss.advantages`."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import TwoSlopeNorm

from prefixloss import advantages

CORRECT = torch.tensor([True, False, False, False])
LENGTHS = torch.tensor([10, 20, 8, 12])
FIRST_ERROR = torch.tensor([-1, 12, 0, -1])
NAMES = ["right", "wrong from token 12 on", "wrong from the start", "wrong, nobody knows where"]


def credit() -> dict[str, torch.Tensor]:
    """Advantages [4, 20] with NaN behind a response's end."""
    group = torch.zeros(4, dtype=torch.int64)
    mask = torch.arange(20) < LENGTHS[:, None]
    outcome = advantages.grpo(CORRECT.float(), group, std=False)[:, None].expand(4, 20)
    first_error = advantages.vppo(CORRECT, LENGTHS, FIRST_ERROR, group, shorten=2).per_token(mask, mask)
    tables = {"outcome reward (GRPO without std)": outcome, "credit up to the first error (VPPO)": first_error}
    return {name: table.where(mask, torch.nan) for name, table in tables.items()}


def draw(path: Path) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, layout="constrained")
    for axis, (name, table) in zip(axes, credit().items(), strict=True):
        image = axis.imshow(table, cmap="RdBu", norm=TwoSlopeNorm(0, -1.3, 1.3), aspect="auto")
        for row, token in (~table.isnan()).nonzero().tolist():
            shown = f"{table[row, token]:+.2f}".replace("0.", ".")
            axis.text(token, row, shown, ha="center", va="center", fontsize=7)
        axis.set_yticks(range(4), NAMES, fontsize=9)
        axis.set_title(name, fontsize=10, loc="left")
        axis.spines[:].set_visible(False)
    axes[-1].set_xticks(range(0, 20, 2))
    axes[-1].set_xlabel("token")
    figure.colorbar(image, ax=axes, label="advantage")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(Path(__file__).parent / "pictures/credit.png")
