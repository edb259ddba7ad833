"""The picture of a run, from its log: loss, and blocks needed for the recall asked for."""

from pathlib import Path

from forepage.training.backbone.journal import read_log

CURVE_FILE = "indexer.png"


def draw_curve(folder: Path) -> None:
    """Write indexer.png beside the log. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    log = read_log(folder)
    figure, (losses, shares) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    learned = [row for row in log if "loss" in row]
    losses.plot([row["step"] for row in learned], [row["loss"] for row in learned])
    losses.set_yscale("log")
    losses.set_ylabel("loss")
    validated = [row for row in log if "share_for_recall" in row]
    for length in sorted({length for row in validated for length in row["share_for_recall"]}, key=int):
        points = [(row["step"], row["share_for_recall"].get(length)) for row in validated]
        shares.plot(*zip(*points, strict=True), label=f"{int(length):,} tokens")
    shares.set_ylabel("share of blocks for the recall asked for")
    shares.set_xlabel("step")
    if validated:
        shares.legend()
    for axes in (losses, shares):
        axes.grid(alpha=0.3)
    figure.savefig(folder / CURVE_FILE, dpi=110)
    plt.close(figure)
