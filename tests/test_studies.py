"""tests/studies.py: every command's figures against numpy's, scipy's and scikit-learn's, or a case known by hand."""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import studies
import torch
import torch.nn.functional as F
import torch.utils.benchmark
import torchvision
from conftest import NANO, ROOT, fewer_shapes, write_tar
from fake_cuda import FakeCuda
from PIL import Image
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve
from test_cli import refused
from test_run import free_port

import deit3
from common import checkpoint, evaluate, report, transfer
from common.errors import RunError
from common.sources import open_data

CLASSES = ["ant", "bee", "cat", "dog"]
CPU = ["--device", "cpu", "--workers", 0]


@pytest.fixture
def study(launched, tmp_path):
    """study(COMMAND, ...): that command in this process, with --out tmp_path/out.json: (result, what it wrote)."""

    def run(command, *arguments, out="out.json"):
        before = CPU[: {"plot": 0, "seeds": 0, "speedup": 0, "grid": 0, "choices": 0, "throughput": 2}.get(command, 4)]
        result = launched(studies.main, ["studies.py", command, *before, "--out", tmp_path / out, *arguments])
        file = tmp_path / out
        return result, json.loads(file.read_text()) if file.is_file() else None

    return run


def saved(folder, script: str, model: str, classes=CLASSES, **options):
    """A checkpoint of a fresh network for images of 32 pixels."""
    module = importlib.import_module(script)
    flags = ["--model", model, "--data", "shapes", "--recipe", "shapes", "--img-size", "32"]
    args, recipe, _ = module.parse_args(flags)
    recipe = dataclasses.replace(recipe, **options)
    torch.manual_seed(len(model))
    network = module.make_model(args, recipe, len(classes))
    content = {"method": script, "model_name": model, "recipe": dataclasses.asdict(recipe)}
    content |= {"data": {"classes": list(classes)}, "model": network.state_dict()}
    checkpoint.save(content, folder / f"{model}.pt")
    return folder / f"{model}.pt"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("distilled"), "deit", "deit_nano_distilled")


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("coarse"), "grafit", NANO["grafit"], method="ce")


def seen(file, data, split: str = "val"):
    """(the network, its images (N, 3, 32, 32) of a data set, their labels), as the script's load_model has them."""
    module = importlib.import_module(torch.load(file)["method"])
    model, _, transform = module.load_model(str(file))
    source = open_data(str(data), splits=(split,))[split]
    return model, torch.stack([transform(source.name(i)) for i in range(len(source))]), torch.tensor(source.labels)


# ---- Runs ------------------------------------------------------------------------------------------------------------


def written_run(folder, seed: int, top1: list, *, lr: float = 0.1, v2: float | None = None, complete: bool = True):
    folder.mkdir(parents=True)
    rows = [{"status": "started", "seed": seed, "recipe": {"lr": lr}}]
    rows += [{"epoch": i, "step": 10 * (i + 1), "val_top1": v, "train_loss": 1 / (i + 1)} for i, v in enumerate(top1)]
    rows += [{"status": "completed"}] if complete else []
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if v2 is not None:
        content = {"/v2": {"weights": "w", "images": 9, "img_size": [1, 1], "top1": v2}}
        (folder / "eval.json").write_text(json.dumps(content))
    return folder


def test_seeds_are_summarised_as_numpy_and_scipy_do(study, tmp_path):
    rng = np.random.default_rng(0)
    curves, v2 = rng.uniform(10, 70, (7, 6)), rng.uniform(10, 70, 7)
    folders = [written_run(tmp_path / str(i), i, curves[i].tolist(), v2=v2[i]) for i in range(7)]
    zero = written_run(tmp_path / "zero", 99, [1.0] * 5 + [50.0], v2=60.0)
    result, found = study("seeds", *folders, "--reference", zero)
    assert result.status == 0, result
    own = found["figures"]["val_top1"]
    end = curves[:, -1]
    expected = [end.mean(), end.std(ddof=1), end.min(), end.max(), 50]
    assert own == pytest.approx(dict(zip(["mean", "deviation", "min", "max", "reference"], expected)))
    assert found["figures"]["/v2:top1"]["mean"] == pytest.approx(v2.mean())
    assert set(found["figures"]) == {"val_top1", "train_loss", "/v2:top1"}
    assert found["correlation"] == {"val_top1 | /v2:top1": pytest.approx(stats.pearsonr(end, v2)[0])}
    third = found["epochs"][2]
    assert third["correlation"] == pytest.approx(stats.pearsonr(curves[:, 2], end)[0])
    assert third["deviation"] == pytest.approx(curves[:, 2].std(ddof=1)) and found["epochs"][-1]["correlation"] == 1
    assert Image.open(tmp_path / "out.png").width == 4 * 440
    assert "val_top1 after epoch 3" in result.out and "val_top1 after epoch 5" in result.out


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(lr=0.2), "another recipe than .*: lr"), (dict(seed=0), "a seed of its own"),
        (dict(complete=False), "not complete"),
    ],
)
def test_runs_that_are_not_of_one_recipe_are_refused(study, tmp_path, change, said):
    changes = [{}, {}, change]
    runs = [{"seed": i, "top1": [1.0 * i]} | changes[i] for i in range(3)]
    folders = [written_run(tmp_path / str(i), **options) for i, options in enumerate(runs)]
    result, found = study("seeds", *folders)
    refused(result, "")
    assert re.search(said, result.err) and found is None


