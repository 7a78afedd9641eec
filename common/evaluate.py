"""Evaluation: top-1, top-5 and loss, exact over any number of ranks; ImageNet-Real's labels; fixed features."""

import dataclasses
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common import checkpoint
from common.cli import built
from common.data import Samples, brought, eval_batches, make_loader, moved, to_device
from common.errors import RunError, UserError, one_line, watched
from common.images import IMAGENET, PIXELS, decode, eval_transform, pixels_note
from common.precision import Precision
from common.run import Run
from common.sources import EXTENSIONS, Files, Source, open_data, open_images, opening, scan_folder

NEIGHBOURS = (10, 15, 20, 25, 30)  # k of the kNN classifier is chosen among these (thesis section 2.4.3)
SCORES = 2**27  # of queries against a collection, computed at a time: half a GiB
Predict = Callable[[torch.nn.Module, torch.Tensor], dict[str, torch.Tensor]]


@functools.lru_cache  # kept on the device: making them anew would cost a synchronising copy per batch
def _mean_and_scale(device: torch.device, mean: tuple, std: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor([[255 * m for m in mean], [1 / (255 * s) for s in std]], device=device)
    return values.view(2, 1, 3, 1, 1).unbind()


def normalize(images: torch.Tensor, pixels: dict[str, tuple] = PIXELS) -> torch.Tensor:
    """(B, 3, H, W) with values 0..255 -> float32, mean and deviation removed: those in force, or others."""
    mean, scale = _mean_and_scale(images.device, **IMAGENET | pixels)
    out = torch.empty(images.shape, device=images.device)  # colour planes, as the networks read them
    chunk = len(images) if images.is_cuda else max(1, 2**18 // images[0].numel())  # what fits a core's cache
    for part, pixels in zip(out.split(chunk), images.split(chunk)):
        part.copy_(pixels).sub_(mean).mul_(scale)  # in place: three times faster than on interleaved colours
    return out


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """The inverse of normalize, for pictures."""
    mean, scale = _mean_and_scale(images.device, **IMAGENET | PIXELS)
    return images / scale + mean


def _prepared(image: torch.Tensor, _rng, size: tuple[int, int], crop_ratio: float) -> tuple[torch.Tensor, tuple]:
    return eval_transform(image, size, crop_ratio), ()


def eval_loader(source: Source, size: tuple[int, int], crop_ratio: float, batch_size: int, run: Run) -> DataLoader:
    """This rank's share of `source`, resized and centre-cropped, as uint8 batches."""
    samples = Samples(source, functools.partial(_prepared, size=size, crop_ratio=crop_ratio), 0)
    batches = eval_batches(len(source), batch_size, run.world, run.rank)
    return make_loader(samples, batches, run.workers, run.device, persistent=False)


def answers(network: Callable, source: Source, size: tuple[int, int], crop_ratio: float, batch_size: int,
            run: Run) -> Iterator[tuple]:
    """(network(normalised images), labels, indices) of eval_loader's batches, on the device. Every 8 rounds signals are
    answered by all ranks, which have as many rounds, though one may have a batch less."""
    batches = to_device(eval_loader(source, size, crop_ratio, batch_size, run), run.device)
    autocast = Precision(run.amp, run.device).autocast
    for _ in range(0, len(source), batch_size * run.world * 8):
        run.check_stop()
        for images, _, labels, indices in itertools.islice(batches, 8):
            with autocast():
                found = network(normalize(images))
            yield found, labels, indices


def logits_of(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"": model(images)}


@torch.no_grad()
def evaluate(run: Run, model: torch.nn.Module, recipe, source: Source, predict: Predict = logits_of, *,
             real: list[list[int]] | None = None, batch_size: int | None = None) -> dict[str, float]:
    """{"top1", "top5" (percent), "loss" (mean cross-entropy)} on a source, sized and cropped as the recipe says, over
    all ranks; "real" by `real`, the labels that count as right per image index (an image without any is left out).
    predict(model, images) -> {"": logits, ...}; a second head N gives "top1_N", ..."""
    training, network = model.training, functools.partial(predict, model.eval())
    sums: dict[str, torch.Tensor] = {}  # name: top-1, top-5, loss, images, Real right, Real images
    size, batch_size = recipe.img_size, batch_size or run.args.micro_batch or 64
    batches, each = answers(network, source, size, recipe.eval_crop_ratio, batch_size, run), batch_size * run.world
    for outputs, labels, indices in watched(batches, "evaluation", "images", run.say, len(source), each):
        for name, logits in outputs.items():
            logits = logits.float()
            right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            found = [right[:, 0].sum(), right.sum(), loss, torch.full((), len(labels), device=run.device)]
            if real is not None:
                first = zip(indices.tolist(), logits.argmax(1).tolist())
                hits = [(answer in real[index], len(real[index]) > 0) for index, answer in first]
                found += torch.tensor(hits, device=run.device).sum(0).unbind()
            sums[name] = sums.get(name, 0) + torch.stack([x.double() for x in found])
    model.train(training)
    of_ranks = [sums]
    if dist.is_initialized():
        of_ranks = [None] * run.world
        dist.all_gather_object(of_ranks, {name: total.cpu() for name, total in sums.items()})
    result = {}
    for name in max(of_ranks, key=len):  # a rank that had no image does not know the names
        top1, top5, loss, count, *hits = sum(s[name] for s in of_ranks if name in s).tolist()
        found = {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
        if hits:
            found["real"] = 100 * hits[0] / max(hits[1], 1)
        result |= {f"{key}_{name}" if name else key: value for key, value in found.items()}
    return result


def validate(run: Run, predict: Predict = logits_of) -> dict[str, float]:
    """The end of an epoch: val_* of evaluate() for the model, val_ema_* for its average; {} without --val-data."""
    record, data = {}, run.data
    for title, model in (("val", run.parts["model"]), ("val_ema", run.parts["ema"])):
        if data.val is not None and model is not None:
            metrics = evaluate(run, model, run.recipe, data.val, predict, batch_size=data.micro_batch)
            record |= {f"{title}_{k}": v for k, v in metrics.items()}
    return record


def trained_model(run: Run, make_model: Callable, adapt: Callable | None = None, content: dict | None = None,
                  classes: list[str] | None = None) -> tuple[torch.nn.Module, object, list[str]]:
    """(model of --weights, or last.pt of --out, in eval mode on the device; recipe as it was trained; class names).
    make_model(args, recipe, num_classes) builds it by that recipe, less flags that are given; adapt: of checkpoint.fit;
    content: the file's, if it has been read; classes: the model's, if not the checkpoint's own."""
    content, args = content or checkpoint.of_run(run), run.args
    before = {k: v for k, v in checkpoint.recipe_of(content).items() if getattr(args, k, 0) is None}
    recipe, where = dataclasses.replace(run.recipe, **before), f"--weights {args.weights}"
    if not (classes := classes or checkpoint.classes_of(content, named=True)):
        raise UserError(f"{where}: holds no classifier")
    model = built(make_model, args, recipe, len(classes))
    checkpoint.fit(model, content, where, run.say, ema=args.use_ema, adapt=adapt)
    return model.to(run.device, memory_format=run.layout).eval(), recipe, classes


def read_file(file: str, flag: str) -> torch.Tensor:
    """An image file as uint8 (3, H, W). UserError, naming `flag`, if it cannot be read."""
    try:
        return decode(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file}: {getattr(error, 'strerror', None) or one_line(error)}") from None


def label_as(source: Source, known: list[str], named: bool, where: str, say: Callable) -> None:
    """Makes the labels of `source` those of the weights' classes `known`, all of which (of --eval-data: or a part) its
    folders name or number. Of weights that do not say names (named: False) the sorted folders are the classes."""
    place = {name: label for label, name in enumerate(known)}
    numbers = not place.keys() >= set(source.classes) and all(c.isdigit() for c in source.classes)
    labels = [int(c) if numbers else place.get(c, -1) for c in source.classes]
    whole = len(labels) == len(known)
    if all(0 <= label < len(known) for label in labels) and (whole or where.startswith("--eval-data")):
        if numbers:
            say(f"{where}: class folders are numbers and taken as labels 0..{len(known) - 1}")
        if not whole:
            say(f"{where}: {len(labels)} of the {len(known)} classes, any of which may be answered")
        source.classes, source.labels = known, np.array(labels)[source.labels]
    elif named or not whole:
        hint = "" if named else "; add --data, whose folders name the classes, or name the folders by number"
        raise UserError(f"{where}: its {len(labels)} classes are not among the {len(known)} of the weights{hint}")


def evaluate_weights(run: Run, make_model: Callable, adapt: Callable | None, predict: Predict = logits_of) -> None:
    """--eval: accuracy of --weights (or last.pt of --out) on --data's validation images and --eval-data; eval.json."""
    args, content, sources, results = run.args, checkpoint.of_run(run), {}, {}
    known, named = checkpoint.classes_of(content), isinstance(content.get("data"), dict)
    talk = dict(say=lambda line: "labels follow their names" in line or run.say(line))  # label_as says how they count
    options = dict(val_data=args.val_data, coarse_labels=args.coarse_labels, splits=("val",), **talk)
    asked = [("--eval-data", path) for path in args.eval_data or []]
    for flag, path in [("--data", args.data), *asked] if args.data else asked:
        source = run.first(lambda: open_data(path, **options)["val"] if flag == "--data" else
                           open_images(path, flag, **talk))
        known = known or source.classes
        label_as(source, known, named, f"{flag} {path}", run.say)
        sources[path], known, named = source, source.classes, named or flag == "--data"
    first = next(iter(sources.values()))
    real = real_labels(args.real_labels, first) if args.real_labels else None
    model, recipe, _ = trained_model(run, make_model, adapt, content, known)
    for name, source in sources.items():
        metrics = evaluate(run, model, recipe, source, predict, real=real if source is first else None)
        (height, width), ratio = recipe.img_size, recipe.eval_crop_ratio
        results[name] = {"weights": args.weights, "images": len(source), "img_size": [height, width], **metrics}
        run.say(f"{name}: {len(source)} images at {height} x {width}, crop ratio {ratio:g}{pixels_note()}")
        for head in dict.fromkeys(k.partition("_")[2] for k in metrics):
            own = [f"{k.partition('_')[0]} {v:.5g}" for k, v in metrics.items() if k.partition("_")[2] == head]
            run.say("  ".join([head, *own] if head else own))
    if args.out and run.rank == 0:
        save_json(run.out / "eval.json", results)


@opening()
def predict_images(run: Run, make_model: Callable, adapt: Callable | None, predict: Predict = logits_of) -> None:
    """--predict: a line per image, in --out a JSON line too; RunError at the end if some could not be read."""
    args, files, records, bad = run.args, [], [], 0
    if run.world > 1:
        raise UserError("--predict: for one process; start it without torchrun")
    for path in map(Path, args.predict):
        inside = [path / os.fsdecode(row[0]) for row in scan_folder(str(path))] if path.is_dir() else [path]
        inside = sorted(p for p in inside if p == path or p.name.lower().endswith(EXTENSIONS))
        if not path.exists() or not inside:
            raise UserError(f"--predict {path}: " + ("holds no images" if path.exists() else "no such file or folder"))
        files += map(str, inside)
    model, recipe, classes = trained_model(run, make_model, adapt)
    source, autocast = Files("", files, classes, np.zeros(len(files))), Precision(run.amp, run.device).autocast
    loader = eval_loader(source, recipe.img_size, recipe.eval_crop_ratio, args.micro_batch or 64, run)
    for keys, batch in zip(loader.batch_sampler, brought(loader)):
        for part in [loader.dataset.__getitems__([key]) for key in keys] if isinstance(batch, str) else [batch]:
            if isinstance(part, str):
                bad += 1
                print(f"cannot read {part}", file=sys.stderr)
                continue
            images, _, _, indices = moved(part, run.device)
            with torch.no_grad(), autocast():
                shares = predict(model, normalize(images))[""].float().softmax(dim=1)
            shares, labels = shares.topk(min(args.top, shares.shape[1]))
            for index, *found in zip(indices.tolist(), labels.tolist(), shares.tolist()):
                found = [(classes[label], round(share, 6)) for label, share in zip(*found)]
                run.say("  ".join([source.name(index), *(f"{name} {share:.4f}" for name, share in found)]))
                records.append(json.dumps({"file": source.name(index), "classes": dict(found)}) + "\n")
    if args.out:
        save_file(run.out / "predictions.jsonl", lambda file: file.write_text("".join(records), encoding="utf-8"))
    if bad:
        raise RunError(f"--predict: {bad} of {len(source)} images could not be read")


def save_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """write(path), in a folder that is made for it. UserError if that cannot be."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or one_line(error)})") from None


def save_json(path: str | Path, content) -> None:
    save_file(path, lambda file: file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def real_labels(file: str, source: Source) -> list[list[int]]:
    """Per image of `source`, ImageNet's validation files, the labels of ImageNet-Real (arXiv:2006.07159); its real.json
    is a list in the order of the official file numbers, ILSVRC2012_val_00000001 first."""
    try:
        labels = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--real-labels {file}: {error}") from None
    found = []
    for i in range(len(source)):
        match = re.search(r"ILSVRC2012_val_(\d{8})", source.name(i))
        number = int(match[1]) - 1 if match else -1
        if not isinstance(labels, list) or not 0 <= number < len(labels):
            raise UserError(f"--real-labels {file}: no entry for {source.name(i)} by a name ILSVRC2012_val_NNNNNNNN")
        found.append(labels[number])
    return found


@torch.no_grad()
def extract(embed: Callable[[torch.Tensor], torch.Tensor], source: Source, size: tuple[int, int], crop_ratio: float,
            run: Run, *, batch_size: int = 64, title: str = "features") -> torch.Tensor:
    """embed(normalised images (B, 3, *size)) -> (B, D) of every image of `source`, in order: float32 (N, D) on all
    ranks, each of which computes a share. Whoever calls puts the network into eval mode; signals are answered."""
    if len(source) < run.world:
        raise UserError(f"{len(source)} images are too few for {run.world} ranks; start fewer")
    most, each = -(-len(source) // run.world), batch_size * run.world
    found = answers(embed, source, size, crop_ratio, batch_size, run)
    shown = watched(found, title, "images", lambda line: run.say(line), len(source), each)
    mine = torch.cat([features.float() for features, *_ in shown])
    shares = run.gather(F.pad(mine, (0, 0, 0, most - len(mine)))).view(run.world, most, -1)
    if not torch.isfinite(shares).all():
        raise RunError(f"{title}: features are not finite: a diverged network, or one that needs --amp fp32")
    return shares.transpose(0, 1).reshape(run.world * most, -1)[: len(source)]  # rank r has every world-th image


def by_blocks(action: Callable, found: list[torch.Tensor], queries: torch.Tensor, keys: torch.Tensor, rows: int,
              run: Run | None) -> list[torch.Tensor]:
    """`found`, zeros (B, ...), filled by action(cosines (b, M) of `rows` queries (B, D) with keys (M, D), their slice).
    The ranks of a run take blocks in turn: the result is the same on any number of them, to the last bit."""
    world, rank, say = (run.world, run.rank, run.say) if run else (1, 0, print)
    queries, keys, starts = F.normalize(queries, dim=1), F.normalize(keys, dim=1), range(0, len(queries), rows)
    for first in watched(starts[::world], "ranking", "queries", say, len(queries), rows * world):
        if run:
            run.check_stop()
        part = slice(first + rank * rows, first + (rank + 1) * rows)
        if len(mine := queries[part]):  # not every rank has one in the last round
            for whole, block in zip(found, action(mine @ keys.T, part)):
                whole[part] = block
    at = torch.arange(len(queries), device=queries.device)
    return [run.gather(whole[None])[at // rows % world, at] for whole in found] if run else found


@torch.no_grad()
def nearest(queries: torch.Tensor, keys: torch.Tensor, k: int, chunk: int | None = None,
            run: Run | None = None) -> tuple[torch.Tensor, ...]:
    """(cosines, indices), each (B, k), of the k nearest of keys (M, D) to queries (B, D), nearest first. Nothing needs
    to be normalised; memory is bounded by chunk x M numbers; the ranks of a `run` share the queries."""
    cosines, rows = queries.new_zeros(len(queries), min(k, len(keys))), chunk or max(1, SCORES // max(1, len(keys)))
    found = [cosines, torch.zeros_like(cosines, dtype=torch.long)]
    return tuple(by_blocks(lambda block, _: block.topk(cosines.shape[1], dim=1), found, queries, keys, rows, run))


def vote(cosines: torch.Tensor, labels: torch.Tensor, sigma: float, num_classes: int) -> torch.Tensor:
    """Class probabilities (B, C) by neighbours' cosines and labels, both (B, k), weighted exp(cos / sigma): Eq. 2.6."""
    weights = (cosines / sigma).softmax(dim=1)  # the same as exponentials over their sum, without their size
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)


def knn_answers(cosines: torch.Tensor, labels: torch.Tensor, sigma: float, num_classes: int) -> dict[int, torch.Tensor]:
    """{k: answers (B,)} of the kNN classifier for each k of NEIGHBOURS, by the nearest's cosines and labels (B, 30)."""
    parts = list(zip(cosines.split(1024), labels.split(1024)))  # votes are as wide as there are classes
    answers = {k: [vote(c[:, :k], y[:, :k], sigma, num_classes).argmax(1) for c, y in parts] for k in NEIGHBOURS}
    return {k: torch.cat(found) for k, found in answers.items()}


@torch.no_grad()
def knn_probabilities(queries: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, k: int, sigma: float,
                      num_classes: int, chunk: int | None = None) -> torch.Tensor:
    """Class probabilities (B, C) of queries (B, D) by their k nearest of keys (M, D) with labels (M,): Eq. 2.6."""
    cosines, indices = nearest(queries, keys, k, chunk)
    return vote(cosines, labels[indices], sigma, num_classes)


@torch.no_grad()
def average_precisions(queries: torch.Tensor, gallery: torch.Tensor, levels: list[tuple], rankings: list[Callable],
                       chunk: int | None = None, run: Run | None = None) -> torch.Tensor:
    """Average precisions (B, R, L), float64, exact, of queries (B, D) among the gallery (M, D) in the order of each of
    R rankings(cosines (b, M), slice of queries) -> scores (b, M), at L levels (queries' labels, gallery's labels). AP:
    mean over the relevant items (same label) of the precision at their rank; of equal scores the last rank counts, as
    in scikit-learn; NaN without a relevant item. Memory is bounded by chunk x M numbers; ranks of a `run` share."""
    by_label = [labels.argsort(stable=True) for _, labels in levels]  # one slice per class
    ends = [[torch.searchsorted(labels[by], asked, right=r).tolist() for r in (False, True)]
            for by, (asked, labels) in zip(by_label, levels)]

    def precisions(scores: torch.Tensor, query: int) -> torch.Tensor:
        relevant = [scores[by[a[query] : b[query]]].sort().values for by, (a, b) in zip(by_label, ends)]
        every = torch.cat(relevant)
        if scores.is_cuda:
            ranks = len(scores) - torch.searchsorted(scores.sort().values, every)
        else:
            ranks = torch.from_numpy(_ranks(scores.numpy(), every.numpy()))
        shares = zip(relevant, ranks.split([len(own) for own in relevant]))  # numerator: how many of these are relevant
        return torch.stack([((len(own) - torch.searchsorted(own, own)).double() / r).mean() for own, r in shares])

    def block(cosines: torch.Tensor, part: slice) -> Iterator[torch.Tensor]:
        for rank in rankings:
            yield torch.stack([precisions(row, query) for query, row in enumerate(rank(cosines, part), part.start)])

    found = [torch.zeros(len(queries), len(levels), dtype=torch.float64, device=queries.device) for _ in rankings]
    rows = chunk or min(128, max(1, SCORES // max(1, 4 * len(gallery))))
    return torch.stack(by_blocks(block, found, queries, gallery, rows, run), dim=1)


def mean_average_precision(queries: torch.Tensor, query_labels: torch.Tensor, gallery: torch.Tensor,
                           gallery_labels: torch.Tensor, chunk: int | None = None, *,
                           scores: Callable = lambda cosines, _: cosines) -> float:
    """Mean of average_precisions over the queries that have a relevant item, for one ranking and level; in 0..1."""
    found = average_precisions(queries, gallery, [(query_labels, gallery_labels)], [scores], chunk)
    return found.nanmean().nan_to_num().item()


def _ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """How many of scores (M,) are at least as high as each of `relevant`, some of them; exact."""
    ascending = np.sort(scores[scores >= relevant.min(initial=np.inf)])  # by vector instructions
    return len(ascending) - np.searchsorted(ascending, relevant)


def logistic_regression(features: torch.Tensor, labels: torch.Tensor, num_classes: int, C: float = 1.0,
                        max_steps: int = 2000, chunk: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight (K, D), bias (K,) of mean 0) at the minimum of C sum_i CE_i + ||weight||^2 / 2 for features (M, D) of K
    classes: scikit-learn's (which for two fits one vector: its optimum at C is this one's at C / 2). By L-BFGS in
    float64 until no step improves; at most chunk x K logits at a time."""
    x, decay = F.pad(features.double(), (0, 1), value=1.0), 0.5 / (C * len(features))  # mean form: of one CE's size
    both = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, device=x.device, requires_grad=True)  # bias last
    limits = dict(max_iter=max_steps, max_eval=2 * max_steps, tolerance_grad=1e-9, tolerance_change=1e-14)
    optimizer = torch.optim.LBFGS([both], **limits, history_size=20, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        total = 0.0
        for rows, answers in zip(x.split(chunk), labels.split(chunk)):
            penalty = len(rows) * decay * both[:, :-1].square().sum()
            loss = (F.cross_entropy(rows @ both.T, answers, reduction="sum") + penalty) / len(x)
            loss.backward()
            total += loss.detach()
        return total

    optimizer.step(objective)
    weight, bias = both.detach().to(features.dtype).split([features.shape[1], 1], dim=1)
    return weight, (bias - bias.mean())[:, 0]


def log_odds(accuracy: float) -> float:
    """log(p / (1 - p)) of an accuracy p in 0..1 (Kornblith et al.); infinite at 0 and 1. ValueError outside."""
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy {accuracy}: must lie in 0..1")
    return torch.tensor(accuracy, dtype=torch.float64).logit().item()
