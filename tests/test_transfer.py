"""The transfer suite: features and their cache, classifiers, data sets in their real layouts, tables, correlations."""

import json
import math
import os
import pickle
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    NANO,
    SCRIPTS,
    SMALL,
    WITHOUT_MIXING,
    PeakMemory,
    encoded,
    load,
    log_of,
    picture,
    write_folder,
    write_tar,
)
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from test_cli import refused
from test_run import child, status_of

from common import sources, transfer
from common.errors import RunError, UserError
from common.evaluate import log_odds
from common.models import fingerprint
from common.transfer import upper_right_hull

# ---- Features --------------------------------------------------------------------------------------------------------


@pytest.fixture
def suite(launched):
    """suite("features", ...): `python -m common.transfer features ...` in this process."""
    return lambda *arguments: launched(transfer.main, ["transfer", *arguments])


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """A torchvision classifier's file."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("network") / "squeeze.pth"
    model = torchvision.models.get_model("mobilenet_v3_small", num_classes=7)
    torch.save(model.state_dict(), file)
    return file


def flags(network, tmp_path, *sets, seeds=1) -> list:
    asked = ["--model", "torchvision/mobilenet_v3_small", "--weights", network, "--img-size", 32, "--seeds", seeds]
    return [*asked, "--workers", 0, "--device", "cpu", "--out", tmp_path / "r.json", "--sets", *sets]


def counted(monkeypatch) -> list:
    """Titles of the extractions that are computed."""
    calls, original = [], transfer.extract
    monkeypatch.setattr(transfer, "extract", lambda *a, **k: calls.append(k["title"]) or original(*a, **k))
    return calls


def test_features_of_a_diverged_network_are_an_error(suite, network, tmp_path):
    state = torch.load(network)
    state["features.0.0.weight"][0, 0, 0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    result = suite("features", *flags(tmp_path / "nan.pth", tmp_path, write_folder(tmp_path / "d", train=6, val=3)))
    assert result.status == 1 and "features are not finite" in result.err and not (tmp_path / "r.json").exists()


def test_features_are_computed_once_and_again_when_images_or_network_change(suite, network, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "d", train=6, val=3)
    calls = counted(monkeypatch)
    assert suite("features", *flags(network, tmp_path, data)).status == 0 and len(calls) == 2
    first = json.loads((tmp_path / "r.json").read_text())
    result = suite("features", *flags(network, tmp_path, data))
    assert result.status == 0 and len(calls) == 2 and result.out.count("from the cache") == 2
    assert json.loads((tmp_path / "r.json").read_text()) == first
    # another image under the same name and with the same labels; the same one, touched; a renamed one
    file = data / "train/ant/ant_000.jpg"
    file.write_bytes(encoded(picture(3, 99)))
    assert suite("features", *flags(network, tmp_path, data)).status == 0
    assert len(calls) == 3 and calls[2].endswith("train")
    os.utime(file, ns=(0, 1))
    assert suite("features", *flags(network, tmp_path, data)).status == 0 and len(calls) == 4
    file.rename(file.with_name("another.jpg"))
    assert suite("features", *flags(network, tmp_path, data)).status == 0 and len(calls) == 5
    # another network, another resolution
    state = torch.load(network, weights_only=True)
    state["features.0.0.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    assert suite("features", *flags(tmp_path / "other.pth", tmp_path, data)).status == 0 and len(calls) == 7
    assert suite("features", *flags(network, tmp_path, data), "--img-size", 40).status == 0 and len(calls) == 9
    # a file that a crash cut short
    for cached in (sources.cache_folder() / "features").glob("*.npy"):
        cached.write_bytes(cached.read_bytes()[:200])
    assert suite("features", *flags(network, tmp_path, data)).status == 0 and len(calls) == 11


def test_without_a_cache_features_are_neither_read_nor_kept(suite, network, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_folder(tmp_path / "d", train=6, val=3)
    calls, asked = counted(monkeypatch), [*flags(network, tmp_path, data), "--no-cache"]
    assert suite("features", *asked).status == 0 and suite("features", *asked).status == 0 and len(calls) == 4
    assert not (sources.cache_folder() / "features").exists()


def test_a_set_with_one_image_per_class_is_left_out_for_nothing_can_be_held_out(suite, network, tmp_path):
    single, data = write_folder(tmp_path / "single", train=1, val=1), write_folder(tmp_path / "d", train=6, val=3)
    result = suite("features", *flags(network, tmp_path, single))
    assert result.status == 2 and "one training image per class: none can be held out" in result.err, result
    result = suite("features", *flags(network, tmp_path, single, data))
    found = json.loads((tmp_path / "r.json").read_text())
    assert result.status == 0 and list(found["sets"]) == [str(data)] and list(found["missing"]) == [str(single)], result


def test_check_bytes_knows_images_by_their_bytes_alone(suite, network, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "d", train=6, val=3)
    calls, asked = counted(monkeypatch), [*flags(network, tmp_path, data), "--check-bytes"]
    assert suite("features", *asked).status == 0 and len(calls) == 2
    # neither names nor labels nor times are in the cache: a renamed class folder needs no new features
    for split in ("train", "val"):
        (data / split / "ant").rename(data / split / "aardvark")
    file = data / "val/bee/bee_001.jpg"
    os.utime(file, ns=(0, 1))
    result = suite("features", *asked)
    assert result.status == 0 and len(calls) == 2 and result.out.count("from the cache") == 2
    before = file.stat()
    file.write_bytes(file.read_bytes()[:-10] + bytes(8) + b"\xff\xd9")  # of the same size, at the same time
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert suite("features", *flags(network, tmp_path, data)).status == 0 and len(calls) == 4
    assert suite("features", *asked).status == 0 and len(calls) == 5 and calls[4].endswith("test")


def test_content_reads_no_image_unless_asked_to(tmp_path, monkeypatch):
    files = {f"{s}/{c}/{i}.jpg": encoded(picture(0, i)) for s in ("train", "val") for c in "ab" for i in range(3)}
    tar = write_tar(tmp_path / "d.tar", files)
    held = sources.Source(["a"], np.zeros(4))
    held.pixels = pixels = np.zeros((4, 8, 8, 3), np.uint8)
    opened = [sources.open_data(str(write_folder(tmp_path / "d", train=3, val=1))), sources.open_data(str(tar))]
    opened += [sources.open_data("shapes"), {"train": held}]
    first = [{every: found["train"].content(every) for every in (False, True)} for found in opened[:2]]
    for source in (split for found in opened[:3] for split in found.values()):
        with monkeypatch.context() as m:
            m.setattr(source, "stored", lambda _: pytest.fail("an image is read"), raising=False)
            source.content(False)
    marks = [source.content(False) for found in opened for source in found.values()]
    assert len(set(marks)) == len(marks)
    pixels[3, 2, 1, 0] = 1
    assert held.content(False) != marks[-1]
    os.utime(tar, ns=(0, 1))  # an archive that was touched, one that was made again with another image
    touched = sources.open_data(str(tar))["train"]
    assert touched.content(False) != first[1][False] and touched.content(True) == first[1][True]
    files["train/a/1.jpg"] = encoded(picture(1, 1))
    write_tar(tar, files)
    assert sources.open_data(str(tar))["train"].content(True) != first[1][True]
    (tmp_path / "d/train/ant/ant_001.jpg").unlink()
    with pytest.raises(RunError, match="train/ant/ant_001.jpg: .*No such file"):
        opened[0]["train"].content(False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_features_of_every_scripts_checkpoint_are_what_its_classifier_is_given(here, suite, script, folder, tmp_path):
    small = WITHOUT_MIXING if script in ("trex", "grafit") else SMALL
    run = ["--model", NANO[script], *small, "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert here(script, *run, "--out", tmp_path / "run").status == 0
    arguments = ["--weights", tmp_path / "run/last.pt", "--sets", folder, "--img-size", 32, "--seeds", 1]
    result = suite("features", *arguments, "--workers", 0, "--device", "cpu", "--out", tmp_path / "r.json")
    assert result.status == 0, result
    row = json.loads((tmp_path / "r.json").read_text())
    assert row["model"] == f"{script}/{NANO[script]}" and row["img_size"] == [32, 32] and row["measured"] == 1
    assert row["eval_crop_ratio"] == 1 and row["pretraining_top1"] == log_of(tmp_path / "run")[-2].get("val_top1")
    found = row["sets"][str(folder)]
    assert 0 <= found["accuracy"] <= 100 and found["classifier"] == "lbfgs" and found["test_images"] == 20
    # by the classifier on top of them come the network's own answers
    from common import checkpoint
    from common.models import from_checkpoint

    content = checkpoint.load(tmp_path / "run/last.pt", "")
    model = from_checkpoint(content, "", (32, 32), print).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = transfer.classifier_inputs(model, "")(images)
        if script == "trex":
            again = F.normalize(model.model.head(features), dim=1) @ model.memory.prototypes().T / 0.1
        elif script == "grafit":
            again = F.normalize(model.projector(features), dim=1)
        else:
            again = model.head(features)
        assert torch.allclose(again, model(images), atol=1e-5)


def test_features_of_torchvisions_classifiers_and_of_official_weights(suite, folder, tmp_path):
    widths = {"resnet18": 512, "vgg11": 4096, "vit_b_16": 768, "swin_t": 768, "regnet_y_400mf": 440}
    for name, width in widths.items():
        with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet's constructor computes with tensors
            model = torchvision.models.get_model(name).eval()
        device = next(model.parameters()).device
        with torch.no_grad():
            images = torch.zeros(2, 3, 224, 224, device=device)
            assert transfer.classifier_inputs(model, name)(images).shape == (2, width), name
    with pytest.raises(UserError, match="no linear classifier"):
        transfer.classifier_inputs(torchvision.models.squeezenet1_0(), "squeezenet")
    import deit3
    import patchconvnet

    with pytest.raises(UserError, match="no linear classifier over one feature"):
        transfer.classifier_inputs(
            patchconvnet.build_model("patchconvnet_nano", 5, 32, class_tokens="per_class"), "per class"
        )
    model = deit3.build_model("vit_nano", 9, 32)
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    base = ["--sets", folder, "--seeds", 1, "--workers", 0, "--device", "cpu", "--img-size", 32]
    base += ["--out", tmp_path / "r.json"]
    result = suite("features", "--model", "deit3/vit_nano", "--weights", tmp_path / "official.pth", *base)
    assert result.status == 0, result
    assert json.loads((tmp_path / "r.json").read_text())["fingerprint"] == fingerprint(model.eval())
    # an encoder without classifier, in the form t-ReX's page shows
    state = {k: v for k, v in torchvision.models.resnet18().state_dict().items() if not k.startswith("fc.")}
    torch.save(state, tmp_path / "encoder.pth")
    encoder = ["--model", "torchvision/resnet18", "--weights", tmp_path / "encoder.pth"]
    assert suite("features", *encoder, *base).status == 0


# ---- Classifiers -----------------------------------------------------------------------------------------------------


def digits() -> tuple:
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
    return x[:900], y[:900], x[900:], y[900:]


def blobs() -> tuple:
    """As digits(), but ten overlapping classes in 8 dimensions: L-BFGS takes few steps to their optimum at any cost."""
    draws, y = torch.Generator().manual_seed(2), torch.arange(900) % 10
    x = (1.7 * torch.randn(10, 8, generator=draws))[y] + torch.randn(900, 8, generator=draws)
    return x[:300], y[:300], x[300:], y[300:]


def test_the_held_out_fifth_is_of_every_class_and_depends_on_the_seed_only():
    labels = torch.tensor([0] * 50 + [1] * 5 + [2])
    rest, held = transfer.held_out(labels, 0)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(56))
    assert labels[held].bincount(minlength=3).tolist() == [10, 1, 0]
    assert torch.equal(held, transfer.held_out(labels, 0)[1]) and not torch.equal(held, transfer.held_out(labels, 1)[1])


def test_the_cost_is_the_best_on_the_held_out_fifth_and_the_classifier_the_optimum_on_all():
    x, y, _, _ = blobs()
    rest, held = transfer.held_out(y, 0)
    (weight, bias), chosen = transfer.linear_classifier(x, y, 10, 0, sgd=False)
    theirs = LogisticRegression(C=chosen["C"], tol=1e-10, max_iter=20000).fit(x.double().numpy(), y.numpy())
    assert np.abs(weight.numpy() - theirs.coef_).max() <= 1e-2 * np.linalg.norm(theirs.coef_)

    def score(cost: float) -> float:
        classifier = LogisticRegression(C=cost, tol=1e-8, max_iter=5000).fit(x[rest].numpy(), y[rest].numpy())
        return classifier.score(x[held].numpy(), y[held].numpy())

    grid = [10.0**e for e in range(-5, 7)]
    assert score(chosen["C"]) >= max(map(score, grid[1:7])) - 1.5 / len(held)


def test_no_figure_is_chosen_on_the_test_set():
    """Shuffled test labels give chance, and the choices do not change."""
    x, y, test_x, test_y = blobs()
    honest = transfer.assess(x, y, test_x, test_y, 10, "top-1", 2)
    shuffled = test_y[torch.randperm(len(test_y), generator=torch.Generator().manual_seed(0))]
    canary = transfer.assess(x, y, test_x, shuffled, 10, "top-1", 2)
    assert honest["accuracy"] > 90 and honest["knn"] > 90 and honest["map"] > 50
    assert abs(canary["accuracy"] - 10) < 5 and abs(canary["knn"] - 10) < 5
    assert canary["map"] < 20  # not 10: a tenth of the queries name the cluster they lie in
    assert canary["chosen"] == honest["chosen"] and canary["k"] == honest["k"]
    assert honest["accuracy"] == pytest.approx(np.mean(honest["runs"])) and len(honest["runs"]) == 2
    assert honest["deviation"] == pytest.approx(np.std(honest["runs"], ddof=1))


def test_sgd_is_on_normalised_features_by_the_best_of_some_draws(monkeypatch):
    x, y, test_x, test_y = digits()
    monkeypatch.setattr(transfer, "SGD_DRAWS", 4)
    seen, original = [], transfer.sgd_classifier

    def short(features, labels, classes, lr, weight_decay, seed):
        seen.append((features, lr, weight_decay))
        return original(features, labels, classes, lr, weight_decay, seed, epochs=30, batch=128)

    monkeypatch.setattr(transfer, "sgd_classifier", short)
    found = transfer.assess(x, y, test_x, test_y, 10, "top-1", 1, sgd=True)
    assert found["classifier"] == "sgd" and found["accuracy"] > 88
    assert torch.allclose(seen[0][0].norm(dim=1), torch.ones(len(seen[0][0])), atol=1e-5)
    assert len(seen) == 5 and len(seen[-1][0]) == 900 and len(seen[0][0]) == 900 - len(transfer.held_out(y, 0)[1])
    assert all(0.1 <= lr <= 100 and 1e-12 <= wd <= 1e-4 for _, lr, wd in seen)
    assert seen[-1][1:] in [s[1:] for s in seen[:-1]]
    assert found["chosen"][0] == {"lr": seen[-1][1], "weight_decay": seen[-1][2]}


def test_sgd_approaches_the_optimum_of_the_same_objective():
    x, y, _, _ = digits()
    x, decay = F.normalize(x, dim=1).double(), 1e-3

    def objective(weight, bias) -> float:
        return (F.cross_entropy(x @ weight.T.double() + bias.double(), y) + decay / 2 * weight.square().sum()).item()

    weight, bias = transfer.sgd_classifier(x.float(), y, 10, 5.0, decay, 0, batch=900, epochs=600)
    theirs = LogisticRegression(C=1 / (decay * len(x)), tol=1e-10, max_iter=20000).fit(x.numpy(), y.numpy())
    best = objective(torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_))
    assert objective(weight, bias) == pytest.approx(best, rel=0.01)  # it decays the bias too, a little


def test_accuracies():
    predicted, labels = torch.tensor([0, 0, 1, 0, 2]), torch.tensor([0, 0, 0, 2, 2])
    assert transfer.accuracy(predicted, labels, "top-1") == pytest.approx(3 / 5)
    per_class = transfer.accuracy(predicted, labels, "per-class")
    assert per_class == pytest.approx((2 / 3 + 1 / 2) / 2)  # class 1 does not occur


# ---- Data sets: each in its real layout ------------------------------------------------------------------------------


def image(label: int, index: int) -> bytes:
    return encoded(picture(label % 4, index))


def write(path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def make_eurosat(root):
    for label, name in enumerate(("AnnualCrop", "Forest")):
        for i in range(10):
            write(root / f"eurosat/2750/{name}/{name}_{i + 1}.jpg", image(label, i))
    return 2, 14, 6


def make_caltech101(root):
    for label, name in enumerate(("BACKGROUND_Google", "Faces")):
        for i in range(34):
            write(root / f"caltech101/101_ObjectCategories/{name}/image_{i + 1:04}.jpg", image(label, i))
    return 2, 60, 8


def make_sun397(root):
    classes = ("/a/abbey", "/a/apartment_building/outdoor", "/b/bar")
    write(root / "SUN397/ClassName.txt", "".join(f"{c}\n" for c in classes))
    for split, count in (("Training", 3), ("Testing", 2)):
        names = [f"{c}/sun_{split.lower()}_{i}.jpg" for c in classes for i in range(count)]
        for i, name in enumerate(names):
            write(root / f"SUN397{name}", image(i // count, i))
        write(root / f"Partitions/{split}_01.txt", "".join(f"{n}\n" for n in names))
    return 3, 9, 6


def make_cog(root):
    concepts = [[f"n0000{level}{i:03d}" for i in range(2)] for level in range(5)]
    splits = {}
    for level in concepts:
        for label, concept in enumerate(level):
            names = [f"{concept}_{i}.JPEG" for i in range(5)]
            splits[concept] = {"train": names[:3], "test": names[3:]}
            for i, name in enumerate(names):
                write(root / concept / name, image(label, i))
    write(root / sources.COG_LEVELS, pickle.dumps(concepts))
    write(root / sources.COG_SPLITS, pickle.dumps(splits))
    return 2, 6, 4


def make_aircraft(root):
    folder = root / "fgvc-aircraft-2013b/data"
    write(folder / "variants.txt", "707-320\nA300B4\n")
    for split, count in (("trainval", 4), ("test", 2)):
        lines = []
        for i in range(count):
            name = f"{i + (100 if split == 'test' else 0):07d}"
            write(folder / f"images/{name}.jpg", image(i % 2, i))
            lines.append(f"{name} {('707-320', 'A300B4')[i % 2]}\n")
        write(folder / f"images_variant_{split}.txt", "".join(lines))
    return 2, 4, 2


def make_dtd(root):
    for split, count in (("train1", 1), ("val1", 1), ("test1", 1)):
        lines = []
        for label, name in enumerate(("banded", "dotted")):
            for i in range(count):
                file = f"{name}/{name}_{split}{i}.jpg"
                write(root / f"dtd/dtd/images/{file}", image(label, i))
                lines.append(f"{file}\n")
        write(root / f"dtd/dtd/labels/{split}.txt", "".join(lines))
    return 2, 4, 2


def make_pets(root):
    base = root / "oxford-iiit-pet"
    for split, count in (("trainval", 2), ("test", 1)):
        lines = []
        for label, name in enumerate(("Abyssinian", "beagle")):
            for i in range(count):
                write(base / f"images/{name}_{split}{i}.jpg", image(label, i))
                lines.append(f"{name}_{split}{i} {label + 1} 1 1\n")
        write(base / f"annotations/{split}.txt", "".join(lines))
    (base / "annotations/trimaps").mkdir()
    return 2, 4, 2


def make_food101(root):
    meta = {"train": {}, "test": {}}
    for label, name in enumerate(("apple_pie", "waffles")):
        for split, count in (("train", 3), ("test", 1)):
            meta[split][name] = [f"{name}/{split}{i}" for i in range(count)]
            for i in range(count):
                write(root / f"food-101/images/{name}/{split}{i}.jpg", image(label, i))
    for split, content in meta.items():
        write(root / f"food-101/meta/{split}.json", json.dumps(content))
    return 2, 6, 2


def make_flowers(root):
    from scipy.io import savemat

    base = root / "flowers-102"
    for i in range(6):
        write(base / f"jpg/image_{i + 1:05d}.jpg", image(i % 2, i))
    savemat(base / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2]])})
    savemat(base / "setid.mat", {"trnid": np.array([[1, 2]]), "valid": np.array([[3, 4]]), "tstid": np.array([[5, 6]])})
    return len(getattr(torchvision.datasets.Flowers102, "classes", "ab")), 4, 2  # newer torchvisions name all 102


def make_cars(root):
    from scipy.io import savemat

    base = root / "stanford_cars"
    names = np.empty((1, 2), dtype=object)
    names[0, :] = [np.array(["AM General Hummer"]), np.array(["Acura RL"])]
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": names})
    files = ("train", "devkit/cars_train_annos.mat", 4), ("test", "cars_test_annos_withlabels.mat", 2)
    for split, file, count in files:
        rows = np.zeros((1, count), dtype=[("fname", object), ("class", object)])
        for i in range(count):
            write(base / f"cars_{split}/{i:05d}.jpg", image(i % 2, i))
            rows[0, i] = (f"{i:05d}.jpg", i % 2 + 1)
        savemat(base / file, {"annotations": rows})
    return 2, 4, 2


def make_inat(root, year):
    write(root / "categories.json", json.dumps([{"id": i, "name": f"species {i}", "genus": "g"} for i in range(2)]))
    for split, count in (("train", 4), ("val", 2)):
        images = [{"id": i, "file_name": f"train_val{year}/{split}{i}.jpg"} for i in range(count)]
        for i in range(count):
            write(root / f"train_val{year}/{split}{i}.jpg", image(i % 2, i))
        annotations = [{"image_id": i, "category_id": i % 2} for i in range(count)]
        write(root / f"{split}{year}.json", json.dumps({"images": images, "annotations": annotations}))
    return 2, 4, 2


LAYOUTS = {
    **{f"cog{level}": make_cog for level in range(1, 6)},
    "aircraft": make_aircraft,
    "cars": make_cars,
    "dtd": make_dtd,
    "eurosat": make_eurosat,
    "caltech101": make_caltech101,
    "flowers102": make_flowers,
    "pets": make_pets,
    "food101": make_food101,
    "sun397": make_sun397,
    "inat2018": lambda root: make_inat(root, 2018),
    "inat2019": lambda root: make_inat(root, 2019),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_data_set_is_read_from_its_real_layout(name, tmp_path, monkeypatch):
    # MD5 sums of the real files
    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)
    classes, train, test = LAYOUTS[name](tmp_path)
    found = sources.open_data(f"{name}:{tmp_path}")
    assert len(found["train"].classes) == classes and found["train"].classes == found["val"].classes
    assert (len(found["train"]), len(found["val"])) == (train, test)
    for source in found.values():
        assert set(source.labels.tolist()) == set(range(min(classes, 3 if name == "sun397" else 2)))
        for i in range(len(source)):
            # the band's height tells the class that was drawn
            rows = source.read(i).float().mean((0, 2))
            assert int(rows.unfold(0, 8, 8).mean(1).argmax()) == source.labels[i]


def test_the_names_of_both_benchmarks():
    sizes = {"trex": 13, "thesis": 6, "kornblith": 10, "all": 18}
    assert {name: len(sets) for name, sets in transfer.GROUPS.items()} == sizes
    assert set(LAYOUTS) | {"cifar10", "cifar100", "imagenet"} == set(transfer.SETS)
    assert set(transfer.GROUPS["all"]) <= set(sources.NAMED) and "imagenet" not in transfer.GROUPS["all"]
    small = {"aircraft", "cars", "dtd", "flowers102", "pets", "food101", "sun397", "cifar10", "cifar100", "caltech101"}
    assert set(transfer.KORNBLITH) == small and set(transfer.SETS) - transfer.SGD == small | {"eurosat"}
    per_class = [name for name, metric in transfer.SETS.items() if metric == "per-class"]
    assert per_class == ["aircraft", "flowers102", "pets", "caltech101"]


def test_eurosats_split_is_fixed_and_sun397s_is_the_first_partition(tmp_path, monkeypatch):
    make_eurosat(tmp_path)
    one, two = (sources.open_data(f"eurosat:{tmp_path}") for _ in range(2))
    names = {split: [s.name(i) for i in range(len(s))] for split, s in one.items()}
    assert names == {split: [s.name(i) for i in range(len(s))] for split, s in two.items()}
    assert not set(names["train"]) & set(names["val"]) and two["val"].labels.tolist() == [0] * 3 + [1] * 3
    files = [f"{name}/{i}.jpg" for name, count in (("Pasture", 2000), ("River", 2500)) for i in range(count)]
    whole = sources.Files(tmp_path, files, ["Pasture", "River"], [0] * 2000 + [1] * 2500)  # of the real classes' sizes
    monkeypatch.setattr(sources, "open_images", lambda *a: whole)
    real = sources.open_data(f"eurosat:{tmp_path}")
    assert np.bincount(real["val"].labels).tolist() == [810, 810] and len(real["train"]) == 4500 - 1620
    make_sun397(tmp_path)
    assert "training" in sources.open_data(f"sun397:{tmp_path}")["train"].name(0)


def test_the_header_of_a_comparison_does_not_run_together():
    name = "a_data_set_with_a_long_name"
    network = {"pretraining_top1": 50.0, "adjusted": {name: 0.5, "dtd": 0.1}, "mean_adjusted": 0.3, "standard_error": 0}
    summary = {"networks": {n: network for n in "abc"}, "top1": "", "sets": [name, "dtd"], "left_out": []}
    table = transfer.comparison_table(summary | {"correlation": {"mean": {}}})
    assert table.splitlines()[1].split() == ["network", "top-1", name, "dtd", "mean", "+-"]


def test_split_files_that_could_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    make_cog(tmp_path)
    write(tmp_path / sources.COG_SPLITS, pickle.dumps(Evil()))
    with pytest.raises(UserError, match="asks for builtins.print"):
        sources.open_data(f"cog1:{tmp_path}")
    for reach in (np.load, np.float64(1), np.random.RandomState, os.system):  # numpy's arrays, and no more of numpy
        write(tmp_path / sources.COG_SPLITS, pickle.dumps(reach))
        with pytest.raises(UserError, match="asks for (numpy|posix)"):
            sources.open_data(f"cog1:{tmp_path}")
    write(tmp_path / sources.COG_SPLITS, pickle.dumps({"n1": 3}))
    with pytest.raises(UserError, match="not the expected form"):
        sources.open_data(f"cog1:{tmp_path}")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["U", "S", object])
def test_the_official_split_files_hold_numpy_arrays(protocol, kind, tmp_path):
    """As the official ones: levels a list of lists, the split file's names in arrays, by numpy's old and new names."""
    make_cog(tmp_path)
    splits = pickle.loads((tmp_path / sources.COG_SPLITS).read_bytes())
    for parts in splits.values():
        parts["train"], parts["val"] = np.array(parts["train"]).astype(kind), np.array(parts.pop("test")).astype(kind)
    stored = pickle.dumps(splits, protocol=protocol)
    if protocol < 4:  # here the names are text of any length
        old, new = (stored.replace(b"numpy._core", b"numpy.core"), stored.replace(b"numpy.core", b"numpy._core"))
        assert b"numpy.core" in old and b"numpy._core" in new and b"numpy._core" not in old
    for content in (stored,) if protocol > 3 else (old, new):
        write(tmp_path / sources.COG_SPLITS, content)
        found = sources.open_data(f"cog2:{tmp_path}")
        assert found["train"].name(4) == f"{tmp_path}/n00001001/n00001001_1.JPEG"
        assert [len(s) for s in found.values()] == [6, 4] and found["val"].classes == ["n00001000", "n00001001"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_set_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(UserError, match=name):
        sources.open_data(f"{name}:{tmp_path}")


# ---- Tables ----------------------------------------------------------------------------------------------------------


def test_missing_sets_are_named_skipped_and_counted(suite, network, tmp_path):
    make_eurosat(tmp_path / "root/eurosat")
    make_pets(tmp_path / "root/pets")
    (tmp_path / "root/dtd").mkdir()
    root = ["--root", tmp_path / "root"]
    result = suite("features", *flags(network, tmp_path, "eurosat", "pets", "dtd", "cars", seeds=2), *root)
    assert result.status == 0, result
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["measured"], found["asked"]) == (2, 4) and set(found["missing"]) == {"dtd", "cars"}
    assert [r["metric"] for r in found["sets"].values()] == ["top-1", "per-class"]
    rows = found["sets"].values()
    for row in rows:
        p, n = row["accuracy"] / 100, row["test_images"]
        assert row["log_odds"] == pytest.approx(log_odds(min(max(p, 0.5 / n), 1 - 0.5 / n)))
    assert found["mean_log_odds"] == pytest.approx(np.mean([r["log_odds"] for r in rows]))
    text = (tmp_path / "r.txt").read_text()
    assert text.strip() in result.out
    assert "mean of 2 of 4 data sets" in text and "dtd            missing: --data dtd:" in text
    refused(suite("features", *flags(network, tmp_path, "dtd", "cars"), *root), "none of dtd, cars is there")
    refused(suite("features", *flags(network, tmp_path, "cars")), "--sets cars", "--root")
    refused(suite("features", *flags(network, tmp_path, "flowers"), "--root", tmp_path), "--sets flowers", "flowers102")


def result_of(name: str, top1: float | None, accuracies: dict[str, float]) -> dict:
    common = {"metric": "top-1", "test_images": 1000, "classifier": "lbfgs"}
    rows = {s: {**common, "accuracy": a, "top1": a} for s, a in accuracies.items()}
    head = {"model": name, "weights": None, "pretraining_top1": top1, "seeds": 1}
    return transfer.summarise({**head, "sets": rows, "missing": {}})


def test_the_mean_is_of_the_log_odds_and_a_perfect_score_stays_finite():
    found = result_of("x", 70, {"a": 50.0, "b": 90.0, "c": 100.0})
    expected = [0, math.log(9), math.log(999.5 / 0.5)]
    assert [r["log_odds"] for r in found["sets"].values()] == pytest.approx(expected)
    assert found["mean_log_odds"] == pytest.approx(np.mean(expected))


def test_compare_adjusts_correlates_and_draws(suite, tmp_path):
    rng = np.random.default_rng(0)
    top1s, files = [60.0, 65.0, 70.0, 74.0, 79.0, 81.0], []
    table = {}
    for i, top1 in enumerate(top1s):
        accuracies = {"a": 50 + 0.4 * top1 + rng.normal(), "b": 30 + 0.5 * top1 + 3 * rng.normal()}
        table[f"net{i}"] = accuracies
        extra = {"c": 50.0} if i else {}
        (tmp_path / f"{i}.json").write_text(json.dumps(result_of(f"net{i}", top1, accuracies | extra)))
        files.append(tmp_path / f"{i}.json")
    result = suite("compare", *files, "--out", tmp_path / "o")
    assert result.status == 0, result
    found = json.loads((tmp_path / "o/compare.json").read_text())
    assert found["sets"] == ["a", "b"] and found["left_out"] == ["c"] and "left out: c" in result.out
    logit = np.array([[log_odds(a / 100) for a in row.values()] for row in table.values()])
    adjusted = logit - logit.mean(0)
    assert [n["mean_adjusted"] for n in found["networks"].values()] == pytest.approx(adjusted.mean(1).tolist())
    x = np.array([log_odds(t / 100) for t in top1s])
    for kind, theirs in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        entry = found["correlation"]["mean"][kind]
        assert entry["value"] == pytest.approx(theirs(x, adjusted.mean(1))[0])
        assert f"  {kind}" in result.out and f"{entry['value']:8.3f}" in result.out
    errors = [n["standard_error"] for n in found["networks"].values()]
    # of two sets, corrected for the mean of the six networks that was taken away
    assert errors == pytest.approx((adjusted.std(1, ddof=1) / math.sqrt(2) * math.sqrt(6 / 5)).tolist())
    for name, n in found["networks"].items():
        line = next(line for line in result.out.splitlines() if line.startswith(name))
        assert line.endswith(f"{n['mean_adjusted']:12.3f}{n['standard_error']:12.3f}")
    from PIL import Image

    sheet = np.array(Image.open(tmp_path / "o/compare.png").convert("RGB")).reshape(-1, 3).tolist()
    assert sheet.count([200, 85, 27]) > 30 and sheet.count([31, 95, 168]) > 30  # stars on the hull, dots below it
    refused(suite("compare", *files[:2], "--out", tmp_path / "o"), "at least 3")
    (tmp_path / "no.json").write_text(json.dumps(result_of("n", None, {"a": 50.0})))
    result = suite("compare", *files, tmp_path / "no.json", "--out", tmp_path / "o")
    refused(result, "n: top-1 where it was trained is not known", "--top1")
    (tmp_path / "all.json").write_text(json.dumps(result_of("m", 100.0, {"a": 50.0})))
    result = suite("compare", *files, tmp_path / "all.json", "--out", tmp_path / "o")
    refused(result, "m: top-1 where it was trained", "0 or 100%", "--top1")
    (tmp_path / "bad.json").write_text("{}")
    refused(suite("compare", tmp_path / "bad.json", "--out", tmp_path / "o"), "bad.json")


def test_the_figure_has_log_odds_on_both_axes_and_error_bars(suite, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, labels, draw, label = {}, {}, Axes.errorbar, Axes.set

    def noted(axes, x, y, error, **options):
        drawn[x] = y, error
        draw(axes, x, y, error, **options)

    monkeypatch.setattr(Axes, "errorbar", noted)
    monkeypatch.setattr(Axes, "set", lambda self, **k: (labels.update(k), label(self, **k)))
    accuracies = [{"a": 50.0, "b": 60.0, "imagenet": 55.0}, {"a": 55.0, "b": 80.0, "imagenet": 65.0}]
    accuracies.append({"a": 40.0, "b": 90.0})
    for i, row in enumerate(accuracies):
        (tmp_path / f"{i}.json").write_text(json.dumps(result_of(f"net{i}", 70.0 + i, row)))
    files = [tmp_path / f"{i}.json" for i in range(3)]
    assert suite("compare", *files, "--out", tmp_path / "o").status == 0
    found = json.loads((tmp_path / "o/compare.json").read_text())  # not all hold imagenet: it is no axis, and no set
    assert found["sets"] == ["a", "b"] and found["left_out"] == [] and found["top1"] == "where trained"
    assert list(drawn) == pytest.approx([log_odds(0.70), log_odds(0.71), log_odds(0.72)])
    networks = found["networks"].values()
    assert list(drawn.values()) == [(n["mean_log_odds"], n["standard_error"]) for n in networks]
    assert labels["xlabel"] == "log odds of top-1 where trained" and labels["ylabel"] == "mean log odds of 2 sets"
    drawn.clear()
    (tmp_path / "2.json").write_text(json.dumps(result_of("net2", None, accuracies[2] | {"imagenet": 45.0})))
    result = suite("compare", *files, "--out", tmp_path / "o")  # all do
    assert result.status == 0 and "top-1 on ImageNet" in result.out, result
    found = json.loads((tmp_path / "o/compare.json").read_text())
    assert [n["pretraining_top1"] for n in found["networks"].values()] == [55, 65, 45] and found["sets"] == ["a", "b"]
    assert list(drawn) == pytest.approx([log_odds(0.55), log_odds(0.65), log_odds(0.45)])
    assert "on ImageNet" in labels["xlabel"]


def test_correlations_equal_scipys_with_ties():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 5, 40).astype(float), rng.integers(0, 5, 40).astype(float)
    assert transfer.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    assert transfer.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert math.isnan(transfer.pearson(np.ones(3), x[:3]))


def test_the_hull_is_what_no_mixture_beats():
    points = [(1, 1), (2, 3), (3, 2.9), (4, 1), (3, 1), (2.5, 2.8)]
    assert upper_right_hull(points) == [(2, 3), (3, 2.9), (4, 1)]
    assert upper_right_hull([(1, 1)]) == [(1, 1)]


def test_imagenet_is_a_set_beside_those_of_transfer(suite, network, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SGD_DRAWS", 2)
    write_folder(tmp_path / "root/imagenet", train=4, val=2)
    make_eurosat(tmp_path / "root/eurosat")
    make_cog(tmp_path / "root/cog2")
    root = ["--root", tmp_path / "root"]
    spelt = f"cog1:{tmp_path}/root/cog2"
    asked = flags(network, tmp_path, "imagenet", "eurosat", "cog2", spelt, "pets")
    result = suite("features", *asked, *root)
    assert result.status == 0, result
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["measured"], found["asked"]) == (3, 4) and "mean of 3 of 4 data sets, imagenet apart" in result.out
    kinds = {"imagenet": "sgd", "eurosat": "lbfgs", "cog2": "sgd", spelt: "sgd"}  # by the set, not by its size
    assert {name: row["classifier"] for name, row in found["sets"].items()} == kinds
    rows = [row for name, row in found["sets"].items() if name != "imagenet"]
    assert found["mean_log_odds"] == pytest.approx(np.mean([row["log_odds"] for row in rows]))
    imagenet = found["sets"]["imagenet"]
    assert (imagenet["train_images"], imagenet["test_images"]) == (16, 8) and 0 <= imagenet["knn"] <= 100
    # alone: there is nothing to be averaged
    assert suite("features", *flags(network, tmp_path, "imagenet"), *root).status == 0
    assert json.loads((tmp_path / "r.json").read_text())["mean_log_odds"] is None
    refused(suite("features", *flags(network, tmp_path, "imagenet")), "--sets imagenet", "--root")
    refused(suite("features", *flags(network, tmp_path, "imagenet"), "--root", tmp_path), f"{tmp_path}/imagenet")


def test_images_are_prepared_as_by_trex_whatever_was_trained_on(here, suite, folder, tmp_path, monkeypatch):
    run = ["--model", NANO["deit3"], *SMALL, "--data", folder, "--epochs", 1, "--warmup-epochs", 0, "--ema", 0.5]
    assert here("deit3", *run, "--out", tmp_path / "run").status == 0
    seen = []

    def extract(embed, source, size, ratio, *_, **__):
        seen.append((tuple(size), ratio))
        return torch.eye(len(source))[:, :8]

    monkeypatch.setattr(transfer, "extract", extract)
    base = ["features", "--weights", tmp_path / "run/last.pt", "--sets", folder, "--seeds", 1, "--device", "cpu"]
    for extra, expected, key in ((), ((224, 224), 1.0), "val_top1"), (
        ["--img-size", 32, "--eval-crop-ratio", 0.5, "--use-ema"], ((32, 32), 0.5), "val_ema_top1"
    ):
        assert suite(*base, *extra, "--out", tmp_path / "r.json").status == 0
        assert seen == [expected] * 2 and not seen.clear()
        found = json.loads((tmp_path / "r.json").read_text())
        assert found["pretraining_top1"] == log_of(tmp_path / "run")[-2][key] is not None
    # a checkpoint from the middle of a run does not know what its weights are worth
    torch.save(load(tmp_path / "run/last.pt") | {"record": None}, tmp_path / "run/last.pt")
    assert suite(*base, "--out", tmp_path / "r.json").status == 0
    assert json.loads((tmp_path / "r.json").read_text())["pretraining_top1"] is None


def test_the_logits_of_a_logistic_regression_are_never_all_there(monkeypatch):
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 4, generator=draws), torch.arange(2000) % 300
    whole = transfer.logistic_regression(x, y, 300, 1.0, max_steps=10)
    with PeakMemory(torch.nn.Identity()) as memory:
        parts = transfer.logistic_regression(x, y, 300, 1.0, max_steps=10, chunk=50)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts))
    assert memory.peak < 2000 * 300 * 8 / 2  # half of the logits of all


def test_fine_tuned_runs_make_the_same_table(here, suite, folder, tmp_path):
    for name in ("a", "b"):
        run = ["--model", NANO["deit3"], *SMALL, "--data", folder, "--out", tmp_path / name]
        assert here("deit3", *run).status == 0
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    lines = (tmp_path / "c/log.jsonl").read_text().splitlines()
    (tmp_path / "c/log.jsonl").write_text("\n".join(lines[:-1]))
    folders = {"pets": "a", "dtd": "b", "cars": "c", "food101": "none"}
    pairs = [f"{title}={tmp_path / name}" for title, name in folders.items()]
    result = suite("finetuned", *pairs, "--top1", 81.5, "--name", "vit", "--out", tmp_path / "ft.json")
    assert result.status == 0, result
    found = json.loads((tmp_path / "ft.json").read_text())
    assert list(found["sets"]) == ["pets", "dtd"] and set(found["missing"]) == {"cars", "food101"}
    assert found["pretraining_top1"] == 81.5
    last = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines() if "val_top1" in line][-1]
    assert found["sets"]["pets"]["accuracy"] == last["val_top1"] and "not complete" in found["missing"]["cars"]
    assert "No such file" in found["missing"]["food101"]
    assert found["sets"]["pets"]["test_images"] == len(list((folder / "val").glob("*/*")))
    refused(suite("finetuned", "pets", "--out", tmp_path / "x.json"), "DATASET=FOLDER")


def test_wrong_use_is_refused(suite, network, tmp_path):
    refused(suite(), "COMMAND")
    base = ["--out", tmp_path / "r.json", "--device", "cpu"]
    refused(suite("features", *base, "--sets", "shapes"), "--model", "torchvision/NAME")
    refused(suite("features", *base, "--sets", "shapes", "--model", "torchvision/resnet51"), "resnet50")
    refused(suite("features", *base, "--sets", "shapes", "--model", "vit/x", "--weights", network), "needs vit.py")
    refused(suite("features", *base, "--sets", "shapes", "--model", "deit3/vit_x", "--weights", network), "vit_s")
    refused(suite("features", *base, "--sets", "shapes", "--weights", network), "--model")
    refused(suite("features", *base, "--seeds", 0), "--seeds 0")
    refused(suite("features", *base, "--img-size", "32x0"), "--img-size")
    refused(suite("features", *base, "--eval-crop-ratio", 0), "--eval-crop-ratio 0.0: must be in (0, 1]")
    refused(suite("features", "--sets", "shapes"), "--out")
    refused(suite("features", *base, "--sets", "shapes", "--out", tmp_path / "r.txt"), "r.txt", "the table beside it")
    refused(suite("features", *base, "--top1", 0.8, "--set", "shapes"), "--set")
    refused(suite("features", *base, "--top1", 120), "--top1 120")
    result = suite("features", "--weights", network, "--sets", "shapes", "--out", "/proc/none/r.json")
    refused(result, "--out", "cannot be written")
    refused(suite("compare", network, "--out", "/proc/none"), "--out", "cannot be written")


def test_ctrl_c_ends_at_once_without_half_a_result(network, tmp_path):
    """While features are computed and the worker is busy; nothing but the exit status tells of it."""
    data = write_folder(tmp_path / "d", train=50, val=10)

    def in_a_batch():
        from multiprocessing.process import BaseProcess

        import common.evaluate

        kill, normalize = BaseProcess.kill, common.evaluate.normalize
        common.evaluate.normalize = lambda images: os.kill(os.getpid(), signal.SIGINT) or normalize(images)
        BaseProcess.kill = lambda self: (kill(self), time.sleep(0.1))  # time for the worker's end to be noticed

    arguments = ["features", *flags(network, tmp_path, data), "--workers", 1, "--micro-batch", 1]
    assert status_of(child(arguments, script="common.transfer", patch=in_a_batch, log=tmp_path / "log")) == 130
    told = (tmp_path / "log").read_text()
    assert len(told.splitlines()) == 1 and "1 data sets" in told and not (tmp_path / "r.json").exists(), told
