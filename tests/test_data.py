"""Data sets, order and loading; the rows of the fault list that concern data (B) are named after it."""

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import random
import shutil
import sys
import tarfile
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, encoded, picture, reference, write_folder, write_tar
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision import datasets

import deit3
from common import checkpoint, errors, evaluate, images, shapes, sources
from common.data import GlobalBatches, RepeatedAugSampler, Samples, epoch_order, eval_batches, make_loader, to_device
from common.errors import RunError, UserError
from common.sources import open_data, open_images

CPU = torch.device("cpu")


# ---- Order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", reference("sampler"), ids=lambda c: f"{c['length']}-{c['world_size']}-{c['epoch']}")
def test_repeated_augmentation_order_is_the_official_one(case):
    for rank in range(case["world_size"]):
        sampler = RepeatedAugSampler(case["length"], case["world_size"], rank, repeats=case["repeats"])
        sampler.set_epoch(case["epoch"])
        indices = list(sampler)
        assert len(indices) == len(sampler) and indices[:6] == case["first"][rank]
        assert hashlib.sha256(",".join(map(str, indices)).encode()).hexdigest() == case["sha256"][rank]


def test_B9_a_small_data_set_yields_its_images():
    assert len(list(RepeatedAugSampler(200, 2, 0))) == len(RepeatedAugSampler(200, 2, 0)) == 100


def test_G6_order_depends_on_seed_and_epoch():
    first = epoch_order(100, 0, 0, 1)
    assert np.array_equal(first, epoch_order(100, 0, 0, 1)) and sorted(first) == list(range(100))
    assert not np.array_equal(first, epoch_order(100, 1, 0, 1)) and not np.array_equal(first, epoch_order(100, 0, 1, 1))


def all_micro_batches(world, accumulation, repeats=3, batch=32, group=4):
    """{(step, group): keys} over all ranks."""
    found = {}
    for rank in range(world):
        micro = batch // world // accumulation
        batches = GlobalBatches(
            1000, batch_size=batch, micro_batch=micro, group=group, world_size=world, rank=rank, repeats=repeats, seed=0
        )
        batches.epoch = 2
        for i, keys in enumerate(batches):
            step, which = divmod(i, accumulation)
            for number, start in zip(batches.groups(which), range(0, micro, group)):
                found[step, number] = keys[start : start + group]
        assert i + 1 == len(batches) == batches.steps * accumulation
    return found


