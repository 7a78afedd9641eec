"""grafit.py: its equations against reference numbers, its parts against plain forms, and as a whole."""

import copy
import dataclasses
import functools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, WITHOUT_MIXING, PeakMemory, fewer_shapes, load, log_of, reference, sine
from PIL import Image
from test_cli import refused
from torch.utils.flop_counter import FlopCounterMode

import grafit
from common.data import GlobalBatches, Samples
from common.evaluate import NEIGHBOURS, extract, mean_average_precision, normalize
from common.images import eval_transform, from_numpy
from common.models import on_meta
from common.optim import param_groups
from common.report import count
from common.sources import open_data

CASES = reference("grafit")
QUERIES, MEMORY = sine(CASES["inputs"]["query_embeddings"]), sine(CASES["inputs"]["memory_embeddings"])
LABELS = torch.tensor(CASES["inputs"]["memory_labels"])
OWN = torch.tensor(CASES["knn_loss"]["own_index"])


def wide(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- Losses and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["instance_loss"], ids=lambda c: f"T{c['T']}")
def test_the_instance_loss_is_equation_2_1(case):
    predictions = [sine(s).requires_grad_() for s in case["predictor_outputs_per_view"]]
    targets = [sine(s).requires_grad_() for s in case["target_outputs_per_view"]]
    loss = grafit.instance_loss(predictions, targets)
    loss.backward()
    assert loss.item() == pytest.approx(case["expected"]["mean"], abs=1e-9)
    assert torch.allclose(predictions[0].grad, wide(case["expected"]["grad_of_mean_wrt_view0"]), atol=1e-9)
    assert all(t.grad is None for t in targets)
    swapped = grafit.instance_loss(predictions[::-1], targets[::-1])
    assert swapped.item() == pytest.approx(loss.item(), abs=1e-12)  # symmetric over all ordered pairs
    with pytest.raises(ValueError, match="at least 2"):
        grafit.instance_loss(predictions[:1], targets[:1])


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_knn_loss_is_equation_2_3(dtype, tolerance, chunk):
    case = CASES["knn_loss"]
    z = QUERIES.clone().to(dtype).requires_grad_()
    memory = MEMORY.clone().to(dtype).requires_grad_()
    loss = grafit.knn_loss(z, LABELS[OWN], memory, LABELS, OWN, case["sigma"], chunk)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(case["expected"]["mean"], rel=tolerance)
    expected = wide(case["expected"]["grad_of_mean_wrt_queries"]).to(dtype)
    assert torch.allclose(z.grad / 3, expected, rtol=tolerance, atol=tolerance) and memory.grad is None


@pytest.mark.parametrize("case", CASES["knn_loss_of_a_batch"]["cases"], ids=lambda c: str(c["sigma"]))
def test_the_knn_loss_of_a_batch_against_itself(case):
    x, labels = sine(CASES["knn_loss_of_a_batch"]["embeddings"]), torch.tensor(CASES["knn_loss_of_a_batch"]["labels"])
    loss = grafit.knn_loss(x, labels, x, labels, torch.arange(len(x)), case["sigma"])
    assert loss.item() == pytest.approx(case["mean"], rel=1e-9)


def plain_knn_loss(z, labels, memory, memory_labels, own, sigma):
    """The whole (B, M) matrix, in log space; images without a positive count 0."""
    scores = F.normalize(z, dim=1) @ F.normalize(memory, dim=1).T / sigma
    scores[torch.arange(len(z)), own] = -torch.inf
    same = scores.masked_fill(labels[:, None] != memory_labels, -torch.inf).logsumexp(1)
    return torch.where(same > -torch.inf, scores.logsumexp(1) - same, 0.0).mean()


@pytest.mark.parametrize("sigma", [0.004, 0.02, 0.05, 1.0])
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float16])
def test_the_knn_loss_equals_the_materialised_form_at_any_temperature(sigma, memory_dtype):
    torch.manual_seed(0)
    memory, labels = torch.randn(500, 16).to(memory_dtype), torch.randint(5, (500,))
    own = torch.randperm(500)[:40]
    z = (memory[own].float() + 0.3 * torch.randn(40, 16)).requires_grad_()
    wide_z = z.detach().double().requires_grad_()
    kept = memory.clone()
    loss = grafit.knn_loss(z, labels[own], memory, labels, own, sigma, chunk=64)
    assert torch.equal(memory, kept)
    expected = plain_knn_loss(wide_z, labels[own], memory.double(), labels, own, sigma)
    loss.backward()
    expected.backward()
    assert torch.isfinite(loss) and loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(z.grad.double(), wide_z.grad, rtol=1e-3, atol=1e-4 * wide_z.grad.abs().max())


def test_an_image_without_another_of_its_label_counts_nothing():
    torch.manual_seed(0)
    memory, labels = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 2, 2])
    z = memory[:3].clone().requires_grad_()
    loss = grafit.knn_loss(z, labels[:3], memory, labels, torch.arange(3))
    loss.backward()
    assert torch.isfinite(loss) and not z.grad[0].any() and z.grad[1:].any()
    expected = plain_knn_loss(z.detach(), labels[:3], memory, labels, torch.arange(3), 0.05)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_knn_loss_never_holds_batch_times_memory():
    memory, labels = torch.randn(400_000, 8), torch.arange(400_000) % 7
    z = torch.randn(64, 8, requires_grad=True)
    with PeakMemory(torch.nn.Module()) as held:
        grafit.knn_loss(z, labels[:64], memory, labels, torch.arange(64)).backward()
    arguments = 400_000 * (8 * 4 + 8)
    assert held.peak - arguments < 64 * 400_000 * 4 / 8, held.peak