def test_steps_to_the_accuracy_of_fine_tuning(study, tmp_path):
    """Fine-tuned: 80% after 20 steps, odds 4, nine tenths of them, 78.3%, after 20 too; from scratch: after 60, 50."""
    tuned = written_run(tmp_path / "a", 0, [50.0, 80.0, 79.0])
    scratch = written_run(tmp_path / "b", 0, [10.0, 20.0, 40.0, 60.0, 79.0, 80.0])
    _, (tenths, whole) = study("speedup", tuned, scratch)
    assert tenths["accuracy"] == pytest.approx(100 * 3.6 / 4.6) and tenths["ratio"] == 2.5 and whole["ratio"] == 3
    _, (_, never) = study("speedup", scratch, tuned, "--metric", "val_top1", out="b.json")
    assert never["ratio"] == pytest.approx(20 / 60)
    _, rows = study("speedup", tuned, written_run(tmp_path / "c", 0, [9.0]), out="c.json")
    assert [row["ratio"] for row in rows] == [None, None]
    refused(study("speedup", tuned, scratch, "--metric", "val_knn")[0], "val_knn")


def test_a_grid_prints_what_is_to_do_and_then_the_best(study, folder, tmp_path):
    training = "grafit.py --model regnet_nano --recipe transfer --weights w.pt --classifier linear".split()
    flags = ["--lrs", 0.1, 0.01, "--decays", 0, 1e-4, "--data", folder, "--steps", 24, "--batch", 16]
    result, _ = study("grid", *flags, *training, out="grid")
    lines = [line for line in result.out.splitlines() if line.startswith("python grafit.py")]
    assert result.status == 0 and len(lines) == 4, result
    grafit, data = importlib.import_module("grafit"), open_data(str(tmp_path / "grid/data"))
    assert [np.bincount(source.labels).tolist() for source in data.values()] == [[13] * 4, [3] * 4]
    recipes = [grafit.parse_args(shlex.split(line)[2:])[:2] for line in lines]
    assert {(r.lr, r.weight_decay) for _, r in recipes} == {(0.1, 0.0), (0.1, 1e-3), (0.01, 0.0), (0.01, 0.01)}
    assert all((r.epochs, r.batch_size) == (8, 16) for _, r in recipes)  # 52 images: 3 steps an epoch
    for number, (args, _) in enumerate(recipes):
        written_run(tmp_path / args.out, 0, [99.0, 50.0 - (number - 2) ** 2])
    result, _ = study("grid", *flags, *training, out="grid")
    assert (best := json.loads((tmp_path / "grid/grid.json").read_text())["best"])["lr"] == 0.01 and best["decay"] == 0
    args, recipe, _ = grafit.parse_args(shlex.split(result.out.splitlines()[-1])[2:])
    assert (args.data, recipe.lr, recipe.epochs) == (str(folder), 0.01, 6)  # all 64 images: 4 steps an epoch
    refused(study("grid", *flags[:-2], *training, out="grid")[0], "holds the grid of another batch")
    refused(study("grid", "--data", folder, *training, out="other")[0], "--batch 256: is more than the 52")
    for wrong in ([], ["graft.py", "--model", "resnet50"]):
        refused(study("grid", "--data", folder, *wrong, out="other")[0], "end with the command of a script")


# ---- Weights ---------------------------------------------------------------------------------------------------------


def test_disagreement_of_three_decisions_and_another_network(study, distilled, folder, tmp_path):
    other = saved(tmp_path, "deit3", NANO["deit3"])
    result, found = study("disagreement", distilled, other, "--data", folder)
    assert result.status == 0, result
    model, images, labels = seen(distilled, folder)
    third, larger, _ = seen(other, folder)  # of another crop ratio
    with torch.no_grad():
        one, two = model.heads(images)
        third = third(larger)
    answers = [labels, one.argmax(1), two.argmax(1), (one.softmax(1) + two.softmax(1)).argmax(1), third.argmax(1)]
    expected = [[(a != b).double().mean().item() for b in answers] for a in answers]
    assert found["images"] == 20 and np.allclose(found["share"], expected, atol=1e-12)
    assert [name.rpartition(" ")[2] for name in found["classifiers"][:4]] == ["truth", "class", "distillation", "both"]
    assert sum(map(sum, expected)) > 1  # they do differ
    elsewhere = saved(tmp_path, "deit", NANO["deit"], classes=[*"wxyz"])
    refused(study("disagreement", distilled, elsewhere, "--data", folder)[0], "its classes are not those of")