@pytest.mark.parametrize("world, accumulation", [(1, 2), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_F7_groups_of_the_global_batch_do_not_depend_on_ranks_or_accumulation(world, accumulation):
    assert all_micro_batches(world, accumulation) == all_micro_batches(1, 1)


def test_groups_are_the_official_ranks():
    """Group g of 8 holds what rank g of 8 gets from the official sampler."""
    sampler = RepeatedAugSampler(1000, 8, 5)
    sampler.set_epoch(2)
    groups = all_micro_batches(1, 1)
    mine = [index for step in range(24) for _, index, _ in groups[step, 5]]
    assert mine == list(sampler)[: len(mine)]


def test_an_epoch_can_be_entered_in_the_middle():
    batches = GlobalBatches(100, batch_size=8, micro_batch=4, group=4, world_size=1, rank=0, repeats=1, seed=0)
    whole = list(batches)
    batches.first_step = 5
    assert list(batches) == whole[10:]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_B10_evaluation_sees_every_image_once(world):
    seen = [k[1] for rank in range(world) for batch in eval_batches(101, 8, world, rank) for k in batch]
    assert sorted(seen) == list(range(101))


# ---- The built-in data set -------------------------------------------------------------------------------------------


def test_shapes_are_a_function_of_their_index():
    image, mask, label = shapes.draw("train", 17)
    again, _, _ = shapes.draw("train", 17)
    assert np.array_equal(image, again) and not np.array_equal(image, shapes.draw("val", 17)[0])
    assert image.shape == (64, 64, 3) and 0.05 < mask.mean() < 0.5 and label == 5
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "b29653a06648e3c4"  # the same on every machine


def test_shapes_have_nested_labels_and_balanced_classes():
    fine, coarse = open_data("shapes"), open_data("shapes@coarse")
    assert len(fine["train"].classes) == 12 and coarse["val"].classes == ["disc", "ring", "cross"]
    for f, c in zip(fine["train"].labels, coarse["train"].labels):
        assert fine["train"].classes[f].startswith(coarse["train"].classes[c])
    assert set(np.bincount(fine["val"].labels)) == {100}


def test_a_linear_classifier_on_the_pixels_of_shapes_stays_under_40_percent():
    def load(split, count):
        pixels = torch.stack([torch.from_numpy(shapes.draw(split, i)[0]) for i in range(count)])
        return pixels.float().flatten(1) / 127.5 - 1, torch.arange(count) % 12

    (x, y), (test_x, test_y) = load("train", 3600), load("val", 600)
    torch.manual_seed(0)
    layer = nn.Linear(x.shape[1], 12)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(128):
            nn.functional.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (layer(test_x).argmax(1) == test_y).float().mean() < 0.4


# ---- Folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_as_torchvision_reads_it(folder):
    from torchvision.datasets import ImageFolder

    source, expected = open_data(str(folder))["train"], ImageFolder(str(folder / "train"))
    assert source.classes == expected.classes and source.labels.tolist() == expected.targets
    assert [source.name(i) for i in range(len(source))] == [path for path, _ in expected.samples]
    assert np.abs(source.read(3).permute(1, 2, 0).numpy().astype(int) - np.array(expected[3][0])).max() <= 1


def test_the_index_is_built_once_and_again_when_files_change(tmp_path, monkeypatch):
    write_folder(tmp_path, train=2, val=1)
    open_images(str(tmp_path / "train"), "--data")
    with monkeypatch.context() as m:
        m.setattr(sources, "scan_folder", lambda path: pytest.fail("scanned again"))
        assert len(open_images(str(tmp_path / "train"), "--data")) == 8
    time.sleep(0.02)
    (tmp_path / "train" / "ant" / "new.jpg").write_bytes(encoded(picture(0, 99)))
    assert len(open_images(str(tmp_path / "train"), "--data")) == 9


def test_a_long_scan_says_how_far_it_is_and_draws_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    write_folder(tmp_path, train=2, val=1)
    path, said, clock = str(tmp_path / "train"), [], iter(range(0, 600, 6))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # nothing is kept
    monkeypatch.setattr(errors, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    open_images(path, "--data", say=said.append)
    assert said[:-1] == [f"listing {path}: {n} files so far" for n in (2, 4, 6, 8)] and "kept" in said[-1]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        open_images(path, "--data", say=said.append)
        assert ("listing" in capsys.readouterr().err) == (rank == "0")
    assert len(said) == 7  # and a warning of each


def test_a_terminal_of_no_columns_or_a_dumb_one_gets_lines_instead_of_a_bar(monkeypatch, capsys):
    said, clock = [], iter(range(0, 600, 6))
    monkeypatch.setattr(errors, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    told = ["d: 6 of 10 images so far", "d: 10 of 10 images so far"]
    for term, columns, lines in (("xterm", 80, []), ("xterm", 0, told), ("dumb", 80, told)):
        said.clear()
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr(os, "get_terminal_size", lambda fd, columns=columns: os.terminal_size((columns, 24)))
        assert list(errors.watched(range(4), "d", "images", said.append, total=10, each=3)) == [0, 1, 2, 3]
        assert said == lines and ("d: " in capsys.readouterr().err) == (not lines)


def test_reading_a_checkpoint_and_extracting_features_say_how_far_they_are(tmp_path, folder, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 11))
    monkeypatch.setattr(errors, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    torch.save({f"w{i}": torch.zeros(1) for i in range(3)}, tmp_path / "a.pt")
    checkpoint.load(tmp_path / "a.pt", "--weights")
    assert f"reading {tmp_path}/a.pt: 3 of " in capsys.readouterr().out
    said = []
    run = SimpleNamespace(world=1, rank=0, workers=0, device=CPU, amp="fp32", say=said.append, gather=lambda x: x,
                          check_stop=lambda: None)
    source = open_data(str(folder))["val"]
    evaluate.extract(lambda x: x.mean((2, 3)), source, (8, 8), 1.0, run, batch_size=16, title="validation images")
    assert [line.split(": ")[1] for line in said] == [f"{n} of 20 images so far" for n in (16, 20)]
    said.clear()
    recipe = SimpleNamespace(img_size=(8, 8), eval_crop_ratio=1.0)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    evaluate.evaluate(run, model, recipe, source, batch_size=16)
    assert said == [f"evaluation: {n} of 20 images so far" for n in (16, 20)]
    capsys.readouterr()
    for every_byte in (False, True):  # what a cache of features is known by
        source.content(every_byte)
        lines = capsys.readouterr().out.splitlines()
        assert lines == [f"reading {folder}/val/: {n} of 20 images so far" for n in range(1, 21)]


def opened_again(kind, root) -> sources.Source:
    if kind == "tar":
        return open_data(str(write_tar(root / "d.tar", members())))["train"]
    write_folder(root / "f", train=3, val=1)
    coarse = root / "coarse.json"
    coarse.write_text(json.dumps(dict(ant="insect", bee="insect", cat="mammal", dog="mammal")))
    if kind == "coarse":
        return open_data(f"{root}/f@coarse", coarse_labels=str(coarse))["train"]
    return open_images(str(root / "f/train"), "", ["dog", "cat", "bee", "ant"] if kind == "other order" else None)


@pytest.mark.parametrize("kind", ["tar", "folder", "coarse", "other order"])
def test_what_is_opened_again_is_mapped_from_the_cache_and_nothing_is_scanned_copied_or_hashed(
    tmp_path, monkeypatch, kind
):
    first = opened_again(kind, tmp_path)
    digest, expected = first.digest(), (first.labels.tolist(), first.names.tolist(), first.classes)
    monkeypatch.setattr(sources, "_by_class", lambda *_: pytest.fail("made again"))
    with monkeypatch.context() as m:
        m.setattr(sources.np, "flatnonzero", lambda mask: mask if len(mask) == 0 else pytest.fail("labels are read"))
        if kind == "tar":
            again = open_data(str(tmp_path / "d.tar"))["train"]
        else:
            m.setattr("test_data.write_folder", lambda *_, **__: None)
            again = opened_again(kind, tmp_path)
        m.setattr(sources.np, "ascontiguousarray", lambda _: pytest.fail("hashed again"))
        assert again.digest() == digest
    assert (again.labels.tolist(), again.names.tolist(), again.classes) == expected
    arrays = [again.labels, again.names] + ([again.offsets, again.sizes] if kind == "tar" else [])
    mapped = {line.split()[-1] for line in open("/proc/self/maps") if ".npy" in line}
    for array in arrays:
        assert array.place[0] in mapped
        parts = pickle.loads(pickle.dumps(array))  # a worker that does not share memory: it maps the file too
        assert len(pickle.dumps(array)) < 300 and parts.place == array.place and np.array_equal(parts, array)
        assert np.array_equal(pickle.loads(pickle.dumps(array[1:])), array[1:])
    assert torch.equal(pickle.loads(pickle.dumps(again)).read(2), first.read(2))


def test_another_class_order_is_another_index(tmp_path):
    write_folder(tmp_path, train=2, val=1)
    orders = ["ant", "bee", "cat", "dog"], ["dog", "cat", "bee", "ant"], ["bee", "ant", "cat", "dog"]
    for _ in range(2):
        for order in orders:
            source = open_images(str(tmp_path / "train"), "", order)
            named = [source.classes[label] for label in source.labels]
            assert source.classes == order and named == [f"{c}" for c in sorted(order) for _ in range(2)]


def test_an_index_that_another_job_made_meanwhile_stays(tmp_path, monkeypatch):
    path, kept, by_class = str(write_tar(tmp_path / "d.tar", members())), [], sources._by_class

    def slow(*arguments):
        with monkeypatch.context() as m:
            m.setattr(sources, "_by_class", by_class)
            kept.append(open_data(path)["train"])
        return by_class(*arguments)

    monkeypatch.setattr(sources, "_by_class", slow)
    source = open_data(path)["train"]
    assert source.labels.place == kept[0].labels.place
    first = [line for line in open("/proc/self/maps") if kept[0].labels.place[0] in line]
    assert first and not any("deleted" in line for line in first)


@pytest.mark.parametrize("change", ["*.npy", "*.pt", "format", "archive"])
def test_an_index_that_does_not_fit_is_made_again(tmp_path, monkeypatch, change):
    path, content, made = tmp_path / "d.tar", members(), []
    by_class = sources._by_class
    monkeypatch.setattr(sources, "_by_class", lambda *a: made.append(a[1]) or by_class(*a))
    for time_, expected in enumerate((6, 7 if change == "archive" else 6)):
        write_tar(path, content)
        os.utime(path, ns=(0, time_ * (change == "archive")))
        assert len(open_data(str(path))["train"]) == expected
        if change.startswith("*"):  # damaged
            [file.write_bytes(file.read_bytes()[:-100]) for file in sources.cache_folder().glob(change)]
        if change == "format":
            monkeypatch.setattr(sources, "FORMAT", sources.FORMAT + 1)
        content |= {"train/ant/new.jpg": encoded(picture(0, 9))} if change == "archive" else {}
    assert made == ["train", "val"] * 2


@pytest.mark.parametrize("make, message", [
    (lambda p: None, "no such file or folder.*train/CLASS"),
    (lambda p: p.mkdir(), "no folder train/"),
    (lambda p: (p / "train" / "a").mkdir(parents=True), "no folder val/|holds no images"),
    (lambda p: p.write_text("x" * 600), "is not a tar archive.*train/CLASS"),
])  # fmt: skip
def test_B1_a_wrong_path_shows_the_expected_tree(tmp_path, make, message):
    make(tmp_path / "d")
    with pytest.raises(UserError, match=message):
        open_data(str(tmp_path / "d"))


def test_B2_an_empty_class_folder_is_named(tmp_path):
    write_folder(tmp_path, train=1, val=1)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "val" / "empty").mkdir()
    with pytest.raises(UserError, match="train/empty holds no images"):
        open_data(str(tmp_path))


def test_an_empty_class_folder_of_a_validation_set_is_said_and_keeps_its_number(tmp_path):
    write_folder(tmp_path, train=1, val=1)
    (tmp_path / "val/bee/bee_000.jpg").unlink()
    (tmp_path / "val/wasp").mkdir()
    said = []
    source = open_data(str(tmp_path), say=said.append)["val"]
    assert source.classes == ["ant", "bee", "cat", "dog"] and source.labels.tolist() == [0, 2, 3]
    assert said == [f"{tmp_path}/val: 2 class folders hold no images: bee, wasp"]
    alone = open_images(str(tmp_path / "val"), "--eval-data", None, said.append)
    assert alone.classes == ["ant", "bee", "cat", "dog", "wasp"] and alone.labels.tolist() == [0, 2, 3]
    for name in ("ant", "cat", "dog"):
        (tmp_path / f"val/{name}/{name}_000.jpg").unlink()
    with pytest.raises(UserError, match="the class folder .*val/ant holds no images"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("at", ["nothing", "data", "data/train", "data/train/ant", "data/train/ant/patient", "d.tar"])
def test_J9_what_may_not_be_read_is_one_line(tmp_path, monkeypatch, at):
    write_folder(tmp_path / "data", train=1, val=1)
    (tmp_path / "data/train/ant/patient").mkdir()
    write_tar(tmp_path / "d.tar", members())

    def denied(action, forbidden=str(tmp_path / at)):
        def checked(path, *arguments, **options):
            if str(path) == forbidden or (at == "data" and str(path).startswith(f"{forbidden}/")):
                raise PermissionError(13, "Permission denied", str(path))
            return action(path, *arguments, **options)

        return checked

    for name in ("scandir", "stat") if at == "data" else ("scandir",):
        monkeypatch.setattr(os, name, denied(getattr(os, name)))
    monkeypatch.setattr("builtins.open", denied(open))
    asked = str(tmp_path / ("d.tar" if at == "d.tar" else "data"))
    refused = pytest.raises(UserError, match=f"{tmp_path}/{at}.*: cannot be read \\(Permission denied\\)")
    with contextlib.nullcontext() if at == "nothing" else refused:
        open_data(asked)


def test_images_added_to_a_folder_in_a_class_folder_are_seen(tmp_path, monkeypatch):
    write_folder(tmp_path, train=1, val=1)
    train, opened = tmp_path / "train", lambda: len(open_images(str(tmp_path / "train"), "--data"))
    picture_, scanned, scan = encoded(picture(0, 9)), [], sources.scan_folder
    monkeypatch.setattr(sources, "scan_folder", lambda path: scanned.append(path) or scan(path))
    (train / "ant/patient1/left").mkdir(parents=True)
    places = ("ant/patient1", "ant/patient1/left", "ant/patient1/left", "bee/new/deep", "bee/new/deep")
    for i, place in enumerate(places):
        (train / place).mkdir(parents=True, exist_ok=True)
        (train / place / f"{i}.jpg").write_bytes(picture_)
        os.utime(train / place, ns=(0, i))  # a change within the clock's grain
        assert opened() == 5 + i == opened() and len(scanned) == 1 + i
    shutil.rmtree(train / "ant/patient1/left")
    assert opened() == 7 == opened() and len(scanned) == 6


def test_B3_B13_junk_is_no_class_and_odd_extensions_are_counted(tmp_path):
    write_folder(tmp_path, train=1, val=1)
    for junk in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "train" / junk).mkdir()
        (tmp_path / "train" / junk / "x.jpg").write_bytes(b"")
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "a.webm"):
        (tmp_path / "train" / "ant" / name).write_text("")
    (tmp_path / "train" / "ant" / "B.JPEG").write_bytes(encoded(picture(0, 1), "PNG"))
    (tmp_path / "train" / "ant" / "c.gif").write_bytes(encoded(picture(0, 1), "GIF"))
    said = []
    source = open_data(str(tmp_path), say=said.append)["train"]
    assert source.classes == ["ant", "bee", "cat", "dog"] and len(source) == 6
    assert len(said) == 1 and "2 files ignored" in said[0]
    assert all(source.read(i).shape[0] == 3 for i in range(6))


def test_B4_validation_classes_that_differ_are_listed(tmp_path):
    write_folder(tmp_path, train=1, val=1)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "wasp")
    with pytest.raises(UserError, match=r"only in train: bee \(1\); only here: wasp \(1\)"):
        open_data(str(tmp_path))


def test_B5_a_flat_validation_folder_is_explained(tmp_path):
    write_folder(tmp_path, train=1, val=1)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encoded(picture(0, 0)))
    with pytest.raises(UserError, match="1 images but no class folders; .*move each .*_devkit_t12.tar.gz"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("form", ["folder", "tar", "val of --data"])
def test_B5_imagenets_flat_validation_images_are_labelled_by_its_devkit(tmp_path, monkeypatch, form):
    """By numbers of its own, which its meta.mat translates; inner nodes of WordNet are in it, too."""
    import scipy.io as scipy_io

    names, numbers = ["n03", "n01", "n02", "n00"], [2, 1, 1, 3]  # of class 1, 2, ... and of image 1, 2, ...
    kit = tmp_path / "kit/ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", int), ("WNID", object), ("words", object), ("gloss", object), ("num_children", int)]
    rows = [(i + 1, name, f"thing {name}, x", "", int(name == "n00")) for i, name in enumerate(names)]
    scipy_io.savemat(kit / "meta.mat", {"synsets": np.array(rows, dtype=fields)})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in numbers))
    images = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": encoded(picture(n, i)) for i, n in enumerate(numbers)}
    place = tmp_path / ("val" if form != "tar" else "val.tar")
    write_folder(tmp_path, train=1, val=0, classes=("n01", "n02", "n03"))
    if form == "tar":
        write_tar(place, images)
    else:
        shutil.rmtree(place)
        place.mkdir()
        for name, content in images.items():
            (place / name).write_bytes(content)
    opened = (lambda: open_data(str(tmp_path))["val"]) if "--data" in form else (
        lambda: open_data(str(tmp_path), val_data=str(place))["val"])
    with pytest.raises(UserError, match="4 images but no class folders"):
        opened()
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "kit/ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    with pytest.raises(UserError, match="devkit_t12.tar.gz: does not give the labels .*corrupted"):
        opened()
    monkeypatch.setattr(datasets.imagenet, "_verify_archive", lambda *_: None)
    source = opened()
    assert [source.classes[label] for label in source.labels] == ["n01", "n03", "n03", "n02"]
    assert source.read(0).shape == (3, 36, 36) and source.name(0).endswith("ILSVRC2012_val_00000001.JPEG")


