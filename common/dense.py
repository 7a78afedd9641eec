"""Dense prediction on the methods' trunks: semantic segmentation (UPerNet) and detection (Mask R-CNN).

    torchrun --nproc_per_node 8 -m common.dense segment --weights runs/vit_b/last.pt --data ade20k:/data
    torchrun --nproc_per_node 8 -m common.dense detect --weights runs/patchconvnet_s60/last.pt --data coco:/data
    python -m common.dense segment --eval --multi-scale --weights runs/segment_deit3_vit_b/last.pt --data ade20k:/data

Data: shapes (segment), scenes (detect), ade20k:FOLDER as MIT publishes it, coco:FOLDER, or a FOLDER of images/, masks/
(PNGs of the same names, of line numbers from 0; 255: ignored) and classes.txt (a name per line), both with train/ and
val/ below, or every fifth image validates. Numbers: thesis sections 4.3.6, 5.3.3, 6.3.5.2; what it leaves open is of
XCiT's published configurations, its base: [xcit]. Where it differs from these: images are padded to whole patches; the
contrast is changed after the brightness, not at times last; Mask R-CNN is torchvision's (smooth L1 with beta 1/9, 2
samples per RoI bin), crowds take no part in its training, and its losses are means over a micro-batch, hence depend on
how the batch is cut; segmentation's do not. Checked here: parameters, AP, the built-in data (tests/). Not run here:
ADE20k, COCO."""

import functools
import importlib
import json
import math
import random
from collections import defaultdict
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
from torchvision.transforms.v2 import functional as tv

from common import checkpoint, cli, data, images, report, script, shapes
from common.errors import UserError, one_line
from common.evaluate import normalize
from common.optim import make_optimizer
from common.precision import Precision
from common.run import Run, launch
from common.sources import EXTENSIONS, JUNK, Files, Source

# ---- Recipes ---------------------------------------------------------------------------------------------------------

Size = tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """What both tasks have; values of UPerNet on ADE20k: 160,000 iterations (section 5.3.3), the rest [xcit]."""

    epochs: Annotated[int, "epochs", "1 or more"] = 80
    epoch_steps: Annotated[int | None, "optimizer steps of an epoch; none: one pass", "1 or more"] = 2000
    batch_size: Annotated[int, "images per optimizer step, over all GPUs", "1 or more"] = 16
    lr: Annotated[float, "peak learning rate", "above 0"] = 6e-5
    warmup_steps: Annotated[int, "steps of linear warm-up, from a millionth", "0 or more"] = 1500
    weight_decay: Annotated[float, "not on norms, biases, position embedding", "0 or more"] = 0.01
    drop_path: Annotated[float | None, "stochastic depth of all blocks; unset: the script's", "in [0, 1)"] = None
    img_size: Annotated[Size, "training crop, SIDE or HxW; detect: for position embeddings", "1 or more"] = (512, 512)
    width: Annotated[int | None, "of the heads; unset: 512, in ViTs the trunk's; detect: 256", "1 or more"] = None
    warmup_epochs = min_lr = warmup_lr = 0  # no fields: what cli.override knows of other schedules


@dataclass(frozen=True)
class Segment(Recipe):
    resize: Annotated[Size, "longest long side x longest short side in training", "1 or more"] = (2048, 512)
    jitter: Annotated[float, "that times a factor in 1/jitter..jitter", "1 or more"] = 2.0
    photometric: Annotated[bool, "photometric distortion: true or false"] = True
    test_resize: Annotated[Size, "as --resize, in tests", "1 or more"] = (2048, 512)
    window: Annotated[bool, "test by a sliding window of the crop's size: true or false"] = False
    dropout: Annotated[float, "of channels before the classifiers", "in [0, 1)"] = 0.1


@dataclass(frozen=True)
class Detect(Recipe):
    short: Annotated[Size, "shortest x longest short side in training; tests: the longest", "1 or more"] = (480, 800)
    long: Annotated[int, "the longest long side", "1 or more"] = 1333
    crop: Annotated[bool, "half of the images first to 400-600, crop of 384-600: true or false"] = True
    rois: Annotated[int, "regions per image that the heads are trained on", "1 or more"] = 512


RECIPES = {  # of each task the paper's first; the last, not of the thesis: the built-in data in minutes on a CPU core
    "segment": {
        "ade20k": Segment(),
        # Table 4.6: crops of 224 from (896, 224), in tests "the usual resolution", by a sliding window (section 4.3.6).
        "ade20k_224": Segment(img_size=(224, 224), resize=(896, 224), window=True),
        "shapes": Segment(3, 100, lr=2e-3, warmup_steps=20, img_size=(64, 64), resize=(64, 64), jitter=1.1,
                          photometric=False, test_resize=(64, 64), width=32),
    },
    "detect": {  # "3x": 36 epochs (section 5.3.3); the rest [xcit]
        "coco": Detect(36, None, lr=1e-4, warmup_steps=500, weight_decay=0.05),
        "scenes": Detect(4, 100, batch_size=4, lr=2e-3, warmup_steps=20, img_size=(128, 128), short=(128, 128),
                         long=128, crop=False, rois=64, width=32),
    },
}  # fmt: skip
PANELS = {"segment": ["val_miou", "val_pixels"], "detect": ["val_box_AP", "val_box_AP50", "val_mask_AP"]}


def lr_at(recipe: Recipe, step: int, total: int) -> float:
    """Learning rate of step 0..total: linear to 0; detection: a tenth after 27/36 and after 33/36; warm-up over it."""
    falls = sum(36 * step >= part * total for part in (27, 33))
    rate = recipe.lr * (0.1**falls if isinstance(recipe, Detect) else 1 - step / total)
    return rate * (1e-6 + (1 - 1e-6) * step / recipe.warmup_steps if step < recipe.warmup_steps else 1)


# ---- Networks --------------------------------------------------------------------------------------------------------