def test_what_is_not_a_network_is_told(study, coarse, folder, tmp_path):
    torch.save(torch.load(coarse)["model"], tmp_path / "bare.pth")
    grafit = saved(tmp_path, "grafit", NANO["grafit"])
    for spec, said in (
        ("nothing.pt", "no such file"), (tmp_path / "bare.pth", "does not name its model; write SCRIPT/MODEL="),
        ("deit/deit_b", "write deit/deit_b=FILE, =official or =random"), (grafit, "has no classifier"),
        ("torchvision/resnet", "did you mean"), (f"deit/deit_b={grafit}", "holds grafit/regnet_nano"),
    ):
        refused(study("disagreement", spec, "--data", folder)[0], said)
    refused(study("tokens", coarse, "--data", folder)[0], "needs a model of deit.py with two tokens")


def test_official_weights_and_torchvisions_are_taken_by_name(study, folder, tmp_path, monkeypatch):
    """An official file tells its model by its name; 1000 classes are not those of four folders."""
    model = importlib.import_module("deit").build_model("deit_ti")
    torch.save({"model": model.state_dict()}, file := tmp_path / "deit_tiny_patch16_224-a1311bcf.pth")
    said = []
    monkeypatch.setattr(studies, "print", said.append, raising=False)
    args = studies.parse_args(["tokens", "x", "--data", "shapes", "--device", "cpu"])
    run = studies.Run("studies", args, None, None)
    found = studies.load_network(f"deit/deit_ti={file}", run)
    assert (found.name, found.size, found.crop_ratio, found.named) == ("deit/deit_ti", (224, 224), 0.875, False)
    assert torch.equal(found.model.head.weight, model.head.weight)
    torch.save(torch.load(file)["model"], tmp_path / "other.pth")
    assert studies.load_network(f"deit/deit_ti={tmp_path / 'other.pth'}", run, (32, 32)).size == (32, 32)
    refused(study("disagreement", f"deit/deit_ti={file}", "--data", folder)[0], "4 classes")


def test_cosines_of_the_two_tokens(study, distilled, folder):
    result, found = study("tokens", distilled, "--data", folder)
    assert result.status == 0, result
    model, images, _ = seen(distilled, folder)
    two = torch.cat([model.cls_token, model.dist_token], 1)
    with torch.no_grad():
        x = torch.cat([two.expand(20, -1, -1), model.patch_embed(images)], 1) + model.pos_embed
        stages = [two, two + model.pos_embed[:, :2]]
        for block in model.blocks:
            stages.append(x := block(x))
        stages.append(model.norm(x))
        expected = [F.cosine_similarity(x[:, 0], x[:, 1]).mean().item() for x in stages]
    assert list(found["cosine"].values()) == pytest.approx(expected, abs=1e-5)
    assert list(found["cosine"]) == ["tokens", "with positions", "block 1", "block 2", "block 3", "at the end"]


def test_throughput_on_a_cpu_has_no_memory(study):
    models = ["deit/deit_nano", "torchvision/squeezenet1_1"]
    result, found = study("throughput", *models, "--sizes", 32, "48x32", "--batch", 2)
    assert result.status == 0, result
    assert [row["img_size"] for row in found] == [[32, 32], [48, 32]] * 2
    deit = importlib.import_module("deit")
    for row in found:
        assert row["peak_memory_mib"] is None and row["images_per_s"] > 1 and row["device"] == "CPU"
    for row, size in zip(found, ((32, 32), (48, 32))):
        counted = report.count(lambda size=size: deit.build_model("deit_nano", 1000, size), size)
        assert (row["parameters"], row["gmacs"]) == counted
    refused(study("throughput", "deit/deit_nano")[0], "--batch: needed on a CPU")
    for name, said in (
        ("deit/deit_c", "did you mean deit_"), ("nothing/deit_b", "SCRIPT/MODEL"), ("torchvision/x", "unknown"),
    ):
        refused(study("throughput", name, "--batch", 2)[0], said)
    refused(study("throughput", "deit/deit_nano", "--sizes", 33, "--batch", 2)[0], "not a multiple")


def test_the_largest_batch_is_found_by_doubling():
    tried = []

    def attempt(most):
        def run(batch):
            tried.append(batch)
            if batch > most:
                raise torch.cuda.OutOfMemoryError
        return run

    assert studies.largest_batch(attempt(12)) == 8 and tried == [1, 2, 4, 8, 16]
    assert studies.largest_batch(attempt(10**6)) == 2**14
    with pytest.raises(RunError, match="not even one"):
        studies.largest_batch(attempt(0))