def test_B6_numeric_class_names_warn_about_their_order(tmp_path):
    write_folder(tmp_path, train=1, val=1, classes=tuple(map(str, range(3))) + ("10",))
    said = []
    assert open_data(str(tmp_path), say=said.append)["train"].classes == ["0", "1", "10", "2"]
    assert "0, 1, 10, 2" in said[0]


def test_imagenet_v2_folders_are_label_numbers(tmp_path):
    write_folder(tmp_path, train=1, val=1, classes=("0", "1", "2", "3"))
    source = open_images(str(tmp_path / "val"), "--eval-data", [f"n{i:08d}" for i in range(12)], lambda _: None)
    assert source.labels.tolist() == [0, 1, 2, 3] and len(source.classes) == 12


@pytest.mark.parametrize("label", [5, -100])
def test_B7_a_label_out_of_range_is_an_error_with_the_file(label):
    with pytest.raises(UserError, match=f"a.jpg: label {label} is outside 0..2"):
        sources.Files("/d", np.array([b"a.jpg"]), ["x", "y", "z"], np.array([label]))


@pytest.mark.parametrize(
    "content",
    [encoded(picture(0, 0))[:300], b"", b"<html>", None, "pipe"],
    ids=["truncated", "empty", "html", "vanished", "pipe"],
)
def test_B11_B12_B20_B25_an_unreadable_image_stops_with_its_path(tmp_path, content):
    write_folder(tmp_path, train=2, val=1)
    source = open_data(str(tmp_path))["train"]
    victim = tmp_path / "train" / "bee" / "bee_001.jpg"
    victim.write_bytes(content) if isinstance(content, bytes) else victim.unlink()
    if content == "pipe":
        os.mkfifo(victim)
    samples = Samples(source, deit3.TrainTransform(deit3.Recipe(img_size=(32, 32))), 0)
    for workers in (0, 1):
        with pytest.raises(RunError, match="train/bee/bee_001.jpg: "):
            list(to_device(make_loader(samples, [[(0, i, 0) for i in range(8)]], workers, CPU), CPU))


