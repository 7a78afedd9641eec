"""Pictures of curves, with matplotlib and without."""

import json
import sys
from types import SimpleNamespace

import numpy as np
from PIL import Image
from test_cli import TINY

from common import report, script, transfer


def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"epoch": 0, "val_top1": 1.5}\n{"epoch": 1, "val_to')
    assert report.read_log(tmp_path / "log.jsonl") == [{"epoch": 0, "val_top1": 1.5}]


def test_curves_have_a_panel_for_losses_and_one_for_accuracies(deit3_here, folder, tmp_path, monkeypatch):
    drawn, original = [], report.new_figure
    monkeypatch.setattr(report, "new_figure", lambda *a: drawn.append(original(*a)) or drawn[-1])
    assert deit3_here(*TINY, "--data", folder, "--out", tmp_path).status == 0
    loss, accuracy = drawn[0].axes
    assert (loss.get_xlabel(), loss.get_ylabel(), accuracy.get_ylabel()) == ("epoch", "loss", "accuracy, %")
    assert [line.get_label() for line in loss.lines] == ["train_loss", "val_loss"]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["val_top1", "val_top5"]
    assert accuracy.lines[1].get_xydata().tolist() == [[0, 100], [1, 100]]
    sheet = np.array(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert sheet.shape == (260, 840, 3) and (sheet[:, :420] != 255).any() and (sheet[:, 420:] != 255).any()


def test_binary_and_plain_cross_entropy_have_axes_of_their_own_and_a_legend_what_is_there(tmp_path, monkeypatch):
    """A recipe with --loss bce is validated by cross-entropy; a curve without points is in no legend."""
    drawn, original = [], report.new_figure
    monkeypatch.setattr(report, "new_figure", lambda *a: drawn.append(original(*a)) or drawn[-1])
    rows = [{"epoch": e, "train_loss": 0.1, "val_loss": 2.0, "val_top1": 50.0, "val_knn": None} for e in range(3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for loss, labels in (
        ("bce", ["binary cross-entropy", "cross-entropy", "accuracy, %"]), ("ce", ["loss", "accuracy, %"]),
    ):
        run = SimpleNamespace(
            log=lambda record: None, rank=0, log_failed=False, data=SimpleNamespace(val=[]), out=tmp_path, say=print,
            best=1.0, recipe=SimpleNamespace(loss=loss, epochs=3)
        )
        script.finish(run, ["train_loss", "val_loss"], ["val_top1", "val_knn"])
        assert [axes.get_ylabel() for axes in drawn[-1].axes] == labels
        legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in drawn[-1].axes]
        assert sum(legends, []) == ["train_loss", "val_loss", "val_top1"]


def test_without_matplotlib_a_run_says_so_once_and_completes(deit3_here, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = deit3_here(*TINY, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--out", tmp_path)
    assert result.status == 0 and not result.err and not (tmp_path / "curves.png").exists()
    assert [line for line in result.out.splitlines() if "matplotlib" in line] == [
        f'{tmp_path / "curves.png"}: not drawn, that needs matplotlib: pip install -e ".[plots]"'
    ]
    transfer.save_scatter(tmp_path / "s.png", {"x": (1.0, 2.0, None)}, "", "")
    assert not (tmp_path / "s.png").exists()
    assert not report.save_plot(tmp_path / "p.png", [{"a": [(0, 1.0)]}], "epoch", say=lambda line: None)