def test_the_memorys_update_is_the_mean_of_old_and_new():
    memory = grafit.Memory(12, 6, torch.float64)
    memory.embeddings.copy_(MEMORY)
    memory.update(OWN, QUERIES)
    for row, values in CASES["knn_loss"]["expected"]["memory_rows_after_update"].items():
        assert torch.allclose(memory.embeddings[int(row)], wide(values), atol=1e-9)
    others = [i for i in range(12) if i not in OWN.tolist()]
    assert torch.equal(memory.embeddings[others], MEMORY[others])
    before = memory.embeddings.clone()
    memory.update(OWN, 2 * QUERIES.flip(0), skip=torch.tensor(1.0))
    assert torch.equal(memory.embeddings, before)
    memory.update(OWN, 2 * QUERIES.flip(0), skip=torch.tensor(0.0))
    assert not torch.equal(memory.embeddings, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_image_that_occurs_twice_counts_once_in_any_order(dtype):
    torch.manual_seed(0)
    indices, g = torch.tensor([3, 1, 3, 0]), F.normalize(torch.randn(4, 8), dim=1)
    one, other = grafit.Memory(5, 8, dtype), grafit.Memory(5, 8, dtype)
    one.update(indices, g)
    order = torch.tensor([2, 3, 0, 1])
    other.update(indices[order], g[order])
    assert one.embeddings.dtype == dtype and torch.allclose(one.embeddings, other.embeddings, atol=1e-7)
    assert torch.allclose(one.embeddings[3].float(), (g[0] + g[2]) / 4, atol=1e-3)
    assert not one.embeddings[2].any() and not one.embeddings[4].any()


@pytest.mark.parametrize("method, groups", [("triplet", 1), ("ce_triplet", 3)])
def test_the_triplet_loss_is_torchs_with_another_image_of_the_group(method, groups):
    """Section 2.2, by its triplets one after the other; the sum of the two losses of ce_triplet is plain."""
    torch.manual_seed(0)
    views, logits = [torch.randn(12, 8, requires_grad=True) for _ in range(3)], torch.randn(12, 5)
    labels, recipe = torch.arange(12) % 5, grafit.Recipe(method=method, instance_weight=0.7)
    outputs = (logits if method == "ce_triplet" else None), None, views
    loss = grafit.total_loss(recipe, None, views, outputs, labels, (), groups)
    loss.backward()
    a, p = (F.normalize(view.detach(), dim=1) for view in views[:2])
    size, expected = 12 // groups, []
    for i in range(12):
        other = p[i - 1 if i % size else i + size - 1]
        expected.append(max(0.0, ((a[i] - p[i]).norm() - (a[i] - other).norm() + 0.2).item()))
    expected = 0.7 * np.mean(expected) + (F.cross_entropy(logits, labels).item() if method == "ce_triplet" else 0)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert all(view.grad.any() for view in views[:2]) and views[2].grad is None


# ---- Retrieval and classification ------------------------------------------------------------------------------------


def test_conditional_scores_are_equation_2_5_and_rank_alike():
    case = CASES["conditional_score"]
    coarse, expected = torch.tensor(case["coarse_label_of_memory"]), case["expected"]
    cosine = F.normalize(QUERIES, dim=1) @ F.normalize(MEMORY, dim=1).T
    psi = grafit.conditional_scores(cosine, wide(expected["coarse_probabilities"]), coarse)
    assert torch.allclose(psi, wide(expected["psi"]), atol=1e-9)
    assert psi.argsort(1, descending=True).tolist() == expected["ranking_psi"]
    oracle = F.one_hot(torch.tensor(case["oracle_coarse_label_of_queries"]), 3).double()
    found = grafit.conditional_scores(cosine, oracle, coarse)
    assert torch.isfinite(found).all() and found.argsort(1, descending=True).tolist() == expected["ranking_oracle"]
    assert torch.isfinite(grafit.conditional_scores(cosine.float(), oracle.float(), coarse)).all()


def average_precision(order: torch.Tensor, relevant: torch.Tensor) -> float:
    hits = relevant[order].double()
    return ((hits.cumsum(0) / torch.arange(1, len(hits) + 1)) * hits).sum().item() / hits.sum().item()


def hierarchy(seed: int = 0):
    """Queries and gallery of 12 fine in 3 coarse classes around centres: (queries, levels, gallery, levels)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=generator).repeat_interleave(4, 0)
    centres = centres + 0.7 * torch.randn(12, 8, generator=generator)
    parts = []
    for size in (60, 240):
        fine = torch.randint(12, (size,), generator=generator)
        parts += [
            (centres[fine] + 0.8 * torch.randn(size, 8, generator=generator)).double(),
            {"coarse": (list("abc"), fine // 4), "fine": (list("abcdefghijkl"), fine)},
        ]
    return parts


def test_coarse_to_fine_equals_brute_force():
    queries, query_levels, gallery, gallery_levels = hierarchy()
    found = grafit.coarse_to_fine(queries, query_levels, gallery, gallery_levels, "coarse", 0.05)
    cosine = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    coarse, fine = gallery_levels["coarse"][1], gallery_levels["fine"][1]

    def votes(k: int, labels, classes: int) -> torch.Tensor:
        p = torch.zeros(len(queries), classes, dtype=torch.float64)
        for i, row in enumerate(cosine):
            for j in row.argsort(descending=True)[:k]:
                p[i, labels[j]] += torch.exp(row[j] / 0.05)
        return p / p.sum(1, keepdim=True)

    for level, labels in (("coarse", coarse), ("fine", fine)):
        right = votes(found[level]["k"], labels, 12).argmax(1) == query_levels[level][1]
        assert found[level]["knn"] == pytest.approx(100 * right.double().mean().item(), abs=1e-6)
    p = votes(len(gallery), coarse, 3)  # Eq. 2.3 sums over all training images, not over k
    oracle = F.one_hot(query_levels["coarse"][1], 3).double()
    for name, scores in (
        ("map", cosine), ("map_conditional", grafit.conditional_scores(cosine, p, coarse)),
        ("map_oracle", grafit.conditional_scores(cosine, oracle, coarse)),
    ):
        for level, labels in (("coarse", coarse), ("fine", fine)):
            asked = zip(scores, query_levels[level][1])
            by_hand = [average_precision(s.argsort(descending=True), labels == y) for s, y in asked]
            assert found[level][name] == pytest.approx(100 * np.mean(by_hand), abs=1e-6), (name, level)
    assert found["coarse"]["map_oracle"] == pytest.approx(100)
    logits = 3 * torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other = grafit.coarse_to_fine(queries, query_levels, gallery, gallery_levels, "coarse", 0.05, logits)
    scores = zip(grafit.conditional_scores(cosine, logits.softmax(1), coarse), query_levels["fine"][1])
    by_hand = [average_precision(s.argsort(descending=True), fine == y) for s, y in scores]
    assert other["fine"].pop("map_conditional") == pytest.approx(100 * np.mean(by_hand), abs=1e-6)
    assert all(other["fine"][key] == found["fine"][key] for key in other["fine"])  # nothing else depends on them


def test_a_network_is_ranked_by_one_pass_of_products_for_all_levels_and_rankings():
    data = hierarchy()
    with FlopCounterMode(display=False) as counter:
        found = grafit.coarse_to_fine(*data, "coarse", 0.05)
    queries, query_levels, gallery, gallery_levels = data
    held, pairs = 24 * (240 - 24), 60 * 240  # choosing k; the nearest of all; the rankings
    assert counter.get_total_flops() == 2 * 8 * (held + 2 * pairs)
    for level, own in found.items():
        labels = query_levels[level][1], gallery, gallery_levels[level][1]
        assert own["map"] == pytest.approx(100 * mean_average_precision(queries, *labels), abs=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_queries_and_find_the_same_to_the_last_bit(monkeypatch, world):
    from common import evaluate

    monkeypatch.setattr(evaluate, "SCORES", 4 * 240 * 7)  # blocks of 7 queries, nine of them; 28 and 31 for the nearest
    queries, *levels_and_gallery = [part if isinstance(part, dict) else part.float() for part in hierarchy(2)]
    whole = grafit.coarse_to_fine(queries, *levels_and_gallery, "coarse", 0.05)
    shares, meeting, results, seen = [None] * world, threading.Barrier(world, timeout=30), [None] * world, []

    class Rank:
        say, check_stop = staticmethod(lambda line: None), meeting.wait  # one for all: a rank that asks less hangs

        def __init__(self, rank):
            self.world, self.rank = world, rank

        def gather(self, tensor):
            shares[self.rank] = tensor
            meeting.wait()
            together = torch.cat(shares)
            meeting.wait()
            return together

    ranks = evaluate._ranks
    monkeypatch.setattr(evaluate, "_ranks", lambda *a: seen.append(threading.get_ident()) or ranks(*a))

    def run(rank):
        results[rank] = grafit.coarse_to_fine(queries, *levels_and_gallery, "coarse", 0.05, run=Rank(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == [whole] * world
    work = [seen.count(thread.ident) for thread in threads]
    assert sum(work) == 3 * 60 and max(work) <= 3 * 7 * -(-9 // world)  # each query's three rankings once


def test_the_number_of_neighbours_is_chosen_without_the_test_set():
    queries, query_levels, gallery, gallery_levels = hierarchy()
    one = grafit.coarse_to_fine(queries, query_levels, gallery, gallery_levels, "coarse", 0.05)
    mixed = {name: (classes, labels[torch.randperm(60)]) for name, (classes, labels) in query_levels.items()}
    other = grafit.coarse_to_fine(queries.flip(0), mixed, gallery, gallery_levels, "coarse", 0.05)
    assert [m["k"] for m in one.values()] == [m["k"] for m in other.values()]
    assert {m["k"] for m in one.values()} <= set(NEIGHBOURS)


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_chunks_do_not_change_a_conditional_ranking(chunk):
    queries, query_levels, gallery, gallery_levels = hierarchy(1)
    probabilities, coarse = torch.randn(60, 3, dtype=torch.float64).softmax(1), gallery_levels["coarse"][1]
    labels = query_levels["fine"][1], gallery, gallery_levels["fine"][1]

    def conditional(cosine: torch.Tensor, rows: slice) -> torch.Tensor:
        return grafit.conditional_scores(cosine, probabilities[rows], coarse)

    found = mean_average_precision(queries, *labels, chunk, scores=conditional)
    cosine = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    scores = grafit.conditional_scores(cosine, probabilities, coarse)
    by_hand = [average_precision(s.argsort(descending=True), labels[2] == y) for s, y in zip(scores, labels[0])]
    assert found == pytest.approx(np.mean(by_hand), abs=1e-9)


# A piece of WordNet, in the format of data.noun: synset, file, part of speech, words (hexadecimal), each with a number,
# links, each of four words, gloss. A dog has two hypernyms, of which canine is the alphabetically first.
WORDNET = """  1 This software and database is being provided to you, the LICENSEE, by
00000001 03 n 01 entity 0 002 ~ 00000002 n 0000 ~ 00000009 n 0000 | that which is
00000002 03 n 0a animal 0 beast 0 brute 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 002 @ 00000001 n 0000 + 00000009 a 0101 | it
00000003 05 n 01 carnivore 0 003 @ 00000002 n 0000 ~ 00000004 n 0000 #m 00000009 n 0000 | it eats | meat
00000004 05 n 02 Canine 0 canid 0 002 @ 00000003 n 0000 ~ 00000005 n 0000 | fissiped
00000005 05 n 01 dog 0 004 @ 00000008 n 0000 @ 00000004 n 0000 ~ 00000006 n 0000 @i 00000009 n 0000 | Fido
00000006 05 n 01 corgi 0 001 @ 00000005 n 0000 | a Welsh dog
00000007 05 n 01 cat 0 001 @ 00000003 n 0000 | it purrs
00000008 05 n 01 domestic_animal 0 001 @ 00000002 n 0000 | it is tame
00000009 06 n 01 thing 0 001 @ 00000001 n 0000 | no animal
00000010 06 n 01 cup 0 001 @ 00000009 n 0000 | it holds tea
00000011 06 n 01 teacup 0 001 @ 00000010 n 0000 | a cup for tea
"""


def test_readme_derives_coarse_labels_from_wordnet(tmp_path):
    """With WordNet 3.0 and ImageNet's 1000 classes: 127, as Huh et al. have."""
    (tmp_path / "data.noun").write_text(WORDNET)
    for wnid in ("n00000005", "n00000006", "n00000007", "n00000010", "n00000011"):
        (tmp_path / "train" / wnid).mkdir(parents=True)
    snippet = re.search(r"<<'END'\n(.*?)\nEND\n", (ROOT / "README.md").read_text(), re.S)[1]
    command = [sys.executable, "-", tmp_path / "data.noun", tmp_path / "train"]
    result = subprocess.run(command, input=snippet, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == {
        "n00000005": "n00000003 carnivore",  # not canine, its hypernym: the cat's lies above that
        "n00000006": "n00000003 carnivore", "n00000007": "n00000003 carnivore",
        "n00000010": "n00000009 thing", "n00000011": "n00000009 thing",
    }
    assert result.stderr == "2 coarse classes\n"


# ---- Network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "regnet_y_8gf"])
def test_trunks_have_torchvisions_keys_and_the_stated_width(name):
    model, theirs = on_meta(lambda: grafit.build_model(name)), on_meta(lambda: torchvision.models.get_model(name))
    keys = {k.removeprefix("trunk."): v.shape for k, v in model.state_dict().items() if k.startswith("trunk.")}
    assert keys == {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert theirs.fc.in_features == grafit.MODELS[name]


def test_regnet_y_4gf_which_torchvision_lacks_has_its_papers_size():
    """20.6 M with a classifier of 1000 (arXiv:2003.13678, Table 4), 21 M in Table 2.15; 4.0 GMACs."""
    trunk = on_meta(lambda: grafit.make_trunk("regnet_y_4gf"))
    assert (sum(p.numel() for p in trunk.parameters()) + 1089 * 1000) / 1e6 == pytest.approx(20.6, abs=0.06)
    assert count(lambda: grafit.make_trunk("regnet_y_4gf"), (224, 224))[1] == pytest.approx(4.0, abs=0.05)
    state = grafit.make_trunk("regnet_nano").state_dict()
    assert {k.split(".")[0] for k in state} == {k.split(".")[0] for k in trunk.state_dict()}


def test_parameters_are_those_of_table_2_7():
    """23.5 M of the trunk, 32.9 M with the MLP; the predictor and the target network do not count."""

    def tested(projector: str) -> float:
        with torch.device("meta"):
            model = grafit.build_model("resnet50", projector=projector)
        return sum(p.numel() for part in (model.trunk, model.projector) for p in part.parameters()) / 1e6

    assert tested("mlp") == pytest.approx(32.9, abs=0.06)
    assert tested("linear") == pytest.approx(23.5 + 2048 * 256 / 1e6, abs=0.05)


@pytest.mark.parametrize("projector", ["mlp", "linear"])
def test_in_eval_mode_the_model_gives_normalised_embeddings(projector):
    torch.manual_seed(0)
    model = grafit.build_model("resnet18", proj_dim=32, projector=projector).eval()
    with torch.no_grad():
        z = model(torch.randn(2, 3, 64, 64))
    assert z.shape == (2, 32) and torch.allclose(z.norm(dim=1), torch.ones(2), atol=1e-6)
    again = grafit.build_model("resnet18", proj_dim=32, projector=projector)
    again.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(KeyError):
        grafit.build_model("resnet51")


def test_the_target_is_an_average_without_gradient():
    torch.manual_seed(0)
    model = grafit.Grafit("regnet_nano", "grafit", proj_dim=16).train()
    views = [torch.randn(4, 3, 32, 32) for _ in range(3)]
    _, g, predictions = model(views)
    targets = model.targets(views)
    assert g.shape == (4, 16) and len(predictions) == len(targets) == 3
    (grafit.instance_loss(predictions, targets) + g.sum()).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    learned = [p for name, p in model.named_parameters() if not name.startswith("target.")]
    assert all(p.grad is not None for p in learned)
    names = {n for n, _ in model.named_parameters() if n.startswith("target.")}
    assert names == {f"target.{n}" for n, _ in model.named_parameters() if n.startswith(("trunk.", "projector."))}
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in learned:
            p.add_(1)
    model.average(0.9)
    after = dict(model.named_parameters())
    for name in names:
        own = before[name.removeprefix("target.")] + 1
        assert torch.allclose(after[name], before[name] + 0.1 * (own - before[name]), atol=1e-6)
    in_groups = {id(p) for group in param_groups(model, 1e-4) for p in group["params"]}
    assert not in_groups & {id(p) for p in model.target.parameters()}


@pytest.mark.parametrize("start", ["trunk", "snca"])
def test_a_target_network_that_the_weights_lack_starts_as_a_copy(start):
    torch.manual_seed(0)
    trunk, own = grafit.make_trunk("regnet_nano"), grafit.Grafit("regnet_nano", "snca", proj_dim=16)
    model = grafit.Grafit("regnet_nano", "grafit", proj_dim=16)
    state = dict((trunk if start == "trunk" else own).state_dict())
    grafit.take_trunk(model, state, {}, print)
    model.load_state_dict(state)
    found = model.state_dict()
    copied = [k for k in found if k.startswith("target.")]
    assert all(torch.equal(found[k], found[k.removeprefix("target.")]) for k in copied)
    assert start == "snca" or torch.equal(found["target.trunk.stem.0.weight"], trunk.stem[0].weight)
    assert start == "trunk" or torch.equal(found["target.projector.0.weight"], own.projector[0].weight)


@pytest.mark.parametrize("method", grafit.METHODS)
def test_every_method_has_what_its_row_of_table_2_7_says_and_nothing_else(method):
    supervised, instance, projector = grafit.METHODS[method]
    model = grafit.Grafit("regnet_nano", method, num_classes=5, proj_dim=16)
    parts = {name.split(".")[0] for name in model.state_dict()}
    wanted = {"trunk": True, "fc": supervised == "ce", "projector": projector}
    wanted |= {"predictor": instance == "byol", "target": instance == "byol"}
    assert parts == {name for name, has in wanted.items() if has}
    width = 16 if supervised == "knn" else 128
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, width)
    logits, g, predictions = model.train()([torch.randn(2, 3, 32, 32)] * (2 if instance else 1))
    assert (logits is None, g is None, predictions is None) == (supervised != "ce", supervised != "knn", not instance)
    assert not instance or [p.shape for p in predictions] == 2 * [(2, 128 if instance == "triplet" else 16)]


def test_views_are_random_and_repeat_exactly():
    image = from_numpy(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    transform = grafit.TrainTransform(grafit.Recipe(views=3, img_size=(32, 32), erasing=1.0))
    (views,), parameters = transform(image, random.Random(1))
    assert views.shape == (3, 3, 32, 32) and len(parameters) == 15 and not torch.equal(views[0], views[1])
    (again,), same = transform(image, random.Random(1))
    assert torch.equal(again, views) and same == parameters
    (one,), _ = grafit.TrainTransform(grafit.Recipe(method="snca", img_size=(32, 32)))(image, random.Random(1))
    assert len(one) == 1 and torch.equal(one[0], views[0])  # the supervised view is the first
    (test,), _ = grafit.TrainTransform(grafit.RECIPES["fixres"])(image, random.Random(1))
    assert torch.equal(test[0], eval_transform(image, (384, 384), 0.875))


def test_the_recipe_of_sections_2_4_3_and_2_5():
    r, cifar, transfer = grafit.RECIPES["grafit"], grafit.RECIPES["cifar"], grafit.RECIPES["transfer"]
    assert (r.epochs, r.batch_size, r.lr, r.optimizer, r.views, r.sigma) == (600, 1024, 0.4, "nesterov", 4, 0.05)
    assert (r.instance_weight, r.proj_dim, r.img_size) == (1.0, 256, (224, 224))
    assert (cifar.views, cifar.img_size, cifar.epochs, cifar.lr) == (8, (32, 32), 600, 0.4)
    assert (transfer.epochs, transfer.lr, transfer.batch_size, transfer.trainable, transfer.classifier) == (
        240, 0.01, 512, "all", "mlp",
    )
    assert grafit.parse_args(["--recipe", "grafit", "--batch-size", "256"])[1].lr == pytest.approx(0.1)
    for data, epochs in (("flowers102:/x", 1000), ("cars:/x", 1000), ("food101:/x", 300), ("inat2018@genus:/x", 300)):
        assert grafit.paper_recipe("transfer_full", data).epochs == epochs
        assert grafit.paper_recipe("transfer", data).epochs == 240


# ---- Runs ------------------------------------------------------------------------------------------------------------

NANO = ["--model", "regnet_nano", "--device", "cpu", "--workers", 0]
SMALL = [*NANO, *"--recipe shapes --img-size 32 --batch-size 16 --mix-group 4 --epochs 2 --warmup-epochs 1".split()]


@pytest.fixture(scope="session")
def coarse(tmp_path_factory):
    file = tmp_path_factory.mktemp("coarse") / "coarse.json"
    file.write_text(json.dumps({"ant": "insect", "bee": "insect", "cat": "mammal", "dog": "mammal"}))
    return file


@pytest.fixture(scope="session")
def trained(folder, coarse, tmp_path_factory):
    """{"coarse" and "fine": output folder of a Grafit trained with these labels}."""
    from test_run import child, status_of

    out = tmp_path_factory.mktemp("grafit")
    for level in ("coarse", "fine"):
        flags = [*SMALL, "--data", f"{folder}@{level}", "--coarse-labels", coarse, "--out", out / level]
        log = out / f"{level}.log"
        assert status_of(child(flags, script="grafit", log=log)) == 0, log.read_text()
    return {level: out / level for level in ("coarse", "fine")}


def test_a_run_is_evaluated_at_every_level_and_eval_repeats_it(here, trained, folder, coarse):
    results = json.loads((trained["coarse"] / "results.json").read_text())
    assert list(results) == ["coarse"] and list(results["coarse"]) == ["coarse", "fine"]
    assert all(0 <= m[key] <= 100 for m in results["coarse"].values() for key in grafit.METRICS)
    assert results["coarse"]["coarse"]["map_oracle"] == pytest.approx(100)
    log = log_of(trained["coarse"])
    assert [r["val_knn"] for r in log if "val_knn" in r] and log[-1]["status"] == "completed"
    assert load(trained["coarse"] / "last.pt")["memory"]["embeddings"].norm(dim=1).max() > 0.5
    data = ["--data", folder, "--coarse-labels", coarse, "--device", "cpu", "--workers", 0]
    both = ["--weights", trained["coarse"] / "last.pt", "--also", trained["fine"] / "last.pt"]
    out = trained["coarse"].parent / "matrix"
    result = here("grafit", "--model", "regnet_nano", "--eval", *both, *data, "--out", out)
    assert result.status == 0, result
    matrix = json.loads((out / "matrix.json").read_text())
    assert list(matrix) == ["coarse", "fine"]  # a column per level of training
    for level in ("coarse", "fine"):
        own = json.loads((trained[level] / "results.json").read_text())[level]
        assert matrix[level] == own
    row = next(line for line in result.out.splitlines() if line.startswith("  test fine"))
    values = [matrix[column]["fine"]["knn"] for column in ("coarse", "fine")]
    assert [float(x) for x in row.split()[2:]] == [pytest.approx(value, abs=0.006) for value in values]


class Alone:
    """A run as far as `extract` knows it."""

    world, rank, workers, device, amp = 1, 0, 0, torch.device("cpu"), "fp32"
    gather, check_stop = staticmethod(lambda x: x), staticmethod(lambda: None)


def frame(picture: Image.Image, column: int, top: int) -> tuple:
    return picture.getpixel((column * 108 + 1, top + 1))


def test_retrieve_draws_frames_by_the_finest_level_that_is_right(here, trained, folder, coarse, tmp_path, monkeypatch):
    extracted = []
    monkeypatch.setattr("common.evaluate.extract", lambda *a, **k: extracted.append(a) or extract(*a, **k))
    data = ["--data", folder, "--coarse-labels", coarse, "--device", "cpu", "--workers", 0]
    outside = tmp_path / "other.png"
    Image.new("RGB", (50, 70), "red").save(outside)
    flags = ["--weights", trained["coarse"] / "last.pt", *data, "--out", tmp_path / "o"]
    query = sorted((folder / "val/bee").iterdir())[0]
    result = here("grafit", "--model", "regnet_nano", "--retrieve", query, "5", outside, *flags)
    assert result.status == 0, result
    sheet = Image.open(tmp_path / "o/retrieved.png")
    # By hand: the ten nearest training images of the query and the level at which they are right.
    splits = open_data(str(folder), coarse_labels=str(coarse))
    index = next(i for i in range(len(splits["val"])) if splits["val"].name(i) == str(query))
    content = load(trained["coarse"] / "last.pt")
    model = grafit.Grafit("regnet_nano", "grafit", proj_dim=256).eval()
    model.load_state_dict(content["model"])

    gallery, queries = (extract(model, splits[s], (32, 32), 1.0, Alone) for s in ("train", "val"))
    nearest = (queries[index] @ gallery.T).argsort(descending=True)[:10]
    fine, levels = splits["train"].labels[nearest], splits["train"].levels["coarse"][1][nearest]
    seen = [frame(sheet, 1 + i, 14) for i in range(10)]
    for colour, f, c in zip(seen, fine, levels):
        red, green, blue = colour
        if f == splits["val"].labels[index]:
            assert green > red
        elif c == splits["val"].levels["coarse"][1][index]:
            assert red > green > blue + 20  # orange
        else:
            assert red > 150 > green
    third = 14 + 2 * (104 + 14)
    assert frame(sheet, 1, third) == (150, 150, 150)  # nothing is known of an image from outside
    asked = ["grafit", "--model", "regnet_nano", "--retrieve"]
    refused(here(*asked, "999", *flags), "--retrieve 999", "20 validation images")
    refused(here(*asked, "5", *flags, "--eval-data", outside), "--eval-data", "--retrieve")
    before = len(extracted)
    refused(here(*asked, tmp_path / "none.jpg", *flags), "none.jpg")
    assert len(extracted) == before  # told before the training images are embedded


def test_retrieve_names_a_damaged_image_in_one_line(here, trained, folder, coarse, tmp_path):
    data = shutil.copytree(folder, tmp_path / "d")
    (data / "val/bee/bee_000.jpg").write_bytes(b"<html>")
    flags = ["--weights", trained["coarse"] / "last.pt", "--data", data, "--coarse-labels", coarse, "--workers", 0]
    result = here("grafit", "--model", "regnet_nano", *flags, "--retrieve", 5, "--out", tmp_path / "o")
    assert result.status == 1 and "val/bee/bee_000.jpg: " in result.err, result
    assert "Traceback" not in result.err and len(result.err.strip().splitlines()) == 1, result


def test_levels_are_named_once_from_the_coarsest_and_known_by_their_classes():
    class Data:
        classes, labels = ["b", "a", "c"], np.array([0, 1, 2])  # iNaturalist: by number
        levels = {
            "species": (["a", "b", "c"], np.array([1, 0, 2])), "kingdom": (["k"], np.zeros(3, int)),
            "genus": (["g", "h"], np.array([0, 0, 1])),
        }

    assert list(grafit.levels(Data)) == ["kingdom", "genus", "species"]
    assert grafit.level_trained(Data, ["b", "a", "c"]) == "species"
    assert grafit.level_trained(Data, ["g", "h"]) == "genus"
    assert grafit.level_trained(Data, ["x"]) is None


@pytest.mark.parametrize("method", ["ce", "instance", "ce_instance", "snca_fc", "grafit_fc", "triplet", "ce_triplet"])
def test_every_other_method_trains(here, folder, coarse, tmp_path, method):
    flags = ["--method", method, "--data", f"{folder}@coarse", "--coarse-labels", coarse, "--epochs", 6]
    result = here("grafit", *SMALL, *flags, "--out", tmp_path / "o")
    assert result.status == 0, result
    losses = [r["train_loss"] for r in log_of(tmp_path / "o") if "train_loss" in r]
    assert losses[-1] < losses[0]
    metrics = json.loads((tmp_path / "o/results.json").read_text())["coarse"]["fine"]
    assert all(0 <= metrics[key] <= 100 for key in grafit.METRICS)


@pytest.mark.parametrize("method", ["grafit", "snca", "ce"])
def test_without_labels_only_the_instance_loss_teaches(here, folder, coarse, tmp_path, method):
    """The columns of Tables 2.5, 2.6 and 2.14 for one class: "the baseline reduces to a random network"."""
    flags = ["--method", method, "--data", f"{folder}@none", "--coarse-labels", coarse, "--epochs", 2]
    result = here("grafit", *SMALL, *flags, "--weight-decay", 0, "--out", tmp_path / "o")
    assert result.status == 0, result
    losses = [r["train_loss"] for r in log_of(tmp_path / "o") if "train_loss" in r]
    assert losses[1] < losses[0] if method == "grafit" else losses == [0, 0]
    found = json.loads((tmp_path / "o/results.json").read_text())
    assert list(found) == ["none"] and list(found["none"]) == ["none", "coarse", "fine"]
    assert found["none"]["none"]["knn"] == found["none"]["none"]["map"] == 100
    flags = ["--model", "regnet_nano", "--weights", tmp_path / "o/last.pt", "--coarse-labels", coarse, "--workers", 0]
    again = here("grafit", "--eval", *flags, "--data", f"{folder}@none", "--device", "cpu", "--out", tmp_path / "e")
    assert again.status == 0 and json.loads((tmp_path / "e/matrix.json").read_text()) == found, again


def test_cross_entropys_conditional_ranking_is_by_its_softmax(here, folder, coarse, tmp_path):
    flags = ["--method", "ce", "--data", f"{folder}@coarse", "--coarse-labels", coarse, "--out", tmp_path / "o"]
    assert here("grafit", *SMALL, *flags).status == 0
    found = json.loads((tmp_path / "o/results.json").read_text())["coarse"]["fine"]
    splits = open_data(str(folder), coarse_labels=str(coarse))
    model = grafit.Grafit("regnet_nano", "ce", 2)
    model.load_state_dict(load(tmp_path / "o/last.pt")["model"])
    gallery, queries = (extract(model.eval(), splits[s], (32, 32), 1.0, Alone) for s in ("train", "val"))
    logits = extract(lambda x: model.fc(model.trunk(x)), splits["val"], (32, 32), 1.0, Alone)
    known = [grafit.levels(splits[s]) for s in ("val", "train")]
    expected = grafit.coarse_to_fine(queries, known[0], gallery, known[1], "coarse", 0.05, logits)["fine"]
    assert found == {key: pytest.approx(value, abs=1e-3) for key, value in expected.items()}
    by_neighbours = grafit.coarse_to_fine(queries, known[0], gallery, known[1], "coarse", 0.05)["fine"]
    assert abs(by_neighbours["map_conditional"] - found["map_conditional"]) > 0.1


def test_fine_tuning_takes_the_trunk_and_freezes_what_it_says(here, folder, trained, tmp_path):
    start = load(trained["coarse"] / "last.pt")["model"]
    sizes = ["--img-size", 32, "--batch-size", 16, "--mix-group", 4, "--epochs", 2]
    run = functools.partial(here, "grafit", *NANO, *sizes, "--data", folder)

    def trunk(out) -> tuple[dict, dict]:
        state = load(tmp_path / out / "last.pt")["model"]
        changed = {k for k in start if k.startswith("trunk.") and not torch.equal(start[k], state[k])}
        return state, changed

    for flags in (["transfer"], ["transfer", "--trainable", "classifier"], ["transfer_full"], ["fixres"]):
        refused(run("--recipe", *flags, "--out", tmp_path / "untrained"), f"--recipe {flags[0]}", "--weights")
    frozen = ["--trainable", "classifier", "--weights", trained["coarse"] / "last.pt", "--out", tmp_path / "frozen"]
    result = run("--recipe", "transfer", *frozen)
    assert result.status == 0 and "trunk taken from the checkpoint; new: fc" in result.out, result
    state, changed = trunk("frozen")
    assert not changed and state["fc.3.weight"].shape == (4, 128)
    result = run("--recipe", "transfer", "--weights", trained["coarse"] / "last.pt", "--out", tmp_path / "tuned")
    assert result.status == 0 and trunk("tuned")[1] == {k for k in start if k.startswith("trunk.")}, result
    # from torchvision's form of weights, all of it trained, with CutMix
    plain = {k.removeprefix("trunk."): v for k, v in start.items() if k.startswith("trunk.")}
    torch.save(plain, tmp_path / "plain.pth")
    linear = ["--classifier", "linear", "--weights"]
    result = run("--recipe", "transfer_full", *linear, tmp_path / "plain.pth", "--out", tmp_path / "full")
    assert result.status == 0, result
    state, changed = trunk("full")
    assert changed == {k for k in start if k.startswith("trunk.")} and state["fc.weight"].shape == (4, 128)
    # FixRes: classifier and BatchNorm
    result = run("--recipe", "fixres", *linear, tmp_path / "full/last.pt", "--out", tmp_path / "fixres")
    assert result.status == 0, result
    fixed = load(tmp_path / "fixres/last.pt")["model"]
    moved = {k for k in state if not torch.equal(state[k], fixed[k])}
    model = grafit.make_trunk("regnet_nano")
    norms = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    norms = {f"trunk.{n}.{k}" for n, m in norms.items() for k in m.state_dict()}
    assert moved == norms | {"fc.weight", "fc.bias"}
    # its accuracy, by --eval too
    top1 = [r["val_top1"] for r in log_of(tmp_path / "fixres") if "val_top1" in r][-1]
    weights = ["--weights", tmp_path / "fixres/last.pt"]
    result = here("grafit", *NANO, "--eval-data", folder / "val", *weights)
    assert result.status == 0 and f"top1 {top1:.5g}" in result.out, result
    result = here("grafit", *NANO, "--eval", "--data", folder, *weights)
    assert f"classifier  top1 {top1:.5g}" in result.out and "kNN, top-1" in result.out, result


def test_groups_bind_the_batch_size_only_where_images_are_mixed():
    flags = ["--recipe", "grafit", "--method", "ce", "--batch-size", "250"]
    assert all(grafit.parse_args(more)[1].mix_group == 1 for more in (flags, [*flags, "--mix-group", "8"]))
    _, recipe, paper = grafit.parse_args([*flags, "--cutmix", "1.0", "--mix-group", "50"])
    assert (recipe.mix_group, paper.mix_group) == (50, 64)
    assert grafit.parse_args(["--recipe", "transfer_full", "--data", "cars:/x"])[1].mix_group == 64
    assert grafit.parse_args(["--recipe", "grafit", "--method", "triplet"])[1].mix_group == 64


def test_a_method_without_a_classifier_has_no_accuracy_elsewhere(here, folder, tmp_path):
    flags = ["--model", "regnet_nano", *WITHOUT_MIXING, "--data", folder, "--epochs", 1, "--warmup-epochs", 0]
    assert here("grafit", *flags, "--out", tmp_path / "o").status == 0
    weights = ["--model", "regnet_nano", "--workers", 0, "--weights", tmp_path / "o/last.pt"]
    refused(here("grafit", *weights, "--eval-data", folder / "val"), "--eval-data", "no classifier; --eval ranks")


def test_wrong_use_is_refused(here, folder, trained, tmp_path):
    refused(here("grafit", "--method", "triple"), "--method triple", "grafit_fc")
    refused(here("grafit", "--method", "triplet", "--mix-group", 1), "--mix-group", "no negative")
    refused(here("grafit", "--method", "ce_triplet", "--target-decay", 0.9), "--target-decay", "no target network")
    refused(here("grafit", "--method", "ce", "--views", 4), "--views", "no instance loss")
    refused(here("grafit", "--cutmix", 1.0), "--cutmix", "method ce")
    refused(here("grafit", "--classifier", "mlp"), "--classifier", "no classifier")
    refused(here("grafit", "--method", "ce", "--memory-dtype", "fp16"), "--memory-dtype", "no memory")
    refused(here("grafit", "--also", "x.pt"), "--also", "--eval")
    refused(here("grafit", "--views", 1), "--views 1", "2 or more")
    refused(here("grafit", "--model", "torchvision/resnet50"), "--model torchvision/resnet50")
    weights = ["--model", "regnet_nano", "--weights", trained["coarse"] / "last.pt", "--device", "cpu"]
    refused(here("grafit", "--eval", *weights, "--data", folder), "no label level")


def test_on_shapes_coarse_labels_teach_grafit_more_of_the_fine_ones_than_cross_entropy(here, tmp_path):
    """1500 images, trained on 3 classes until all are right, tested on 12."""
    found = {}
    for method in ("ce", "grafit"):
        flags = ["--model", "regnet_nano", "--recipe", "shapes", "--data", "shapes@coarse", "--method", method]
        with fewer_shapes(1500, 240):
            flags += ["--batch-size", 32, "--epochs", 10, "--workers", 0, "--device", "cpu"]
            assert here("grafit", *flags, "--out", tmp_path / method).status == 0
        found[method] = json.loads((tmp_path / method / "results.json").read_text())["coarse"]
        assert found[method]["coarse"]["knn"] > 98
    assert found["grafit"]["fine"]["map"] > found["ce"]["fine"]["map"] + 20
    assert found["grafit"]["fine"]["knn"] > found["ce"]["fine"]["knn"] + 8


# ---- A second implementation -----------------------------------------------------------------------------------------


def plain_training(model, batches, method: str, memory, memory_labels) -> None:
    """Section 2.3.1 word for word, on trunk, projector and predictor of a network: two epochs, one of them warm-up, of
    the learning rate 0.1; weight decay 1e-4, Nesterov momentum 0.9, sigma 0.05, tau 0.9, lambda 1."""
    trunk, projector = model.trunk, model.projector
    learned = [trunk, projector] + ([model.predictor] if method == "grafit" else [])
    target_trunk, target_projector = copy.deepcopy(trunk), copy.deepcopy(projector)
    parameters = [p for part in learned for p in part.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 1e-4},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    for step, (views, labels, numbers) in enumerate(batches):
        epoch = 2 * step / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * epoch if epoch < 1 else 0.1 * (1 + math.cos(math.pi * epoch / 2)) / 2
        g = projector(trunk(torch.cat(views)))
        first = g[: len(labels)] / g[: len(labels)].pow(2).sum(1, keepdim=True).sqrt()
        norms = memory.pow(2).sum(1, keepdim=True).sqrt()
        cosines = first @ (memory / norms.clamp(min=1e-12)).T
        others = torch.ones(cosines.shape, dtype=torch.bool)
        others[torch.arange(len(numbers)), numbers] = False
        p = torch.exp(cosines / 0.05) * others
        p = p / p.sum(1, keepdim=True)  # Eq. 2.2
        loss = -(p * (labels[:, None] == memory_labels)).sum(1).log().mean()  # Eq. 2.3
        if method == "grafit":
            q, T = model.predictor(g).chunk(len(views)), len(views)
            with torch.no_grad():
                z = target_projector(target_trunk(torch.cat(views))).chunk(T)
            for i in range(T):
                for j in range(T):
                    if i != j:
                        loss = loss - torch.cosine_similarity(q[i], z[j]).mean() / (T * (T - 1))  # Eq. 2.1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for own, target in ((trunk, target_trunk), (projector, target_projector)):
                for theta, xi in zip(own.parameters(), target.parameters()):
                    xi.copy_(0.9 * xi + (1 - 0.9) * theta)
            for number, embedding in zip(numbers.tolist(), first):
                memory[number] = (memory[number] + embedding) / 2
    if method == "grafit":
        model.target.load_state_dict({
            **{f"trunk.{k}": v for k, v in target_trunk.state_dict().items()},
            **{f"projector.{k}": v for k, v in target_projector.state_dict().items()},
        })


@pytest.mark.parametrize("method", ["grafit", "snca"])
def test_two_epochs_end_as_a_plain_loop_does(here, folder, coarse, tmp_path, monkeypatch, method):
    """There is no official code. The loop above shares the order and augmentation of the images and the layers of the
    network with grafit.py, nothing else; both in double precision."""

    class Wide(grafit.Grafit):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.double()

        def forward(self, views):
            return super().forward([v.double() for v in views] if isinstance(views, list) else views.double())

        def targets(self, views):
            return super().targets([v.double() for v in views])

    wide_memory = functools.partial(grafit.Memory, dtype=torch.float64)
    recipe = dataclasses.replace(
        grafit.RECIPES["shapes"], method=method, views=3, augment="crop", erasing=0.0, img_size=(32, 32)
    )
    source = open_data(f"{folder}@coarse", coarse_labels=str(coarse), splits=("train",))["train"]
    samples = Samples(source, grafit.TrainTransform(recipe), seed=5)
    order = GlobalBatches(
        len(source), batch_size=20, micro_batch=20, group=1, world_size=1, rank=0, repeats=1, seed=5
    )
    batches = []
    for order.epoch in range(2):
        for keys in order:
            (images,), _, labels, numbers = samples.__getitems__(keys)
            batches.append(([normalize(view).double() for view in images.unbind(1)], labels, numbers))
    torch.manual_seed(5)
    model = Wide("regnet_nano", method, 2, 16).train()
    memory = torch.zeros(len(source), 16, dtype=torch.float64)
    plain_training(model, batches, method, memory, torch.from_numpy(source.labels))

    monkeypatch.setattr(grafit, "Grafit", Wide)
    monkeypatch.setattr(grafit, "Memory", lambda images, dim, dtype: wide_memory(images, dim))
    flags = [*NANO, "--recipe", "shapes", "--method", method, "--data", f"{folder}@coarse", "--coarse-labels", coarse]
    flags += [*"--seed 5 --epochs 2 --batch-size 20 --proj-dim 16 --lr 0.1 --warmup-epochs 1 --val-data none".split()]
    if method == "grafit":
        flags += ["--views", 3, "--target-decay", 0.9, "--instance-weight", 1.0]
    result = here("grafit", *flags, "--out", tmp_path / "o")
    assert result.status == 0, result
    found, expected = load(tmp_path / "o/last.pt"), model.state_dict()
    assert found["model"].keys() == expected.keys() and len(batches) == 6
    for key, value in {**found["model"], "memory": found["memory"]["embeddings"]}.items():
        wanted = memory if key == "memory" else expected[key]
        assert value.dtype == wanted.dtype and torch.allclose(value, wanted, rtol=0, atol=1e-10), key
    assert memory.norm(dim=1).max() > 0.5
