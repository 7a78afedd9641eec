"""The transfer suite: how good a trained network's features are on other data sets.

    python -m common.transfer features --weights runs/trex/last.pt --root /data --out results/trex.json
    python -m common.transfer features --model torchvision/resnet50 --root /data --sets trex --out results/resnet50.json
    python -m common.transfer features --model deit3/vit_b --weights deit_3_base_224_1k.pth --root /data --out results/vit_b.json
    python -m common.transfer finetuned flowers102=runs/a cars=runs/b --top1 83.1 --out results/vit_b_finetuned.json
    python -m common.transfer compare results/*.json --out results/compare

features: on frozen features of each data set a linear classifier, a kNN classifier and retrieval. finetuned: the same
table of runs that were fine-tuned by `--recipe transfer` of a script. compare: what correlates with what (Kornblith et
al., arXiv:1805.08974, "Do Better ImageNet Models Transfer Better?").

The protocol is t-ReX's (arXiv:2206.15369): features of the training set, cost chosen on a fifth of it that is held out
class by class, then a fit to all of it, accuracy on the test set, mean over seeds; the log odds of these accuracies are
averaged over the data sets. The test set decides nothing. Where it differs: t-ReX draws 30 costs with Optuna, here a
grid is searched; its logistic regressions stop at scikit-learn's default tolerance, here at the optimum.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from common import checkpoint
from common.cli import Parser, check_choice, converter
from common.errors import UserError
from common.evaluate import NEIGHBOURS, extract, knn_answers, log_odds, logistic_regression, mean_average_precision, nearest
from common.models import classifier_inputs, fingerprint, from_checkpoint, from_official, from_torchvision
from common.precision import check_amp
from common.report import save_json, save_scatter
from common.run import Run, launch
from common.sources import Source, cache_folder, no_cache, open_data

# ---- Data sets -------------------------------------------------------------------------------------------------------

COG, KORNBLITH, THESIS_TOP1 = "arXiv:2012.05649", "arXiv:1805.08974, Table 1", "thesis Table 2.9"
SETS = {  # name: (metric, where that is the benchmark's metric)
    **{f"cog{level}": ("top-1", COG) for level in range(1, 6)},
    "aircraft": ("per-class", KORNBLITH),
    "cars": ("top-1", KORNBLITH),
    "dtd": ("top-1", KORNBLITH),
    "eurosat": ("top-1", "arXiv:1709.00029"),
    "flowers102": ("per-class", KORNBLITH),
    "pets": ("per-class", KORNBLITH),
    "food101": ("top-1", KORNBLITH),
    "sun397": ("top-1", KORNBLITH),
    "cifar10": ("top-1", KORNBLITH),
    "cifar100": ("top-1", KORNBLITH),
    "inat2018": ("top-1", THESIS_TOP1),
    "inat2019": ("top-1", THESIS_TOP1),
}
GROUPS = {
    "trex": list(SETS)[:13],  # of t-ReX's page
    "thesis": ["cifar10", "cifar100", "flowers102", "cars", "inat2018", "inat2019"],  # of Tables 3.7, 5.5, 6.11
    "all": list(SETS),
}


def chosen_sets(names: list[str], root: str | None) -> dict[str, str]:
    """{name: what open_data takes} for names of SETS, of GROUPS, or whatever else --data takes."""
    found = {}
    for name in names:
        for one in GROUPS.get(name, [name]):
            if one in SETS and root is None:
                raise UserError(f"--sets {one}: needs --root, the folder that holds the data sets' folders")
            found[one] = f"{one}:{Path(root) / one}" if one in SETS else one
            if one not in SETS and one != "shapes" and ":" not in one and not Path(one).exists():
                check_choice("--sets", one, [*GROUPS, *SETS, "shapes"])
    return found


# ---- Features --------------------------------------------------------------------------------------------------------


def cached_features(
    embed: Callable, identity: str, source: Source, size: tuple[int, int], crop_ratio: float, run: Run, title: str
) -> torch.Tensor:
    """extract(), kept under a hash of the network, of the images' bytes and of how they are prepared."""
    key = [identity, source.content(), tuple(size), crop_ratio, run.amp, run.device.type, str(torchvision.__version__)]
    folder = cache_folder() / "features"
    file = folder / (hashlib.sha256(repr(key).encode()).hexdigest()[:32] + ".npy")
    try:
        found = torch.from_numpy(np.load(file, allow_pickle=False))
        if len(found) == len(source):
            run.say(f"{title}: {len(source)} images, features from the cache")
            return found.to(run.device)
    except (OSError, ValueError, EOFError):  # absent, or cut short by a crash
        pass
    found = extract(embed, source, size, crop_ratio, run, batch_size=run.args.micro_batch or 64, title=title)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as out:
            np.save(out, found.cpu().numpy())
        os.replace(out.name, file)
    except OSError as error:
        run.say(f"warning: features of {title}: {no_cache(folder, error)}")
    return found


