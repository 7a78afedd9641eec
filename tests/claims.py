"""The papers' claims, checked small: do the orders that they report appear on real 32-pixel images, in small networks?

    python tests/claims.py --data-root FOLDER                # all rows, hours on two CPU cores; stop it, start it again
    python tests/claims.py --data-root FOLDER --only grafit trex
    python tests/claims.py --list                            # the rows, how far they are, their commands

FOLDER holds cifar100_subset.tar (100 classes, 100 training and 20 test images each) and cifar10_subset.tar (10 classes,
2,000 and 200), each with train/CLASS/, val/CLASS/ and coarse.json. Every run is an ordinary command of this repository
in a folder of its own below --work. A row compares figures at the end of training (not the best epoch's) of the same
seeds, all tested on the same images: the deviation is the seeds'. Settings were chosen with --tune: the same commands
on four fifths of the training images, tested on the last fifth. Results: results/claims.json, and Markdown tables on
standard output. A run that has its figures in that file already is not made again, also on another machine, unless
another run needs its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# ---- The table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """claims: lines "left > right | the paper's table, left, right | left | right", the last two runs joined by " - ",
    RUN or RUN:METRIC (without: the row's metric), or a number."""

    title: str
    metric: str  # of METRICS
    setting: str  # what differs from the paper
    claims: str

    def parsed(self) -> list[list[str]]:
        return [[cell.strip() for cell in line.split("|")] for line in self.claims.strip().splitlines()]


METRICS = {  # name: where it stands in a run's result file, or in the last epoch's record of log.jsonl
    "top1": "val_top1", "class": "val_top1_class", "distillation": "val_top1_distillation", "odds": "mean_log_odds",
    "coarse": "coarse.coarse.knn", "knn": "coarse.fine.knn", "map": "coarse.fine.map",
    "conditional": "coarse.fine.map_conditional", "oracle": "coarse.fine.map_oracle",
    "pearson": "correlation.mean.pearson.value",
    "alone": "share.1.2", "by_class": "share.1.3", "by_distillation": "share.1.4",  # 0: the truth, 1: the convnet
}
GRAFIT = "grafit.py --model regnet_nano --recipe cifar --batch-size 128 --mix-group 8"
TEN = f"{GRAFIT} --data {{data}}/ten@coarse --coarse-labels {{data}}/ten/coarse.json"
FIVE = f"{GRAFIT} --data {{data}}/five@coarse --coarse-labels {{data}}/five/coarse.json"
BETWEEN = f"{GRAFIT} --eval --data {{data}}/SET_halves@coarse --coarse-labels {{data}}/SET/coarse.json --weights"
WEAK = "--augment crop --erasing 0"  # 2 views: the least
SMALL = "--data {data}/cifar10 --batch-size 64 --mix-group 8 --warmup-epochs 2 --repeats 1 --mixup 0 --cutmix 0"
LIGHT = f"{SMALL} --img-size 32 --epochs 15 --augment none"
DEIT = f"deit.py {LIGHT} --lr 1e-3 --erasing 0 --drop-path 0 --eval-crop-ratio 1 --model"
CAIT = f"cait.py {SMALL} --img-size 32 --augment none --lr 1e-3 --erasing 0 --drop-path 0 --model"
RESMLP = f"resmlp.py --model resmlp_nano {LIGHT} --lr 2e-2 --erasing 0 --drop-path 0 --eval-crop-ratio 1"
PATCH = f"patchconvnet.py --model patchconvnet_nano {LIGHT} --lr 2e-2"
DEIT3 = f"deit3.py --model vit_nano {SMALL}"
TREX = "trex.py --model resnet_nano --data {data}/half --img-size 32 --batch-size 64 --epochs 15 --warmup-epochs 2"
TREX += " --eval-crop-ratio 1"
CROPS = "--local-crops 2 --local-size 20"
OF_CONVNET = "--teacher-weights {runs}/convnet/0/last.pt"
OF_LOW = "--weights {runs}/deit3_low/{seed}/last.pt"
FEATURES = "-m common.transfer features --seeds 1 --img-size 32"

COMMANDS = {  # *_fit: of half of the training images, the nearest among the other half
    "ce": f"{TEN} --epochs 40 --method ce",
    "snca": f"{TEN} --epochs 40 --method snca --proj-dim 128",
    "grafit": f"{TEN} --epochs 40 --method grafit --proj-dim 128 --views 4",
    "ce_instance": f"{TEN} --epochs 40 --method ce_instance --proj-dim 128 --views 4",
    "instance": f"{TEN} --epochs 40 --method instance --proj-dim 128 --views 4",
    "instance_weak": f"{TEN} --epochs 40 --method instance --proj-dim 128 --views 2 {WEAK}",
    "random": f"{TEN} --epochs 1 --method ce --warmup-epochs 0 --lr 1e-9",
    "ce_fit": BETWEEN.replace("SET", "ten") + " {runs}/ce/{seed}/last.pt",
    "grafit_fit": BETWEEN.replace("SET", "ten") + " {runs}/grafit/{seed}/last.pt",
    "convnet": f"{PATCH} --pooling average",
    "deit": f"{DEIT} deit_nano",
    "deit_soft": f"{DEIT} deit_nano --distillation soft {OF_CONVNET}",
    "deit_hard": f"{DEIT} deit_nano --distillation hard {OF_CONVNET}",
    "deit_token": f"{DEIT} deit_nano_distilled {OF_CONVNET}",
    "deit_of_deit": f"{DEIT} deit_nano_distilled --teacher-weights {{runs}}/deit/0/last.pt",
    "agreement": "tests/studies.py disagreement {runs}/convnet/0/last.pt {runs}/deit/{seed}/last.pt "
        "{runs}/deit_token/{seed}/last.pt --data {data}/cifar10",
    "deep": f"{CAIT} cait_xxs24 --epochs 5",
    "deep_plain": f"{CAIT} cait_xxs24 --epochs 5 --branches none",
    "cait_plain": f"{CAIT} cait_nano --epochs 15 --branches none",
    "resmlp": RESMLP,
    "resmlp_none": f"{RESMLP} --communication none",
    "resmlp_hard": f"{RESMLP} --distillation hard {OF_CONVNET}",
    "patchconvnet": PATCH,
    "patchconvnet_linear": f"{PATCH} --stem linear",
    "deit3": f"{DEIT3} --img-size 32 --epochs 20 --lr 2e-2",
    "deit3_rand": f"{DEIT3} --img-size 32 --epochs 20 --lr 2e-2 --augment rand",
    "deit3_ce": f"{DEIT3} --img-size 32 --epochs 20 --lr 2e-2 --loss ce",
    "deit3_low": f"{DEIT3} --img-size 24 --epochs 20 --lr 2e-2",
    "deit3_low_full": f"{DEIT3} --img-size 32 --epochs 3 --recipe finetune --lr 1e-4 {OF_LOW}",
    "plain": f"{TREX} --recipe trex_plain --local-crops 0 --hidden-layers 0",
    "plain_projector": f"{TREX} --recipe trex_plain --local-crops 0 --hidden-layers 1",
    "plain_crops": f"{TREX} --recipe trex_plain {CROPS} --hidden-layers 0",
    "trex": f"{TREX} {CROPS} --hidden-layers 1 --memory-size 2048",
    "five_ce": f"{FIVE} --epochs 300 --method ce {WEAK}",
    "five_snca": f"{FIVE} --epochs 300 --method snca --proj-dim 128 {WEAK}",
    "five_grafit": f"{FIVE} --epochs 300 --method grafit --proj-dim 128 --views 2 {WEAK}",
    "five_fit": BETWEEN.replace("SET", "five") + " {runs}/five_ce/{seed}/last.pt",
}
TRAINED_ON_HALF = ("plain", "plain_projector", "plain_crops", "trex")
TRAINED_ON_TEN = ("convnet", "patchconvnet", "patchconvnet_linear", "deit", "deit_token", "resmlp", "resmlp_none")
TRAINED_ON_TEN += ("deit3", "deit3_rand")
for name in TRAINED_ON_HALF + TRAINED_ON_TEN:
    sets = "{data}/other_half shapes" if name in TRAINED_ON_HALF else "{data}/half"
    COMMANDS[f"{name}_features"] = f"{FEATURES} --name {name} --weights {{runs}}/{name}/{{seed}}/last.pt --sets {sets}"
results = " ".join(f"{{runs}}/{name}_features/{{seed}}/features.json" for name in TRAINED_ON_TEN)
COMMANDS["correlation"] = f"-m common.transfer compare {results}"

ROWS = {
    "patchconvnet": Row("PatchConvNet, top-1", "top1",
        "CIFAR-10 (20,000 training, 2,000 test images, 32 pixels); 4 blocks of width 64 (0.18 M parameters), "
        "patches of 8 pixels; 15 epochs for 400, batch 64 for 2048, LAMB at 2e-2; crop and flip alone", """
        attention > average pooling | Table 5.7: 82.1, 81.9 | patchconvnet | convnet
        convolutional > linear stem | 82.1, 80.0 | patchconvnet | patchconvnet_linear"""),
    "distillation": Row("DeiT, top-1", "top1",
        "data and epochs as above; 3 blocks of width 96 (0.45 M parameters), AdamW at 1e-3, no stochastic depth; "
        "teachers trained here: the PatchConvNet with average pooling, a DeiT", """
        token, hard > labels alone | Table 3.3, Ti: 74.5, 72.2 | deit_token | deit
        hard > soft, without token | 74.3, 72.2 | deit_hard | deit_soft
        token > no token, hard | 74.5, 74.3 | deit_token | deit_hard
        distillation > class head | 74.6, 73.9 | deit_token:distillation | deit_token:class
        convnet > DeiT as teacher | Table 3.2, B: 82.7, 81.9 | deit_token | deit_of_deit
        (the teachers: convnet > DeiT) | 81.7, 81.8 | convnet | deit"""),
    "agreement": Row("DeiT, share of the test images decided differently than by the convnet that teaches", "alone",
        "the runs above, at the end of training", """
        labels alone > class head | Table 3.4, B: 0.133, 0.112 | agreement | agreement:by_class
        labels alone > distillation head | 0.133, 0.100 | agreement | agreement:by_distillation"""),
    "resmlp": Row("ResMLP, top-1", "top1",
        "data and epochs as above; 4 layers of width 96 (0.42 M parameters), LAMB at 2e-2", """
        distilled > labels alone | Table 4.3, S12: 77.8, 76.6 | resmlp_hard | resmlp
        gain > DeiT's (no token) | S12: 1.2; Ti: 2.1 | resmlp_hard - resmlp | deit_hard - deit
        linear across patches > none | 76.6, 56.5 | resmlp | resmlp_none"""),
    "grafit": Row("Grafit: fine classes from coarse labels", "knn",
        "CIFAR-10 (500 training and 200 test images of each class; trained on animal and vehicle) for CIFAR-100; "
        "RegNet of 0.24 M parameters for a ResNet-50; 40 epochs for 600, batch 128 for 1024; 4 views for 8; "
        "projection to 128 for 256", """
        coarse labels are learnt, CE: above 90% |  | ce_fit:coarse | 90
        the same, Grafit |  | grafit_fit:coarse | 90
        Grafit > CE, fine kNN | Table 2.7: 77.7, 71.8 | grafit | ce
        Grafit > CE, fine mAP | 52.9, 42.5 | grafit:map | ce:map
        Grafit > SNCA+, fine kNN | 77.7, 72.2 | grafit | snca
        Grafit > SNCA+, fine mAP | 52.9, 35.9 | grafit:map | snca:map
        CE + instance > CE, fine kNN | 76.9, 71.8 | ce_instance | ce
        CE + instance > CE, fine mAP | 51.0, 42.5 | ce_instance:map | ce:map
        instance > untrained network, fine kNN | 54.3, ? | instance | random
        instance: this > crop and flip, 2 views |  | instance | instance_weak"""),
    "conditional": Row("Grafit: ranking conditioned on the coarse class (Eq. 2.5), fine mAP", "map",
        "the runs above", """
        CE: conditional > cosine | Table 2.7: 43.1, 42.5 | ce:conditional | ce
        SNCA+: conditional > cosine | 41.4, 35.9 | snca:conditional | snca
        Grafit: conditional > cosine | 55.7, 52.9 | grafit:conditional | grafit
        Grafit: oracle > conditional | 59.3, 55.7 | grafit:oracle | grafit:conditional"""),
    "depth": Row("CaiT, top-1", "top1",
        "data as above; LayerScale: 24 blocks of width 192 (11.9 M parameters) on 4 patches of 16 pixels, 5 "
        "epochs; class attention: 3 blocks and 2 of class attention, with talking heads, against DeiT's 3 blocks, "
        "15 epochs", """
        LayerScale > plain pre-norm | Table 3.11: 82.4, 78.9 (failed) | deep | deep_plain
        class attention > class token at layer 0 | Table 3.13: 80.8, 79.9 | cait_plain | deit"""),
    "trex": Row("t-ReX, mean log odds of linear classifiers on frozen features", "odds",
        "trained on 50 classes of CIFAR-100 (100 images each), transferred to the other 50 and to the built-in "
        "data set; ResNet of one block per stage; 15 epochs for 100, batch 64; 2 local crops for 8, 1 hidden "
        "layer for 3, memory 2048", """
        t-ReX > plain (no projector, crops, memory) | the page's figure | trex_features | plain_features
        projector > none | the same | plain_projector_features | plain_features
        multi-crop > one crop | the same | plain_crops_features | plain_features
        (where trained, top-1: t-ReX > plain) | the same | trex:top1 | plain:top1"""),
    "deit3": Row("DeiT III, top-1", "top1",
        "data and network as the row on DeiT; 20 epochs for 400, LAMB at 2e-2, no mixup, no cutmix; low "
        "resolution: 24 pixels, then 3 epochs at 32", """
        3-Augment > RandAugment | Table 6.4, B: 83.1, 82.7; S: 80.4, 80.7 | deit3 | deit3_rand
        BCE > CE | B: 82.2, 80.9; S: 79.8, 79.8 | deit3 | deit3_ce
        low resolution, then full > full | Table 6.6, L: 84.4, 84.2 | deit3_low_full | deit3"""),
    "correlation": Row("Better where trained, better elsewhere (Kornblith et al.)", "pearson",
        f"{len(TRAINED_ON_TEN)} networks of the rows above, trained on CIFAR-10; log odds of linear classifiers on 50 "
        "classes of CIFAR-100 against those of the best epoch's top-1",
        "Pearson's correlation of log odds > 0 | 0.99 | correlation | 0"),
    "five": Row("Grafit, five superclasses of CIFAR-100 (25 fine classes)", "knn",
        "as the row on Grafit, with 300 epochs, 2 views, crop and flip alone", """
        coarse labels are learnt, CE: above 90% |  | five_fit:coarse | 90
        Grafit > CE, fine kNN | Table 2.7: 77.7, 71.8 | five_grafit | five_ce
        Grafit > CE, fine mAP | 52.9, 42.5 | five_grafit:map | five_ce:map
        Grafit > SNCA+, fine kNN | 77.7, 72.2 | five_grafit | five_snca
        Grafit > SNCA+, fine mAP | 52.9, 35.9 | five_grafit:map | five_snca:map"""),
}

# ---- Data sets -------------------------------------------------------------------------------------------------------


def link(folder: Path, classes: list[str], coarse: dict, **splits: dict[str, list[Path]]) -> None:
    """A data set of links to the files of these classes."""
    for split, files in splits.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for file in files[name]:
                if not (folder / split / name / file.name).is_symlink():
                    (folder / split / name / file.name).symlink_to(file)
    (folder / "coarse.json").write_text(json.dumps({name: coarse[name] for name in classes}))


def prepare_data(archives: Path, work: Path, tune: bool) -> Path:
    """The folder of the data sets that the commands name. tune: no test image is in it; the last fifth of each class's
    training images stands in for them."""
    data = work / ("data_tune" if tune else "data")
    for name in ("cifar10", "cifar100"):
        whole = work / "whole" / name
        if not whole.exists():
            with tarfile.open(archives / f"{name}_subset.tar") as tar:
                tar.extractall(whole.with_suffix(".part"))  # no filter: Python 3.10.0 to 3.11.3 have none
            whole.with_suffix(".part").rename(whole)
        coarse = json.loads((whole / "coarse.json").read_text())
        classes = sorted(coarse)
        train, val = ({c: sorted((whole / split / c).iterdir()) for c in classes} for split in ("train", "val"))
        if tune:
            val = {c: files[len(files) * 4 // 5 :] for c, files in train.items()}
            train = {c: files[: len(files) * 4 // 5] for c, files in train.items()}
        if name == "cifar10":
            link(data / "cifar10", classes, coarse, train=train, val=val)
            train, title = {c: files[:500] for c, files in train.items()}, "ten"
        else:
            link(data / "half", classes[: len(classes) // 2], coarse, train=train, val=val)
            link(data / "other_half", classes[len(classes) // 2 :], coarse, train=train, val=val)
            classes, title = [c for c in classes if coarse[c] in sorted(set(coarse.values()))[:5]], "five"
        link(data / title, classes, coarse, train=train, val=val)
        first, second = ({c: train[c][i::2] for c in classes} for i in (0, 1))
        link(data / f"{title}_halves", classes, coarse, train=first, val=second)
    return data


# ---- Runs ------------------------------------------------------------------------------------------------------------


def runs_of(row: Row, seeds: int, known: dict | None = None) -> list[tuple[str, int]]:
    """(run, seed) of a row in the order to run them: seed by seed, before a run those whose files it reads.
    known: records by "RUN/SEED", as results/claims.json holds them; only what is not among them is run."""
    found: dict[tuple[str, int], None] = {}

    def add(run: str, seed: int) -> None:
        for other, own in re.findall(r"\{runs\}/(\w+)/(\{seed\}|\d+)/", COMMANDS[run]):
            add(other, seed if own == "{seed}" else int(own))
        found[run, seed] = None

    for seed in range(seeds):
        for *_, left, right in row.parsed():
            for term in f"{left} - {right}".split(" - "):
                run = term.split(":")[0]
                if not term.isdigit() and (known or {}).get(f"{run}/{seed}", {}).get("command") != COMMANDS[run]:
                    add(run, seed)
    return list(found)


def command_line(run: str, seed: int, data: Path, runs: Path, workers: int) -> list[str]:
    """What follows "python" on the command line."""
    words, out = shlex.split(COMMANDS[run].format(data=data, runs=runs, seed=seed)), runs / run / str(seed)
    if words[0] == "tests/studies.py":
        return [*words, "--out", str(out / "results.json")]
    if words[:2] == ["-m", "common.transfer"]:
        return [*words, "--out", str(out / "features.json" if "features" in words else out)]
    training = [] if "--eval" in words else ["--seed", str(seed), "--resume", "auto"]
    return [*words, *training, "--workers", str(workers), "--out", str(out)]


def noted(folder: Path) -> dict:
    """What is known of a run: "command", "state" ("completed", "failed", "begun" or ""), "seconds"."""
    note = folder / "claim.json"
    return json.loads(note.read_text()) if note.exists() else {"command": None, "state": "", "seconds": 0.0}


def execute(folder: Path, argv: list[str]) -> str:
    """Runs a command to its end and returns "completed" or "failed"; its output goes to FOLDER/output.txt.

    KeyboardInterrupt: it was asked to stop, and has saved. SystemExit: the folder holds a run of another command."""
    folder.mkdir(parents=True, exist_ok=True)
    before, start, stopped = noted(folder), time.time(), []
    lines = [re.sub(r" --workers \d+", "", shlex.join(command)) for command in (before["command"] or argv, argv)]
    if lines[0] != lines[1]:
        raise SystemExit(f"{folder}: holds a run of another command, {lines[0]}; delete it")

    def note(state: str) -> str:
        content = {"command": argv, "state": state, "seconds": before["seconds"] + time.time() - start}
        (folder / "claim.part").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "claim.part").replace(folder / "claim.json")
        return state

    def stop(number: int, _frame) -> None:
        stopped.append(number)
        child.terminate()

    note("begun")
    with open(folder / "output.txt", "a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # another thread count changes the last bits
        streams = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        child = subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=environment, **streams)
        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        code = child.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped and code:
        note("begun")
        raise KeyboardInterrupt
    return note("failed" if code else "completed")


# ---- Results ---------------------------------------------------------------------------------------------------------


def figures(folder: Path) -> dict[str, float]:
    """A completed run's figures, from its result file or the last epoch's record of log.jsonl."""
    records = [folder / name for name in ("results.json", "matrix.json", "features.json", "compare.json")]
    records = [json.loads(file.read_text()) for file in records if file.exists()]
    if (folder / "log.jsonl").exists():
        records += [json.loads(line) for line in reversed((folder / "log.jsonl").read_text().splitlines())]
    found = {}
    for metric, keys in METRICS.items():
        for value in records:
            for key in keys.split("."):
                if isinstance(value, list):
                    value = value[int(key)]
                else:
                    value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found.setdefault(metric, float(value))
    return found


def known_runs(out: Path, runs: Path) -> dict[str, dict]:
    """By "RUN/SEED": "command", "minutes" and "figures" of what `out` holds and of the runs completed here; those of
    another command are left out."""
    known = json.loads(out.read_text())["runs"] if out.exists() else {}
    for folder in runs.glob("*/*"):
        note, name = noted(folder), f"{folder.parent.name}/{folder.name}"
        if note["state"] == "completed" and folder.parent.name in COMMANDS:
            minutes = round(note["seconds"] / 60, 1)
            known[name] = {"command": COMMANDS[folder.parent.name], "minutes": minutes, "figures": figures(folder)}
    return {name: run for name, run in sorted(known.items()) if COMMANDS.get(name.split("/")[0]) == run["command"]}


def side(expression: str, metric: str, known: dict, seed: int) -> float | None:
    """A claim's left or right for a seed; None before its runs are completed."""
    values = []
    for term in expression.split(" - "):
        run, _, own = term.partition(":")
        figures = known.get(f"{run}/{seed}", {"figures": {}})["figures"]
        values.append(float(term) if term.isdigit() else figures.get(own or metric))
    return None if None in values else values[0] - sum(values[1:])


T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)  # Student's t, one-sided, for 1, 2, ... degrees


def separable(mean: float, deviation: float, n: int) -> bool:
    """Whether a mean of n differences lies further from 0 than in 5% of draws it would if the true one were 0."""
    t = T95[n - 2] if n - 2 < len(T95) else 1.645 + 1.62 / (n - 1)
    return abs(mean) > t * deviation / math.sqrt(n)


def verdict(differences: list[float]) -> str:
    """Of left - right, one per seed. Not separable: with the number of seeds at which such a mean would be."""
    if len(differences) < 2:
        return f"{len(differences)} seed{'s' * (not differences)} yet"
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if separable(mean, deviation, len(differences)):
        return "order holds" if mean > 0 else "does not hold"
    needed = next((n for n in range(len(differences) + 1, 1001) if separable(mean, deviation, n)), "more than 1000")
    return f"not separable; would take {needed} seeds"


def results_of(row: Row, known: dict, seeds: int) -> dict:
    """What results/claims.json holds of a row."""
    runs, claims = {f"{run}/{seed}" for run, seed in runs_of(row, seeds)}, []
    for text, paper, *sides in row.parsed():
        pairs = [[side(expression, row.metric, known, seed) for expression in sides] for seed in range(seeds)]
        pairs = [pair for pair in pairs if None not in pair]
        differences = [left - right for left, right in pairs]
        columns = {"left": [pair[0] for pair in pairs], "right": [pair[1] for pair in pairs], "difference": differences}
        claims.append({"claim": text, "paper": paper, **columns, "verdict": verdict(differences)})
    done = {"runs": len(runs), "completed": len(runs & known.keys())}
    return {"title": row.title, "setting": row.setting, **done, "claims": claims}


def markdown(row: dict) -> str:
    """A row's results as a table."""

    def cell(values: list[float], digits: int) -> str:
        if len(values) < 2:
            return " ".join(f"{v:.{digits}f}" for v in values)
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    lines = [f"{row['title']} ({row['setting']})", "", "| claim | paper | left | right | difference | verdict |"]
    lines.append("|---|---|---|---|---|---|")
    for claim in row["claims"]:
        digits = 1 if max(map(abs, claim["left"] + claim["right"]), default=0) >= 10 else 2
        cells = " | ".join(cell(claim[key], digits) for key in ("left", "right", "difference"))
        lines.append(f"| {claim['claim']} | {claim['paper']} | {cells} | {claim['verdict']} |")
    return "\n".join(lines) + "\n"


def write(out: Path, known: dict, seeds: int) -> None:
    results = {"rows": {name: results_of(row, known, seeds) for name, row in ROWS.items()}, "runs": known}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".part").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    out.with_suffix(".part").replace(out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="tests/claims.py", description=__doc__, formatter_class=formatter)
    add, folder = parser.add_argument, {"type": Path, "metavar": "FOLDER"}
    add("--data-root", default="data", help="holds the two archives; default: data", **folder)
    add("--work", default="runs/claims", help="data sets and runs go here; default: runs/claims", **folder)
    add("--out", type=Path, default="results/claims.json", metavar="FILE", help="default: results/claims.json")
    add("--only", nargs="+", metavar="ROW", default=list(ROWS), choices=list(ROWS), help=f"of {', '.join(ROWS)}")
    add("--seeds", type=int, default=3, metavar="N", help="default: 3")
    add("--workers", type=int, default=1, metavar="N", help="loader processes of a run; default: 1")
    add("--tune", action="store_true", help="test on a fifth of the training images, to choose settings")
    add("--list", action="store_true", help="print the rows, how far they are and their commands, and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    work, failed = args.work.resolve(), 0
    runs, out = (work / "runs_tune", work / "claims_tune.json") if args.tune else (work / "runs", args.out)
    if args.list:
        for name in args.only:
            row = results_of(ROWS[name], known_runs(out, runs), args.seeds)
            print(f"{name}: {row['title']}; {row['completed']} of {row['runs']} runs")
            print("\n".join(f"    python {COMMANDS[run]}" for run in dict(runs_of(ROWS[name], 1))))
        return 0
    data = prepare_data(args.data_root, work, args.tune)
    for name in args.only:
        for run, seed in runs_of(ROWS[name], args.seeds, known_runs(out, runs)):
            folder = runs / run / str(seed)
            if noted(folder)["state"] == "completed":
                continue
            print(f"{time.strftime('%H:%M:%S')}  {name}: {run}, seed {seed}", flush=True)
            try:
                state = execute(folder, command_line(run, seed, data, runs, args.workers))
            except KeyboardInterrupt:
                print(f"stopped; the same command goes on in {folder}")
                return 130
            if state == "failed":
                failed += 1
                print(f"failed; see {folder}/output.txt", flush=True)
            write(out, known_runs(out, runs), args.seeds)
        print(markdown(results_of(ROWS[name], known_runs(out, runs), args.seeds)), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
