"""What the sources measure on finished runs, on weights and on features, a command each.

    python tests/studies.py seeds runs/resnet50_a2_* --out results/seeds.json
    python tests/studies.py disagreement torchvision/regnet_y_16gf runs/deit_b/last.pt --data /imagenet
    python tests/studies.py COMMAND --help

A NETWORK is FILE, a checkpoint of a script here; SCRIPT/MODEL=FILE, weights that do not name their model,
SCRIPT/MODEL=official, or =random, untrained; torchvision/NAME with torchvision's own weights, or torchvision/NAME=FILE.
It sees images of its recipe's size and crop ratio, unless flags say otherwise. Figures go to --out as JSON, a table to
standard output, curves to a picture beside --out (by matplotlib, if installed). T:n is line n of the thesis' text;
Kornblith: arXiv:1805.08974, by its summary.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402

from common import checkpoint, evaluate, images, report, transfer  # noqa: E402
from common.cli import Parser, built, check_choice, check_rule, check_torchvision, converter  # noqa: E402
from common.errors import RunError, UserError  # noqa: E402
from common.images import pixels_of  # noqa: E402
from common.models import fingerprint, from_checkpoint, from_torchvision  # noqa: E402
from common.precision import Precision  # noqa: E402
from common.run import Run, launch  # noqa: E402
from common.sources import Files, Source, open_data, open_images  # noqa: E402

# ---- Networks, data, results -----------------------------------------------------------------------------------------


def load_network(spec: str, run: Run, size: tuple[int, int] | None = None) -> SimpleNamespace:
    """A NETWORK in eval mode for images of `size` (None: --img-size, else its recipe's): title (as asked for), name
    (SCRIPT/MODEL), model, size, crop_ratio, epochs (of its training, or None), classes, named (whether it knows their
    names), predict(model, images) -> {head: logits} (None: it has no classifier). UserError if it cannot be had."""
    match = None if os.path.exists(spec) else re.fullmatch(r"(\w+)/(\w+)(?:=(.+))?", spec)
    script, model_name, file = match.groups() if match else (None, None, spec)
    asked, content, size = f"{script}/{model_name}", {}, size or getattr(run.args, "img_size", None)
    if file and file.partition(":")[0] == "official":
        file = checkpoint.official_address(script, file, model_name, size and min(size))
    if file == "random":
        torch.manual_seed(getattr(run.args, "seed", 0))
    elif file:
        content = checkpoint.load(file, "network")
        if (row := checkpoint.OFFICIAL.get(script, {}).get(Path(file).stem)) and "method" not in content:
            options = {"img_size": (row[1], row[1]), **dict(*row[3:])}
            content |= {"method": script, "model_name": row[0], "recipe": options}
        if not match and "method" not in content:
            raise UserError(f"{spec}: does not name its model; write SCRIPT/MODEL={spec} or torchvision/NAME={spec}")
    if pixels_of(content):
        raise UserError(f"{spec}: was trained with a mean and deviation of its own; studies give all ImageNet's")
    own = "method" in content
    name, recipe = f"{content['method']}/{content['model_name']}" if own else asked, checkpoint.recipe_of(content)
    if match and name != asked:
        raise UserError(f"{spec}: holds {name}")
    predict = evaluate.logits_of
    if name.startswith("torchvision/"):
        check_torchvision("torchvision/", model_name)
        model = from_torchvision(model_name, content or None, spec, f"{name}= and a")
    elif not file:
        raise UserError(f"{spec}: no such file; of a model of a script write {spec}=FILE, =official or =random")
    else:
        size = size or recipe.get("img_size")
        model = from_checkpoint(content, spec, size or (224, 224), run.say, name=None if own else name)
        script = importlib.import_module(name.partition("/")[0])
        recipe, predict = vars(script.Recipe()) | recipe, getattr(script, "predict", predict)
        if script.__name__ == "grafit":
            predict = script.class_logits if hasattr(model, "fc") else None
    name = re.sub(r"\w+/(?=torchvision/)", "", name)  # whichever script trained it
    model.to(run.device, memory_format=run.layout).eval().requires_grad_(False)
    ratio = getattr(run.args, "eval_crop_ratio", None) or recipe.get("eval_crop_ratio", 0.875)
    classes, named = checkpoint.classes_of(content) or [str(i) for i in range(1000)], "data" in content
    if file == "random":
        classes, predict = [], None
    return SimpleNamespace(title=spec, name=name, model=model, size=tuple(size or (224, 224)), crop_ratio=ratio,
                           epochs=recipe.get("epochs"), classes=classes, named=named, predict=predict)


def open_split(args, split: str, say: Callable) -> Source:
    options = dict(val_data=args.val_data, coarse_labels=args.coarse_labels, say=say)
    return open_data(args.data, splits=(split,), **options)[split]


def extracted(embed: Callable, net, source: Source, run: Run) -> torch.Tensor:
    """embed(images) (N, D) of all images of a source."""
    batch = run.args.micro_batch or 64
    return evaluate.extract(embed, source, net.size, net.crop_ratio, run, batch_size=batch, title=net.title)


def features(net, source: Source, run: Run) -> torch.Tensor:
    """(N, D): what the classifier is given, of Grafit and t-ReX the trunk's, as in the transfer suite."""
    net.embed = getattr(net, "embed", None) or transfer.classifier_inputs(net.model, net.title)  # it hooks once
    return extracted(net.embed, net, source, run)


def decisions(net, source: Source, run: Run) -> dict[str, torch.Tensor]:
    """{head: class numbers (N,)}, "" the network's own decision, the late fusion of two heads."""
    if net.predict is None:
        raise UserError(f"{net.title}: has no classifier, it gives embeddings")
    heads = {}

    def decide(batch: torch.Tensor) -> torch.Tensor:
        heads.update(net.predict(net.model, batch))
        return torch.stack([logits.argmax(1) for logits in heads.values()], dim=1)

    found = extracted(decide, net, source, run).long().cpu()  # whole numbers up to 2^24 are exact in float32
    return dict(zip(heads, found.T))


def table(head: list[str], rows: list[list]) -> str:
    """Text in columns; numbers with five digits, None as -."""
    cells = [[c if isinstance(c, str) else "-" if c is None else f"{c:.5g}" for c in row] for row in [head, *rows]]
    first, *others = (max(map(len, column)) for column in zip(*cells))
    return "\n".join(row[0].ljust(first) + "".join(c.rjust(w + 2) for c, w in zip(row[1:], others)) for row in cells)


def finish(args, result: dict | list, text: str) -> None:
    evaluate.save_json(args.out, result)
    print(text)


def draw(args, panels: list[tuple[str, str, list[tuple]]]) -> None:
    """The picture. A panel: (x label, y label, [(name of a curve, x, y, matplotlib's style, or bar)])."""
    file = Path(args.out).with_suffix(".png")
    if figure := report.new_figure(file, 4.4 * len(panels), 3.4, print):
        for axes, (x_label, y_label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            axes.set(xlabel=x_label, ylabel=y_label)
            for name, x, y, style in curves:
                if style == "bar":
                    axes.bar(x, y, width=x[1] - x[0], alpha=0.5)
                else:
                    axes.plot(x, y, style, label=name)
            if any(name for name, *_ in curves) and len(curves) <= 20:
                axes.legend(fontsize="small")
        evaluate.save_file(file, figure.savefig)


# ---- Runs ------------------------------------------------------------------------------------------------------------

NO_RESULTS = {"epoch", "step", "images_per_s", "waiting_for_data", "skipped_steps", "lr", "images", "k"}


def flat(content: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of nested dictionaries, by their path."""
    inside = [flat(v, f"{prefix}{k}:") for k, v in content.items() if isinstance(v, dict)]
    own = {prefix + k: v for k, v in content.items() if isinstance(v, (int, float)) and k not in NO_RESULTS}
    return own | {k: v for found in inside for k, v in found.items()}


def read_run(folder: str | Path) -> tuple[dict, dict, list[dict]]:
    """(recipe with seed, figures at the end, epochs' records) of a run's folder; UserError unless it is complete."""
    try:
        records = report.read_log(Path(folder, "log.jsonl"))
    except OSError as error:
        raise UserError(f"{folder}/log.jsonl: {error.strerror}") from None
    started = [r for r in records if r.get("status") == "started"]
    epochs = [r for r in records if "epoch" in r and "status" not in r]
    if not epochs or not started or records[-1].get("status") != "completed":
        raise UserError(f"{folder}: its training is not complete")
    files = [file for name in ("eval.json", "results.json") if (file := Path(folder, name)).exists()]
    figures = flat(epochs[-1])
    for file in files:
        figures |= flat(json.loads(file.read_text()))
    return started[-1]["recipe"] | {"seed": started[-1]["seed"]}, figures, epochs


MOMENTS = ("mean", "deviation", "min", "max")


def moments(values: list[float]) -> dict[str, float]:
    """MOMENTS of at least two numbers; the deviation is a sample's, by n - 1: the thesis does not say."""
    return dict(zip(MOMENTS, (statistics.mean(values), statistics.stdev(values), min(values), max(values))))


def early_epochs(count: int) -> list[int]:
    """Positions of Figure 6.10's epochs: 150, 250 and 290 of 300."""
    return [math.ceil(count * share) - 1 for share in (1 / 2, 5 / 6, 29 / 30)]


def seeds(args) -> None:
    """Many runs of one recipe: Figures 6.7 to 6.10, the +- of section 5.3.4 and of Tables 2.1, 2.2.

    T:2716-2869, T:2289, T:345. Of every figure of the last epoch (not of the best), of --eval's eval.json (Real, V2)
    and of Grafit's results.json: mean, deviation, extremes; Pearson's correlations of accuracies; of --metric the same
    after every epoch, and its correlation with the last one's."""
    runs = [read_run(folder) for folder in args.runs]
    recipes = [{k: v for k, v in recipe.items() if k != "seed"} for recipe, *_ in runs]
    for folder, recipe in zip(args.runs, recipes):
        if differ := [k for k, v in recipe.items() if v != recipes[0].get(k)]:
            raise UserError(f"{folder}: is of another recipe than {args.runs[0]}: {', '.join(differ)}")
    if len(runs) < 3 or len({recipe["seed"] for recipe, *_ in runs}) < len(runs):
        raise UserError(f"{len(runs)} runs: at least 3 are needed, each with a seed of its own")
    names = [k for k in runs[0][1] if all(k in figures for _, figures, _ in runs)]
    columns = {k: [figures[k] for _, figures, _ in runs] for k in names}
    extra = read_run(args.reference)[1] if args.reference else None
    summary = {k: moments(v) | ({"reference": extra.get(k)} if extra else {}) for k, v in columns.items()}
    accuracies = [k for k in names if re.search(r"(top1|real|knn|map)\w*$", k)]
    pairs = {f"{a} | {b}": transfer.pearson(columns[a], columns[b]) for a, b in itertools.combinations(accuracies, 2)}
    histories = [[r.get(args.metric) for r in records] for *_, records in runs]
    if args.metric not in columns or any(None in history for history in histories):
        raise UserError(f"--metric {args.metric}: not in every epoch of all runs; there is: {', '.join(names)}")
    end = columns[args.metric]
    epochs = [{"epoch": i + 1, **moments(v), "correlation": transfer.pearson(v, end)}
              for i, v in enumerate(map(list, zip(*histories)))]
    early = [(f"{args.metric} after epoch {at + 1}", epochs[at]) for at in early_epochs(len(epochs))]
    finish(args, {"figures": summary, "correlation": pairs, "epochs": epochs, "values": columns}, "\n\n".join([
        table([f"{len(runs)} runs", *summary[args.metric]], [[k, *row.values()] for k, row in summary.items()]),
        table(["early", *MOMENTS, "r with the end"], [[k, *list(e.values())[1:]] for k, e in early]),
        table(["correlation", "r"], [[k, v] for k, v in pairs.items() if k.startswith(f"{args.metric} |")])]))
    draw(args, panels_of_seeds(args.metric, columns, epochs, histories))


def panels_of_seeds(metric: str, columns: dict, epochs: list[dict], histories: list[list[float]]) -> list[tuple]:
    """Figures 6.8 (with a Gaussian of as many runs), 6.9, 6.10 and, for each other data set, 6.7."""
    values, numbers = columns[metric], [e["epoch"] for e in epochs]
    counts, edges = np.histogram(values, bins=max(5, round(math.sqrt(len(values)))))
    law, x = statistics.NormalDist.from_samples(values), np.linspace(edges[0], edges[-1])
    area = len(values) * (edges[1] - edges[0])
    bars = [("", (edges[1:] + edges[:-1]) / 2, counts, "bar")]
    bars += [("", x, [area * law.pdf(v) for v in x], "-")] if law.stdev else []
    band = [(key, numbers, [e[key] for e in epochs], "-") for key in ("min", "mean", "max")]
    for sign in (-1, 1):
        band.append((f"{sign:+d} deviation", numbers, [e["mean"] + sign * e["deviation"] for e in epochs], "--"))
    early = [(f"epoch {at + 1}", [h[at] for h in histories], values, ".") for at in early_epochs(len(epochs))]
    clouds = [(metric, k, [("", values, v, ".")]) for k, v in columns.items() if k.endswith(":top1")]
    return [(metric, "runs", bars), ("epoch", metric, band), ("at the epoch", "at the end", early), *clouds]


def speedup(args) -> None:
    """How many times more steps training from scratch takes to the accuracy of fine-tuning (Kornblith: 17).

    The summary does not define it. Here: steps until the end of the first epoch whose --metric has a share of the odds
    p / (1 - p) of the fine-tuned run's best epoch: all of them, and nine tenths, which the paper took as far as known.
    Null: never. Each run counts within its own schedule: give both as many steps."""
    curves = []
    for folder in (args.finetuned, args.scratch):
        curves.append([(r["step"], r[args.metric] / 100) for r in read_run(folder)[2] if args.metric in r])
        if not curves[-1]:
            raise UserError(f"--metric {args.metric}: not in the log of {folder}")
    best, rows = max(p for _, p in curves[0]), []
    for share in (0.9, 1.0):
        odds = share * best / max(1 - best, 1e-9)
        target = odds / (1 + odds)
        tuned, scratch = (next((s for s, p in curve if p >= target - 1e-9), None) for curve in curves)
        rows.append({"accuracy": 100 * target, "share_of_odds": share, "tuned_steps": tuned, "scratch_steps": scratch,
                     "ratio": scratch / tuned if scratch else None})
    finish(args, rows, table(list(rows[0]), [[f"{row['accuracy']:.2f}", *list(row.values())[1:]] for row in rows]))


def training_of(args, *own: str) -> list[str]:
    """TRAINING, a script's command line without the flags that the study gives itself."""
    if not args.training or not (ROOT / args.training[0]).is_file():
        raise UserError("TRAINING: end with the command of a script, say grafit.py --model resnet50 --recipe transfer")
    for word in args.training:
        if word.partition("=")[0] in own:
            raise UserError(f"{word}: not in TRAINING; {args.command} gives it itself, or starts anew")
    return args.training


def grid(args) -> None:
    """Kornblith's fine-tuning: learning rates x weight decays, chosen on a held-out part of the training set.

    TRAINING is a command of a script here without --data and --out, say grafit.py --model resnet50 --recipe transfer
    --weights FILE, and comes last. 20,000 steps of 256 images each. Makes OUT/data, with a fifth of every class's
    training images as val/; prints the commands of the points that are not complete: start them, and call this again.
    When all are, says the best in val_top1, and the command that trains by it on all training images (`sweep` gives its
    mean per class). The summary has no numbers; the default grid is the paper's appendix's as far as known: decays are
    shares of the weights per step, hence --weight-decay is decay / rate."""
    folder, batch = Path(args.out), args.batch or 256
    training = training_of(args, "--data", "--out")
    what = {"data": args.data, "training": training, "steps": args.steps, "batch": batch}
    if (folder / "grid.json").exists():
        held = json.loads((folder / "grid.json").read_text())
        if differ := [key for key, value in what.items() if held[key] != value]:
            raise UserError(f"--out {folder}: holds the grid of another {', '.join(differ)}; choose another folder")
    source = open_split(args, "train", print)
    parts = [part.tolist() for part in transfer.held_out(torch.from_numpy(source.labels), 0)]
    if len(parts[0]) < batch:
        raise UserError(f"--batch {batch}: is more than the {len(parts[0])} training images left")
    for split, part in zip(("train", "val"), parts):
        if not (folder / "data" / split).exists():
            write_classes(folder / "data" / split, source, part, [source.classes[source.labels[i]] for i in part])

    def command(lr: float, decay: float, data: str | Path, count: int, out: Path) -> str:
        epochs = math.ceil(args.steps / (count // batch))
        flags = f"--batch-size {batch} --epochs {epochs} --lr {lr:.4g} --min-lr 0 --weight-decay {decay / lr:.4g}"
        return shlex.join(["python", *training, "--data", str(data), *flags.split(), "--out", str(out)])

    points = []
    for lr, decay in itertools.product(args.lrs, args.decays):
        out, top1 = folder / f"lr{lr:.4g}_decay{decay:.4g}", None
        if (out / "log.jsonl").exists() and '"completed"' in (out / "log.jsonl").read_text():
            if (top1 := read_run(out)[1].get("val_top1")) is None:
                raise UserError(f"{out}: its log has no val_top1 to choose by")
        line = command(lr, decay, folder / "data", len(parts[0]), out)
        points.append({"lr": lr, "decay": decay, "val_top1": top1, "command": line})
    missing, best = [p["command"] for p in points if p["val_top1"] is None], None
    if not missing:
        best = max(points, key=lambda p: p["val_top1"])
        best = best | {"command": command(best["lr"], best["decay"], args.data, len(source), folder / "final")}
    evaluate.save_json(folder / "grid.json", what | {"points": points, "best": best})
    print(table(["lr", "decay", "val_top1"], [[f"{p['lr']:.4g}", p["decay"], p["val_top1"]] for p in points]))
    print("\n".join(missing or ["the best, on all training images:", best["command"]]))


def choices(args) -> None:
    """A ResNet with choices that make features worse (Kornblith), trained by deit3.py: no BatchNorm scale, dropout, ...

    TRAINING is deit3.py and its flags without --out, and comes last; also under torchrun. --no-scale: BatchNorm's scale
    stays 1; --dropout X before the classifier; --auxiliary X: a second classifier, over the mean of the last stage but
    one, its loss with this weight; the fourth is deit3.py's own --smoothing. Leaves in OUT the run, to be resumed and
    evaluated by this command, and network.pt, torchvision's ResNet without the second classifier, for the transfer
    suite. The summary has no numbers and no form of the second classifier; GoogLeNet's weight is 0.3."""
    import deit3

    told = training_of(args, "--out", "--weights")
    sys.argv = [*told, "--out", args.out]
    name, weight = deit3.parse_args()[0].model if told[0] == "deit3.py" else "", args.auxiliary
    if not name.startswith("torchvision/resn"):
        raise UserError("TRAINING: end with deit3.py --model torchvision/resnet50 and its flags")
    chosen = f"choices: no scale {args.no_scale}, dropout {args.dropout}, auxiliary {weight}".replace(".", "_")
    build, plain = deit3.build_model, chosen == "choices: no scale False, dropout 0_0, auxiliary 0_0"

    def second(model, inputs, logits: torch.Tensor) -> torch.Tensor:
        """Both classifiers' logits side by side in training."""
        pooled = model.layer3.__dict__.pop("kept").mean((2, 3))
        return torch.cat([logits, model.auxiliary(pooled)], dim=1) if model.training else logits

    def changed(*arguments, **options) -> torch.nn.Module:
        model = build(*arguments, **options)
        if plain or not isinstance(model, torchvision.models.ResNet):
            return model
        model.register_buffer(chosen, torch.zeros(()))  # other choices than a checkpoint's are refused by its keys
        for module in model.modules() if args.no_scale else ():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.requires_grad_(False)
        if args.dropout:
            model.fc.register_forward_pre_hook(lambda fc, inputs: F.dropout(inputs[0], args.dropout, fc.training))
        if weight:
            model.auxiliary = torch.nn.Linear(model.fc.in_features // 2, model.fc.out_features)
            model.layer3.register_forward_hook(lambda stage, _, output: stage.__dict__.update(kept=output))
            model.register_forward_hook(second)
        return model

    def joint(loss: Callable) -> Callable:
        def both(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            first, *others = logits.split(targets.shape[1], dim=1)
            return loss(first, targets) + sum(weight * loss(other, targets) for other in others)

        return both

    deit3.build_model, deit3.bce_loss = changed, joint(deit3.bce_loss)
    deit3.F = SimpleNamespace(**vars(F) | {"cross_entropy": joint(F.cross_entropy)})
    try:
        deit3.main()
    except SystemExit as end:  # also of a run that is complete already
        if end.code:
            raise
    last, file = Path(args.out, "last.pt"), Path(args.out, "network.pt")
    if last.exists() and int(os.environ.get("RANK", 0)) == 0:
        state = checkpoint.weights(checkpoint.load(str(last), "--out"))
        state = {key: value for key, value in state.items() if not key.startswith(("auxiliary.", "choices: "))}
        evaluate.save_file(file, functools.partial(torch.save, state))
        print(f"wrote {file}; its features: python -m common.transfer features --model {name} --weights {file}")


# ---- Weights ---------------------------------------------------------------------------------------------------------


def disagreement(args) -> None:
    """Table 3.4: the share of images that two classifiers decide differently, the truth one of them.

    T:1250. On the validation images of --data; of a distilled model class head, distillation head and both."""
    run = Run("studies", args, None, None)
    source, networks = open_split(args, "val", run.say), [load_network(spec, run) for spec in args.networks]
    known = next((net for net in networks if net.named), networks[0])
    for net in networks:
        if len(net.classes) != len(known.classes) or (net.named and net.classes != known.classes):
            raise UserError(f"{net.title}: its classes are not those of {known.title}")
    evaluate.label_as(source, known.classes, known.named, f"--data {args.data}", run.say)
    columns = {"truth": torch.from_numpy(source.labels)}
    for net in networks:
        found = decisions(net, source, run)
        for head in [*filter(None, found), ""]:  # both heads last
            columns[f"{net.title} {head or 'both'}" if len(found) > 1 else net.title] = found[head]
    shares = [[(a != b).double().mean().item() for b in columns.values()] for a in columns.values()]
    rows = [[f"{i + 1} {name}", *(f"{v:.3f}" for v in row)] for i, (name, row) in enumerate(zip(columns, shares))]
    finish(args, {"images": len(source), "classifiers": list(columns), "share": shares},
           table(["decided differently", *(str(i + 1) for i in range(len(columns)))], rows))


def tokens(args) -> None:
    """Cosine of a distilled DeiT's two tokens: as learned, and after every block.

    T:1192: 0.06 as learned, 0.93 at the end, averaged over images. Of a `_distilled` model that was trained without a
    teacher, whose tokens learn the same label: T:1194, 0.999. Whether 0.06 is of the tokens alone or with their
    position embeddings is not said: both are given."""
    run, found = Run("studies", args, None, None), []
    net, source = load_network(args.network, run), open_split(args, "val", run.say)
    if not net.name.startswith("deit/") or not net.model.distilled:
        raise UserError(f"{args.network}: needs a model of deit.py with two tokens, NAME_distilled")
    model, pair = net.model, torch.cat([net.model.cls_token, net.model.dist_token], dim=1)
    places = ["tokens", "with positions", *(f"block {i + 1}" for i in range(len(model.blocks))), "at the end"]
    for block in [*model.blocks, model.norm]:
        block.register_forward_hook(lambda _, __, x: found.append(x[:, :2]))

    def embed(batch: torch.Tensor) -> torch.Tensor:
        found[:] = [x.expand(len(batch), -1, -1) for x in (pair, pair + model.pos_embed[:, :2])]
        model.forward_features(batch)
        return torch.stack([F.cosine_similarity(*x.float().unbind(1)) for x in found], dim=1)

    cosines = dict(zip(places, extracted(embed, net, source, run).double().mean(0).tolist()))
    finish(args, {"network": args.network, "images": len(source), "cosine": cosines},
           table(["class and distillation token", "cosine"], [[k, f"{v:.3f}"] for k, v in cosines.items()]))


def fresh(name: str, size: tuple[int, int]) -> torch.nn.Module:
    """SCRIPT/MODEL or torchvision/NAME with random weights and 1000 classes; UserError if there is none."""
    script, _, model = name.partition("/")
    if script == "torchvision":  # which deit.py can build, too
        script, model = "deit", name
    check_choice("SCRIPT/MODEL:", script, [file.stem for file in ROOT.glob("*.py") if file.stem != "hubconf"])
    module = importlib.import_module(script)
    args, recipe, _ = module.parse_args(["--model", model, "--data", "shapes", "--img-size", "x".join(map(str, size))])
    return built(module.make_model, args, recipe, 1000)


def largest_batch(attempt: Callable[[int], object]) -> int:
    """The largest power of two, up to 16,384, that attempt(batch) does not run out of a GPU's memory with, by doubling.
    RunError if a single image is too much."""
    largest = 0
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        for batch in (2**n for n in range(15)):
            attempt(batch)
            largest = batch
    if not largest:
        raise RunError("not even one image fits into the GPU's memory")
    return largest


def throughput(args) -> None:
    """Tables 3.5, 4.1, 5.1, 5.2, 6.7: images per second, peak memory, parameters, GMACs.

    T:1324: the mean of 30 passes at the largest batch that fits, found by doubling. Table 4.1 has --batch 32 (T:1984),
    the others --batch 256 --amp fp16. Peak memory (MiB) is that of inference alone, weights and images in it. Random
    weights. The memory of a CPU is not measured: it is null, and --batch must be given."""
    from torch.utils.benchmark import Timer  # looks for a compiler when it is imported

    run, rows = Run("studies", args, None, None), []
    autocast, device = Precision(run.amp, run.device).autocast, run.device
    cuda = device.type == "cuda"
    if not cuda and not args.batch:
        raise UserError("--batch: needed on a CPU, where the largest batch that fits cannot be told")
    for name, size in itertools.product(args.models, args.sizes or [(224, 224)]):
        parameters, gmacs = report.count(lambda: fresh(name, size), size)
        model = fresh(name, size).to(device, memory_format=run.layout).eval()

        def inference(batch: int) -> Callable[[], torch.Tensor]:
            if cuda:  # what another batch took does not count
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            pixels = torch.randn(batch, 3, *size, device=device)
            return torch.no_grad()(autocast()(lambda: model(pixels)))

        batch = args.batch or largest_batch(lambda batch: inference(batch)())
        timer = Timer("step()", globals={"step": inference(batch)}, num_threads=torch.get_num_threads())
        rate = batch / timer.timeit(30).mean  # after two to warm up; waits for the GPU
        memory = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None
        rows.append({"model": name, "img_size": list(size), "batch": batch, "amp": run.amp,
                     "device": torch.cuda.get_device_name(device) if cuda else "CPU", "images_per_s": rate,
                     "peak_memory_mib": memory, "parameters": parameters, "gmacs": gmacs})
        evaluate.save_json(args.out, rows)  # what is done is kept
    finish(args, rows, table(list(rows[0]), [[str(v) if isinstance(v, list) else v for v in r.values()] for r in rows]))


def sweep(args) -> None:
    """Accuracy at every size and crop ratio, for `plot`: Figures 3.2, 3.8, 4.4, 5.4, 6.6, 6.11.

    In percent: top1, per_class (its mean per class) and with --real-labels real, on --data; on each --eval-data PATH
    with its name, top1:NAME; of a distilled model also top1_class and top1_distillation, of its heads."""
    run, rows = Run("studies", args, None, None), []
    for spec, size in itertools.product(args.networks, args.sizes or [None]):
        net = load_network(spec, run, size)
        parameters, gmacs = report.count(lambda net=net: copy.deepcopy(net.model).to("meta"), net.size)
        for ratio in args.crop_ratios or [net.crop_ratio]:
            net.crop_ratio = ratio
            row = {"network": spec, "model": net.name, "data": args.data, "img_size": list(net.size),
                   "crop_ratio": ratio, "epochs": net.epochs, "parameters": parameters, "gmacs": gmacs}
            rows.append(row | accuracies(args, net, run))
            texts = (f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
            finish(args, rows, "  ".join(texts))  # what is done is kept


def accuracies(args, net, run: Run) -> dict[str, float]:
    result = {}
    for flag, path in [("--data", args.data), *(("--eval-data", path) for path in args.eval_data or [])]:
        source = open_images(path, flag, say=run.say) if result else open_split(args, "val", run.say)
        real = evaluate.real_labels(args.real_labels, source) if args.real_labels and not result else []
        evaluate.label_as(source, net.classes, net.named, f"{flag} {path}", run.say)
        where, truth = f":{Path(path).name}" if result else "", torch.from_numpy(source.labels)
        for head, found in decisions(net, source, run).items():
            end = (f"_{head}" if head else "") + where
            for key, metric in (("top1", "top-1"), ("per_class", "per-class")):
                result[key + end] = 100 * transfer.accuracy(found, truth, metric)
            if hits := [answer in right for answer, right in zip(found.tolist(), real) if right]:
                result["real" + end] = 100 * statistics.mean(hits)
    return result


def plot(args) -> None:
    """A picture of results of `sweep` and `throughput`: Figures 3.2, 3.8, 4.4, 5.4, 6.6, 6.11.

    Any figure of theirs over another (--x and --y: img_size, crop_ratio, epochs, gmacs, top1, ...; images_per_s and
    peak_memory_mib from `throughput` for the same model and size), a curve for each value of --by. --fit: with a line
    through all points, by least squares (Figure 6.11)."""
    try:
        rows = [row for file in args.files for row in json.loads(Path(file).read_text())]
        speeds = {(r["model"], *r["img_size"]): r for r in rows if "images_per_s" in r}
        swept = [speeds.get((r["model"], *r["img_size"]), {}) | r for r in rows if "network" in r]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{', '.join(args.files)}: not results of sweep or throughput ({error})") from None
    curves, fit = {}, None
    for row in swept or speeds.values():
        point = [value[0] if isinstance(value := row.get(key), list) else value for key in (args.x, args.y)]
        if all(isinstance(value, (int, float)) for value in point):
            curves.setdefault(str(row.get(args.by, row["model"])), []).append(point)
    if not curves:
        keys = ", ".join(dict.fromkeys(key for row in rows for key in row))
        raise UserError(f"--x {args.x} --y {args.y}: in no row together; there is: {keys}")
    lines = [(name, *zip(*sorted(curve)), ".-") for name, curve in curves.items()]
    if args.fit:
        x, y = zip(*itertools.chain(*curves.values()))
        fit = np.polyfit(x, y, 1).tolist()
        lines.append((f"{fit[0]:.3g} x + {fit[1]:.3g}", ends := (min(x), max(x)), np.polyval(fit, ends), "--"))
    finish(args, {"x": args.x, "y": args.y, "curves": curves, "fit": fit},
           table([args.by, args.x, args.y], [[name, *point] for name, curve in curves.items() for point in curve]))
    draw(args, [(args.x, args.y, lines)])


# ---- Features --------------------------------------------------------------------------------------------------------


def separability(args) -> None:
    """Table 2.1: top-1 of a linear classifier that tells apart random halves of the coarse classes.

    T:325-353; 10 splits, on the training images. --data names the labels the network was trained on,
    cifar100@coarse:FOLDER. The classifier is logistic regression at cost 1: the thesis does not say. With the coarse
    class (a random network has none): P(fine) = the network's softmax of the coarse class times the linear classifier's
    within it, one reading of T:353."""
    run, plain, given = Run("studies", args, None, None), [], []
    net, source = load_network(args.network, run), open_split(args, "train", run.say)
    if net.classes:
        evaluate.label_as(source, net.classes, net.named, f"--data {args.data}", run.say)
    if net.predict:
        coarse = extracted(lambda batch: net.predict(net.model, batch)[""], net, source, run).log_softmax(1)
    x, labels = features(net, source, run), torch.from_numpy(source.labels).to(run.device)
    generator, classes = torch.Generator().manual_seed(args.seed), len(source.classes)
    for _ in range(10):
        order = torch.randperm(len(labels), generator=generator).to(run.device)
        order = order[labels[order].argsort(stable=True)]  # class by class, within it at random
        fine = 2 * labels
        fine[order] += torch.arange(len(labels), device=run.device) % 2
        weight, bias = evaluate.logistic_regression(x, fine, 2 * classes)
        logits = x @ weight.T + bias
        plain.append(100 * transfer.accuracy(logits.argmax(1), fine, "top-1"))
        if net.predict:
            inside = logits.view(len(x), classes, 2).log_softmax(2) + coarse[:, :, None]
            given.append(100 * transfer.accuracy(inside.flatten(1).argmax(1), fine, "top-1"))
    result = {"no condition": moments(plain)} | ({"coarse condition": moments(given)} if given else {})
    rows = [[name, *found.values()] for name, found in result.items()]
    finish(args, result, table(["random halves, top-1", *MOMENTS], rows))


def energy(args) -> None:
    """Figure 2.1: the share of the features' variance in the first 1, 2, ... principal components.

    T:357-364. The lower the curve, the richer the space. Which images, the thesis does not say: --split."""
    run, curves, shares = Run("studies", args, None, None), {}, (0.5, 0.8, 0.9, 0.95, 0.99)
    for spec in args.networks:
        x = features(load_network(spec, run), open_split(args, args.split, run.say), run).double()
        values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).flip(0).clamp(min=0)
        curves[spec] = (values.cumsum(0) / values.sum()).tolist()
    rows = [[spec, *(1 + sum(v < share for v in curve) for share in shares)] for spec, curve in curves.items()]
    finish(args, curves, table(["components for", *(f"{share:.0%}" for share in shares)], rows))
    draw(args, [("components", "cumulative energy", [(k, range(1, len(v) + 1), v, "-") for k, v in curves.items()])])


def tsne(args) -> None:
    """Figure 2.5: exact t-SNE of at most 2,000 images' features, a colour per class of --data.

    T:877. --within LEVEL=CLASS keeps the images of one class of another label level, family=NAME of
    inat2018@genus:FOLDER. The thesis gives no settings: scikit-learn's, from the principal components."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("tsne: needs scikit-learn: pip install scikit-learn") from None
    run = Run("studies", args, None, None)
    source, (level, _, name) = open_split(args, args.split, run.say), (args.within or "").partition("=")
    kept = np.arange(len(source))
    if args.within:
        classes, labels = source.levels.get(level, ([], None))
        if name not in classes:
            raise UserError(f"--within {args.within}: write LEVEL=CLASS, of the levels {', '.join(source.levels)}")
        kept = np.flatnonzero(labels == classes.index(name))
    kept = np.sort(np.random.default_rng(args.seed).permutation(kept)[:2000])
    if len(kept) < 4:
        raise UserError(f"tsne: {len(kept)} images are too few")
    x = features(load_network(args.network, run), source, run)[kept.tolist()].cpu().numpy()
    how = TSNE(method="exact", perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=args.seed)
    places, names = how.fit_transform(x), np.array([source.classes[label] for label in source.labels[kept]])
    points = zip(kept, names, places.tolist())
    rows = [{"image": source.name(i), "class": str(name), "place": place} for i, name, place in points]
    finish(args, {"divergence": float(how.kl_divergence_), "points": rows},
           f"{len(rows)} images of {len(set(names))} classes, divergence {how.kl_divergence_:.3f}")
    draw(args, [("", "", [(c, *places[names == c].T, ".") for c in dict.fromkeys(names)])])


def assign(x: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(distances, numbers), both (N,), of the nearest of the centres (k, D) to x (N, D), in pieces."""
    parts = [torch.cdist(part, centres).min(1) for part in x.split(max(1, evaluate.SCORES // len(centres)))]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def kmeans(x: torch.Tensor, k: int, seed: int, steps: int = 100) -> torch.Tensor:
    """Centres (k or fewer, D) of x (N, D) by Lloyd's algorithm from k of them at random, until none moves. A centre
    that is nobody's goes to one of the points that lie farthest from theirs; one that is so at the end is left out."""
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k].to(x.device)]
    for _ in range(steps):
        distances, numbers = assign(x, centres)
        counts = numbers.bincount(minlength=k)
        moved = torch.zeros_like(centres).index_add_(0, numbers, x) / counts.clamp(min=1)[:, None]
        moved[counts == 0] = x[distances.topk(int((counts == 0).sum())).indices]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres[assign(x, centres)[1].unique()]


def write_classes(folder: Path, source: Source, indices: list[int], names: list[str]) -> None:
    """folder/CLASS/NUMBER_NAME of images with new class names: links to files, copies of an archive's, else PNGs."""
    part = folder.with_name(f"{folder.name}.part")  # another name until it is whole
    shutil.rmtree(part, ignore_errors=True)
    for index, name in zip(indices, names):
        old, new = Path(source.name(index)), part / name / f"{index:08d}"
        new.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Files):
            Path(f"{new}_{old.name}").symlink_to(old.resolve())
        elif isinstance(stored := source.named(source.stored, index), bytes):
            Path(f"{new}_{old.name}").write_bytes(stored)
        else:
            images.to_pil(images.from_numpy(stored)).save(f"{new}.png")
    part.rename(folder)


def clusterfit(args) -> None:
    """ClusterFit+ (Tables 2.4, 2.5, 2.9): the training images by k-means clusters, for a network trained anew.

    T:493: a network that was trained on the labels (`grafit.py --method ce`), k-means of its features, another one
    trained from scratch on the clusters by the same procedure. --clusters: 15000 for ImageNet, 1500 for CIFAR-100; none
    given for iNaturalist. Features are the trunk's, L2-normalised, as the baseline's (T:476). Writes OUT/train/CLUSTER/
    and, by the nearest centre, OUT/val/CLUSTER/, and says how to train on them and how to judge the features."""
    run, out = Run("studies", args, None, None), Path(args.out)
    if (out / "train").exists() or (out / "val").exists():
        raise UserError(f"--out {out}: holds clusters already; choose another")
    net, sources = load_network(args.network, run), {s: open_split(args, s, run.say) for s in ("train", "val")}
    if not 2 <= args.clusters <= len(sources["train"]):
        raise UserError(f"--clusters {args.clusters}: must be 2 to {len(sources['train'])}, the training images")
    x = {split: F.normalize(features(net, source, run), dim=1) for split, source in sources.items()}
    centres = kmeans(x["train"], args.clusters, args.seed)
    for split, source in sources.items():
        names = [f"{number:06d}" for number in assign(x[split], centres)[1].tolist()]
        write_classes(out / split, source, range(len(source)), names)
    for number in range(len(centres)):  # a cluster may have no validation image
        (out / "val" / f"{number:06d}").mkdir(parents=True, exist_ok=True)
    flags = f"--img-size {'x'.join(map(str, net.size))} --eval-crop-ratio {net.crop_ratio:g}"
    train = f"grafit.py --model {net.name.rpartition('/')[2]} --method ce {flags}".split()
    judge = f"-m common.transfer features {flags}".split()
    train += ["--data", str(out), "--out", f"{out}/run"]
    judge += ["--weights", f"{out}/run/last.pt", "--sets", args.data, "--out", f"{out}.json"]
    print(f"{len(centres)} clusters of {len(x['train']) / len(centres):.1f} images; now train, and judge the features:",
          *(shlex.join(["python", *words]) for words in (train, judge)), sep="\n")


def eleven_points(scores: torch.Tensor, wanted: torch.Tensor) -> float:
    """Average precision of scores (N,) for the images that are `wanted` (N,) as VOC2007 defines it: the mean over the
    recalls 0, 0.1, ..., 1 of the best precision at that recall or a higher one. In 0..1."""
    hits = wanted[scores.argsort(descending=True, stable=True)].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1, device=hits.device)
    best = [precision[hits * 10 >= tenth * hits[-1]].max().item() for tenth in range(11)]
    return sum(best) / 11


def voc2007(args) -> None:
    """VOC2007, one more of the sets of Kornblith: 11-point mAP of linear classifiers of features.

    --data is the folder that holds VOCdevkit/VOC2007, training and test part. A classifier per class, one cost for all,
    chosen on val of those fitted on train (the decades 1e-5 to 1e6), refitted on both; images in which a class is only
    marked difficult count for neither side of it, as in the devkit. --into FILE, a result of `features` of the same
    network: takes its size and crop ratio, and adds the row to it, where both means of log odds count this mAP."""
    into, keys = {}, ("fingerprint", "sets", "missing", "img_size", "eval_crop_ratio")
    root, found = Path(args.data, "VOCdevkit/VOC2007"), {}
    if args.into:
        try:
            into = json.loads(Path(args.into).read_text())
            identity, *_, args.img_size, args.eval_crop_ratio = (into[key] for key in keys)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"--into {args.into}: no result of the suite's features ({error})") from None
    try:
        names = sorted(file.name.removesuffix("_train.txt") for file in root.glob("ImageSets/Main/*_train.txt"))
        for split in ("train", "val", "test") if names else ():
            columns = [(root / f"ImageSets/Main/{name}_{split}.txt").read_text().split() for name in names]
            files = [f"{image}.jpg" for image in columns[0][::2]]
            source = Files(root / "JPEGImages", files, ["image"], [0] * len(files))
            found[split] = source, torch.tensor([[int(mark) for mark in column[1::2]] for column in columns])
    except (OSError, ValueError) as error:
        raise UserError(f"--data {args.data}: a list of VOC2007 cannot be read ({error})") from None
    if not names:
        raise UserError(f"--data {args.data}: no VOCdevkit/VOC2007/ImageSets/Main/CLASS_train.txt in it")
    run = Run("studies", args, None, None)
    net = load_network(args.network, run)
    if into and identity != fingerprint(copy.deepcopy(net.model).cpu()):
        raise UserError(f"--into {args.into}: is a result of another network than {args.network}")
    x = {split: features(net, source, run) for split, (source, _) in found.items()}
    truth = {split: marks.to(run.device) for split, (_, marks) in found.items()}

    def mean_ap(fitted: tuple[str, ...], tested: str, cost: float) -> list[float]:
        """Of every class, in percent; marks are 1, -1 and, difficult, 0."""
        precisions, images = [], torch.cat([x[split] for split in fitted])
        for marks, test in zip(torch.cat([truth[split] for split in fitted], dim=1), truth[tested]):
            weight, bias = evaluate.logistic_regression(images[marks != 0], (marks[marks != 0] > 0).long(), 2, cost)
            scores = x[tested] @ (weight[1] - weight[0]) + bias[1] - bias[0]
            precisions.append(100 * eleven_points(scores[test != 0], test[test != 0] > 0))
        return precisions

    cost = max((10.0**e for e in range(-5, 7)), key=lambda cost: sum(mean_ap(("train",), "val", cost)))
    each = mean_ap(("train", "val"), "test", cost)
    row = {"metric": "11-point", "train_images": len(x["train"]) + len(x["val"]), "test_images": len(x["test"])}
    row |= {"accuracy": statistics.mean(each), "top1": statistics.mean(each), "classifier": "lbfgs"}
    row |= {"chosen": [{"C": cost}], "classes": dict(zip(names, each))}
    if into:
        into["sets"]["voc2007"] = row
        transfer.write(Path(args.into), transfer.summarise(into), transfer.table(into))
    finish(args, row, table(["class", "AP, %"], [*zip(names, each), ("mean", row["accuracy"])]))


# ---- The program -----------------------------------------------------------------------------------------------------

N, X, RUN = dict(type=int, metavar="N"), dict(type=float, metavar="X"), dict(metavar="RUN_FOLDER")
SIZE = dict(type=converter(tuple[int, int]), metavar="X")
FLAGS = {
    "runs": dict(nargs="+", **RUN), "finetuned": RUN, "scratch": RUN, "network": dict(metavar="NETWORK"),
    "networks": dict(nargs="+", metavar="NETWORK"), "models": dict(nargs="+", metavar="SCRIPT/MODEL"),
    "files": dict(nargs="+", metavar="FILE"), "training": dict(nargs=argparse.REMAINDER, metavar="TRAINING"),
    "--metric": dict(default="val_top1", metavar="NAME", help="a figure of log.jsonl; default: val_top1"),
    "--reference": dict(help="a run beside them, as the thesis' seed 0", **RUN),
    "--steps": dict(default=20_000, help="default: 20000", **N), "--batch": dict(help="images per step or pass", **N),
    "--lrs": dict(nargs="+", default=[10 ** (-4 + i / 2) for i in range(7)], **X),
    "--decays": dict(nargs="+", default=[0.0, *(10 ** (-6 + i / 2) for i in range(7))], **X),
    "--sizes": dict(nargs="+", help="S or HxW", **SIZE), "--crop-ratios": dict(nargs="+", **X),
    "--eval-data": dict(nargs="+", metavar="PATH"), "--real-labels": dict(metavar="FILE"),
    "--no-scale": dict(action="store_true"), "--dropout": dict(default=0.0, **X), "--auxiliary": dict(default=0.0, **X),
    "--into": dict(metavar="FILE", help="a result of the transfer suite's `features` to add the row to"),
    "--x": dict(default="gmacs", metavar="KEY"), "--y": dict(default="top1", metavar="KEY"),
    "--by": dict(default="network", metavar="KEY"), "--fit": dict(action="store_true"),
    "--split": dict(choices=("train", "val"), default="val", help="default: val"),
    "--within": dict(metavar="LEVEL=CLASS"), "--clusters": dict(required=True, **N), "--seed": dict(default=0, **N),
    "--data": dict(required=True, metavar="DATA", help="as of the scripts, like the next"),
    "--val-data": dict(metavar="PATH"), "--coarse-labels": dict(metavar="FILE"),
    "--img-size": dict(help="default: the network's", **SIZE),
    "--eval-crop-ratio": dict(help="default: the network's", **X),
    "--micro-batch": dict(help="images per forward pass; default: 64", **N), "--workers": N,
    "--device": dict(choices=("cuda", "cpu"), help="default: cuda where there is one"),
    "--amp": dict(choices=("bf16", "fp16", "fp32"), default="fp32", help="default: fp32"),
}
RULES = {"1 or more": "steps batch sizes img_size clusters", "above 0": "lrs", "0 or more": "decays auxiliary",
         "in [0, 1)": "dropout", "in (0, 1]": "crop_ratios eval_crop_ratio"}
DEVICE = " --device --amp"
IMAGES = " --data --val-data --coarse-labels --img-size --eval-crop-ratio --micro-batch --workers" + DEVICE
COMMANDS = {
    seeds: "runs --metric --reference", speedup: "finetuned scratch --metric",
    grid: "training --data --val-data --coarse-labels --steps --batch --lrs --decays",
    choices: "training --no-scale --dropout --auxiliary", voc2007: "network --into" + IMAGES,
    disagreement: "networks" + IMAGES, tokens: "network" + IMAGES,
    throughput: "models --sizes --batch" + DEVICE,
    sweep: "networks --sizes --crop-ratios --eval-data --real-labels" + IMAGES, plot: "files --x --y --by --fit",
    separability: "network --seed" + IMAGES, energy: "networks --split" + IMAGES,
    tsne: "network --split --within --seed" + IMAGES, clusterfit: "network --clusters --seed" + IMAGES,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="tests/studies.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, required=True)
    for action, names in COMMANDS.items():
        name, text = action.__name__, action.__doc__.replace("%", "%%")
        one = commands.add_parser(name, help=text.splitlines()[0], description=text)
        for flag in names.split():
            one.add_argument(flag, **FLAGS[flag])
        where = f"results/{name}" + ".json" * (action not in (grid, choices, clusterfit))
        one.add_argument("--out", default=where, metavar="PATH", help=f"default: {where}")
        one.set_defaults(action=action, timeout=600, workers=None, mean=None, std=None)
    args = parser.parse_args(argv)
    for rule, names in RULES.items():
        for name in names.split():
            value = getattr(args, name, None)
            for one in value if isinstance(value, list) else [value]:
                check_rule(name, one, rule)
    return args


def main() -> None:
    args = parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.action is not choices:
        raise UserError(f"{args.command}: runs as one process; start it with plain python")
    args.action(args)


if __name__ == "__main__":
    launch(main)