upsampled = functools.partial(F.interpolate, mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> four maps (B, C, .., ..) of strides p/4, p/2, p, 2p for a trunk of stride p, by
    deconvolutions and a max-pool [xcit]. PatchConvNet's final output feeds all four (section 5.3.3); of the others
    blocks 4, 6, 8, 12 of 12 do [xcit], in proportion where there are more. With fpn: the five maps of a feature pyramid
    network (arXiv:1612.03144) of that width. What of the trunk does not lead there is frozen, or with fpn removed."""

    def __init__(self, trunk: nn.Module, fpn: int | None = None):
        super().__init__()
        embed = [module for module in trunk.patch_embed.modules() if isinstance(module, nn.Conv2d)]
        self.trunk, self.dim, depth = trunk, embed[-1].out_channels, len(trunk.blocks)
        self.stride, self.out_channels, dim = math.prod(conv.stride[0] for conv in embed), fpn, self.dim
        self.is_map = not hasattr(trunk, "grid")  # (B, H, W, C) runs through the blocks, not tokens
        self.one_size = not self.is_map and not hasattr(trunk, "pos_embed")  # ResMLP
        self.taken = [depth - 1 if self.is_map else math.ceil(k * depth / 12) - 1 for k in (4, 6, 8, 12)]
        known = ("cls_token", "dist_token", "head", "head_dist", "norm", "blocks_token_only")
        held = [name for name in known if getattr(trunk, name, None) is not None]
        self.tokens = [name for name in held[:2] if name in known[:2] and "blocks_token_only" not in held]
        for name in set(held) - set(self.tokens):
            getattr(trunk, name).requires_grad_(False)
            # Table 6.12 counts a ViT's parameters without its classifier, Table 5.3 PatchConvNet's with it.
            if fpn or (name.startswith("head") and not self.is_map):
                delattr(trunk, name)
        up = [nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2) for _ in range(3)]
        self.up4, self.up2 = nn.Sequential(up[0], nn.BatchNorm2d(dim), nn.GELU(), up[1]), up[2]
        last = ops.feature_pyramid_network.LastLevelMaxPool()
        self.fpn = ops.FeaturePyramidNetwork([dim] * 4, fpn, extra_blocks=last) if fpn else None

    def placed(self, x: torch.Tensor, grid: Size) -> torch.Tensor:
        """Patches (B, N, C) as they enter the blocks: position embedding added, interpolated to other grids than its
        own (bicubic: section 3.4.5), tokens in front."""
        position, own = self.trunk.pos_embed, self.trunk.grid
        first = position.shape[1] - own[0] * own[1]  # of the tokens: DeiT's have positions
        patches = position[:, first:].unflatten(1, own).permute(0, 3, 1, 2)
        if grid != own:
            patches = F.interpolate(patches.float(), size=grid, mode="bicubic", align_corners=False)
        tokens = torch.cat([x[:1, :0], *(getattr(self.trunk, name) for name in self.tokens)], dim=1)
        tokens = tokens + position[:, :first] if first else tokens
        return torch.cat([tokens.expand(len(x), -1, -1), x + patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor] | dict[str, torch.Tensor]:
        (height, width), p, maps = images.shape[-2:], self.stride, {}
        grid = (-(-height // p), -(-width // p))
        images = F.pad(images, (0, grid[1] * p - width, 0, grid[0] * p - height))
        x = self.trunk.patch_embed(images).to(self.up2.weight.dtype)  # under autocast too the stream is not of 16 bits
        x = x if self.is_map or self.one_size else self.placed(x, grid)
        for number, block in enumerate(self.trunk.blocks):
            x = block(x)
            if number in self.taken:
                patches = x if self.is_map else x[:, len(self.tokens) :].unflatten(1, grid)
                maps[number] = patches.permute(0, 3, 1, 2)
        a, b, c, d = (maps[number] for number in self.taken)
        levels = [self.up4(a), self.up2(b), c, F.max_pool2d(d, 2, ceil_mode=True)]
        return self.fpn({str(i): level for i, level in enumerate(levels)}) if self.fpn else levels


class Segmenter(nn.Module):
    """UPerNet (arXiv:1807.10221), images (B, 3, H, W) of any size, but of ResMLP -> logits (B, K, H, W); in training
    mode a pair of them, the second by the auxiliary head, a 3 x 3 convolution to 256 on the third level [xcit]."""

    def __init__(self, trunk: nn.Module, classes: int, width: int | None = None, dropout: float = 0.1):
        super().__init__()
        self.pyramid, conv = Pyramid(trunk), ops.Conv2dNormActivation
        dim = self.pyramid.dim
        width = width or (512 if self.pyramid.is_map else min(512, dim))  # section 6.3.5.2, Table 5.3
        self.pools = nn.ModuleList(conv(dim, width, 1) for _ in range(4))
        self.pooled = conv(dim + 4 * width, width, 3)
        self.lateral = nn.ModuleList(conv(dim, width, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in range(3))
        self.join = nn.Sequential(conv(4 * width, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1))
        self.auxiliary = nn.Sequential(conv(dim, 256, 3), nn.Dropout2d(dropout), nn.Conv2d(256, classes, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        (height, width), p = images.shape[-2:], self.pyramid.stride
        *fine, last = self.pyramid(images)
        pools = [pool(F.adaptive_avg_pool2d(last, side)) for pool, side in zip(self.pools, (1, 2, 3, 6))]
        path = [self.pooled(torch.cat([last, *(upsampled(x, last.shape[-2:]) for x in pools)], dim=1))]
        for lateral, x in zip(self.lateral, reversed(fine)):
            path.append(lateral(x) + upsampled(path[-1], x.shape[-2:]))
        path[1:] = [smooth(x) for smooth, x in zip(self.smooth, path[1:])]
        outputs = [self.join(torch.cat([upsampled(x, fine[0].shape[-2:]) for x in path], dim=1))]
        outputs += [self.auxiliary(fine[2])] if self.training else []
        outputs = [upsampled(x, (height + -height % p, width + -width % p))[..., :height, :width] for x in outputs]
        return tuple(outputs) if self.training else outputs[0]


def segment_loss(outputs: tuple[torch.Tensor, torch.Tensor], masks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, K, H, W) plus 0.4 of the auxiliary ones' [xcit]; masks int64 (B, H, W). Pixels of
    255 have none but count in the mean, as there: it does not depend on how the batch is cut."""
    main, auxiliary = (F.cross_entropy(x.float(), masks, ignore_index=IGNORED, reduction="sum") for x in outputs)
    return (main + 0.4 * auxiliary) / masks.numel()


class Detector(MaskRCNN):
    """torchvision's Mask R-CNN: images, a list of (3, H, W) in 0..1, and in training targets (boxes (N, 4), labels 1..K
    (N,), masks (N, H, W)) -> losses, or boxes, labels, scores, masks. Anchors are 8 strides wide."""

    def __init__(self, trunk: nn.Module, classes: int, recipe: Detect):
        width = recipe.width or 256
        pyramid = Pyramid(trunk, width)
        if pyramid.one_size or pyramid.stride not in (8, 16):
            raise UserError("detect: needs a trunk for images of any size whose patches are 8 or 16 pixels wide")
        anchors = [(pyramid.stride * 2**k,) for k in range(1, 6)], [(0.5, 1.0, 2.0)] * 5
        super().__init__(
            pyramid, min_size=max(recipe.short), max_size=recipe.long, box_batch_size_per_image=recipe.rois,
            _skip_resize=True,  # in training: augment_detect has done it
            rpn_anchor_generator=anchor_utils.AnchorGenerator(*anchors),
            box_head=faster_rcnn.TwoMLPHead(49 * width, 4 * width),
            box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, classes + 1),
            mask_head=mask_rcnn.MaskRCNNHeads(width, (width,) * 4, 1),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(width, width, classes + 1),
        )  # fmt: skip