@pytest.mark.parametrize("error", [RuntimeError("no AVIF"), NotImplementedError("DXT9"), KeyError(7), MemoryError()])
@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_a_decoder_raises_names_the_file(folder, monkeypatch, error, workers):
    from common.evaluate import read_file

    source = open_data(str(folder))["train"]
    name = source.name(3)

    def broken(data):
        raise error

    monkeypatch.setattr(images.Image, "open", broken)
    samples = Samples(source, deit3.TrainTransform(deit3.Recipe(img_size=(32, 32))), 0)
    kind = type(error).__name__
    with pytest.raises(RunError, match=f"cannot read {name}: .*{kind}"):
        list(to_device(make_loader(samples, [[(0, 3, 0)]], workers, CPU), CPU))
    with pytest.raises(RunError, match=f"^{name}: .*{kind}"):
        source.named(source.read, 3)
    with pytest.raises(UserError, match=f"--predict {name}: .*{kind}"):
        read_file(name, "--predict")


class Mistaken:
    """A transform with a mistake in it."""

    def __call__(self, image, rng):
        raise RuntimeError("sizes do not match")


def test_a_mistake_in_a_transform_is_not_told_as_a_worker_that_died(folder):
    samples = Samples(open_data(str(folder))["train"], Mistaken(), 0)
    loader = make_loader(samples, [[(0, 3, 0)]], 1, CPU)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        list(to_device(loader, CPU))
    loader._iterator._shutdown_workers()