def test_a_sweep_equals_the_scripts_own_evaluation_and_is_plotted(
    study, here, distilled, folder, tmp_path, monkeypatch
):
    evaluated = ["--eval", "--model", "deit_nano_distilled", "--weights", distilled, "--data", folder]
    evaluated += ["--img-size", 48, "--eval-crop-ratio", 0.8, *CPU, "--out", tmp_path / "e"]
    assert here("deit", *evaluated).status == 0
    own = json.loads((tmp_path / "e/eval.json").read_text())[str(folder)]
    flags = ["--data", folder, "--eval-data", folder / "val", "--sizes", 32, 48, "--crop-ratios", 0.8, 1]
    monkeypatch.setattr(evaluate, "real_labels", lambda file, source: [[]] + [[int(y), 9] for y in source.labels[1:]])
    result, found = study("sweep", distilled, *flags, "--real-labels", "real.json")
    assert result.status == 0 and len(found) == 4, result
    assert [(row["img_size"][0], row["crop_ratio"]) for row in found] == [(32, 0.8), (32, 1), (48, 0.8), (48, 1)]
    row = found[2]
    for key in ("top1", "top1_class", "top1_distillation"):
        assert row[key] == row[f"{key}:val"] == pytest.approx(own[key]) == row[key.replace("top1", "per_class")]
    right = 19 * row["real"] / 100  # of 20 images one without a label that counts is left out
    assert right == pytest.approx(round(right)) and round(row["top1"] / 5) - round(right) in (0, 1)
    assert "real:val" not in row and row["epochs"] == 6
    assert row["gmacs"] > found[0]["gmacs"] and row["model"] == "deit/deit_nano_distilled"
    speeds = [{"model": row["model"], "img_size": [s, s], "images_per_s": 1000 / s} for s in (32, 48)]
    (tmp_path / "speed.json").write_text(json.dumps(speeds))
    files = [tmp_path / "out.json", tmp_path / "speed.json"]
    result, drawn = study("plot", *files, "--x", "images_per_s", "--y", "crop_ratio", "--by", "img_size", out="p.json")
    assert drawn["curves"] == {"[32, 32]": [[31.25, 0.8], [31.25, 1]], "[48, 48]": [[1000 / 48, 0.8], [1000 / 48, 1]]}
    assert Image.open(tmp_path / "p.png").width == 440
    refused(study("plot", *files, "--x", "peak_memory", out="q.json")[0], "there is: network, model")
    refused(study("plot", distilled, out="q.json")[0], "not results of sweep or throughput")


def test_the_line_through_points_is_that_of_least_squares(study, tmp_path):
    rows = [{"network": n, "model": n, "img_size": [9, 9], "top1": x, "top1:v2": y} for n, x, y in
            (("a", 80.0, 70.0), ("a", 82.0, 71.0), ("b", 84.0, 75.0), ("c", 85.0, None))]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    _, found = study("plot", tmp_path / "r.json", "--x", "top1", "--y", "top1:v2", "--fit")
    line = stats.linregress([80, 82, 84], [70, 71, 75])
    assert found["fit"] == pytest.approx([line.slope, line.intercept]) and set(found["curves"]) == {"a", "b"}


# ---- Features --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features, plain, given", [(torch.zeros(64, 1), 12.5, 50), (torch.eye(64), 100, 100)])
def test_random_halves_are_told_apart_as_far_as_features_go(study, coarse, folder, monkeypatch, features, plain, given):
    """Features that are equal for all images tell none of 8 halves from another: one of 8 is right, and one of 2 where
    the coarse class is known; a feature of its own for every image tells all."""
    calls, real = [], studies.extracted
    monkeypatch.setattr(studies, "features", lambda *_: features)
    sure = 9 * torch.eye(4).repeat_interleave(16, 0)
    monkeypatch.setattr(studies, "extracted", lambda *arguments: calls.append(real(*arguments)) or sure)
    result, found = study("separability", coarse, "--data", folder)
    assert result.status == 0, result
    assert calls[0].shape == (64, 4)  # of the network's own classifier
    assert found["no condition"]["mean"] == plain and found["coarse condition"]["mean"] == given
    assert found["no condition"]["deviation"] == 0
    refused(study("separability", coarse, "--data", f"{folder}@coarse")[0], "give --coarse-labels")


def test_a_random_network_is_told_apart_too(study, folder):
    """Table 2.1's last row: of no classes, so without their condition."""
    result, found = study("separability", "grafit/regnet_nano=random", "--img-size", 32, "--data", folder, "--seed", 3)
    assert result.status == 0 and found.keys() == {"no condition"}, result
    again = study("separability", "grafit/regnet_nano=random", "--img-size", 32, "--data", folder, "--seed", 3)[1]
    assert again == found


def test_energy_is_that_of_principal_components(study, coarse, folder, tmp_path):
    result, found = study("energy", coarse, "--data", folder)
    model, images, _ = seen(coarse, folder)
    with torch.no_grad():
        x = model.trunk(images).numpy()
    expected = PCA().fit(x).explained_variance_ratio_.cumsum()
    (curve,) = found.values()
    assert len(curve) == 128 and np.allclose(curve[: len(expected)], expected, atol=1e-4), result
    assert Image.open(tmp_path / "out.png").width == 440


def test_tsne_is_scikit_learns_of_one_coarse_class(study, coarse, tmp_path):
    with fewer_shapes(12, 48):
        result, found = study("tsne", coarse, "--data", "shapes", "--within", "coarse=ring")
        other = study("tsne", coarse, "--data", "shapes", "--within", "coarse=square", out="o.json")[0]
    assert result.status == 0 and len(found["points"]) == 16, result
    assert {p["class"].partition("_")[0] for p in found["points"]} == {"ring"}
    refused(other, "write LEVEL=CLASS, of the levels fine, coarse")