# ---- Classifiers -----------------------------------------------------------------------------------------------------

SGD_ABOVE = 2**28  # numbers in the training features, from which on the linear classifier is fitted by SGD
COSTS = [10.0**e for e in range(-5, 7)]  # then half a decade around the best
SGD_DRAWS = 30
SIGMA = 0.05  # of the kNN classifier: thesis section 2.4.3

Linear = tuple[torch.Tensor, torch.Tensor]


def held_out(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (rest, a fifth of every class), at random; classes of one image stay in the rest."""
    generator = torch.Generator().manual_seed(seed)
    validation = []
    for label in labels.unique().tolist():
        mine = (labels == label).nonzero()[:, 0]
        mine = mine[torch.randperm(len(mine), generator=generator)]
        validation.append(mine[: max(1, round(len(mine) / 5)) if len(mine) > 1 else 0])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(validation)] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def accuracy(predicted: torch.Tensor, labels: torch.Tensor, metric: str) -> float:
    """ "top-1": share of right answers; "per-class": its mean over the classes that occur. In 0..1."""
    right = (predicted == labels).double()
    if metric == "top-1":
        return right.mean().item()
    counts = labels.bincount()
    per_class = right.new_zeros(len(counts)).index_add_(0, labels, right) / counts
    return per_class[counts > 0].mean().item()


def predict(classifier: Linear, features: torch.Tensor) -> torch.Tensor:
    weight, bias = classifier
    return torch.cat([(part @ weight.T + bias).argmax(1) for part in features.split(65_536)])


def fit_logistic(
    x: torch.Tensor, y: torch.Tensor, rest: torch.Tensor, held: torch.Tensor, classes: int, metric: str
) -> tuple[Linear, dict]:
    """(classifier, {"C"}): logistic regression with the cost that is best on the images `held`, refitted to all of (x,
    y).

    Costs rise by decades until three in a row are worse than the best, then its neighbours half a decade away are
    tried; the smallest of equally good ones counts.
    """
    scores: dict[float, float] = {}

    def score(cost: float) -> float:
        classifier = logistic_regression(x[rest], y[rest], classes, cost, max_steps=200)
        scores[cost] = accuracy(predict(classifier, x[held]), y[held], metric)
        return scores[cost]

    worse, top = 0, -1.0
    for cost in COSTS:
        worse = 0 if score(cost) >= top else worse + 1
        top = max(top, scores[cost])
        if worse == 3:
            break
    best = min(scores, key=lambda c: (-scores[c], c))
    for cost in (best * 10**-0.5, best * 10**0.5):
        score(cost)
    best = min(scores, key=lambda c: (-scores[c], c))
    return logistic_regression(x, y, classes, best), {"C": best}


def sgd_classifier(
    x: torch.Tensor, y: torch.Tensor, classes: int, lr: float, weight_decay: float, seed: int, *, epochs: int = 100, batch: int = 1024
) -> Linear:
    """Softmax classifier by SGD with momentum 0.9 and a cosine schedule, from 0: (weight (K, D), bias (K,)). t-ReX's
    numbers."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.zeros(s, device=x.device, requires_grad=True) for s in ((classes, x.shape[1]), (classes,)))
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9, weight_decay=weight_decay)
    steps = -(-len(x) // batch)
    for step in range(epochs * steps):
        if step % steps == 0:
            order = torch.randperm(len(x), generator=generator).to(x.device)
        part = order[step % steps * batch : (step % steps + 1) * batch]
        optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / (epochs * steps)))
        loss = F.cross_entropy(x[part] @ weight.T + bias, y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def fit_sgd(x, y, rest, held, classes: int, metric: str, seed: int) -> tuple[Linear, dict]:
    """(classifier, {"lr", "weight_decay"}): the same by SGD on L2-normalised features, for data too large for L-BFGS;
    the best of 30 draws of learning rate in 0.1..100 and weight decay in 1e-12..1e-4."""
    rng = random.Random(f"sgd-{seed}")
    draws = [(10 ** rng.uniform(-1, 2), 10 ** rng.uniform(-12, -4)) for _ in range(SGD_DRAWS)]
    scores = [accuracy(predict(sgd_classifier(x[rest], y[rest], classes, *draw, seed), x[held]), y[held], metric) for draw in draws]
    lr, weight_decay = draws[scores.index(max(scores))]
    return sgd_classifier(x, y, classes, lr, weight_decay, seed), {"lr": lr, "weight_decay": weight_decay}


def knn_accuracy(train, train_labels, test, test_labels, classes: int, metric: str) -> dict:
    """{"k", "accuracy"} of the kNN classifier (thesis Eq. 2.6), k chosen on the held-out fifth of the training set."""

    def answers(queries, keys, labels) -> dict[int, torch.Tensor]:
        cosines, indices = nearest(queries, keys, max(NEIGHBOURS))
        return knn_answers(cosines, labels[indices], SIGMA, classes)

    rest, held = (i.to(train.device) for i in held_out(train_labels.cpu(), 0))
    validation = answers(train[held], train[rest], train_labels[rest])
    k = max(NEIGHBOURS, key=lambda k: (accuracy(validation[k], train_labels[held], metric), -k))
    return {"k": k, "accuracy": accuracy(answers(test, train, train_labels)[k], test_labels, metric)}


def assess(train: torch.Tensor, train_labels, test: torch.Tensor, test_labels, classes: int, metric: str, seeds: int) -> dict:
    """All figures of one data set from its features (N, D) and labels (N,); accuracies in percent."""
    large = train.numel() > SGD_ABOVE
    if large:
        train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    runs, top1, chosen = [], [], []
    for seed in tqdm(range(seeds), desc="linear classifier", leave=False, disable=not sys.stderr.isatty()):
        rest, held = (i.to(train.device) for i in held_out(train_labels.cpu(), seed))
        fit = (fit_sgd, (metric, seed)) if large else (fit_logistic, (metric,))
        classifier, values = fit[0](train, train_labels, rest, held, classes, *fit[1])
        answers = predict(classifier, test)
        runs.append(100 * accuracy(answers, test_labels, metric))
        top1.append(100 * accuracy(answers, test_labels, "top-1"))
        chosen.append(values)
    knn = knn_accuracy(train, train_labels, test, test_labels, classes, metric)
    return {
        "accuracy": float(np.mean(runs)),
        "deviation": float(np.std(runs, ddof=1)) if seeds > 1 else None,
        "runs": runs,
        "top1": float(np.mean(top1)),
        "classifier": "sgd" if large else "lbfgs",
        "chosen": chosen,
        "knn": 100 * knn["accuracy"],
        "k": knn["k"],
        "map": 100 * mean_average_precision(test, test_labels, train, train_labels),
    }


# ---- Tables ----------------------------------------------------------------------------------------------------------


def bounded_log_odds(percent: float, images: int) -> float:
    """log odds of an accuracy measured on so many images; 0 and 100% count as half an image right and wrong."""
    return log_odds(min(max(percent / 100, 0.5 / images), 1 - 0.5 / images))


def summarise(result: dict) -> dict:
    """Adds each set's log odds and, over the sets that are there, their means."""
    for row in result["sets"].values():
        row["log_odds"] = bounded_log_odds(row["accuracy"], row["test_images"])
        row["log_odds_top1"] = bounded_log_odds(row["top1"], row["test_images"])
    rows = result["sets"].values()
    result["measured"], result["asked"] = len(rows), len(rows) + len(result["missing"])
    result["mean_log_odds"] = float(np.mean([r["log_odds"] for r in rows])) if rows else None
    result["mean_log_odds_top1"] = float(np.mean([r["log_odds_top1"] for r in rows])) if rows else None
    return result


def table(result: dict) -> str:
    """A result as text."""

    def cell(value, width: int, digits: int = 2) -> str:
        return f"{'-':>{width}s}" if value is None else f"{value:{width}.{digits}f}"

    lines = [f"{result['model']}  (top-1 where it was trained: {cell(result['pretraining_top1'], 0)})"]
    lines.append(
        f"{'data set':14s} {'metric':>9s} {'accuracy':>8s} {'+-':>6s} {'top-1':>8s} {'log odds':>8s} {'kNN':>8s} {'mAP':>8s}  classifier"
    )
    for name, r in result["sets"].items():
        lines.append(
            f"{name:14s} {r['metric']:>9s} {cell(r['accuracy'], 8)} {cell(r.get('deviation'), 6)} {cell(r['top1'], 8)}"
            f" {cell(r['log_odds'], 8, 3)} {cell(r.get('knn'), 8)} {cell(r.get('map'), 8)}  {r['classifier']}"
        )
    lines += [f"{name:14s} missing: {reason}" for name, reason in result["missing"].items()]
    lines.append(
        f"mean of {result['measured']} of {result['asked']} data sets: log odds {cell(result['mean_log_odds'], 0, 3)}"
        f" (of top-1 everywhere, as t-ReX reports: {cell(result['mean_log_odds_top1'], 0, 3)})"
    )
    return "\n".join(lines)


def write(result: dict, out: Path) -> None:
    """The result as JSON, and as text beside it."""
    save_json(out, result)
    out.with_suffix(".txt").write_text(table(result) + "\n", encoding="utf-8")


# ---- Commands --------------------------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Makes the folder; UserError if nothing can be written there: told before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written ({error.strerror})") from None


def load_network(args, say) -> tuple[torch.nn.Module, str, tuple[int, int], float, float | None]:
    """(network in eval mode, its name, test resolution, crop ratio, its top-1 where it was trained) of --model and
    --weights."""
    content = checkpoint.load(args.weights, "--weights") if args.weights else None
    size, ratio, top1, where = (224, 224), 0.875, None, f"--weights {args.weights}"
    if content is not None and isinstance(content.get("method"), str):
        name = f"{content['method']}/{content['model_name']}"
        if args.model not in (None, name):
            raise UserError(f"{where}: holds {name}, you asked for --model {args.model}; leave it out")
        recipe = content["recipe"]
        size, ratio = tuple(args.img_size or recipe["img_size"]), recipe["eval_crop_ratio"]
        model = from_checkpoint(content, where, size, say, ema=args.use_ema)
        top1 = content["best"] if math.isfinite(content.get("best", math.nan)) else None
    elif args.model is None:
        raise UserError("--model: needed with weights that are no checkpoint of a script here (torchvision/NAME or SCRIPT/NAME)")
    else:
        name, size = args.model, tuple(args.img_size or size)
        kind, _, model_name = name.partition("/")
        if kind == "torchvision":
            check_choice("--model torchvision/", model_name, torchvision.models.list_models(torchvision.models))
            model = from_torchvision(model_name, content, where, "--weights", headless=True)
        elif content is None:
            raise UserError(f"--model {name}: needs --weights")
        else:
            model = from_official(kind, model_name, content, where, size, say, ema=args.use_ema)
    return model.eval().requires_grad_(False), name, size, args.eval_crop_ratio or ratio, args.top1 if args.top1 is not None else top1


def features(args) -> None:
    """Every data set's figures by one network's frozen features."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("features: runs as one process; start it with plain python")
    asked = chosen_sets(args.sets, args.root)
    run = Run("transfer", args, None, None)
    check_amp(run.amp, run.device)
    model, name, size, ratio, top1 = load_network(args, run.say)
    embed, identity = classifier_inputs(model, name), fingerprint(model)
    model.to(run.device)
    out, missing = Path(args.out), {}
    result = {"model": args.name or name, "weights": args.weights, "fingerprint": identity, "img_size": list(size), "eval_crop_ratio": ratio, "pretraining_top1": top1, "seeds": args.seeds, "sets": {}, "missing": missing}  # fmt: skip
    run.say(f"{name} at {size[0]} x {size[1]}, crop ratio {ratio:g}; {len(asked)} data sets")
    found = {}
    for title, spec in asked.items():  # all are looked for before the first is computed
        try:
            found[title] = open_data(spec, say=run.say)
        except UserError as error:
            missing[title] = str(error)
            run.say(f"{title}: skipped, {error}")
    if not found:
        raise UserError(f"--sets: none of {', '.join(asked)} is there; the first: {next(iter(missing.values()))}")
    for title, splits in found.items():
        metric, source = SETS.get(title, ("top-1", "not of a benchmark"))
        train, test = splits["train"], splits["val"]
        parts = [cached_features(embed, identity, s, size, ratio, run, f"{title} {part}") for s, part in ((train, "train"), (test, "test"))]
        labels = [torch.from_numpy(s.labels).to(run.device) for s in (train, test)]
        row = assess(parts[0], labels[0], parts[1], labels[1], len(train.classes), metric, args.seeds)
        result["sets"][title] = {"metric": metric, "metric_source": source, "train_images": len(train), "test_images": len(test), **row}
        write(summarise(result), out)  # what is done is not lost if the next one fails
        run.say(f"{title}: {metric} {row['accuracy']:.2f}, kNN {row['knn']:.2f}, mAP {row['map']:.2f}")
    run.say(table(result))


def finetuned(args) -> None:
    """The table of fine-tuned runs: of each the accuracy after its last epoch."""
    result = {
        "model": args.name or Path(args.out).stem,
        "weights": None,
        "pretraining_top1": args.top1,
        "seeds": 1,
        "sets": {},
        "missing": {},
    }
    for pair in args.runs:
        title, equals, folder = pair.partition("=")
        if not equals:
            raise UserError(f"{pair}: write DATASET=FOLDER_OF_THE_RUN")
        try:
            records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
            images = records[0]["val_images"]
        except OSError as error:
            result["missing"][title] = f"{folder}/log.jsonl: {error.strerror}"
            continue
        except (ValueError, LookupError, TypeError):
            result["missing"][title] = f"{folder}/log.jsonl: not the log of a run of these scripts"
            continue
        last = [r for r in records if "val_top1" in r]
        if not last or records[-1].get("status") != "completed":
            result["missing"][title] = f"{folder}: its training is not complete"
            continue
        top1 = last[-1]["val_top1"]
        result["sets"][title] = {"metric": "top-1", "metric_source": "log of the run", "test_images": images, "accuracy": top1, "top1": top1, "classifier": "fine-tuned"}  # fmt: skip
    if not result["sets"]:
        raise UserError(f"none of the runs is complete; the first: {next(iter(result['missing'].values()))}")
    write(summarise(result), Path(args.out))
    print(table(result))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; equal values share the mean of their ranks."""

    def ranks(v: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return pearson(ranks(x), ranks(y))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation; NaN if either is constant."""
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else math.nan


def bootstrap(statistic: Callable, x: np.ndarray, y: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """The 95% percentile interval of statistic(x, y) over resampled pairs; draws in which it is not defined do not
    count."""
    picks = np.random.default_rng(0).integers(0, len(x), (draws, len(x)))
    values = np.array([statistic(x[p], y[p]) for p in picks])
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def compare(args) -> None:
    """Several results: adjusted log odds, their correlation with the accuracy where the networks were trained, scatter
    plot.

    Adjusted (Kornblith et al., section 3): a set's log odds less the mean of all networks on it. Compared are the sets
    that all results have. Correlations are with the log odds of the top-1 accuracy (Spearman's is the same without).
    """
    results = {}
    for file in args.files:
        try:
            content = json.loads(Path(file).read_text())
            results[Path(file).stem if content["model"] in results else content["model"]] = content
            content["sets"], content["pretraining_top1"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: holds no result of this suite ({error})") from None
    lacking = [name for name, r in results.items() if r["pretraining_top1"] is None]
    if lacking:
        raise UserError(f"{', '.join(lacking)}: top-1 where it was trained is not known; measure again with --top1 PERCENT")
    extreme = [name for name, r in results.items() if not 0 < r["pretraining_top1"] < 100]
    if extreme:
        raise UserError(
            f"{', '.join(extreme)}: a top-1 of 0 or 100% where it was trained has no log odds; measure again with --top1 PERCENT"
        )
    if len(results) < 3:
        raise UserError(f"{len(results)} results: correlations need at least 3 networks")
    everywhere = [s for s in next(iter(results.values()))["sets"] if all(s in r["sets"] for r in results.values())]
    left_out = sorted({s for r in results.values() for s in [*r["sets"], *r["missing"]]} - set(everywhere))
    if not everywhere:
        raise UserError("no data set is in all of the results")
    values = np.array([[r["sets"][s]["log_odds"] for s in everywhere] for r in results.values()])  # (networks, sets)
    adjusted = values - values.mean(0)
    pretraining = np.array([log_odds(r["pretraining_top1"] / 100) for r in results.values()])

    def correlations(y: np.ndarray) -> dict:
        return {f.__name__: {"value": f(pretraining, y), "interval": bootstrap(f, pretraining, y)} for f in (pearson, spearman)}

    networks = {
        name: {
            "pretraining_top1": r["pretraining_top1"],
            "mean_log_odds": float(v.mean()),
            "adjusted": dict(zip(everywhere, a.tolist())),
            "mean_adjusted": float(a.mean()),
            "standard_error": float(a.std(ddof=1) / math.sqrt(len(a))) if len(a) > 1 else None,
        }
        for (name, r), v, a in zip(results.items(), values, adjusted)
    }
    summary = {
        "networks": networks,
        "sets": everywhere,
        "left_out": left_out,
        "correlation": {"mean": correlations(adjusted.mean(1)), **{s: correlations(values[:, i]) for i, s in enumerate(everywhere)}},
    }
    out = Path(args.out)
    save_json(out / "compare.json", summary)
    text = comparison_table(summary)
    (out / "compare.txt").write_text(text + "\n", encoding="utf-8")
    points = {name: (n["pretraining_top1"], n["mean_log_odds"]) for name, n in networks.items()}
    save_scatter(out / "compare.png", points, "top-1 where trained, %", f"mean log odds of {len(everywhere)} sets")
    print(text)


def comparison_table(summary: dict) -> str:
    width = max(20, *(len(n) + 2 for n in summary["networks"]))
    columns = [*summary["sets"], "mean"]
    lines = ["adjusted log odds", f"{'network':{width}s}{'top-1':>8s}" + "".join(f"{c:>12s}" for c in columns)]
    for name, n in sorted(summary["networks"].items(), key=lambda item: -item[1]["mean_adjusted"]):
        cells = [*n["adjusted"].values(), n["mean_adjusted"]]
        lines.append(f"{name:{width}s}{n['pretraining_top1']:8.2f}" + "".join(f"{c:12.3f}" for c in cells))
    for kind in ("pearson", "spearman"):
        lines.append(f"{kind + ', 95% interval':{width}s}")
        for title, found in summary["correlation"].items():
            low, high = found[kind]["interval"]
            lines.append(f"  {title:{width - 2}s}{found[kind]['value']:8.3f}   [{low:.3f}, {high:.3f}]")
    lines.append(f"{len(summary['networks'])} networks, {len(summary['sets'])} data sets" + (f"; not in all results, left out: {', '.join(summary['left_out'])}" if summary["left_out"] else ""))  # fmt: skip
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m common.transfer", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="features | finetuned | compare", parser_class=Parser)
    one = commands.add_parser("features", help="linear classifier, kNN and retrieval on frozen features")
    one.add_argument("--model", metavar="NAME", help="torchvision/NAME, or SCRIPT/NAME for weights that do not name their model")
    one.add_argument("--weights", metavar="FILE", help="a script's checkpoint, official weights, or a torchvision classifier's; default: torchvision's own")  # fmt: skip
    one.add_argument("--use-ema", action="store_true", help="the averaged weights of --weights")
    one.add_argument("--root", metavar="FOLDER", help="holds one folder per data set, named as in --sets")
    one.add_argument("--sets", nargs="+", default=["all"], metavar="NAME", help=f"groups {', '.join(GROUPS)}; sets {', '.join(SETS)}; shapes, or what --data takes; default: all")  # fmt: skip
    one.add_argument("--seeds", type=int, default=5, metavar="N", help="splits the cost is chosen on; default: 5")
    one.add_argument(
        "--img-size", type=converter(tuple[int, int]), metavar="X", help="test resolution, S or HxW; default: the checkpoint's, or 224"
    )
    one.add_argument(
        "--eval-crop-ratio", type=float, metavar="X", help="share of the resized image that is kept; default: the checkpoint's, or 0.875"
    )
    one.add_argument("--workers", type=int, metavar="N", help="loader processes; default: the cores, at most 16")
    one.add_argument("--micro-batch", type=int, metavar="N", help="images per forward pass; default: 64")
    one.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    one.add_argument("--amp", choices=("bf16", "fp16", "fp32"), default="fp32", help="precision of the network; default: fp32")
    two = commands.add_parser("finetuned", help="the table of fine-tuned runs")
    two.add_argument("runs", nargs="+", metavar="DATASET=FOLDER", help="a run's output folder")
    for sub in (one, two):
        sub.add_argument("--out", required=True, metavar="FILE", help="the result, JSON; a table beside it, .txt")
        sub.add_argument("--name", metavar="TEXT", help="what tables call the network; default: the model's name")
        sub.add_argument("--top1", type=float, metavar="PERCENT", help="top-1 where the network was trained (ImageNet), for compare; default: the best when the checkpoint was written, its own epoch's not yet counted")  # fmt: skip
    three = commands.add_parser("compare", help="adjusted log odds, correlations, scatter plot of several results")
    three.add_argument("files", nargs="+", metavar="FILE", help="results of features or finetuned")
    three.add_argument("--out", required=True, metavar="FOLDER", help="compare.json, compare.txt and compare.png go here")
    for sub in (one, two, three):
        sub.add_argument("--debug", action="store_true", help="show tracebacks of expected errors")
    args = parser.parse_args(argv)
    if args.command is None:
        raise UserError("say what to do: features, finetuned or compare; see --help")
    if args.command == "features":
        args.timeout = 600
        if args.seeds < 1:
            raise UserError(f"--seeds {args.seeds}: must be 1 or more")
        if args.img_size is not None and min(args.img_size) < 1:
            raise UserError(f"--img-size {args.img_size[0]}x{args.img_size[1]}: must be 1 or more")
    if args.command != "compare" and args.top1 is not None and not 0 < args.top1 < 100:
        raise UserError(f"--top1 {args.top1}: must lie between 0 and 100")
    if args.command != "compare" and Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: is a folder; name the result's file")
    return args


def main() -> None:
    args = parse_args()
    check_writable(Path(args.out) if args.command == "compare" else Path(args.out).parent)
    {"features": features, "finetuned": finetuned, "compare": compare}[args.command](args)


if __name__ == "__main__":
    launch(main)