def test_B20_links_to_nothing_are_named_and_loops_end(tmp_path):
    write_folder(tmp_path, train=1, val=1)
    (tmp_path / "train" / "ant" / "loop").symlink_to(tmp_path / "train" / "ant")
    assert len(open_data(str(tmp_path))["train"]) == 4
    (tmp_path / "train" / "bee" / "gone.jpg").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="gone.jpg is a link to nothing"):
        open_data(str(tmp_path))


def test_B21_odd_names_work(tmp_path):
    write_folder(tmp_path, train=1, val=1)
    for name in ("with space.jpg", "naïve.jpg", "new\nline.jpg", "-dash.jpg", os.fsdecode(b"\xff\xfe.jpg")):
        (tmp_path / "train" / "ant" / name).write_bytes(encoded(picture(0, 0)))
    source = open_data(str(tmp_path))["train"]
    assert len(source) == 9 and all(source.read(i).shape[0] == 3 for i in range(9))
    json.dumps([source.name(i) for i in range(9)])


def test_B26_the_digest_follows_files_and_labels(tmp_path):
    write_folder(tmp_path, train=2, val=1)
    digest = open_data(str(tmp_path))["train"].digest()
    assert digest == open_data(str(tmp_path))["train"].digest()
    time.sleep(0.02)
    (tmp_path / "train" / "ant" / "ant_001.jpg").rename(tmp_path / "train" / "bee" / "ant_001.jpg")
    assert digest != open_data(str(tmp_path))["train"].digest()


def test_coarse_labels_of_a_folder(tmp_path, folder):
    mapping = tmp_path / "coarse.json"
    mapping.write_text(json.dumps({"ant": "insect", "bee": "insect", "cat": "mammal", "dog": "mammal"}))
    source = open_data(f"{folder}@coarse", coarse_labels=str(mapping))["val"]
    assert source.classes == ["insect", "mammal"] and np.bincount(source.labels).tolist() == [10, 10]
    mapping.write_text(json.dumps({"ant": "insect"}))
    with pytest.raises(UserError, match="no coarse class for 3 classes, e.g. bee"):
        open_data(f"{folder}@coarse", coarse_labels=str(mapping))
    with pytest.raises(UserError, match="--coarse-labels"):
        open_data(f"{folder}@coarse")


# ---- Tar archives ----------------------------------------------------------------------------------------------------