def test_tsne_without_scikit_learn_says_what_to_install(study, coarse, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    refused(study("tsne", coarse, "--data", folder)[0], "pip install scikit-learn")


def test_kmeans_finds_what_scikit_learns_does():
    x, _ = make_blobs(300, 5, centers=6, random_state=0)
    x = torch.tensor(x)
    start = x[torch.randperm(300, generator=torch.Generator().manual_seed(3))[:6]]
    theirs = KMeans(6, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(x.numpy())
    centres = studies.kmeans(x, 6, seed=3)
    assert (studies.assign(x, centres)[0] ** 2).sum().item() == pytest.approx(theirs.inertia_)
    twice = torch.cat([torch.zeros(9, 2), torch.ones(9, 2)])
    assert len(studies.kmeans(twice, 5, seed=0)) == 2  # no cluster is empty
    far = torch.tensor([[10.0, 10.0]] * 9 + [[20.0, 20.0]])
    starts = [torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:2] for seed in range(9)]
    seed = next(seed for seed, start in enumerate(starts) if 9 not in start)  # both in one place
    assert studies.kmeans(far, 2, seed).tolist() == [[10, 10], [20, 20]]


def test_clusterfit_writes_a_data_set_that_grafit_trains_on(study, here, coarse, folder, tmp_path, monkeypatch):
    clustered, kmeans = [], studies.kmeans
    monkeypatch.setattr(studies, "kmeans", lambda x, *others: clustered.append(x) or kmeans(x, *others))
    result, _ = study("clusterfit", coarse, "--data", folder, "--clusters", 6, out="clusters")
    assert result.status == 0, result
    data = open_data(str(tmp_path / "clusters"))
    assert len(data["train"]) == 64 and len(data["val"]) == 20 and 2 <= len(data["train"].classes) <= 6
    model, images, _ = seen(coarse, folder, "train")
    with torch.no_grad():
        x = F.normalize(model.trunk(images), dim=1)
    links = sorted((tmp_path / "clusters/train").glob("*/*"))
    assert {link.resolve() for link in links} == {f.resolve() for f in (folder / "train").glob("*/*")}
    order = {f.resolve(): i for i, f in enumerate(sorted((folder / "train").glob("*/*")))}
    names = sorted({link.parent.name for link in links})
    own = torch.tensor([names.index(link.parent.name) for link in links])
    assert torch.allclose(clustered[0], x, atol=1e-5)  # of length 1
    x = x[[order[link.resolve()] for link in links]]
    centres = torch.stack([x[own == c].mean(0) for c in range(len(names))])
    assert (torch.cdist(x, centres).argmin(1) == own).all()  # nobody is nearer to another cluster's mean
    train, judge = (shlex.split(line) for line in result.out.splitlines()[-2:])
    small = ["--batch-size", 16, "--epochs", 1, "--warmup-epochs", 0, *CPU]
    assert here("grafit", *train[2:], *small).status == 0
    assert importlib.import_module("common.transfer").parse_args(judge[3:]).sets == [str(folder)]
    refused(study("clusterfit", coarse, "--data", folder, "--clusters", 6, out="clusters")[0], "holds clusters already")
    refused(study("clusterfit", coarse, "--data", folder, "--clusters", 65, out="c")[0], "must be 2 to 64")


def test_images_of_archives_and_pixels_are_written_as_they_are(folder, tmp_path):
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.glob("*/*/*_00[01].jpg"))}
    source = open_data(str(write_tar(tmp_path / "d.tar", files)), splits=("train",))["train"]
    studies.write_classes(tmp_path / "a", source, [0, 3], ["x", "y"])
    (one,), (two,) = ((tmp_path / "a" / name).iterdir() for name in "xy")
    assert one.read_bytes() == source.stored(0) and two.read_bytes() == source.stored(3) and one.suffix == ".jpg"
    shapes = open_data("shapes", splits=("val",))["val"]
    studies.write_classes(tmp_path / "b", shapes, [5], ["x"])
    assert (np.array(Image.open(next((tmp_path / "b/x").iterdir()))) == shapes.stored(5)).all()


# ---- Kornblith -------------------------------------------------------------------------------------------------------

RESNET = ["deit3.py", "--model", "torchvision/resnet18", "--data", "shapes", "--recipe", "shapes", "--img-size", 32]
RESNET += ["--batch-size", 16, "--epochs", 2, "--warmup-epochs", 0, "--workers", 0]


@pytest.fixture
def choices(study, monkeypatch):
    """choices(ARGUMENTS, out=): that command on deit3.py as it is, which it changes for its own process."""
    originals = {name: getattr(deit3, name) for name in ("build_model", "bce_loss", "F")}

    def run(*arguments, out="out"):
        for name, original in originals.items():
            monkeypatch.setattr(deit3, name, original)
        return study("choices", *arguments, out=out)[0]

    return run


def network_of(folder):
    return torch.load(folder / "network.pt")