def build(recipe: Recipe, name: str, img_size: int | Size, classes: int, fill=lambda trunk: None) -> nn.Module:
    """Segmenter or Detector on the trunk SCRIPT/MODEL for that image size, which fill(trunk) gives its weights;
    UserError if it has no patch grid or cannot take the size."""
    method, _, model = name.partition("/")
    if not method.isidentifier() or not Path(__file__).parents[1].joinpath(f"{method}.py").is_file():
        raise UserError(f"--model {name}: needs {method}.py beside common/; write SCRIPT/MODEL, such as deit3/vit_b")
    made_by = importlib.import_module(method)
    cli.check_choice(f"--model {method}/", model, made_by.MODELS)
    try:
        trunk = made_by.build_model(model, 1000, img_size)
    except ValueError as error:
        raise UserError(f"--img-size: {error}") from None
    if not hasattr(trunk, "blocks"):
        raise UserError(f"--model {name}: has no patch grid; choose a model of deit, deit3, cait, resmlp, patchconvnet")
    fill(trunk)
    for block in trunk.blocks if recipe.drop_path is not None else ():
        block.drop_path = recipe.drop_path
    segment, plain = isinstance(recipe, Segment), trunk.no_weight_decay()
    whole = Segmenter(trunk, classes, recipe.width, recipe.dropout) if segment else Detector(trunk, classes, recipe)
    names = {name for name, _ in whole.named_parameters() if name.split("trunk.")[-1] in plain}
    whole.no_weight_decay = lambda: names
    return whole


def build_segmenter(name: str, classes: int, img_size: int | Size = 512) -> Segmenter:
    """A fresh UPerNet on the trunk SCRIPT/MODEL, for Tables 5.3 and 6.12: see Segmenter, and build for errors."""
    return build(RECIPES["segment"]["ade20k"], name, img_size, classes)


def build_detector(name: str, classes: int, img_size: int | Size = 512) -> Detector:
    """A fresh Mask R-CNN on it, for Table 5.6, position embeddings kept at img_size: see Detector, and build."""
    return build(RECIPES["detect"]["coco"], name, img_size, classes)


# ---- Data ------------------------------------------------------------------------------------------------------------

IGNORED = 255  # in masks: pixels without a label
Sample = tuple[torch.Tensor, dict[str, torch.Tensor]]  # image uint8 (3, H, W); "mask", or "boxes", "labels", "masks"


class MaskFiles(Files):
    """Those images of a folder whose position is `chosen`, with PNG masks in another; first: the number there of class
    0 (ADE20k's 0 is nothing known). UserError for what is missing; of sample(), ValueError for what is wrong."""

    def __init__(self, inputs: Path, masks: Path, classes: list[str], first: int = 0, chosen=lambda i: True):
        if absent := [folder for folder in (inputs, masks) if not folder.is_dir()]:
            raise UserError(f"--data: no folder {absent[0]}; the head of common/dense.py says what is expected")
        names = sorted(f.name for f in inputs.iterdir() if f.suffix.lower() in EXTENSIONS and not JUNK.search(f.name))
        names = [name for i, name in enumerate(names) if chosen(i)]
        self.first, self.masks = first, [masks / f"{Path(name).stem}.png" for name in names]
        if (lost := [str(mask) for mask in self.masks if not mask.is_file()]) or not names:
            raise UserError(f"--data: {inputs}: {len(names)} images, {len(lost)} without mask {' '.join(lost[:1])}")
        super().__init__(inputs, names, classes, np.zeros(len(names)))

    def sample(self, index: int) -> Sample:
        image, file, last = self.read(index), self.masks[index], len(self.classes) - 1
        try:
            numbers = np.asarray(Image.open(file))
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise ValueError(f"its mask {file}: {error}") from None
        if numbers.shape != tuple(image.shape[1:]):
            raise ValueError(f"its mask {file} is of shape {numbers.shape}, the image of {tuple(image.shape[1:])}")
        mask = np.where((numbers < self.first) | (numbers == IGNORED), IGNORED, numbers.astype(int) - self.first)
        if len(bad := mask[(mask > last) & (mask != IGNORED)] + self.first):
            raise ValueError(f"its mask {file}: label {bad[0]} is outside {self.first}..{last + self.first}")
        return image, {"mask": tv_tensors.Mask(mask.astype(np.uint8))}