def members(**options) -> dict[str, bytes]:
    return {
        f"{s}/{c}/{c}_{i}.jpg": encoded(picture(label, i))
        for s in ("train", "val")
        for label, c in enumerate(("ant", "bee"))
        for i in range(3)
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_in_place_in_every_format(tmp_path, form):
    odd = "train/ant/z.jpg" if form == tarfile.USTAR_FORMAT else "./train/ant/" + "long" * 40 + "é.jpg"
    content = {odd: encoded(picture(0, 7)), **members()}
    found = open_data(str(write_tar(tmp_path / "d.tar", content, format=form)))
    assert len(found["train"]) == 7 and len(found["val"]) == 6 and found["val"].classes == ["ant", "bee"]
    for source in found.values():
        for i in range(len(source)):
            name = source.name(i).split(": ")[1]
            data_of = next(v for k, v in content.items() if k.removeprefix("./") == name)
            assert torch.equal(source.read(i), images.decode(data_of))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.tar"]  # nothing was unpacked


def test_imagenets_tar_of_class_tars(tmp_path):
    inner = {}
    for label, name in enumerate(("n01", "n02")):
        write_tar(tmp_path / "x.tar", {f"{name}_{i}.JPEG": encoded(picture(label, i)) for i in range(4)})
        inner[f"{name}.tar"] = (tmp_path / "x.tar").read_bytes()
    outer = write_tar(tmp_path / "train.tar", inner)
    write_folder(tmp_path / "v", train=1, val=2, classes=("n01", "n02"))
    found = open_data(str(outer), val_data=str(tmp_path / "v" / "val"))
    assert found["train"].classes == ["n01", "n02"] and found["train"].labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(found["train"].read(5), images.decode(encoded(picture(1, 1)))) and len(found["val"]) == 4
    with pytest.raises(UserError, match="--val-data"):
        open_data(str(outer))


def test_validation_images_beside_data_that_have_their_own_are_refused(tmp_path):
    """They used to be left out without a word."""
    for spec in ("shapes", "shapes@coarse", f"cifar10:{tmp_path}"):
        with pytest.raises(UserError, match="--val-data: .* has validation images of its own"):
            open_data(spec, val_data=str(tmp_path), splits=("val",))
    assert len(open_data("shapes", val_data="none", splits=("train",))["train"]) > 0


@pytest.mark.parametrize("name, kind, message", [
    ("../x.jpg", tarfile.REGTYPE, "points outside"),
    ("/etc/x.jpg", tarfile.REGTYPE, "points outside"),
    ("train/a/l.jpg", tarfile.SYMTYPE, "link or device"),
    ("train/a/h.jpg", tarfile.LNKTYPE, "link or device"),
    ("train/a/d.jpg", tarfile.CHRTYPE, "link or device"),
])  # fmt: skip
def test_B22_a_tar_that_reaches_out_is_refused_by_member(tmp_path, name, kind, message):
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match=f"member {name} .*{message}|{message}"):
        open_data(str(tmp_path / "d.tar"))


def test_B23_broken_tars_are_named_by_member(tmp_path):
    path = write_tar(tmp_path / "d.tar", members())
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"val/bee/bee_2.jpg") + 700])
    with pytest.raises(UserError, match="truncated: member val/bee/bee_2.jpg"):
        open_data(str(path))
    path.write_bytes(whole[:2000] + b"x" * 300 + whole[2300:])
    with pytest.raises((UserError, OSError, ValueError)):
        source = open_data(str(path))["train"]
        [source.read(i) for i in range(len(source))]
    second = whole.index(b"train/ant/ant_1.jpg")  # a header in the middle: what follows must not be lost in silence
    path.write_bytes(whole[: second + 3] + b"?" + whole[second + 4 :])
    with pytest.raises(UserError, match=f"is damaged at byte {second}"):
        open_data(str(path))
    huge = tarfile.TarInfo("train/a/huge.jpg")
    huge.size = 10 << 30
    with open(tmp_path / "h.tar", "wb") as f:  # sparse: 10 GB of nothing
        f.write(huge.tobuf(tarfile.GNU_FORMAT))
        f.truncate((10 << 30) + 2048)
    with pytest.raises(UserError, match="huge.jpg has 10737418240 bytes"):
        open_data(str(tmp_path / "h.tar"))
    write_tar(tmp_path / "flat.tar", {"a.jpg": b"x"})
    with pytest.raises(UserError, match="without a class folder .*devkit_t12.tar.gz beside"):
        open_images(str(tmp_path / "flat.tar"), "--val-data")