def test_a_resnet_without_choices_is_the_scripts_own(choices, here, tmp_path):
    with fewer_shapes(32, 8):
        assert choices(*RESNET, out="a").status == 0
        assert here("deit3", *RESNET[1:], "--out", tmp_path / "b").status == 0
    own, found = torch.load(tmp_path / "b/last.pt")["model"], network_of(tmp_path / "a")
    assert own.keys() == found.keys() and all(torch.equal(found[key], own[key]) for key in own)


def test_a_resnet_with_all_choices_trains_goes_on_and_gives_torchvisions_weights(choices, tmp_path):
    """The second classifier is in last.pt, not in network.pt."""
    line = ["--no-scale", "--dropout", 0.2, "--auxiliary", 0.3, *RESNET, "--smoothing", 0.1]
    with fewer_shapes(32, 8):
        result = choices(*line, "--epochs", 1, out="a")
        resumed = choices(*line, "--resume", "auto", "--allow-changes", out="a")
    assert result.status == resumed.status == 0 and "network.pt" in resumed.out, (result, resumed)
    last, found = torch.load(tmp_path / "a/last.pt")["model"], network_of(tmp_path / "a")
    chosen = "choices: no scale True, dropout 0_2, auxiliary 0_3"
    assert last.keys() - found.keys() == {"auxiliary.weight", "auxiliary.bias", chosen}
    assert last["auxiliary.bias"].abs().max() > 0
    torchvision.models.resnet18(num_classes=12).load_state_dict(found)
    scales = {key for key, value in found.items() if value.ndim == 1 and key.endswith("weight")}
    assert len(scales) == 20 and all((found[key] == 1).all() for key in scales)
    assert (found["layer4.1.bn2.bias"] != 0).any()


def test_dropout_and_the_second_classifier_act_in_training_alone(choices, monkeypatch):
    """Logits and loss by hand, from the trunk's stages."""
    seen = {}

    def main():
        torch.manual_seed(0)
        model, x, targets = deit3.build_model("torchvision/resnet18", 4), torch.randn(8, 3, 32, 32), torch.rand(8, 4)
        model.layer3.register_forward_hook(lambda stage, _, output: seen.update(third=output))
        model.avgpool.register_forward_hook(lambda stage, _, output: seen.update(pooled=output.flatten(1)))
        model.fc.register_forward_hook(lambda fc, inputs, _: seen.update(dropped=inputs[0]))
        both = model.train()(x)
        share = (seen["dropped"] == 0)[seen["pooled"] != 0].float().mean()
        second = model.auxiliary(seen["third"].mean((2, 3)))
        assert both.shape == (8, 8) and torch.allclose(both[:, 4:], second, atol=1e-6) and 0.2 < share < 0.3
        for loss, plain in ((deit3.F.cross_entropy, F.cross_entropy), (deit3.bce_loss, bce)):
            expected = plain(both[:, :4], targets) + 0.4 * plain(second, targets)
            assert loss(both, targets).item() == pytest.approx(expected.item(), rel=1e-5)
            assert torch.equal(loss(second, targets), plain(second, targets))
        alone = model.eval()(x)
        assert alone.shape == (8, 4) and torch.equal(seen["dropped"], seen["pooled"])
        seen["done"] = True

    bce = deit3.bce_loss
    monkeypatch.setattr(deit3, "main", main)
    assert choices("--dropout", 0.25, "--auxiliary", 0.4, *RESNET).status == 0 and seen["done"]


@pytest.mark.parametrize("training, said", [
    ([], "TRAINING: end with"), (["deit.py"], "TRAINING: end with deit3.py --model torchvision/resnet50"),
    (["deit3.py", "--model", "vit_nano"], "TRAINING: end with deit3.py --model torchvision/resnet50"),
    ([*RESNET, "--out", "here"], "--out: not in TRAINING"), ([*RESNET, "--weights=w.pt"], "--weights=w.pt: not in"),
])  # fmt: skip
def test_choices_are_those_of_a_resnet_that_starts_anew(choices, training, said):
    refused(choices(*training), said)


def test_a_run_goes_on_with_its_own_choices_alone(choices, here, tmp_path):
    one = [*RESNET, "--epochs", 1]
    with fewer_shapes(32, 8):
        assert choices("--dropout", 0.25, *one).status == 0
        refused(choices("--dropout", 0.5, *RESNET, "--resume", "auto", "--allow-changes"), "dropout 0_25")
        flags = [*RESNET[1:], "--resume", "auto", "--allow-changes", "--out", tmp_path / "out"]
        refused(here("deit3", *flags), "dropout 0_25")
        (tmp_path / "out/network.pt").unlink()  # killed before it was written: the complete run goes on to it
        assert choices("--dropout", 0.25, *one, "--resume", "auto").status == 0
    assert network_of(tmp_path / "out").keys() == torchvision.models.resnet18().state_dict().keys()
    assert "vit_b" in choices("--no-scale", *RESNET, "--list-models").out


