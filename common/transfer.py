"""The transfer suite: how good a trained network's features are on other data sets.

    python -m common.transfer features --weights runs/trex/last.pt --root /data --out results/trex.json
    python -m common.transfer features --model torchvision/resnet50 --root /data --sets trex --out results/r50.json
    python -m common.transfer finetuned flowers102=runs/a cars=runs/b --top1 83.1 --out results/vit_b_finetuned.json
    python -m common.transfer compare results/*.json --out results/compare

features: a linear and a kNN classifier and retrieval on frozen features. finetuned: the same table of runs by `--recipe
transfer`. compare: do networks better where they were trained transfer better (Kornblith et al., arXiv:1805.08974)?

The protocol is t-ReX's (arXiv:2206.15369), whatever a network was trained with: images of 224 pixels, bicubic, without
margin; logistic regression on features as they are, on ImageNet, ImageNet-CoG and iNaturalist by SGD on L2-normalised
ones; the cost is the best in top-1 on a held-out fifth of every class, then the fit is to all; the test set decides
nothing; mean over seeds; log odds, averaged over all sets but `imagenet`, the other axis of its figure (78.0, 80.2).
It draws 30 costs by Optuna, here a grid of 14 is tried, and for SGD 30 random draws from its ranges; it stops logistic
regressions at scikit-learn's tolerance or 2,000 steps, here at 200, the last fit at the optimum or 2,000; it reports
top-1, here the metric of each set's benchmark (SETS) too; EuroSAT's 810 test images per class are others."""

import argparse
import contextlib
import functools
import json
import math
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from common import checkpoint, evaluate
from common.cli import Parser, add_network_flags, check_choice, check_torchvision, converter
from common.errors import UserError, watched
from common.evaluate import extract, log_odds, logistic_regression, mean_average_precision, save_file, save_json
from common.images import PIXELS, pixels_note, use_pixels
from common.models import fingerprint, from_checkpoint, from_torchvision
from common.report import new_figure, read_log
from common.run import Run, launch
from common.sources import Source, cache_file, keep, open_data

# ---- Data sets and their features ------------------------------------------------------------------------------------

TREX = [*(f"cog{level}" for level in range(1, 6)), "aircraft", "cars", "dtd", "eurosat", "flowers102", "pets",
        "food101", "sun397"]  # of t-ReX's page
KORNBLITH = [*(s for s in TREX[5:] if s != "eurosat"), "cifar10", "cifar100", "caltech101"]  # of their 12; see README
THESIS = ["cifar10", "cifar100", "flowers102", "cars", "inat2018", "inat2019"]  # of Tables 3.7, 5.5, 6.11
SETS = dict.fromkeys([*TREX, *THESIS, *KORNBLITH, "imagenet"], "top-1")  # the benchmark's metric; whose: README
SETS |= dict.fromkeys(("aircraft", "flowers102", "pets", "caltech101"), "per-class")
SGD = {"imagenet", *TREX[:5], "inat2018", "inat2019"}  # whose linear classifier is fitted by SGD
GROUPS = {"trex": TREX, "thesis": THESIS, "kornblith": KORNBLITH, "all": [s for s in SETS if s != "imagenet"]}


def chosen_sets(names: list[str], root: str | None) -> dict[str, str]:
    """{name: what open_data takes} for names of SETS, of GROUPS, or whatever else --data takes."""
    found = {}
    for name in names:
        for one in GROUPS.get(name, [name]):
            if one in SETS and root is None:
                raise UserError(f"--sets {one}: needs --root, the folder that holds the data sets' folders")
            place = Path(root or "", one)
            found[one] = one if one not in SETS else str(place) if one == "imagenet" else f"{one}:{place}"
            if one not in SETS and one != "shapes" and ":" not in one and not os.path.exists(one):
                check_choice("--sets", one, [*GROUPS, *SETS, "shapes"])
    return found