def test_a_tar_that_was_cut_between_two_members_is_refused(tmp_path):
    whole = write_tar(tmp_path / "d.tar", members()).read_bytes()
    cut = whole.index(b"val/bee/bee_2.jpg")
    (tmp_path / "d.tar").write_bytes(whole[:cut])
    with pytest.raises(UserError, match=f"is truncated: it ends at byte {cut} without"):
        open_data(str(tmp_path / "d.tar"))
    (tmp_path / "d.tar").write_bytes(whole[:cut] + bytes(1024))  # the way out that is named
    assert len(open_data(str(tmp_path / "d.tar"))["val"]) == 5
    inner = write_tar(tmp_path / "x.tar", {"n01_0.JPEG": encoded(picture(0, 0))}).read_bytes()
    end = 512 + -(-len(encoded(picture(0, 0))) // 512) * 512
    write_tar(tmp_path / "train.tar", {"n01.tar": inner[:end], "n02.tar": inner})
    with pytest.raises(UserError, match="is truncated: n01/ ends"):
        open_data(str(tmp_path / "train.tar"), val_data="none", splits=("train",))


# ---- Data sets of torchvision and iNaturalist ------------------------------------------------------------------------


def test_cifar_100_with_coarse_labels(tmp_path, monkeypatch):
    from torchvision import datasets

    base = tmp_path / "cifar-100-python"
    base.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        content = {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [i % 100 for i in range(count)],
            "coarse_labels": [i % 20 for i in range(count)],
        }
        (base / split).write_bytes(pickle.dumps(content))
    fine, coarse = [f"f{i}" for i in range(100)], [f"c{i}" for i in range(20)]
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": fine, "coarse_label_names": coarse}))
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": None})
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    fine, coarse = open_data(f"cifar100:{tmp_path}"), open_data(f"cifar100@coarse:{tmp_path}")
    assert len(fine["train"]) == 20 and len(fine["val"]) == 10 and len(fine["train"].classes) == 100
    assert coarse["train"].classes[3] == "c3" and coarse["train"].labels.tolist() == list(range(20))
    assert fine["train"].read(0).shape == (3, 32, 32)


def test_a_named_set_that_is_not_there_is_explained(tmp_path):
    for name in ("cifar10", "flowers102", "food101", "inat2018", "dtd", "pets", "aircraft", "cars"):
        with pytest.raises(UserError, match=f"{name}:{tmp_path}"):
            open_data(f"{name}:{tmp_path}")


def test_flowers_trains_on_train_and_val(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)
    import scipy.io as scipy_io  # what torchvision reads the labels with

    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for i in range(1, 10):
        (base / "jpg" / f"image_{i:05d}.jpg").write_bytes(encoded(picture(0, i)))
    scipy_io.savemat(base / "imagelabels.mat", {"labels": np.arange(1, 10)})
    numbers = {"trnid": np.array([1, 2]), "valid": np.array([3, 4]), "tstid": np.arange(5, 10)}
    scipy_io.savemat(base / "setid.mat", numbers)
    found = open_data(f"flowers102:{tmp_path}")
    assert len(found["train"]) == 4 and len(found["val"]) == 5


def test_H6_without_a_cache_the_variable_is_named_and_images_are_listed_anew(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = []
    assert len(open_data(str(folder), say=said.append)["train"]) == 64
    assert len(said) == 2 and all("set XDG_CACHE_HOME" in line for line in said)  # train and val
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(UserError, match="set HOME or XDG_CACHE_HOME"):
        open_data(str(folder), say=said.append)


def test_H5_scipy_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install scipy"):
        open_data(f"flowers102:{tmp_path}")


def test_food_101(tmp_path):
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for name in ("apple_pie", "waffles"):
        (base / "images" / name).mkdir(parents=True)
        for i in range(3):
            (base / "images" / name / f"{i}.jpg").write_bytes(encoded(picture(0, i)))
    for split, ids in (("train", (0, 1)), ("test", (2,))):
        names = {name: [f"{name}/{i}" for i in ids] for name in ("apple_pie", "waffles")}
        (base / "meta" / f"{split}.json").write_text(json.dumps(names))
    found = open_data(f"food101:{tmp_path}")
    assert found["train"].labels.tolist() == [0, 0, 1, 1] and found["val"].read(1).shape == (3, 36, 36)


def put(path, content=None) -> None:
    """Writes a file with its folders: bytes of a picture, or lines of text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(0, 0)) if content is None else "\n".join(content).encode())


def layout_of_dtd(root):
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        names = [f"{c}/{c}_{split}{i}.jpg" for c in ("banded", "woven") for i in range(count)]
        put(root / f"dtd/dtd/labels/{split}1.txt", names)
        [put(root / "dtd/dtd/images" / n) for n in names]


def layout_of_pets(root):
    for split, count in (("trainval", 3), ("test", 1)):
        names = [f"{c}_{split}{i}" for c in ("Abyssinian", "beagle") for i in range(count)]
        put(root / f"oxford-iiit-pet/annotations/{split}.txt", [f"{n} {1 + n.startswith('b')} 1 1" for n in names])
        [put(root / f"oxford-iiit-pet/images/{n}.jpg") for n in names]


def layout_of_aircraft(root):
    base = root / "fgvc-aircraft-2013b/data"
    put(base / "variants.txt", ["707-320", "A380"])
    for split, count in (("trainval", 3), ("test", 1)):
        lines = [f"{split}{v[:2]}{i} {v}" for v in ("707-320", "A380") for i in range(count)]
        put(base / f"images_variant_{split}.txt", lines)
        [put(base / f"images/{line.split()[0]}.jpg") for line in lines]


def layout_of_cars(root):
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(["Acura", "BMW"], dtype=object)})
    splits = (("train", "devkit/cars_train_annos.mat", 3), ("test", "cars_test_annos_withlabels.mat", 1))
    for split, file, count in splits:
        rows = [(f"{c}{i}.jpg", c) for c in (1, 2) for i in range(count)]
        savemat(base / file, {"annotations": np.array(rows, dtype=[("fname", object), ("class", float)])})
        [put(base / f"cars_{split}/{n}") for n, _ in rows]


@pytest.mark.parametrize(
    "name, write",
    [("dtd", layout_of_dtd), ("pets", layout_of_pets), ("aircraft", layout_of_aircraft), ("cars", layout_of_cars)],
)
def test_sets_in_torchvisions_layout(tmp_path, name, write):
    """Two classes, three training images (train and val together) and one test image each."""
    write(tmp_path)
    found = open_data(f"{name}:{tmp_path}")
    assert sorted(found["train"].labels) == [0, 0, 0, 1, 1, 1] and sorted(found["val"].labels) == [0, 1]
    assert len(found["train"].classes) == 2 and found["train"].classes == found["val"].classes
    assert all(found[s].read(i).shape == (3, 36, 36) for s in found for i in range(len(found[s])))


def test_inaturalist_at_a_chosen_level(tmp_path):
    categories = [{"id": i, "name": f"species {i}", "kingdom": "Animalia", "genus": f"g{i // 2}"} for i in range(4)]
    categories = [{**c, "supercategory": "Insecta"} for c in categories]  # the competition's, not a rank of biology
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    for split, count in (("train", 8), ("val", 4)):
        pictures = [{"id": i, "file_name": f"train_val2018/{split}_{i}.jpg"} for i in range(count)]
        labels = [{"image_id": i, "category_id": i % 4} for i in range(count)]
        (tmp_path / f"{split}2018.json").write_text(json.dumps({"images": pictures, "annotations": labels}))
        for p in pictures:
            (tmp_path / "train_val2018").mkdir(exist_ok=True)
            (tmp_path / p["file_name"]).write_bytes(encoded(picture(0, p["id"])))
    assert open_data(f"inat2018:{tmp_path}")["train"].labels.tolist() == [0, 1, 2, 3] * 2
    genus = open_data(f"inat2018@genus:{tmp_path}")["val"]
    assert genus.classes == ["g0", "g1"] and genus.labels.tolist() == [0, 0, 1, 1] and genus.read(0).shape[0] == 3
    with pytest.raises(UserError, match="there is: fine, kingdom, genus, species"):
        open_data(f"inat2018@order:{tmp_path}")


# ---- Loading ---------------------------------------------------------------------------------------------------------


def test_B27_pixels_do_not_depend_on_workers_and_differ_between_epochs_and_repeats(folder):
    transform = deit3.TrainTransform(deit3.Recipe(img_size=(32, 32), augment="auto"))
    samples = Samples(open_data(str(folder))["train"], transform, 0)
    batches = [[(e, i, r) for i in range(4)] for e in (0, 1) for r in (0, 1)]
    results = [list(to_device(make_loader(samples, batches, workers, CPU), CPU)) for workers in (0, 1, 3)]
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
    pictures = [b[0] for b in results[0]]
    assert all(not torch.equal(pictures[i], pictures[j]) for i in range(4) for j in range(i))
    assert results[0][0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_J8_loaders_work_by_every_start_method(tmp_path, method):
    """What a worker is sent can be pickled, an archive and its index included; forkserver is Python 3.14's default."""
    source = open_data(str(write_tar(tmp_path / "d.tar", members())))["val"]
    run = SimpleNamespace(world=1, rank=0, workers=1, device=CPU)
    loader = evaluate.eval_loader(source, (16, 16), 1.0, 4, run)
    expected = [loader.dataset.__getitems__(keys) for keys in loader.batch_sampler]
    loader.multiprocessing_context = method
    for found, batch in zip(to_device(loader, CPU), expected, strict=True):
        assert all(map(torch.equal, found, batch))


@pytest.mark.parametrize("script", SCRIPTS)
def test_J8_every_training_transform_can_be_sent_to_a_worker(script):
    module, source = importlib.import_module(script), open_data("shapes")["val"]
    for recipe in module.RECIPES.values():
        samples = Samples(source, module.TrainTransform(recipe), 0)
        sent = pickle.loads(pickle.dumps(samples))
        for found, expected in zip(sent.__getitems__([(0, 3, 1)]), samples.__getitems__([(0, 3, 1)])):
            assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))