@pytest.mark.slow
def test_two_ranks_choose_as_one(tmp_path):
    """With an average of the weights, under torchrun; rank 0 writes network.pt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    command += [ROOT / "tests/studies.py", "choices", "--out", tmp_path / "o", "--no-scale", "--auxiliary", 0.3]
    code = "import conftest; context = conftest.fewer_shapes(32, 8); context.__enter__()"
    (tmp_path / "sitecustomize.py").write_text(code)
    line = [*command, *RESNET, "--ema", 0.9, "--batch-size", 32, "--mix-group", 1, "--device", "cpu"]
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / "tests", ROOT)))
    found = subprocess.run(list(map(str, line)), env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.count("wrote ") == 1, found
    torchvision.models.resnet18(num_classes=12).load_state_dict(network_of(tmp_path / "o"))


def test_eleven_points_are_the_best_precisions_from_each_recall_on():
    """Right answers at ranks 1, 3 and 4 of 5 of three: 1 up to recall 1/3, then 3/4 at recalls to 1."""
    scores, wanted = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([True, False, True, True, False])
    assert studies.eleven_points(scores, wanted) == pytest.approx((4 * 1 + 7 * 0.75) / 11)
    rng = np.random.RandomState(0)
    for _ in range(50):
        scores, wanted = rng.permutation(30).astype("f"), rng.rand(30) < 0.3
        wanted[0] = True
        precision, recall, _ = precision_recall_curve(wanted, scores)
        expected = np.mean([precision[:-1][recall[:-1] >= t / 10 - 1e-12].max() for t in range(11)])
        assert studies.eleven_points(torch.tensor(scores), torch.tensor(wanted)) == pytest.approx(expected)


@pytest.fixture
def voc(tmp_path):
    """A VOC2007 of two classes in torchvision's layout: an image's red and green say whether it has the first, second;
    some images have it marked as difficult."""
    root, rng, marks = tmp_path / "voc/VOCdevkit/VOC2007", np.random.RandomState(0), {}
    for folder in ("JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", 16), ("val", 12), ("test", 20)):
        marks[split] = rng.choice([-1, 1, 0], (count, 2), p=[0.45, 0.45, 0.1])
        names = [f"{split}{i:03}" for i in range(count)]
        for name, (first, second) in zip(names, marks[split]):
            noise = rng.randint(0, 120, (32, 32, 3)) + [9 * (first > 0), 9 * (second > 0), 0]
            Image.fromarray(noise.astype("u1")).save(root / f"JPEGImages/{name}.jpg", quality=95)
        for column, name in enumerate(("bird", "car")):
            lines = [f"{image} {mark:2d}\n" for image, mark in zip(names, marks[split][:, column])]
            (root / f"ImageSets/Main/{name}_{split}.txt").write_text("".join(lines))
    return tmp_path / "voc", marks


def test_voc2007_is_scikit_learns_and_joins_the_suites_result(study, launched, coarse, folder, voc, tmp_path):
    data, marks = voc
    suite = ["transfer", "features", "--weights", coarse, "--sets", folder, "--img-size", 32, "--eval-crop-ratio", 1]
    assert launched(transfer.main, [*suite, *CPU, "--out", tmp_path / "suite.json"]).status == 0
    result, found = study("voc2007", coarse, "--data", data, "--into", tmp_path / "suite.json")
    assert result.status == 0, result
    model, _, _ = importlib.import_module("grafit").load_model(str(coarse))
    x = {}
    for split in marks:
        files = sorted((data / "VOCdevkit/VOC2007/JPEGImages").glob(f"{split}*"))
        images = torch.stack([torch.tensor(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
        with torch.no_grad():
            x[split] = model.trunk(evaluate.normalize(images)).numpy()
    cost, fitted = 2 * found["chosen"][0]["C"], np.concatenate([x["train"], x["val"]])  # of two rows of weights: twice
    truth, expected = np.concatenate([marks["train"], marks["val"]]), []
    for column in range(2):
        known, tested = truth[:, column] != 0, marks["test"][:, column] != 0
        classifier = LogisticRegression(C=cost, max_iter=10_000, tol=1e-8).fit(fitted[known], truth[known, column])
        precision, recall, _ = precision_recall_curve(
            marks["test"][tested, column] > 0, classifier.decision_function(x["test"][tested])
        )
        expected.append(100 * np.mean([precision[:-1][recall[:-1] >= t / 10 - 1e-12].max() for t in range(11)]))
    assert list(found["classes"].values()) == pytest.approx(expected, abs=1e-3), found
    assert found["accuracy"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert (found["train_images"], found["test_images"]) == (28, 20)
    suite = json.loads((tmp_path / "suite.json").read_text())
    own = math.log(found["accuracy"] / (100 - found["accuracy"]))
    assert suite["sets"]["voc2007"]["log_odds"] == pytest.approx(own) and suite["measured"] == 2
    assert "voc2007" in (tmp_path / "suite.txt").read_text()


def test_voc2007_for_another_network_or_of_another_layout_is_told(study, distilled, coarse, folder, voc, tmp_path):
    other = {"fingerprint": "x", "img_size": [32, 32], "eval_crop_ratio": 1, "sets": {}, "missing": {}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    refused(study("voc2007", coarse, "--data", voc[0], "--into", tmp_path / "other.json")[0], "of another network")
    for wrong in ([], None, {"img_size": [32, 32], "eval_crop_ratio": 1}):
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        result = study("voc2007", coarse, "--data", voc[0], "--into", tmp_path / "wrong.json")[0]
        refused(result, "no result of the suite")
    refused(study("voc2007", coarse, "--data", folder)[0], "no VOCdevkit/VOC2007/ImageSets/Main/CLASS_train.txt")
    (voc[0] / "VOCdevkit/VOC2007/ImageSets/Main/bird_test.txt").unlink()
    refused(study("voc2007", coarse, "--data", voc[0])[0], "bird_test.txt")
    refused(study("voc2007", coarse, "--data", voc[0], "--into", tmp_path / "none")[0], "--into")


def test_readmes_line_makes_birdsnap_folders_that_the_suite_takes(tmp_path):
    """test_images.txt's images, as far as they could be downloaded, are val/; the others train/."""
    (line,) = re.findall(r"^\(cd /data/birdsnap .*$", (ROOT / "README.md").read_text(), re.M)
    names = {"Blue_Jay": ["1.jpg", "2.jpg", "3.jpg"], "Anna's_Wren": ["4.jpg", "5.jpg"]}
    for species, files in names.items():
        (tmp_path / "download/images" / species).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (8, 8)).save(tmp_path / "download/images" / species / file)
    (tmp_path / "test_images.txt").write_text("path\nBlue_Jay/2.jpg\nBlue_Jay/gone.jpg\nAnna's_Wren/5.jpg")
    for _ in range(2):  # the second time it does nothing
        subprocess.run(["bash", "-c", line.replace("/data/birdsnap", shlex.quote(str(tmp_path)))])
    splits = open_data(str(tmp_path))
    found = {split: sorted(source.name(i) for i in range(len(source))) for split, source in splits.items()}
    assert [len(found["train"]), len(found["val"])] == [3, 2] and splits["val"].classes == sorted(names)
    assert all(name.endswith(("2.jpg", "5.jpg")) for name in found["val"])