def classifier_inputs(model: torch.nn.Module, where: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """images (B, 3, H, W) -> features (B, D) for other tasks: model.transfer_features(images) if it has that, else what
    its classifiers are given, side by side. UserError if there is none of the usual kind."""
    if hasattr(type(model), "transfer_features"):
        return model.transfer_features
    inputs, found = [], []
    for name, head in model.named_children():
        if f"{name}." in checkpoint.HEADS:
            found += [module for module in head.modules() if isinstance(module, torch.nn.Linear)][-1:]
    if not found or any(linear.out_features == 1 for linear in found):
        raise UserError(f"{where}: has no linear classifier over one feature vector per image; choose another model")
    for linear in found:
        linear.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))

    def embed(images: torch.Tensor) -> torch.Tensor:
        inputs.clear()
        model(images)
        return torch.cat(inputs, dim=1)

    return embed


def cached_features(embed, identity: str, source: Source, size, ratio: float, run: Run, title: str) -> torch.Tensor:
    """extract(), kept under a hash of the network, of the images' content() and of how they are prepared."""
    compute = functools.partial(extract, embed, source, size, ratio, run, batch_size=run.args.micro_batch or 64)
    if run.args.no_cache:
        return compute(title=title)
    key = [identity, source.content(run.args.check_bytes), tuple(size), ratio, run.amp, run.device.type]
    file = cache_file([*key, str(torchvision.__version__), *PIXELS.items()], ".npy", "features")
    with contextlib.suppress(OSError, ValueError, EOFError):  # absent, or cut short by a crash
        found = torch.from_numpy(np.load(file, allow_pickle=False))
        run.say(f"{title}: {len(source)} images, features from the cache")
        return found.to(run.device)
    found = compute(title=title)
    if problem := keep(file, lambda out: np.save(out, found.cpu().numpy())):
        run.say(f"warning: features of {title}: {problem}")
    return found


# ---- Classifiers -----------------------------------------------------------------------------------------------------

SGD_DRAWS = 30
SIGMA = 0.05  # of the kNN classifier: thesis section 2.4.3


