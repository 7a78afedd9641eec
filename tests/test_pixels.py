"""Mean and deviation other than ImageNet's (--mean, --std): of weights that were trained with others."""

import json

import pytest
import torch
from conftest import NANO, TINY, fewer_shapes, fill, load
from PIL import Image
from test_cli import refused

import deit3
from common import dense, evaluate, images, transfer

HALF = ["--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5]
OWN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SHORT = [*TINY, "--epochs", 1, "--warmup-epochs", 0]


@pytest.fixture(autouse=True)
def imagenets_afterwards():
    yield
    images.PIXELS.clear()


def figures(out: str) -> list[float]:
    """top-1, top-5 and loss of --eval's last line."""
    return [float(pair.split(" ")[1]) for pair in out.strip().splitlines()[-1].split("  ")]


def test_foreign_weights_are_evaluated_as_computed_by_hand(deit3_here, tmp_path, folder):
    fill(model := deit3.build_model("vit_nano", 4, 32).eval())
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    flags = ["--model", "vit_nano", "--eval", "--weights", tmp_path / "bare.pth", "--img-size", 32, "--workers", 0]
    own = ["--mean", 0.5, 0.4, 0.3, "--std", 0.5, 0.25, 0.2]
    found = [deit3_here(*flags, "--eval-data", folder / "val", *more) for more in (own, [])]
    source = evaluate.open_images(str(folder / "val"), "")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2)))
    pixels = torch.stack([images.eval_transform(source.read(i), (32, 32), 1.0) for i in range(20)])
    with torch.no_grad():
        logits, labels = model((pixels / 255 - mean) / std), torch.tensor(source.labels)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert figures(found[0].out) == pytest.approx([top1, 100, loss], rel=1e-4), found
    assert "mean (0.5, 0.4, 0.3), std (0.5, 0.25, 0.2)" in found[0].out and "mean" not in found[1].out
    assert figures(found[1].out)[2] != pytest.approx(loss, rel=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """The folder of a run with a mean and deviation of its own."""
    out, made = tmp_path_factory.mktemp("half"), []

    def make(here):
        if not made:
            made.append(here("deit3", *SHORT, "--data", folder, "--out", out, *HALF))
            assert made[0].status == 0 and "images, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)\n" in made[0].out, made
        return out

    return make


def test_a_checkpoint_keeps_its_own_for_evaluation_and_load_model(trained, here, folder):
    out = trained(here)
    content = load(out / "last.pt")
    assert images.pixels_of(content) == OWN
    result = here("deit3", "--model", "vit_nano", "--eval", "--data", folder, "--weights", out / "last.pt",
                  "--workers", 0)  # fmt: skip
    record = content["record"]
    assert figures(result.out) == pytest.approx([record[f"val_{k}"] for k in ("top1", "top5", "loss")], rel=1e-4)
    images.PIXELS.clear()
    _, _, transform = deit3.load_model(str(out / "best.pt"))
    picture = Image.open(folder / "val/bee/bee_000.jpg")
    pixels = images.eval_transform(images.from_pil(picture), (32, 32), content["recipe"]["eval_crop_ratio"])
    torch.testing.assert_close(transform(picture), (pixels / 255 - 0.5) / 0.5, atol=1e-5, rtol=1e-5)
    assert not images.PIXELS  # of the process


def test_fine_tuning_takes_them_over_and_resuming_compares_them(trained, here, folder, tmp_path):
    out, tuned = trained(here), [*SHORT, "--data", folder, "--out", tmp_path]
    result = here("deit3", *tuned, "--weights", out / "last.pt")
    assert result.status == 0 and images.pixels_of(load(tmp_path / "last.pt")) == OWN, result
    refused(here("deit3", *tuned, "--resume"), "mean was (0.5, 0.5, 0.5), now (0.485, 0.456, 0.406)", "repeat its")
    assert "it is complete" in here("deit3", *tuned, *HALF, "--resume").out
    plain = [*SHORT, "--data", folder, "--out", tmp_path / "plain"]
    assert here("deit3", *plain).status == 0 and "mean" not in load(tmp_path / "plain/last.pt")["data"]
    refused(here("deit3", *plain, *HALF, "--resume"), "std was (0.229, 0.224, 0.225), now (0.5, 0.5, 0.5)")


def test_a_teacher_sees_images_as_it_was_trained(trained, here, folder):
    from common.models import load_teacher

    content = load(trained(here) / "last.pt")
    args = type("Args", (), {"teacher": None, "teacher_weights": "last.pt"})
    teacher = load_teacher(args, content, "", (32, 32), content["data"]["classes"], print)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    answers = []
    for own in ({}, OWN, {"std": (1.0, 0.9, 0.8)}):  # of the student
        images.PIXELS.clear()
        images.PIXELS.update(own)
        answers.append(teacher(evaluate.normalize(pixels)))
        seen = evaluate.denormalize(evaluate.normalize(pixels))
        torch.testing.assert_close(seen, pixels.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(answers[0], answers[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answers[2], answers[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("module, words", [("deit3", []), ("dense", ["segment"]), ("transfer", ["features"])])
def test_wrong_values_get_one_line(launched, tmp_path, module, words):
    main = {"deit3": deit3, "dense": dense, "transfer": transfer}[module].main
    for flags, told in ((["--std", 0, 1, 1], "must be in (0, 1]"), (["--mean", 0.5, 0.5], "expected 3 arguments"),
                        (["--mean", 2, 2, 2], "must be in [0, 1]"), (["--std", 2, 2, 2], "must be in")):  # fmt: skip
        refused(launched(main, [module, *words, "--out", tmp_path / "o", *flags]), flags[0], told)
    if module == "transfer":
        refused(launched(main, [module, "compare", "a", "--out", tmp_path / "o", *HALF]), "unknown flag --mean")


def test_features_of_two_normalisations_are_kept_apart(trained, here, launched, folder, tmp_path, monkeypatch):
    calls, original = [], transfer.extract
    monkeypatch.setattr(transfer, "extract", lambda *a, **k: calls.append(dict(images.PIXELS)) or original(*a, **k))
    flags = ["transfer", "features", "--weights", trained(here) / "last.pt", "--img-size", 32, "--workers", 0,
             "--device", "cpu", "--seeds", 1, "--sets", folder, "--out", tmp_path / "r.json"]  # fmt: skip
    imagenet = [word for name, value in images.IMAGENET.items() for word in (f"--{name}", *value)]
    for more, own, count in (([], OWN, 2), (HALF, OWN, 2), (imagenet, {}, 4)):
        assert launched(transfer.main, [*flags, *more]).status == 0
        found = json.loads((tmp_path / "r.json").read_text())
        assert len(calls) == count and calls[-1] == own
        assert {k: tuple(found[k]) for k in images.IMAGENET if k in found} == own


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_dense_training_takes_them_from_its_trunk(launched, tmp_path, task):
    script = "patchconvnet"
    model = __import__(script).build_model(NANO[script], 5, 32)
    dense.checkpoint.save({
        "model": model.state_dict(), "method": script, "model_name": NANO[script], "recipe": {"img_size": (32, 32)},
        "data": {"classes": list("abcde"), **OWN},
    }, tmp_path / "trunk.pt")  # fmt: skip
    flags = "--epochs 1 --epoch-steps 1 --warmup-steps 0 --workers 0 --device cpu --batch-size 2 --width 8".split()
    flags += ("--img-size 32 --short 32 --test-size 32" if task == "segment" else "--short 64 --test-size 64").split()
    flags += ["--weights", tmp_path / "trunk.pt", "--out", tmp_path / "o"]
    with fewer_shapes(24, 4):
        result = launched(dense.main, ["dense", task, *flags])
    assert result.status == 0 and "validation images, mean (0.5, 0.5, 0.5)" in result.out, result
    assert images.pixels_of(load(tmp_path / "o/last.pt")) == OWN
    if task == "detect":
        built = dense.build_detector(f"{script}/{NANO[script]}", classes=3)
        assert tuple(built.transform.image_mean) == OWN["mean"] and tuple(built.transform.image_std) == OWN["std"]


def test_studies_refuse_a_network_with_its_own(trained, here, launched, folder, tmp_path):
    import studies

    command = ["studies.py", "tsne", trained(here) / "last.pt", "--data", folder, "--out", tmp_path / "o.json"]
    refused(launched(studies.main, command), "mean and deviation of its own")