# ---- The program -----------------------------------------------------------------------------------------------------


def test_readme_has_every_command_and_they_are_accepted():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)).splitlines()
    lines = [line.split("#")[0].partition("tests/studies.py ") for line in blocks]
    used = [studies.parse_args(shlex.split(line)) for _, found, line in lines if found]
    assert {args.action for args in used} == set(studies.COMMANDS)
    assert all(studies.training_of(args, "--out") for args in used if getattr(args, "training", None))
    for action in studies.COMMANDS:
        assert action.__doc__.splitlines()[0].endswith(".") and re.search(r"T:\d+|Kornblith|Figures", action.__doc__)


def test_the_program_is_for_one_process(study, monkeypatch):
    refused(study("seeds", "none")[0], "error: none/log.jsonl: No such file or directory")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(study("seeds", "none")[0], "start it with plain python")


@pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="there is a real GPU, or torch is older than 2.10 and cannot do without its driver",
)
def test_a_gpus_figures_are_the_cpus(launched, distilled, coarse, folder, tmp_path, monkeypatch):
    """On the make-believe GPU, where an operator that mixes devices is an error."""
    fit, found = evaluate.logistic_regression, []
    monkeypatch.setattr(evaluate, "logistic_regression", lambda *problem: fit(*problem, max_steps=1))
    monkeypatch.setattr(torch.utils.benchmark, "Timer", OnePass)
    lines = [f"disagreement {distilled}", f"tokens {distilled}", f"separability {coarse}"]
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        with FakeCuda() if device == "cuda" else contextlib.nullcontext():
            for line in [*lines, f"clusterfit {coarse} --clusters 6"]:
                flags = ["--data", folder, "--device", device, "--workers", 0, "--out", out / line.split()[0]]
                assert launched(studies.main, ["studies.py", *line.split(), *flags]).status == 0, line
            flags = ["deit/deit_nano", "--batch", 2, "--sizes", 32, "--device", device, "--out", tmp_path / "t.json"]
            assert launched(studies.main, ["studies.py", "throughput", *flags]).status == 0
        found.append([(out / line.split()[0]).read_text() for line in lines])
        found[-1] += sorted(str(file.relative_to(out)) for file in out.glob("clusterfit/*/*/*"))
    assert found[0] == found[1]
    assert json.loads((tmp_path / "t.json").read_text())[0]["peak_memory_mib"] > 1.7  # the weights


class OnePass:
    """In place of torch's timer, which waits for a real GPU."""

    def __init__(self, stmt, globals, num_threads):
        self.step = globals["step"]

    def timeit(self, passes):
        assert passes == 30
        return SimpleNamespace(mean=0.5 if self.step().shape == (2, 1000) else None)


def test_flags_out_of_range_are_told(study, coarse, folder):
    for flags, said in ((["--img-size", 0], "1 or more"), (["--eval-crop-ratio", 2], "in (0, 1]")):
        refused(study("separability", coarse, "--data", folder, *flags)[0], said)