def held_out(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (rest, a fifth of every class), at random; classes of one image stay in the rest."""
    generator, device, labels = torch.Generator().manual_seed(seed), labels.device, labels.cpu()
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        mine = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(mine), generator=generator)
        held[mine[order[: max(1, round(len(mine) / 5)) if len(mine) > 1 else 0]]] = True
    return (~held).nonzero()[:, 0].to(device), held.nonzero()[:, 0].to(device)


def accuracy(predicted: torch.Tensor, labels: torch.Tensor, metric: str) -> float:
    """ "top-1": share of right answers; "per-class": its mean over the classes that occur. In 0..1."""
    right = (predicted == labels).double()
    weights = 1 / labels.bincount()[labels].double() if metric == "per-class" else torch.ones_like(right)
    return ((right * weights).sum() / weights.sum()).item()


def predict(classifier: tuple[torch.Tensor, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    weight, bias = classifier
    return torch.cat([(part @ weight.T + bias).argmax(1) for part in features.split(65_536)])


def sgd_classifier(x, y, classes: int, lr: float, weight_decay: float, seed: int, *, epochs=100, batch=1024) -> tuple:
    """(weight (K, D), bias (K,)) by SGD with momentum 0.9 and a cosine schedule, from 0: t-ReX's numbers."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.zeros(s, device=x.device, requires_grad=True) for s in ((classes, x.shape[1]), (classes,)))
    optimizer = torch.optim.SGD([weight, bias], momentum=0.9, weight_decay=weight_decay)
    for epoch in range(epochs):
        batches = torch.randperm(len(x), generator=generator).to(x.device).split(batch)
        for i, part in enumerate(batches):
            done = (epoch + i / len(batches)) / epochs
            optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * done))
            loss = F.cross_entropy(x[part] @ weight.T + bias, y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weight.detach(), bias.detach()


def linear_classifier(x, y, classes: int, seed: int, sgd: bool) -> tuple[tuple, dict]:
    """(classifier, {"C"} or {"lr", "weight_decay"}): what is best in top-1 on a held-out fifth, refitted to all of (x,
    y). Logistic regression: tried are the decades 1e-5..1e6, then half a decade around the best; of equally good ones
    the smallest counts. SGD: SGD_DRAWS draws of learning rate in 0.1..100 and weight decay in 1e-12..1e-4."""
    (of_rest, of_held), told = ((x[part], y[part]) for part in held_out(y, seed)), ("linear classifier", "tried", print)

    @functools.cache
    def score(*tried: float) -> float:
        fit, options = (sgd_classifier, {"seed": seed}) if sgd else (logistic_regression, {"max_steps": 200})
        return accuracy(predict(fit(*of_rest, classes, *tried, **options), of_held[0]), of_held[1], "top-1")

    if sgd:
        rng = random.Random(f"sgd-{seed}")
        draws = [(10 ** rng.uniform(-1, 2), 10 ** rng.uniform(-12, -4)) for _ in range(SGD_DRAWS)]
        lr, weight_decay = max(watched(draws, *told, SGD_DRAWS), key=lambda draw: score(*draw))
        return sgd_classifier(x, y, classes, lr, weight_decay, seed), {"lr": lr, "weight_decay": weight_decay}
    decade = max(watched((10.0**e for e in range(-5, 7)), *told, 12), key=score)
    best = max((decade * 10**-0.5, decade, decade * 10**0.5), key=score)
    return logistic_regression(x, y, classes, best), {"C": best}


def knn_accuracy(train, train_labels, test, test_labels, classes: int, metric: str) -> tuple[int, float]:
    """(k, accuracy) of the kNN classifier (thesis Eq. 2.6), k chosen on the held-out fifth of the training set."""
    most, (rest, held) = max(evaluate.NEIGHBOURS), held_out(train_labels, 0)
    cosines, indices = evaluate.nearest(train[held], train[rest], most)
    answers = evaluate.knn_answers(cosines, train_labels[rest[indices]], SIGMA, classes)
    k = max(answers, key=lambda k: accuracy(answers[k], train_labels[held], metric))  # of equally good ones the first
    cosines, indices = evaluate.nearest(test, train, most)
    answers = evaluate.knn_answers(cosines, train_labels[indices], SIGMA, classes)
    return k, accuracy(answers[k], test_labels, metric)


def assess(train, train_labels, test, test_labels, classes: int, metric: str, seeds: int, sgd: bool = False) -> dict:
    """All figures of one data set from its features (N, D) and labels (N,); accuracies in percent."""
    if sgd:
        train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    answers, chosen = [], []
    for seed in watched(range(seeds), "linear classifier", "splits", print, seeds):
        classifier, values = linear_classifier(train, train_labels, classes, seed, sgd)
        answers.append(predict(classifier, test))
        chosen.append(values)
    runs, top1 = ([100 * accuracy(a, test_labels, m) for a in answers] for m in (metric, "top-1"))
    k, knn = knn_accuracy(train, train_labels, test, test_labels, classes, metric)
    return {
        "accuracy": float(np.mean(runs)), "deviation": float(np.std(runs, ddof=1)) if seeds > 1 else None, "runs": runs,
        "top1": float(np.mean(top1)), "classifier": "sgd" if sgd else "lbfgs", "chosen": chosen,
        "knn": 100 * knn, "k": k, "map": 100 * mean_average_precision(test, test_labels, train, train_labels),
    }


def summarise(result: dict) -> dict:
    """Adds each set's log odds and their means over the sets but `imagenet` (None of no others); 0 and 100% count as
    half an image right and wrong."""
    counted, missing = (result[key].keys() - {"imagenet"} for key in ("sets", "missing"))
    result["measured"], result["asked"] = len(counted), len(counted) + len(missing)
    for key, measure in (("log_odds", "accuracy"), ("log_odds_top1", "top1")):
        for row in result["sets"].values():
            half = 0.5 / row["test_images"]
            row[key] = log_odds(min(max(row[measure] / 100, half), 1 - half))
        values = [row[key] for name, row in result["sets"].items() if name in counted]
        result[f"mean_{key}"] = float(np.mean(values)) if values else None
    return result


def table(result: dict) -> str:
    """A result as text."""
    row = "{:14s} {:>9s} {:>8s} {:>6s} {:>8s} {:>8s} {:>8s} {:>8s}  {}".format

    def cell(value, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [f"{result['model']}  (top-1 where it was trained: {cell(result['pretraining_top1'])})",
             row("data set", "metric", "accuracy", "+-", "top-1", "log odds", "kNN", "mAP", "classifier")]
    for name, r in result["sets"].items():
        figures = [cell(r["accuracy"]), cell(r.get("deviation")), cell(r["top1"]), cell(r["log_odds"], 3)]
        lines += [row(name, r["metric"], *figures, cell(r.get("knn")), cell(r.get("map")), r["classifier"])]
    lines += [f"{name:14s} missing: {reason}" for name, reason in result["missing"].items()]
    own, top1 = (cell(result[key], 3) for key in ("mean_log_odds", "mean_log_odds_top1"))
    of = f"{result['measured']} of {result['asked']} data sets{', imagenet apart' * ('imagenet' in result['sets'])}"
    return "\n".join([*lines, f"mean of {of}: log odds {own} (of top-1 everywhere, as t-ReX reports: {top1})"])


def write(out: Path, content: dict, text: str) -> None:
    """Numbers as JSON, and as text beside it."""
    save_json(out, content)
    save_file(out.with_suffix(".txt"), lambda file: file.write_text(text + "\n", encoding="utf-8"))


def load_network(args, say) -> tuple[torch.nn.Module, str, float | None]:
    """(network in eval mode, its name, its top-1 where it was trained, if it is known) as asked for."""
    content = checkpoint.load(args.weights, "--weights") if args.weights else None
    use_pixels(args, content or {})
    own, where = content is not None and isinstance(content.get("method"), str), f"--weights {args.weights}"
    name = f"{content['method']}/{content['model_name']}" if own else args.model
    if args.model not in (None, name):
        raise UserError(f"{where}: holds {name}, you asked for --model {args.model}; leave it out")
    if name is None:
        raise UserError("--model: needed with weights that no script here wrote (torchvision/NAME or SCRIPT/NAME)")
    if name.startswith("torchvision/"):
        check_torchvision("--model torchvision/", name.removeprefix("torchvision/"))
        model = from_torchvision(name.removeprefix("torchvision/"), content, where, "--weights", headless=True)
    elif content is None:
        raise UserError(f"--model {name}: needs --weights")
    else:
        options = dict(name=None if own else name, ema=args.use_ema, headless=True)
        model = from_checkpoint(content, where, args.img_size, say, **options)
    measured = ((content or {}).get("record") or {}).get("val_ema_top1" if args.use_ema else "val_top1")
    return model.eval().requires_grad_(False), name, args.top1 or measured


def features(args) -> None:
    """Every data set's figures by one network's frozen features."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("features: runs as one process; start it with plain python")
    asked = chosen_sets(args.sets, args.root)
    run = Run("transfer", args, None, None)
    (model, name, top1), size, ratio = load_network(args, run.say), args.img_size, args.eval_crop_ratio
    embed, identity = classifier_inputs(model, name), fingerprint(model)
    model.to(run.device, memory_format=run.layout)
    result = {
        "model": args.name or name, "weights": args.weights, "fingerprint": identity, "img_size": list(size),
        "eval_crop_ratio": ratio, "pretraining_top1": top1, "seeds": args.seeds, "sets": {}, "missing": {},
    } | PIXELS
    run.say(f"{name} at {size[0]} x {size[1]}, crop ratio {ratio:g}{pixels_note()}; {len(asked)} data sets")
    found, missing = {}, result["missing"]
    for title, spec in asked.items():  # all are looked for before the first is computed
        try:
            if np.bincount((splits := open_data(spec, say=run.say))["train"].labels).max() < 2:
                raise UserError("has one training image per class: none can be held out to choose classifiers by")
            found[title] = splits
        except UserError as error:
            missing[title] = str(error)
            run.say(f"{title}: skipped, {error}")
    if not found:
        raise UserError(f"--sets: none of {', '.join(asked)} is there; the first: {next(iter(missing.values()))}")
    for title, splits in found.items():
        metric, inputs = SETS.get(kind := title.partition(":")[0], "top-1"), []  # also of NAME:FOLDER
        for part, source in (("train", splits["train"]), ("test", splits["val"])):
            inputs.append(cached_features(embed, identity, source, size, ratio, run, f"{title} {part}"))
            inputs.append(torch.from_numpy(source.labels).to(run.device))
        row = {"metric": metric, "train_images": len(splits["train"]), "test_images": len(splits["val"])}
        row |= assess(*inputs, len(splits["train"].classes), metric, args.seeds, sgd=kind in SGD)
        result["sets"][title] = row
        write(Path(args.out), summarise(result), table(result))  # what is done is not lost if the next one fails
        run.say(f"{title}: {metric} {row['accuracy']:.2f}, kNN {row['knn']:.2f}, mAP {row['map']:.2f}")
    run.say(table(result))


def finetuned(args) -> None:
    """The table of fine-tuned runs: of each the accuracy after its last epoch."""
    sets, missing = {}, {}
    for pair in args.runs:
        title, equals, folder = pair.partition("=")
        if not equals:
            raise UserError(f"{pair}: write DATASET=FOLDER_OF_THE_RUN")
        try:
            records = read_log(f"{folder}/log.jsonl")
            images, top1 = records[0]["val_images"], [r["val_top1"] for r in records if "val_top1" in r]
        except OSError as error:
            missing[title] = f"{folder}/log.jsonl: {error.strerror}"
        except (ValueError, LookupError, TypeError):
            missing[title] = f"{folder}/log.jsonl: not the log of a run of these scripts"
        else:
            if top1 and records[-1].get("status") == "completed":
                figures = dict(accuracy=top1[-1], top1=top1[-1], classifier="fine-tuned")
                sets[title] = {"metric": "top-1", "test_images": images, **figures}
            else:
                missing[title] = f"{folder}: its training is not complete"
    if not sets:
        raise UserError(f"none of the runs is complete; the first: {next(iter(missing.values()))}")
    head = {"model": args.name or Path(args.out).stem, "weights": None, "pretraining_top1": args.top1, "seeds": 1}
    result = summarise({**head, "sets": sets, "missing": missing})
    write(Path(args.out), result, table(result))
    print(table(result))


def read_results(files: list[str]) -> tuple[dict[str, dict], str]:
    """({name of the network, or of the file where that is taken: result}, what their top-1 is of); UserError unless
    they can be compared. If all hold `imagenet`, top-1 is its linear classifier's: the axis of t-ReX's figure."""
    results = {}
    for file in files:
        try:
            content = json.loads(Path(file).read_text())
            name, *_ = content["model"], content["sets"], content["pretraining_top1"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: holds no result of this suite ({error})") from None
        results[Path(file).stem if name in results else name] = content
    axis = "where trained"
    if all("imagenet" in r["sets"] for r in results.values()):
        axis = "on ImageNet, measured like the others"
        results = {n: r | {"pretraining_top1": r["sets"]["imagenet"]["top1"]} for n, r in results.items()}
    if names := [name for name, r in results.items() if not 0 < (r["pretraining_top1"] or 0) < 100]:
        why = "top-1 where it was trained is not known, or 0 or 100%, which has no log odds"
        raise UserError(f"{', '.join(names)}: {why}; measure again with --top1 PERCENT")
    if len(results) < 3:
        raise UserError(f"{len(results)} results: correlations need at least 3 networks")
    return results, axis


def pearson(x: np.ndarray, y: np.ndarray) -> float:  # NaN if either is constant
    return torch.corrcoef(torch.tensor(np.stack([x, y])))[0, 1].item()


def spearman(x: np.ndarray, y: np.ndarray) -> float:  # by ranks, twice and from the middle; equal values share theirs
    return pearson(*(np.sign(v[:, None] - v).sum(1) for v in (x, y)))


def compare(args) -> None:
    """Several results: adjusted log odds (Kornblith et al., section 3: a set's less the mean of all networks on it) on
    the sets that all have, correlation of their mean with the log odds of the accuracy in training, scatter plot."""
    results, axis = read_results(args.files)
    named = sorted({s for r in results.values() for s in [*r["sets"], *r["missing"]]} - {"imagenet"})
    first, *others = ([s for s in r["sets"] if s in named] for r in results.values())
    everywhere = [s for s in first if all(s in sets for sets in others)]
    if not everywhere:
        raise UserError("no data set is in all of the results")
    values = np.array([[r["sets"][s]["log_odds"] for s in everywhere] for r in results.values()])
    adjusted, (many, sets) = values - values.mean(0), values.shape  # (networks, sets)
    # The factor: to take the networks' mean away makes the spread smaller (section 3).
    errors = adjusted.std(1, ddof=1) * math.sqrt(many / (many - 1) / sets) if sets > 1 else np.full(many, None)
    networks = {
        name: {"pretraining_top1": r["pretraining_top1"], "mean_log_odds": float(v.mean()), "standard_error": error,
               "adjusted": dict(zip(everywhere, a.tolist())), "mean_adjusted": float(a.mean())}
        for (name, r), v, a, error in zip(results.items(), values, adjusted, errors.tolist())
    }
    x, y = np.array([log_odds(r["pretraining_top1"] / 100) for r in results.values()]), adjusted.mean(1)
    summary = {"networks": networks, "top1": axis, "sets": everywhere, "left_out": sorted({*named} - {*everywhere}),
               "correlation": {"mean": {f.__name__: {"value": f(x, y)} for f in (pearson, spearman)}}}
    out, text = Path(args.out), comparison_table(summary)
    write(out / "compare.json", summary, text)
    points = {name: (at, n["mean_log_odds"], n["standard_error"]) for (name, n), at in zip(networks.items(), x)}
    save_scatter(out / "compare.png", points, f"log odds of top-1 {axis}", f"mean log odds of {sets} sets")
    print(text)


def save_scatter(path: str | Path, points: dict[str, tuple], x_label: str, y_label: str) -> None:
    """PNG of named points (x, y, error in y or None); stars: the upper right of the hull, which no mixture beats."""
    if figure := new_figure(path, 6.4, 4.8, print):
        axes, best = figure.subplots(), upper_right_hull([point[:2] for point in points.values()])
        axes.set(xlabel=x_label, ylabel=y_label, title="stars: no mixture of the others is better")
        axes.grid(alpha=0.3)
        for name, (*point, error) in points.items():
            marker, size, colour = ("*", 14, "#c8551b") if tuple(point) in best else ("o", 7, "#1f5fa8")
            axes.errorbar(*point, error, fmt=marker, markersize=size, color=colour, elinewidth=1)
            axes.annotate(name, point, (6, 6), textcoords="offset points", fontsize="small", parse_math=False)
        evaluate.save_file(path, figure.savefig)


def upper_right_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the convex hull from the highest point to the rightmost one."""
    hull = [max(points, key=lambda p: (p[1], p[0]))]
    while right := [p for p in points if p[0] > hull[-1][0]]:
        x, y = hull[-1]
        hull.append(max(right, key=lambda p: ((p[1] - y) / (p[0] - x), p[0])))  # where the way falls least, and far
    return hull


def comparison_table(summary: dict) -> str:
    networks, sets = summary["networks"], summary["sets"]
    width, column = (max(low, *(len(n) + 2 for n in names)) for low, names in ((20, networks), (12, sets)))
    lines = [f"adjusted log odds; top-1 {summary['top1']}; +-: standard error of the mean over the data sets",
             f"{'network':{width}s}{'top-1':>8s}" + "".join(f"{c:>{column}s}" for c in [*sets, "mean", "+-"])]
    for name, n in sorted(networks.items(), key=lambda item: -item[1]["mean_adjusted"]):
        cells = [*n["adjusted"].values(), n["mean_adjusted"], n["standard_error"]]
        texts = (f"{'-' if c is None else f'{c:.3f}':>{column}s}" for c in cells)
        lines.append(f"{name:{width}s}{n['pretraining_top1']:8.2f}" + "".join(texts))
    lines.append("correlation of the mean with top-1, both as log odds")
    for kind, found in summary["correlation"]["mean"].items():
        lines.append(f"  {kind:{width - 2}s}{found['value']:8.3f}")
    left_out = f"; not in all results, left out: {', '.join(summary['left_out'])}" if summary["left_out"] else ""
    return "\n".join([*lines, f"{len(networks)} networks, {len(sets)} data sets{left_out}"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m common.transfer", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, required=True)
    one = commands.add_parser("features", help="linear classifier, kNN and retrieval on frozen features")
    flag, sets = one.add_argument, f"groups {', '.join(GROUPS)}; sets {', '.join(SETS)}; shapes, or what --data takes"
    flag("--model", metavar="NAME", help="torchvision/NAME, or SCRIPT/NAME for weights that do not name their model")
    flag("--weights", metavar="FILE", help="of a script, official ones, or torchvision's; default: torchvision's own")
    flag("--root", metavar="FOLDER", help="holds one folder per data set, named as in --sets")
    flag("--sets", nargs="+", default=["all"], metavar="NAME", help=f"{sets}; default: all")
    flag("--seeds", type=int, default=5, metavar="N", help="splits the cost is chosen on; default: 5")
    flag("--img-size", type=converter(tuple[int, int]), default=(224, 224), metavar="X", help="S or HxW; default: 224")
    flag("--eval-crop-ratio", type=float, default=1.0, metavar="X", help="share that the crop keeps; default: 1")
    add_network_flags(flag)
    flag("--micro-batch", type=int, metavar="N", help="images per forward pass; default: 64")
    flag("--amp", choices=("bf16", "fp16", "fp32"), default="fp32", help="precision of the network; default: fp32")
    flag("--no-cache", action="store_true", help="compute all features, and keep none")
    flag("--check-bytes", action="store_true", help="know images again by all their bytes, not by name, size and time")
    two = commands.add_parser("finetuned", help="the table of fine-tuned runs")
    two.add_argument("runs", nargs="+", metavar="DATASET=FOLDER", help="a run's output folder")
    for flag in (one.add_argument, two.add_argument):
        flag("--out", required=True, metavar="FILE", help="the result, JSON; a table beside it, .txt")
        flag("--name", metavar="TEXT", help="what tables call the network; default: the model's name")
        flag("--top1", type=float, metavar="PERCENT", help="where the network was trained (ImageNet), for compare;"
             " default: that of the checkpoint's weights, which best.pt and a whole run's last.pt hold")
    three = commands.add_parser("compare", help="adjusted log odds, correlation, scatter plot of several results")
    three.add_argument("files", nargs="+", metavar="FILE", help="results of features or finetuned")
    three.add_argument("--out", required=True, metavar="FOLDER", help="for compare.json, compare.txt and compare.png")
    args = parser.parse_args(argv)
    if args.command == "features":
        args.timeout = 600
    if args.command != "compare":
        if args.top1 is not None and not 0 < args.top1 < 100:
            raise UserError(f"--top1 {args.top1}: must lie between 0 and 100")
        if os.path.isdir(args.out) or args.out.endswith(".txt"):
            raise UserError(f"--out {args.out}: name the result's file, no folder, nor .txt: the table beside it")
    return args


def main() -> None:
    args = parse_args()
    folder = Path(args.out) if args.command == "compare" else Path(args.out).parent
    try:  # told before the work, not after it
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written ({error.strerror})") from None
    {"features": features, "finetuned": finetuned, "compare": compare}[args.command](args)


if __name__ == "__main__":
    launch(main)