class Drawn(Source):
    """The built-in images with their masks, background first; or scenes of 2 x 2 of them."""

    def __init__(self, split: str, scenes: bool):
        self.split, self.scenes, self.title = split, scenes, f"{'scenes' if scenes else 'shapes'} {split}"
        self.images = shapes.TRAIN_IMAGES if split == "train" else shapes.VAL_IMAGES
        count = self.images // 4 if scenes else self.images
        super().__init__(shapes.CLASSES if scenes else ["background", *shapes.CLASSES], np.zeros(count))

    def sample(self, index: int) -> Sample:
        rng, side = random.Random(f"scenes-{self.split}-{index}"), shapes.SIZE
        if not self.scenes:
            image, mask, label = shapes.draw(self.split, index)
            return images.from_numpy(image), {"mask": tv_tensors.Mask(mask * np.uint8(label + 1))}
        parts, masks, labels = zip(*(shapes.draw(self.split, rng.randrange(self.images)) for _ in range(4)))
        margins = [[(i // 2 * side, side - i // 2 * side), (i % 2 * side, side - i % 2 * side)] for i in range(4)]
        scene = np.vstack([np.hstack(parts[:2]), np.hstack(parts[2:])])
        return images.from_numpy(scene), instances(np.stack(list(map(np.pad, masks, margins))), [i + 1 for i in labels])


class CocoFiles(Files):
    """COCO's images and annotations; training leaves out crowds, specks and images with nothing else [xcit]."""

    def __init__(self, file: Path, train: bool):
        try:
            content, self.of_image = json.loads(file.read_text()), defaultdict(list)
            order = sorted(content["categories"], key=lambda c: c["id"])
            label = {c["id"]: number for number, c in enumerate(order, 1)}
            for a in content["annotations"]:
                if not train or not (a.get("iscrowd") or min(a["bbox"][2:]) < 1):
                    self.of_image[a["image_id"]].append({**a, "category_id": label[a["category_id"]]})
            chosen = [i for i in content["images"] if not train or i["id"] in self.of_image]
            self.ids, names = [i["id"] for i in chosen], [i["file_name"] for i in chosen]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"--data: {file} holds no COCO annotations ({type(error).__name__}: {error})") from None
        folder = file.parents[1] / file.stem.removeprefix("instances_")
        if lost := sorted(set(names) - {f.name for f in folder.glob("*")}):
            raise UserError(f"--data: {len(lost)} of {len(names)} images are not in {folder}, e.g. {lost[0]}")
        super().__init__(folder, names, [c["name"] for c in order], np.zeros(len(names)))

    def sample(self, index: int) -> Sample:
        image, chosen = self.read(index), self.of_image[self.ids[index]]
        masks = [mask_of(a["segmentation"], tuple(image.shape[1:])) for a in chosen]
        boxes = ops.box_convert(torch.tensor([a["bbox"] for a in chosen]).reshape(-1, 4), "xywh", "xyxy")
        masks = np.array(masks, bool).reshape(-1, *image.shape[1:])
        crowd = torch.tensor([bool(a.get("iscrowd")) for a in chosen])
        return image, instances(masks, [a["category_id"] for a in chosen], boxes) | {"crowd": crowd}


def instances(masks: np.ndarray, labels: list[int], boxes: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Detection's truth: masks (N, H, W), labels from 1, boxes x0 y0 x1 y1, None: those that enclose the masks."""
    masks = tv_tensors.Mask(masks.astype(np.uint8))
    boxes = ops.masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]) if boxes is None else boxes
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=masks.shape[1:], dtype=torch.float32)
    return {"boxes": tv.clamp_bounding_boxes(boxes), "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


def open_truth(task: str, spec: str, say=print, splits=("train", "val")) -> dict[str, Source]:
    """The splits of a --data value, see the head of this file; UserError for what is missing."""
    name, _, folder = spec.partition(":")
    if spec == list(RECIPES[task])[-1]:
        return {split: Drawn(split, task == "detect") for split in splits}
    if task == "detect":
        found = {split: sorted(Path(folder).glob(f"annotations/instances_{split}*.json")) for split in splits}
        if name != "coco" or not all(found.values()):
            files = "annotations/instances_{train,val}*.json"
            raise UserError(f"--data {spec}: neither scenes nor coco:FOLDER with {files}")
        return {split: CocoFiles(files[0], split == "train") for split, files in found.items()}
    first = int(name == "ade20k")
    root = next(filter(Path.is_dir, [Path(folder, "ADEChallengeData2016")]), Path(folder)) if first else Path(spec)
    table, masks = root / ("objectInfo150.txt" if first else "classes.txt"), "annotations" if first else "masks"
    if not table.is_file():
        raise UserError(f"--data {spec}: no file {table}; the head of common/dense.py says what is expected")
    lines = table.read_text(encoding="utf-8").splitlines()[first:]  # ADE20k's has a head, and the names come last
    classes = [line.split("\t")[-1].strip() for line in lines if line.strip()]
    if not 1 < len(classes) <= IGNORED:
        raise UserError(f"{table}: {len(classes)} classes; 2 to {IGNORED} can be told apart")
    if first or (root / "images/train").is_dir():
        names = {split: {"train": "training", "val": "validation"}[split] if first else split for split in splits}
        return {s: MaskFiles(root / "images" / part, root / masks / part, classes, first) for s, part in names.items()}
    say(f"{root}: without images/train and images/val every fifth image validates")
    which = {"train": lambda i: i % 5 > 0, "val": lambda i: i % 5 == 0}
    return {split: MaskFiles(root / "images", root / masks, classes, 0, which[split]) for split in splits}


def each(change, sample: Sample, *how, **more) -> Sample:
    """A geometric change of the image and of what lies on it."""
    image, truth = sample
    moved = {k: change(v, *how, **more) if isinstance(v, tv_tensors.TVTensor) else v for k, v in truth.items()}
    return change(image, *how, **more), moved


def resized(sample: Sample, long: int, short: int, factor: float = 1.0) -> Sample:
    """The longest that fits into long side x short side, times a factor; bilinear, masks by the nearest pixel."""
    height, width = sample[0].shape[1:]
    factor *= min(long / max(height, width), short / min(height, width))
    return each(tv.resize, sample, [max(1, round(height * factor)), max(1, round(width * factor))], antialias=True)


def cropped(sample: Sample, height: int, width: int, rng: random.Random) -> Sample:
    """A window of that size, or of the image's where that is smaller, at a random place."""
    have = sample[0].shape[1:]
    h, w = min(height, have[0]), min(width, have[1])
    return each(tv.crop, sample, rng.randint(0, have[0] - h), rng.randint(0, have[1] - w), h, w)


def augment_segment(recipe: Segment, sample: Sample, rng: random.Random) -> Sample:
    """Resize, a crop with no class above 75% of it (10 attempts), flip, photometric distortion, padding [xcit]."""
    sample = resized(sample, *recipe.resize, rng.uniform(1 / recipe.jitter, recipe.jitter))
    for _ in range(10):
        crop = cropped(sample, *recipe.img_size, rng)
        counts = crop[1]["mask"].flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
        if counts.max() < 0.75 * counts.sum():
            break
    image, truth = each(tv.horizontal_flip, crop) if rng.random() < 0.5 else crop
    kinds = [("brightness", 1 / 8), ("contrast", 0.5), ("saturation", 0.5), ("hue", 0.1)] if recipe.photometric else []
    for kind, most in kinds:
        if rng.random() < 0.5:
            image = getattr(tv, f"adjust_{kind}")(image, (kind != "hue") + rng.uniform(-most, most))
    missing = [0, 0, recipe.img_size[1] - image.shape[2], recipe.img_size[0] - image.shape[1]]
    return tv.pad(image, missing, fill=[124, 116, 104]), {"mask": tv.pad(truth["mask"], missing, fill=IGNORED)}


def augment_detect(recipe: Detect, sample: Sample, rng: random.Random) -> Sample:
    """Flip; half of the images: short side 400, 500 or 600 and a crop of sides 384-600; short side 480-800 [xcit]."""
    sample = each(tv.horizontal_flip, sample) if rng.random() < 0.5 else sample
    if recipe.crop and rng.random() < 0.5:
        sample = resized(sample, 10**6, rng.choice((400, 500, 600)))
        sample = cropped(sample, *(rng.randint(min(384, side), min(600, side)) for side in sample[0].shape[1:]), rng)
    image, truth = resized(sample, recipe.long, rng.choice(range(min(recipe.short), max(recipe.short) + 1, 32)))
    sides = ops.box_convert(truth["boxes"].as_subclass(torch.Tensor), "xyxy", "xywh")[:, 2:]
    kept = (sides >= 1).all(1) & (truth["masks"].flatten(1) > 0).any(1)
    return image, {key: value[kept] for key, value in truth.items()}


class TruthSamples(data.Samples):
    """(images, a list of uint8 (3, h, w), nothing, their truths, indices (B,)), or what could not be read."""

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> tuple | str:
        pictures, truths = [], []
        for number, index, _ in keys:
            try:
                sample = self.source.sample(index)
            except (OSError, ValueError) as error:
                return f"{self.source.name(index)}: {one_line(error, 1000)}"
            rng = random.Random((((self.seed << 32) + number) << 40) + (index << 8))
            image, truth = self.transform(sample, rng)
            pictures.append(image)
            truths.append({key: value.as_subclass(torch.Tensor) for key, value in truth.items()})
        return pictures, torch.empty(0), truths, torch.tensor([index for _, index, _ in keys])


class Passes(data.GlobalBatches):
    """Epochs of any number of steps: one permutation of the images after the other, whatever epochs end between."""

    def __iter__(self):
        order, length = functools.lru_cache(8)(data.epoch_order), self.length
        for step in range(self.first_step, self.steps):
            first = (self.epoch * self.steps + step) * self.batch_size
            for part in range(self.accumulation):
                numbers = [first + i for i in self.groups(part)]
                yield [(n // length, int(order(length, n // length, self.seed, 1)[n % length]), 0) for n in numbers]


class TruthData(data.TrainingData):
    """The same for images with dense truths."""

    def __init__(self, run: Run, recipe: Recipe):
        args, self.run, self.group = run.args, run, 1
        splits = ("train",) if args.val_data == "none" else ("train", "val")
        found = run.first(lambda: open_truth(run.method, args.data, run.say, splits))
        self.source, self.val = found["train"], found.get("val")
        self.classes, size = self.source.classes, recipe.batch_size
        self.micro_batch, self.accumulation = data.split_batch(size, run.world, args.micro_batch, 1)
        self.batches = Passes(len(self.source), batch_size=size, micro_batch=self.micro_batch, group=1,
                              world_size=run.world, rank=run.rank, repeats=1, seed=args.seed)  # fmt: skip
        self.steps = self.batches.steps = recipe.epoch_steps or max(1, self.batches.steps)
        augment = functools.partial(augment_segment if run.method == "segment" else augment_detect, recipe)
        samples = TruthSamples(self.source, augment, args.seed)
        self.loader = data.make_loader(samples, self.batches, run.workers, run.device)


# ---- COCO's average precision ----------------------------------------------------------------------------------------

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU


def mask_of(segmentation: dict | list, size: Size) -> np.ndarray:
    """COCO's polygons, run lengths or compressed run lengths as a mask, bool (H, W), pixel for pixel COCO's own."""
    if isinstance(segmentation, list):
        return np.any([polygon_mask(np.array(corners, float).reshape(-1, 2), size) for corners in segmentation], axis=0)
    (height, width), runs = segmentation["size"], segmentation["counts"]
    if not isinstance(runs, list):
        text, runs, value, shift = runs.encode() if isinstance(runs, str) else runs, [], 0, 0
        for byte in text:
            value, shift = value | (byte - 48 & 31) << shift, shift + 5
            if not byte - 48 & 32:  # the last 5 bits, the highest of which is the sign; differences from the third on
                value -= (byte - 48 & 16) << shift - 4
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def polygon_mask(corners: np.ndarray, size: Size) -> np.ndarray:
    """One polygon, corners (N, 2) x y. As COCO defines it: edges are followed in steps of a fifth of a pixel, a pixel
    column is crossed at its middle, and what lies between two crossings is inside."""
    (height, width), start, path = size, np.trunc(5 * corners + 0.5).astype(int), []
    for a, b in zip(start, np.roll(start, -1, axis=0)):
        axis = int(abs(b[1] - a[1]) > abs(b[0] - a[0]))  # along which steps are taken, from its lower end
        low, high = (b, a) if a[axis] > b[axis] else (a, b)
        steps = np.arange(high[axis] - low[axis] + 1)
        slope = (high - low)[1 - axis] / max(1, len(steps) - 1)
        points = np.stack([steps + low[axis], np.trunc(low[1 - axis] + slope * steps + 0.5)])
        path.append((points[::-1] if axis else points)[:, :: -1 if low is b else 1])
    path = np.concatenate(path, axis=1)  # (2, points): x and y
    x, y = (np.minimum(path[:, 1:], path[:, :-1])[:, np.diff(path[0]) != 0] + 0.5) / 5 - 0.5
    crossed = (x == np.floor(x)) & (x >= 0) & (x <= width - 1)
    places = (x * height + np.ceil(y.clip(0, height)))[crossed].astype(int)
    return (np.bincount(places, minlength=height * width + 1)[:-1].cumsum() % 2 == 1).reshape(width, height).T


def results(image: int, found: dict[str, torch.Tensor]) -> list[dict]:
    """One image's instances (boxes, labels, masks, scores or none, crowd or none) as COCO's annotations or results."""
    scores, crowd = (found.get(key, torch.zeros(len(found["labels"]))).tolist() for key in ("scores", "crowd"))
    boxes, rows = ops.box_convert(found["boxes"], "xyxy", "xywh").tolist(), []
    for i, (label, mask) in enumerate(zip(found["labels"].tolist(), found["masks"].cpu().numpy().astype(bool))):
        changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
        shape = {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=mask.size).tolist()}
        row = {"image_id": image, "category_id": label, "bbox": boxes[i], "segmentation": shape}
        rows.append(row | {"iscrowd": int(crowd[i]), "score": scores[i]})
    return rows


def overlaps(found: list[dict], truth: list[dict], crowd: np.ndarray, kind: str) -> np.ndarray:
    """IoU (D, G) of detections and truths; with a crowd the share of the detection that it covers."""
    if kind == "segm":
        shapes = [row["segmentation"] for row in found + truth]
        corners = [np.reshape(polygon, (-1, 2)).max(0) for s in shapes if isinstance(s, list) for polygon in s]
        sizes = [tuple(s["size"]) for s in shapes if isinstance(s, dict)]  # without any: as large as it takes
        size = sizes[0] if sizes else np.ceil(np.max(corners, axis=0)).astype(int)[::-1] + 1
        masks = np.array([mask_of(s, size).ravel() for s in shapes], np.float32)
        a, b = masks[: len(found)], masks[len(found) :]
        both, area_a, area_b = (a @ b.T).astype(float), a.sum(1, dtype=float), b.sum(1, dtype=float)
    else:
        a, b = (np.array([x["bbox"] for x in rows], float) for rows in (found, truth))
        ends = [np.minimum.outer(a[:, i] + a[:, i + 2], b[:, i] + b[:, i + 2]) for i in (0, 1)]
        both = math.prod((ends[i] - np.maximum.outer(a[:, i], b[:, i])).clip(0) for i in (0, 1))
        area_a, area_b = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
    union = np.where(crowd, area_a[:, None], area_a[:, None] + area_b - both)
    return np.divide(both, union, out=np.zeros_like(both), where=both > 0)


def matched(truth: list[dict], found: list[dict], kind: str) -> tuple:
    """One category in one image: (scores (D,), hits (T, D), ignored (T, D), number of truths that count), for each of
    COCO's thresholds T: by falling score a detection takes the free truth of largest IoU, or else lies in a crowd."""
    found = sorted(found, key=lambda row: -row["score"])[:100]
    truth = sorted(truth, key=lambda row: bool(row.get("iscrowd")))
    crowd = np.array([bool(row.get("iscrowd")) for row in truth], bool)
    hits, ignored = np.zeros((2, len(THRESHOLDS), len(found)), bool)
    taken = np.zeros((len(THRESHOLDS), len(truth)), bool)
    for d, shares in enumerate(overlaps(found, truth, crowd, kind) if found and truth else ()):
        fits = (shares >= np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]) & (crowd | ~taken)
        for group in (~crowd, crowd):
            rest = fits & group & ~hits[:, d, None]
            best = len(truth) - 1 - np.where(rest, shares, -1)[:, ::-1].argmax(1)  # of equal ones the last
            new = np.flatnonzero(rest.any(1))
            hits[new, d], ignored[new, d], taken[new, best[new]] = True, crowd[best[new]], True
    return np.array([row["score"] for row in found]), hits, ignored, int((~crowd).sum())


def coco_ap(truth: list[dict], detections: list[dict], kind: str = "bbox") -> dict[str, float]:
    """{"AP", "AP50", "AP75"} in 0..1 of COCO's annotations and results, boxes ("bbox", x y w h) or masks ("segm"): all
    areas, at most 100 detections per image and category; 101 recalls, 10 IoUs. -1 where nothing is to be found."""
    cells, of_category, precisions = defaultdict(lambda: ([], [])), defaultdict(list), []
    for number, rows in enumerate((truth, detections)):
        for row in rows:
            cells[row["category_id"], row["image_id"]][number].append(row)
    for category, image in sorted(cells):
        of_category[category].append(matched(*cells[category, image], kind))
    for found in of_category.values():
        scores, hits, ignored = (np.concatenate(part, axis=-1) for part in list(zip(*found))[:3])
        positives, order = sum(count for *_, count in found), np.argsort(-scores, kind="stable")
        right, wrong = ((x & ~ignored)[:, order].cumsum(1).astype(float) for x in (hits, ~hits))
        precision = np.maximum.accumulate((right / (wrong + right + np.spacing(1)))[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))  # 0 beyond the recall that is reached
        if positives:
            at = [np.searchsorted(row / positives, np.linspace(0, 1, 101)) for row in right]
            precisions.append(np.take_along_axis(precision, np.stack(at), axis=1))
    values = np.stack(precisions) if precisions else np.full((1, 10, 1), -1.0)
    return {name: float(values[:, at].mean()) for name, at in (("AP", slice(None)), ("AP50", 0), ("AP75", 5))}


# ---- Evaluation and training -----------------------------------------------------------------------------------------


def windows(model: nn.Module, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Mean logits over windows of h x w that overlap by a third."""
    height, width = x.shape[2:]
    x, total = F.pad(x, (0, max(0, w - width), 0, max(0, h - height))), 0
    for top in {min(i, x.shape[2] - h) for i in range(0, x.shape[2], -(-2 * h // 3))}:
        for left in {min(i, x.shape[3] - w) for i in range(0, x.shape[3], -(-2 * w // 3))}:
            logits = model(x[:, :, top : top + h, left : left + w]).float()
            counted = torch.cat([logits, torch.ones_like(logits[:, :1])], dim=1)
            total = total + F.pad(counted, (left, x.shape[3] - left - w, top, x.shape[2] - top - h))
    return (total[:, :-1] / total[:, -1:])[..., :height, :width]


def predict(run: Run, model: nn.Module, image: torch.Tensor, scales=(1.0,), flips=(False,)) -> dict[str, torch.Tensor]:
    """Of an image uint8 (3, H, W): its "mask" of classes, by the mean probability over scales and flips, or instances
    as the truth has them, and "scores"."""
    recipe, total = run.recipe, 0
    with torch.no_grad(), Precision(run.amp, run.device).autocast():
        if run.method == "detect":
            found = model([image / 255])[0]
            return found | {"masks": found["masks"][:, 0] > 0.5}
        sliding = recipe.window or model.pyramid.one_size
        for scale in scales:
            x = normalize(resized((image, {}), *recipe.test_resize, scale)[0][None])
            for flip in flips:
                y = x.flip(-1) if flip else x
                logits = windows(model, y, *recipe.img_size) if sliding else model(y)
                logits = upsampled((logits.flip(-1) if flip else logits).float(), image.shape[1:])
                total = total + logits.softmax(1)
    return {"mask": total[0].argmax(0)}


def evaluate(run: Run, model: nn.Module, val: Source, **how) -> dict[str, float]:
    """Percent, over all ranks' shares: mean IoU of the classes that occur and pixel accuracy; or box and mask AP."""
    size, rows, truth = len(val.classes), [], []
    keys = data.eval_batches(len(val), 1, run.world, run.rank)
    samples = TruthSamples(val, lambda sample, rng: sample, 0)
    batches = data.to_device(data.make_loader(samples, keys, run.workers, run.device, persistent=False), run.device)
    pairs = torch.zeros(size, size, dtype=torch.int64, device=run.device)  # of true and predicted class
    model.eval()
    for number in range(math.ceil(len(val) / run.world)):
        if number % 8 == 0:
            run.check_stop()
        if number < len(keys):
            (image,), _, (answer,), index = next(batches)
            found = predict(run, model, image, **how)
            if run.method == "segment":
                mask = answer["mask"].long()
                pairs += (mask * size + found["mask"])[mask != IGNORED].bincount(minlength=size**2).view(size, size)
            else:
                rows += results(int(index), found)
                truth += results(int(index), answer)
    if run.method == "segment":
        pairs = run.gather(pairs[None]).sum(0).double()
        right, union = pairs.diag(), pairs.sum(0) + pairs.sum(1) - pairs.diag()
        return {"val_miou": 100 * (right / union)[union > 0].mean().item(),
                "val_pixels": 100 * (right.sum() / pairs.sum()).item()}  # fmt: skip
    parts = [(truth, rows)]
    if run.world > 1:
        torch.distributed.all_gather_object(parts := [None] * run.world, (truth, rows))
    truth, rows = (sum(part, []) for part in zip(*parts))
    found = [(name, coco_ap(truth, rows, kind)) for name, kind in (("box", "bbox"), ("mask", "segm"))]
    return {f"val_{name}_{key}": 100 * value for name, values in found for key, value in values.items()}


def save_pictures(run: Run, model: nn.Module, val: Source, path: Path) -> None:
    """PNG of the first images: as they are, their truth, what the model says (instances of a score above 0.5)."""
    colours, rows = [tuple(row) for row in np.random.default_rng(4).integers(40, 256, (IGNORED, 3)).tolist()], []
    for index in range(min(4, len(val))):
        image, truth = val.sample(index)
        shown = [image]
        for answer in (truth, predict(run, model, image.to(run.device))):
            if run.method == "segment":
                labels, boxes = torch.arange(len(val.classes)), []
                masks = answer["mask"].cpu() == labels[:, None, None]
            else:
                sure = answer.get("scores", torch.ones(len(answer["labels"]))).cpu() > 0.5
                boxes, labels, masks = (answer[key].cpu()[sure] for key in ("boxes", "labels", "masks"))
            mine = [colours[i] for i in labels]
            drawn = utils.draw_segmentation_masks(image, masks.bool(), 0.6, mine) if len(labels) else image
            names = [val.classes[i - 1] for i in labels]
            shown.append(utils.draw_bounding_boxes(drawn, boxes, names, mine) if len(boxes) else drawn)
        rows.append(("" if index else "image, truth, prediction", list(map(images.to_pil, shown))))
    report.save_sheet(path, rows)


def train(run: Run, content: dict) -> None:
    """content: of --weights, a trunk's, or {}."""
    args, recipe = run.args, run.recipe
    found = TruthData(run, recipe)
    total = recipe.epochs * found.steps
    if recipe.warmup_steps >= total:
        raise UserError(f"--warmup-steps {recipe.warmup_steps}: must be less than the {total} of the run")
    if run.method == "detect" and run.world > 1 and run.device.type == "cpu" and args.data != "scenes":
        raise UserError("detect: several ranks need GPUs, a BatchNorm over CPUs takes images of one size only")
    torch.manual_seed(args.seed)

    def fill(trunk: nn.Module) -> None:
        adapt = getattr(importlib.import_module(args.model.split("/")[0]), "fit_resolution", None)
        heard = lambda line: line.startswith("new head") or run.say(line)  # noqa: E731, its classifier is not used
        checkpoint.fit(trunk, content, f"--weights {args.weights}", heard, ema=args.use_ema, adapt=adapt, new_head=True)

    fill = fill if content else lambda trunk: run.say(f"{args.model} from scratch: no --weights")
    model = build(recipe, args.model, recipe.img_size, len(found.classes), fill)
    model.to(run.device, memory_format=run.layout)
    optimizer = make_optimizer("adamw", model, recipe.lr, recipe.weight_decay)
    precision = Precision(run.amp, run.device, accumulation=found.accumulation)
    run.open_folder()
    cut = f"{run.world} ranks x {found.micro_batch} x {found.accumulation} accumulation, {run.amp} on {run.device.type}"
    numbers = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(found.classes)} classes"
    run.say(f"{run.method} {args.data}: {len(found.source)} training, {len(found.val or ())} validation images; "
            f"{args.model}, {numbers}; {recipe.epochs} epochs x {found.steps} steps of {recipe.batch_size} = {cut}\n"
            f"differs from the paper: {'; '.join(cli.differences(recipe, run.paper)) or 'nothing'}")  # fmt: skip
    wrapped = run.prepare(model, found.micro_batch)
    run.start(found.identity(), model=model, optimizer=optimizer, scaler=precision, ema=None)
    run.val_loader = found.val
    run.check_stop()
    for epoch in range(run.epoch, recipe.epochs):
        wrapped.train()
        for step in run.steps(found):
            for batch in found.micro_batches():
                with precision.forward(wrapped):
                    if run.method == "segment":
                        masks = torch.stack([truth["mask"] for truth in batch.labels]).long()
                        loss = segment_loss(wrapped(normalize(torch.stack(batch.images))), masks)
                    else:
                        loss = sum(wrapped([image / 255 for image in batch.images], batch.labels).values())
                precision.backward(loss)
            lr = lr_at(recipe, epoch * found.steps + step, total)
            stats, _ = precision.step(optimizer, lr, asked=run.asked())
            run.after_step(stats, lr)
        record = run.end_of_training_epoch(lr_at(recipe, (epoch + 1) * found.steps, total))
        if found.val:
            record |= evaluate(run, model, found.val)
            run.on_rank_0(lambda: save_pictures(run, model, found.val, run.out / f"pictures/epoch_{epoch:03d}.png"))
        run.end_of_epoch(record, record.get(PANELS[run.method][0]))
    script.finish(run, ["train_loss"], PANELS[run.method])


def parse_args(argv: list[str] | None = None):
    """(arguments, the recipe with the flags given, the paper's recipe)."""
    parser = cli.Parser(prog="python -m common.dense", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="segment | detect", parser_class=cli.Parser)
    for task, kind in (("segment", Segment), ("detect", Detect)):
        sub = commands.add_parser(task, help=f"its recipes: {', '.join(RECIPES[task])}")
        sub.add_argument("--model", metavar="SCRIPT/MODEL", help="for official weights, or from scratch")
        sub.add_argument("--recipe", metavar="NAME", help=f"{', '.join(RECIPES[task])}; default: the data's")
        if task == "segment":
            sub.add_argument("--multi-scale", action="store_true", help="of --eval: by scales 0.5-1.75 and flips too")
        cli._add_run_flags(sub)
        sub._option_string_actions["--data"].help = "see above"
        cli._add_recipe_flags(sub, kind)
    args = parser.parse_args(argv)
    if args.command is None:
        raise UserError("say what to do: segment or detect; see --help")
    cli.refuse(args, ("coarse_labels", "eval_data", "real_labels", "predict", "export"), "not for dense prediction")
    if args.val_data not in (None, "none"):
        raise UserError(f"--val-data {args.val_data}: only none is possible, validation images are part of --data")
    if args.eval and not (args.weights or args.out):
        raise UserError("--eval: needs --weights, or --out for its last.pt")
    paper, *_, own = RECIPES[args.command]
    args.data = args.data or own
    args.recipe = args.recipe or (own if args.data == own else paper)
    cli.check_choice("--recipe", args.recipe, RECIPES[args.command])
    return args, cli.override(RECIPES[args.command][args.recipe], args), RECIPES[args.command][paper]


def main() -> None:
    args, recipe, paper = parse_args()
    args.weights = args.weights or (f"{args.out}/last.pt" if args.eval else None)
    content = checkpoint.load(args.weights, "--weights") if args.weights else {}
    held, named = content.get("method"), args.model
    if isinstance(held, str):
        named = content["model_name"] if held in RECIPES else f"{held}/{content['model_name']}"
    if args.eval != (held == args.command) or (held in RECIPES and held != args.command):
        needed = f"--eval takes a run of {args.command}, training a classifier"
        raise UserError(f"--weights {args.weights}: holds {held or 'no name of a model'}; {needed}")
    if args.model not in (None, named) or (content and not named):
        hint = "write --model SCRIPT/MODEL with weights that do not name it, else leave it out"
        raise UserError(f"--weights {args.weights}: holds {named}, you asked for --model {args.model}; {hint}")
    args.model = named or "patchconvnet/patchconvnet_nano"
    run = Run(args.command, args, cli.override(type(recipe)(**content["recipe"]), args) if args.eval else recipe, paper)
    if not args.eval:
        return train(run, content)
    classes, val = content["data"]["classes"], open_truth(args.command, args.data, run.say, ("val",))["val"]
    if classes != val.classes:
        raise UserError(f"--data {args.data}: its {len(val.classes)} classes are not the {len(classes)} of --weights")
    model = build(run.recipe, args.model, run.recipe.img_size, len(classes))
    checkpoint.load_weights(model, checkpoint.weights(content, ema=args.use_ema), f"--weights {args.weights}")
    found = evaluate(run, model.to(run.device, memory_format=run.layout), val)
    if getattr(args, "multi_scale", False):
        how = dict(scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flips=(False, True))
        found |= {f"{key}_multi": value for key, value in evaluate(run, model, val, **how).items()}
    run.say("  ".join(f"{key} {value:.2f}" for key, value in found.items()))


if __name__ == "__main__":
    launch(main)
