"""Dense prediction on the methods' trunks: semantic segmentation (UPerNet) and detection (Mask R-CNN).

    torchrun --nproc_per_node 8 -m common.dense segment --weights runs/vit_b/last.pt --data ade20k:/data
    torchrun --nproc_per_node 8 -m common.dense detect --weights runs/patchconvnet_s60/last.pt --data coco:/data

Data: shapes (segment), scenes (detect), ade20k:FOLDER, coco:FOLDER as published, or a FOLDER of images/, masks/ and
classes.txt. README has their forms, and where this differs from the thesis (sections 4.3.6, 5.3.3, 6.3.5.2) and from
its base, XCiT's published configurations: [xcit]. Not run here: ADE20k, COCO."""

import functools
import importlib
import itertools
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import ops, tv_tensors, utils
from torchvision.models.detection import MaskRCNN, anchor_utils, faster_rcnn, mask_rcnn
from torchvision.transforms import v2

from common import checkpoint, cli, data, images, optim, report, script, shapes, sources
from common.coco import mask_of, matched
from common.errors import RunError, UserError, watched
from common.evaluate import normalize, trained_model
from common.precision import Precision
from common.run import Run, launch

# ---- Recipes ---------------------------------------------------------------------------------------------------------

Size = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """Values of UPerNet on ADE20k: 160,000 iterations (section 5.3.3), the rest [xcit]. Sizes in pixels."""

    epochs: Annotated[int, "epochs", "1 or more"] = 80
    epoch_steps: Annotated[int | None, "optimizer steps of an epoch; none: one pass", "1 or more"] = 2000
    batch_size: Annotated[int, "images per optimizer step, over all GPUs", "1 or more"] = 16
    lr: Annotated[float, "peak learning rate", "above 0"] = 6e-5
    decay: Annotated[str, "linear to 0, or steps: a tenth after 27/36 and 33/36", ("linear", "steps")] = "linear"
    warmup_steps: Annotated[int, "steps of linear warm-up, from a millionth", "0 or more"] = 1500
    weight_decay: Annotated[float, "not on norms, biases, position embedding", "0 or more"] = 0.01
    width: Annotated[int | None, "of the heads; unset: 512, in ViTs the trunk's; detect: 256", "1 or more"] = None
    short: Annotated[Size, "shortest x longest short side in training, in steps of 32", "1 or more"] = (256, 1024)
    test_size: Annotated[Size, "longest short x long side in tests; training: of this ratio", "1 or more"] = (512, 2048)
    img_size: Annotated[Size, "SIDE or HxW: segment's crop, detect's for position embeddings", "1 or more"] = (512, 512)
    crop: Annotated[bool, "detect: half of the images first to 400-600, crop of 384-600: true or false"] = False
    rois: Annotated[int, "detect: regions per image that the heads are trained on", "1 or more"] = 512
    warmup_epochs, min_lr, warmup_lr, repeats = 0, 0, 0, 1  # no fields: what common knows of other schedules

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0..total: the decay, warm-up over it."""
        falls = sum(36 * step >= part * total for part in (27, 33))
        rate = self.lr * (0.1**falls if self.decay == "steps" else 1 - step / total)
        return rate * (1e-6 + (1 - 1e-6) * step / self.warmup_steps if step < self.warmup_steps else 1)


RECIPES = {  # of each task the paper's first; the last, not of the thesis: the built-in data in minutes on a CPU core
    "segment": {
        "ade20k": Recipe(),
        # Table 4.6: crops of 224 from (896, 224) x 0.5-2, in tests "the usual resolution", by a sliding window (4.3.6).
        "ade20k_224": Recipe(img_size=(224, 224), short=(112, 448)),
        "shapes": Recipe(3, 100, lr=2e-3, warmup_steps=20, img_size=(64, 64), short=(64, 64), test_size=(64, 64),
                         width=32),
    },
    "detect": {  # "3x": 36 epochs (section 5.3.3); the rest [xcit]
        "coco": Recipe(36, None, lr=1e-4, decay="steps", warmup_steps=500, weight_decay=0.05, short=(480, 800),
                       test_size=(800, 1333), crop=True),
        "scenes": Recipe(5, 100, batch_size=4, lr=1e-3, decay="steps", warmup_steps=20, img_size=(128, 128),
                         short=(128, 128), test_size=(128, 128), rois=64, width=32),
    },
}  # fmt: skip
PANELS = {"segment": ["val_miou", "val_pixels"], "detect": ["val_box_AP", "val_box_AP50", "val_mask_AP"]}

# ---- Networks --------------------------------------------------------------------------------------------------------

IGNORED = 255  # in masks: pixels without a label
upsampled = functools.partial(F.interpolate, mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> four maps (B, C, .., ..) of strides p/4, p/2, p, 2p for a trunk of stride p, by
    deconvolutions and a max-pool [xcit]. PatchConvNet's final output feeds all four (section 5.3.3), of others blocks
    4, 6, 8, 12 of 12 do [xcit], in proportion where there are more. fpn: five maps, of a feature pyramid network
    (arXiv:1612.03144) of that width. What of the trunk does not lead there is frozen, most of it removed."""

    def __init__(self, trunk: nn.Module, fpn: int | None = None):
        super().__init__()
        embed = [module for module in trunk.patch_embed.modules() if isinstance(module, nn.Conv2d)]
        dim, depth = embed[-1].out_channels, len(trunk.blocks)
        self.trunk, self.dim, self.out_channels, self.maps = trunk, dim, fpn, {}
        self.stride, self.is_map = math.prod(conv.stride[0] for conv in embed), not hasattr(trunk, "grid")
        self.resized = getattr(importlib.import_module(type(trunk).__module__), "resize_pos_embed", None)
        self.one_size = not self.is_map and self.resized is None  # ResMLP
        self.taken = [depth - 1 if self.is_map else math.ceil(k * depth / 12) - 1 for k in (4, 6, 8, 12)]
        for number in set(self.taken):
            trunk.blocks[number].register_forward_hook(lambda block, _, x, n=number: self.maps.update({n: x}))
        first = () if hasattr(trunk, "blocks_token_only") else ("cls_token", "dist_token")
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad &= name.startswith(("patch_embed.", "blocks.", "pos_embed", *first))
        if fpn or self.resized:  # Table 6.12 counts a ViT's parameters without its classifier, Table 5.3 with it
            trunk.head = trunk.head_dist = trunk.blocks_token_only = None
        trunk.forward = trunk.forward_features
        a, b, c = (nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2) for _ in range(3))
        self.up4, self.up2 = nn.Sequential(a, nn.BatchNorm2d(dim), nn.GELU(), b), c
        last = ops.feature_pyramid_network.LastLevelMaxPool()
        self.fpn = ops.FeaturePyramidNetwork([dim] * 4, fpn, extra_blocks=last) if fpn else None

    def forward(self, images: torch.Tensor) -> list[torch.Tensor] | dict[str, torch.Tensor]:
        p, trunk = self.stride, self.trunk
        images = F.pad(images, (0, -images.shape[3] % p, 0, -images.shape[2] % p))
        grid = trunk.patch_embed.grid = (images.shape[2] // p, images.shape[3] // p)
        fitted = {"pos_embed": self.resized(trunk.pos_embed, grid, old_grid=trunk.grid)} if self.resized else {}
        torch.func.functional_call(trunk, fitted, images)
        patches = [self.maps[number].flatten(1, -2)[:, -math.prod(grid) :] for number in self.taken]  # no tokens
        a, b, c, d = (x.unflatten(1, grid).permute(0, 3, 1, 2) for x in patches)
        self.maps.clear()
        levels = [self.up4(a), self.up2(b), c, F.max_pool2d(d, 2, ceil_mode=True)]
        return self.fpn(dict(zip("0123", levels))) if self.fpn else levels


class Segmenter(nn.Module):
    """UPerNet (arXiv:1807.10221), normalised images (B, 3, H, W) of any size, but of ResMLP -> logits (B, K, H, W);
    with masks int64 (B, H, W) the loss, to which an auxiliary head on the third level adds 0.4 of its own [xcit]."""

    def __init__(self, trunk: nn.Module, classes: int, recipe: Recipe):
        super().__init__()
        self.pyramid, conv, drop = Pyramid(trunk), ops.Conv2dNormActivation, nn.Dropout2d(0.1)
        dim = self.pyramid.dim
        width = recipe.width or (512 if self.pyramid.is_map else min(512, dim))  # section 6.3.5.2, Table 5.3
        self.pools = nn.ModuleList(conv(dim, width, 1) for _ in range(4))
        self.pooled = conv(dim + 4 * width, width, 3)
        self.lateral = nn.ModuleList(conv(dim, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in range(3))
        self.join = nn.Sequential(conv(4 * width, width, 3), drop, nn.Conv2d(width, classes, 1))
        self.auxiliary = nn.Sequential(conv(dim, 256, 3), drop, nn.Conv2d(256, classes, 1))

    def forward(self, images: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        (height, width), p = images.shape[-2:], self.pyramid.stride
        *fine, last = self.pyramid(images)
        pools = [pool(F.adaptive_avg_pool2d(last, side)) for pool, side in zip(self.pools, (1, 2, 3, 6))]
        path = [self.pooled(torch.cat([last, *(upsampled(x, last.shape[-2:]) for x in pools)], dim=1))]
        for lateral, x in zip(self.lateral, reversed(fine)):
            path.append(lateral(x) + upsampled(path[-1], x.shape[-2:]))
        path[1:] = [smooth(x) for smooth, x in zip(self.smooth, path[1:])]
        outputs = [self.join(torch.cat([upsampled(x, fine[0].shape[-2:]) for x in path], dim=1))]
        outputs += [] if masks is None else [self.auxiliary(fine[2])]
        outputs = [upsampled(x, (height + -height % p, width + -width % p))[..., :height, :width] for x in outputs]
        if masks is None:
            return outputs[0]
        # Pixels without a label count in the mean, as [xcit]'s do: it does not depend on how the batch is cut.
        main, auxiliary = (F.cross_entropy(x.float(), masks, ignore_index=IGNORED, reduction="sum") for x in outputs)
        return (main + 0.4 * auxiliary) / masks.numel()

    def windows(self, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """Mean logits over windows of h x w that overlap by a third."""
        height, width = x.shape[2:]
        x, total = F.pad(x, (0, max(0, w - width), 0, max(0, h - height))), 0
        starts = [{min(i, n - k) for i in range(0, n, -(-2 * k // 3))} for n, k in zip(x.shape[2:], (h, w))]
        for top, left in itertools.product(*starts):
            logits = self(x[:, :, top : top + h, left : left + w]).float()
            counted = torch.cat([logits, torch.ones_like(logits[:, :1])], dim=1)
            total = total + F.pad(counted, (left, x.shape[3] - left - w, top, x.shape[2] - top - h))
        return (total[:, :-1] / total[:, -1:])[..., :height, :width]


def detector(trunk: nn.Module, classes: int, recipe: Recipe) -> MaskRCNN:
    """torchvision's Mask R-CNN: images, a list of (3, H, W) in 0..1, and in training targets (boxes (N, 4), labels 1..K
    (N,), masks (N, H, W)) -> losses, or boxes, labels, scores, masks. Anchors are 8 strides wide."""
    pyramid, width = Pyramid(trunk, recipe.width or 256), recipe.width or 256
    if pyramid.one_size or pyramid.stride not in (8, 16):
        raise UserError("detect: needs a trunk for images of any size whose patches are 8 or 16 pixels wide")
    anchors = anchor_utils.AnchorGenerator([(pyramid.stride * 2**k,) for k in range(1, 6)], [(0.5, 1.0, 2.0)] * 5)
    (short, long), (mean, std) = recipe.test_size, (images.IMAGENET | images.PIXELS).values()  # training's come resized
    return MaskRCNN(pyramid, min_size=short, max_size=long, _skip_resize=True, rpn_anchor_generator=anchors,
                    box_batch_size_per_image=recipe.rois, box_head=faster_rcnn.TwoMLPHead(49 * width, 4 * width),
                    box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, classes + 1), image_mean=mean,
                    mask_head=mask_rcnn.MaskRCNNHeads(width, (width,) * 4, 1), image_std=std,
                    mask_predictor=mask_rcnn.MaskRCNNPredictor(width, width, classes + 1))  # fmt: skip


def build(task: str, recipe: Recipe, name: str, classes: int, img_size: int | Size = 512, weights=None) -> nn.Module:
    """Segmenter or detector on the trunk SCRIPT/MODEL for that image size, fresh or with weights (checkpoint.fit's
    options); UserError if the trunk is unknown, has no patch grid or cannot take the size."""
    method, _, model = name.partition("/")
    try:
        made_by = importlib.import_module(method)
        cli.check_choice(f"--model {method}/", model, made_by.MODELS)
        trunk = made_by.build_model(model, 1000, img_size)
        if not hasattr(trunk, "blocks"):
            raise ValueError("no patch grid")
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--model {name}: needs SCRIPT/MODEL and an --img-size that it takes ({error}); SCRIPT: deit, "
                        "deit3, cait, resmlp or patchconvnet") from None
    if weights:
        checkpoint.fit(trunk, **weights, adapt=getattr(made_by, "fit_resolution", None), new_head=True)
    network = (Segmenter if task == "segment" else detector)(trunk, classes, recipe)
    plain = {name for name, _ in network.named_parameters() if name.endswith(tuple(trunk.no_weight_decay()))}
    network.no_weight_decay = lambda: plain
    return network


# (SCRIPT/MODEL, classes, img_size=512) -> the networks of Tables 5.3 and 6.12, of Table 5.6.
build_segmenter = functools.partial(build, "segment", RECIPES["segment"]["ade20k"])
build_detector = functools.partial(build, "detect", RECIPES["detect"]["coco"])

# ---- Data ------------------------------------------------------------------------------------------------------------

Sample = tuple[torch.Tensor, dict[str, torch.Tensor]]  # image uint8 (3, H, W); "mask", or "boxes", "labels", "masks"


class MaskFiles(sources.Files):
    """images/ and masks/ (PNGs of the same names, of line numbers from 0; 255: ignored) and classes.txt, a name per
    line, both with train/ and val/ below, or every fifth image validates; or MIT's ADEChallengeData2016."""

    def __init__(self, name: str, folder: Path, split: str):
        self.first = int(name == "ade20k")  # whose 0 is nothing known, whose table has a head and names come last
        root = next(folder.glob("ADEChallengeData2016"), folder)
        pictures, masks = root / "images", root / ("annotations" if self.first else "masks")
        lines = (root / ("objectInfo150.txt" if self.first else "classes.txt")).read_text(encoding="utf-8").splitlines()
        classes = [line.split("\t")[-1].strip() for line in lines[self.first :] if line.strip()]
        names = sorted(row[0].decode(errors="surrogateescape") for row in sources.scan_folder(str(pictures)))
        names = [name for name in names if name.lower().endswith(sources.EXTENSIONS)]
        parts = [name.partition("/")[0] if "/" in name else "train" if i % 5 else "val" for i, name in enumerate(names)]
        names = [name for name, part in zip(names, parts) if part.startswith(split)]  # MIT's: training, validation
        self.masks = [(masks / name).with_suffix(".png") for name in names]
        if (lost := [str(mask) for mask in self.masks if not mask.is_file()]) or not names or len(classes) >= IGNORED:
            raise ValueError(f"{len(classes)} classes, {len(names)} images, {len(lost)} without mask {lost[:1]}")
        super().__init__(pictures, names, classes, np.zeros(len(names)))

    def sample(self, index: int) -> Sample:
        """ValueError for a mask that cannot be read, is of another size or holds other labels."""
        image, file, first = self.read(index), self.masks[index], self.first
        try:
            mask = np.asarray(Image.open(file)).astype(int)
            mask = np.where(mask == IGNORED, -1, mask - first)
            if mask.shape != tuple(image.shape[1:]):
                raise ValueError(f"of shape {mask.shape}, the image of {tuple(image.shape[1:])}")
            if (most := mask.max()) >= len(self.classes):
                raise ValueError(f"label {most + first} is outside {first}..{first + len(self.classes) - 1}")
        except Exception as error:  # of any kind: it is a decoder's
            raise ValueError(f"its mask {file}: {error}") from None
        return image, {"mask": tv_tensors.Mask(mask.astype(np.uint8))}  # -1 is 255 there


class Drawn(sources.Source):
    """The built-in images with their masks, background first; or scenes of 2 x 2 of them."""

    def __init__(self, name: str, folder: Path, split: str):
        self.split, self.scenes, self.title = split, name == "scenes", f"{name} {split}"
        self.drawn = shapes.TRAIN_IMAGES if split == "train" else shapes.VAL_IMAGES
        classes = shapes.CLASSES if self.scenes else ["background", *shapes.CLASSES]
        super().__init__(classes, np.zeros(self.drawn // (4 if self.scenes else 1)))

    def sample(self, index: int) -> Sample:
        if not self.scenes:
            image, mask, label = shapes.draw(self.split, index)
            return images.from_numpy(image), {"mask": tv_tensors.Mask(mask * np.uint8(label + 1))}
        rng = random.Random(f"scenes-{self.split}-{index}")
        parts, masks, labels = zip(*(shapes.draw(self.split, rng.randrange(self.drawn)) for _ in range(4)))
        scene = utils.make_grid([images.from_numpy(part) for part in parts], nrow=2, padding=0)
        places = np.eye(4, dtype=bool).reshape(4, 2, 1, 2, 1) & np.array(masks)[:, None, :, None]
        return scene, instances(places.reshape(4, *scene.shape[1:]), [label + 1 for label in labels])


class CocoFiles(sources.Files):
    """annotations/instances_train*.json, annotations/instances_val*.json and the folders of images they name; training
    leaves out crowds, specks and images with nothing else [xcit]."""

    def __init__(self, name: str, folder: Path, split: str):
        file, self.of_image = min(folder.glob(f"annotations/instances_{split}*.json")), defaultdict(list)
        content = json.loads(file.read_text())
        classes = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
        label = {key: number for number, key in enumerate(classes, 1)}
        for a in content["annotations"]:
            if split == "val" or not (a.get("iscrowd") or min(a["bbox"][2:]) < 1):
                self.of_image[a["image_id"]].append(a | {"category_id": label[a["category_id"]]})
        names = {i["id"]: i["file_name"] for i in content["images"] if split == "val" or i["id"] in self.of_image}
        self.ids, pictures = list(names), folder / file.stem.removeprefix("instances_")
        super().__init__(pictures, list(names.values()), list(classes.values()), np.zeros(len(names)))

    def sample(self, index: int) -> Sample:
        image, chosen = self.read(index), self.of_image[self.ids[index]]
        masks = [mask_of(a["segmentation"], tuple(image.shape[1:])) for a in chosen]
        boxes = ops.box_convert(torch.tensor([a["bbox"] for a in chosen]).reshape(-1, 4), "xywh", "xyxy")
        truth = instances(np.reshape(masks, (-1, *image.shape[1:])), [a["category_id"] for a in chosen], boxes)
        return image, truth | {"crowd": torch.tensor([bool(a.get("iscrowd")) for a in chosen])}


def instances(masks: np.ndarray, labels: list[int], boxes: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Detection's truth: masks (N, H, W), labels from 1, boxes x0 y0 x1 y1, None: those that enclose the masks."""
    masks = tv_tensors.Mask(masks.astype(np.uint8))
    boxes = ops.masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]) if boxes is None else boxes
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=masks.shape[1:], dtype=torch.float32)
    return v2.ClampBoundingBoxes()({"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks})


READERS = {"segment": ("shapes", "ade20k", "masks"), "detect": ("scenes", "coco")}
sources.NAMED.update(shapes=(Drawn,), scenes=(Drawn,), ade20k=(MaskFiles,), masks=(MaskFiles,), coco=(CocoFiles,))


def augment(task: str, recipe: Recipe, sample: Sample) -> Sample:
    """Short side, flip; segment: a crop with no class above 75% of it (10 attempts), padding, photometric distortion;
    detect: half of the images first to a short side of 400, 500 or 600 and a crop of sides 384-600 [xcit]."""
    if recipe.crop and torch.rand(()) < 0.5:
        sample = v2.RandomShortestSize([400, 500, 600])(*sample)
        sides = [int(torch.randint(min(384, side), min(600, side) + 1, ())) for side in sample[0].shape[1:]]
        sample = v2.RandomCrop(sides)(*sample)
    (low, high), (short, long) = recipe.short, recipe.test_size
    resized = v2.RandomShortestSize(range(low, high + 1, 32), high * long // short)
    sample = v2.RandomHorizontalFlip()(*resized(*sample))
    if task == "detect":
        return v2.Compose([v2.SanitizeBoundingBoxes(min_size=1), v2.ToPureTensor()])(*sample)
    fill = {tv_tensors.Mask: IGNORED, "others": [124, 116, 104]}  # the mean
    for _ in range(10):
        image, truth = v2.RandomCrop(recipe.img_size, pad_if_needed=True, fill=fill)(*sample)
        counts = truth["mask"].flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
        if counts.max() < 0.75 * counts.sum():
            break
    kinds = {"brightness": 1 / 8, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    distortion = [v2.RandomApply([v2.ColorJitter(**{kind: most})]) for kind, most in kinds.items()]
    return v2.Compose([*distortion, v2.ToPureTensor()])(image, truth)


class TruthSamples(data.Samples):
    """(images, a list of uint8 (3, h, w), nothing, their truths, indices (B,)), or what could not be read. An epoch has
    `length` images and goes on where the last one ended; transform(sample) draws from torch's generator."""

    length = 0

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> tuple | str:
        samples, indices = [], [(epoch * self.length + i) % len(self.source) for epoch, i, _ in keys]
        for key, index in zip(keys, indices):
            try:
                sample = self.source.named(self.source.sample, index)
            except RunError as error:
                return str(error)
            torch.manual_seed(hash((self.seed, *key)) & (2**63 - 1))  # steps have their own seeds
            samples.append(self.transform(sample))
        pictures, truths = map(list, zip(*samples))
        return pictures, torch.empty(0), truths, torch.tensor(indices)


# ---- Evaluation and training -----------------------------------------------------------------------------------------


def predict(run: Run, model: nn.Module, image: torch.Tensor, scales=(1.0,), flips=((),)) -> dict[str, torch.Tensor]:
    """Of an image uint8 (3, H, W): its "mask" of classes, by the mean probability over scales and flips (of which
    dimensions), or instances as the truth has them, and "scores"."""
    (short, long), crop, total = run.recipe.test_size, run.recipe.img_size, 0
    with torch.no_grad(), Precision(run.amp, run.device).autocast():
        if run.method == "detect":
            found = model([image / 255])[0]
            return found | {"masks": found["masks"][:, 0] > 0.5}
        for scale, flip in itertools.product(scales, flips):
            x = normalize(v2.RandomShortestSize([round(scale * short)], round(scale * long))(image)[None]).flip(flip)
            logits = model.windows(x, *crop) if max(crop) < short or model.pyramid.one_size else model(x)
            total = total + upsampled(logits.flip(flip).float(), image.shape[1:]).softmax(1)
    return {"mask": total[0].argmax(0)}


def painted(image: torch.Tensor, answer: dict[str, torch.Tensor]) -> Image.Image:
    """Image uint8 (3, H, W) in the colours of its classes, or of its instances (if they have scores, above 0.5)."""
    colours = torch.from_numpy(np.random.default_rng(4).integers(40, 256, (IGNORED + 1, 3)))
    mask = answer.get("mask", torch.zeros_like(image[0])).long().cpu()
    for number, one in enumerate(answer.get("masks", ())):
        if "scores" not in answer or answer["scores"][number] > 0.5:
            mask[one.cpu() > 0] = answer["labels"][number].cpu()
    return images.to_pil((0.4 * image.cpu() + 0.6 * colours[mask].permute(2, 0, 1)).to(torch.uint8))


def results(image: int, found: dict[str, torch.Tensor]) -> Iterator[dict]:
    """One image's instances (boxes, labels, masks, scores or none, crowd or none) as COCO's annotations or results."""
    scores, crowd = (found.get(key, torch.zeros(len(found["labels"]))).tolist() for key in ("scores", "crowd"))
    boxes, labels = ops.box_convert(found["boxes"], "xyxy", "xywh").tolist(), found["labels"].tolist()
    for mask, *row in zip(found["masks"].cpu().numpy() > 0, labels, boxes, scores, crowd):
        changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
        runs = {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=mask.size).tolist()}
        yield dict(zip(("category_id", "bbox", "score", "iscrowd"), row), image_id=image, segmentation=runs)


def coco_ap(truth: list[dict], detections: list[dict], kind: str = "bbox") -> dict[str, float]:
    """{"AP", "AP50", "AP75"} in 0..1 of COCO's annotations and results, boxes ("bbox", x y w h) or masks ("segm"): all
    areas, at most 100 detections per image and category; 101 recalls, 10 IoUs. -1 where nothing is to be found."""
    cells, precisions, recalls = defaultdict(lambda: ([], [])), [], np.linspace(0, 1, 101)[:, None]
    for number, rows in enumerate((truth, detections)):
        for row in rows:
            cells[row["category_id"], row["image_id"]][number].append(row)
    for _, group in itertools.groupby(sorted(cells), key=lambda cell: cell[0]):
        found = [matched(*cells[cell], kind) for cell in group]
        scores, answers, counts = (np.concatenate(part, axis=-1) for part in zip(*found))
        answers = answers[:, np.argsort(-scores, kind="stable")]
        right, wrong = ((answers == value).cumsum(1) for value in (1, 0))
        if counts.any():  # at each recall the best precision of those where it is reached
            curves = zip(right / counts.sum(), right / (wrong + right + np.spacing(1)))
            precisions.append([np.where(recall >= recalls, row, 0).max(1, initial=0) for recall, row in curves])
    values = np.array(precisions or np.full((1, 10, 1), -1.0))  # (categories, 10, 101)
    return {name: float(values[:, at].mean()) for name, at in (("AP", slice(None)), ("AP50", 0), ("AP75", 5))}


def evaluate(run: Run, model: nn.Module, val: sources.Source, pictures: Path | None = None, **how) -> dict[str, float]:
    """Percent, over all ranks' shares: mean IoU of the classes that occur and pixel accuracy; or box and mask AP.
    pictures: a PNG of rank 0's first images: as they are, their truth, what the model says."""
    size, parts, rows = len(val.classes), ([], []), []
    keys, samples = data.eval_batches(len(val), 1, run.world, run.rank), TruthSamples(val, v2.ToPureTensor(), 0)
    batches = data.to_device(data.make_loader(samples, keys, run.workers, run.device, persistent=False), run.device)
    pairs = torch.zeros(size, size, dtype=torch.int64, device=run.device)  # of true and predicted class
    shown = watched(batches, "evaluation", "images", run.say, len(val), run.world)
    model.eval()
    for number, ((image,), _, (truth,), index) in enumerate(shown):
        if number % 8 == 0 and number < len(val) // run.world:  # images that every rank has
            run.check_stop()
        answers = truth, predict(run, model, image, **how)
        if pictures and number < 4:
            rows.append(("", [images.to_pil(image.cpu()), *(painted(image, answer) for answer in answers)]))
        if run.method == "segment":
            mask, found = (answer["mask"].long() for answer in answers)
            pairs += (mask * size + found)[mask != IGNORED].bincount(minlength=size**2).view(size, size)
        else:
            for part, answer in zip(parts, answers):
                part += results(int(index), answer)
    if pictures:
        run.on_rank_0(lambda: report.save_sheet(pictures, rows))
    if run.method == "segment":
        pairs = run.gather(pairs[None]).sum(0).double()
        right, union = pairs.diag(), pairs.sum(0) + pairs.sum(1) - pairs.diag()
        miou, pixels = (right / union).nanmean(), right.sum() / pairs.sum()
        return {"val_miou": 100 * miou.item(), "val_pixels": 100 * pixels.item()}
    of_ranks = [parts]
    if run.world > 1:
        torch.distributed.all_gather_object(of_ranks := [None] * run.world, parts)
    truth, found = (sum(part, []) for part in zip(*of_ranks))
    values = [(name, coco_ap(truth, found, kind)) for name, kind in (("box", "bbox"), ("mask", "segm"))]
    return {f"val_{name}_{key}": 100 * value for name, ap in values for key, value in ap.items()}


def train(run: Run, content: dict) -> None:
    """content: of --weights, a classifier's, or {}."""
    args, recipe, augmented = run.args, run.recipe, functools.partial(augment, run.method, run.recipe)
    run.data = found = data.TrainingData(run, recipe, augmented, TruthSamples)
    found.steps = found.batches.steps = recipe.epoch_steps or found.steps
    found.loader.dataset.length = found.batches.length = found.steps * recipe.batch_size
    total = recipe.epochs * found.steps
    if found.val.classes != found.classes:
        raise UserError(f"--data {args.data}: the classes of its validation are not those of its training images")
    if recipe.warmup_steps >= total:
        raise UserError(f"--warmup-steps {recipe.warmup_steps}: must be less than the {total} of the run")
    if recipe.short[0] < recipe.short[1] and run.method == "detect" and run.world > 1 and run.device.type == "cpu":
        raise UserError("detect: several ranks need GPUs, a BatchNorm over CPUs takes images of one size only")
    torch.manual_seed(args.seed)
    heard = lambda line: line.startswith("new head") or run.say(line)  # noqa: E731, the classifier is not used
    weights = dict(content=content, where=f"--weights {args.weights}", say=heard, ema=args.use_ema) if content else None
    model = build(run.method, recipe, args.model, len(found.classes), recipe.img_size, weights)
    model.to(run.device, memory_format=run.layout)
    optimizer = optim.make_optimizer("adamw", model, recipe.lr, recipe.weight_decay)
    precision = Precision(run.amp, run.device, accumulation=found.accumulation)
    run.open_folder()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    run.say(f"{args.model} from {args.weights or 'scratch'}, {size:.2f} M parameters, {len(found.classes)} classes; "
            f"{len(found.source)} training, {len(found.val)} validation images{images.pixels_note()}; {recipe.epochs} "
            f"epochs x {found.steps} steps of {recipe.batch_size} in {found.accumulation} x {run.world}, {run.amp} on "
            f"{run.device.type}; unlike the paper: {', '.join(cli.differences(recipe, run.paper)) or 'nothing'}")
    wrapped = run.prepare(model, found.micro_batch)
    run.start(found.identity(), model=model, optimizer=optimizer, scaler=precision, ema=None)
    run.check_stop()
    for epoch in range(run.epoch, recipe.epochs):
        wrapped.train()
        for step in run.steps(found):
            for batch in found.micro_batches():
                with precision.forward(wrapped):
                    if run.method == "segment":
                        masks = torch.stack([truth["mask"] for truth in batch.labels]).long()
                        loss = wrapped(normalize(torch.stack(batch.images)), masks)
                    else:
                        loss = sum(wrapped([image / 255 for image in batch.images], batch.labels).values())
                precision.backward(loss)
            lr = recipe.lr_at(epoch * found.steps + step, total)
            stats, _ = precision.step(optimizer, lr, asked=run.asked())
            run.after_step(stats, lr)
        record = run.end_of_training_epoch(recipe.lr_at((epoch + 1) * found.steps, total))
        record |= evaluate(run, model, found.val, run.out / f"pictures/epoch_{epoch:03d}.png")
        run.end_of_epoch(record, record[PANELS[run.method][0]])
    script.finish(run, ["train_loss"], PANELS[run.method])


def parse_args(argv: list[str] | None = None):
    """(arguments, the recipe with the flags given, the paper's recipe)."""
    parser = cli.Parser(prog="python -m common.dense", description=__doc__)
    parser.add_argument("task", choices=RECIPES)
    parser.add_argument("--model", metavar="SCRIPT/MODEL", help="for official weights, or from scratch")
    parser.add_argument("--recipe", metavar="NAME", help=", ".join(itertools.chain(*RECIPES.values())))
    parser.add_argument("--multi-scale", action="store_true", default=None, help="--eval: scales 0.5-1.75, flips too")
    cli._add_run_flags(parser)
    cli._add_recipe_flags(parser, Recipe)
    parser._option_string_actions["--data"].help = "see above"
    args = parser.parse_args(argv)
    cli.refuse(args, ("coarse_labels", "eval_data", "real_labels", "predict", "export", "val_data"), "not for dense")
    cli.refuse(args, ("crop", "rois") if args.task == "segment" else ("multi_scale",), f"not for {args.task}")
    paper, *_, own = recipes = RECIPES[args.task]
    args.data = args.data or own
    args.recipe = args.recipe or (own if args.data == own else paper)
    cli.check_choice("--recipe", args.recipe, recipes)
    if ":" not in args.data:
        args.data = f"{args.data}:." if args.data in ("shapes", "scenes") else f"masks:{args.data}"
    cli.check_choice("--data", args.data.partition(":")[0], READERS[args.task])
    for flag in ("short", "test_size"):
        if (size := getattr(args, flag)) and size[0] > size[1]:
            raise UserError(f"--{flag.replace('_', '-')} {size[0]}x{size[1]}: the smaller one comes first")
    return args, cli.override(recipes[args.recipe], args), recipes[paper]


def main() -> None:
    args, recipe, paper = parse_args()
    if args.eval and not (args.weights or args.out):
        raise UserError("--eval: give --weights FILE, or --out, the run's folder")
    args.weights = args.weights or (f"{args.out}/last.pt" if args.eval else None)
    content = checkpoint.load(args.weights, "--weights") if args.weights else {}
    held, name, where = content.get("method"), content.get("model_name"), f"--weights {args.weights}"
    if args.eval and held != args.task:
        raise UserError(f"{where}: holds {held}, no run of {args.task}")
    own = "" if content else "patchconvnet/patchconvnet_nano"  # weights that do not name their model need --model
    args.model = args.model or (name if args.eval else f"{held}/{name}" if held else own)
    run = Run(args.task, args, recipe, paper, content)
    if not args.eval:
        return train(run, content)
    as_trained = lambda args, recipe, count: build(args.task, recipe, args.model, count, recipe.img_size)  # noqa: E731
    model, run.recipe, classes = trained_model(run, as_trained, content=content)
    val = sources.open_data(args.data, splits=("val",))["val"]
    if classes != val.classes:
        raise UserError(f"--data {args.data}: its {len(val.classes)} classes are not the {len(classes)} of {where}")
    found = evaluate(run, model, val)
    if args.multi_scale:
        scales = dict(scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flips=((), (-1,)))
        found |= {f"{key}_multi": value for key, value in evaluate(run, model, val, **scales).items()}
    run.say("  ".join(f"{key} {value:.2f}" for key, value in found.items()))


if __name__ == "__main__":
    launch(main)