def test_B24_a_killed_worker_stops_the_run_with_the_likely_cause(folder):
    class Slow(Samples):
        def __getitems__(self, keys):
            time.sleep(0.3)
            return super().__getitems__(keys)

    loader = make_loader(
        Slow(open_data(str(folder))["train"], deit3.TrainTransform(deit3.Recipe(img_size=(32, 32))), 0),
        [[(0, i, 0)] for i in range(40)],
        1,
        CPU,
    )
    stream = to_device(loader, CPU)
    next(stream)
    os.kill(loader._iterator._workers[0].pid, 9)
    with pytest.raises(RunError, match="worker died.*--workers"):
        list(stream)


def test_repeats_of_an_image_share_one_decode(folder, monkeypatch):
    source, reads = open_data(str(folder))["train"], []
    monkeypatch.setattr(source, "read", lambda i, read=source.read: reads.append(i) or read(i))
    images, _, labels, indices = Samples(source, deit3.TrainTransform(deit3.Recipe(img_size=(32, 32))), 0).__getitems__(
        [(0, 5, r) for r in range(3)]
    )
    assert reads == [5] and indices.tolist() == [5] * 3 and labels.tolist() == [source.labels[5]] * 3
    assert not torch.equal(images[0], images[1])


def test_an_image_is_released_after_its_last_use(folder, monkeypatch):
    source, alive, most = open_data(str(folder))["train"], weakref.WeakSet(), []

    def read(index):
        image = torch.full((3, 40, 40), index, dtype=torch.uint8)
        alive.add(image)
        most.append(len(alive))
        return image

    monkeypatch.setattr(source, "read", read)
    samples = Samples(source, lambda image, _: (image[:, :8, :8].clone(), ()), 0)
    keys = [(0, i // 3, i % 3) for i in range(32)]
    keys = [keys[i] for g in range(8) for i in range(g, 32, 8)]  # as dealt out to groups: repeats lie far apart
    for wanted in (keys, [(0, i, 0) for i in range(32)]):
        images, _, labels, indices = samples.__getitems__(wanted)
        assert indices.tolist() == [index for _, index, _ in wanted] == images[:, 0, 0, 0].tolist()
        assert labels.tolist() == source.labels[indices].tolist()
    assert most == [1] * (11 + 32)


def test_the_image_stays_as_it_is_when_the_decode_is_shared():
    pixels = images.from_pil(Image.new("RGB", (40, 40), (9, 9, 9)))
    before = pixels.clone()
    for policy in ("auto", "rand", "3-augment"):
        deit3.TrainTransform(deit3.Recipe(img_size=(40, 40), crop="src", augment=policy))(pixels, random.Random(1))
    assert torch.equal(before, pixels)
