"""Names of the classes that the models were trained on, in the order of their outputs."""

from __future__ import annotations

import importlib

CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)

# The 150 classes of the scene parsing benchmark, by their short names.
ADE20K = (
    *("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass"),
    *("cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair"),
    *("car", "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field"),
    *("armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion"),
    *("base", "box", "column", "signboard", "chest of drawers", "counter", "sand", "sink", "skyscraper", "fireplace"),
    *("refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table", "pillow", "screen door"),
    *("stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet", "flower", "book", "hill"),
    *("bench", "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar"),
    *("arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight"),
    *("booth", "television receiver", "airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator"),
    *("ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain", "conveyer belt", "canopy"),
    *("washer", "plaything", "swimming pool", "stool", "barrel", "basket", "waterfall", "tent", "bag", "minibike"),
    *("cradle", "oven", "ball", "food", "step", "tank", "trade name", "microwave", "pot", "animal"),
    *("bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase", "traffic light"),
    *("tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator"),
    *("glass", "clock", "flag"),
)
SEGMENTATION = {"cityscapes": CITYSCAPES, "ade20k": ADE20K}


def imagenet_names() -> tuple[str, ...] | None:
    """The 1000 names that torchvision has; None without a torchvision that loads into this torch."""
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError):  # the latter from a torchvision that was built for another torch
        return None
    return tuple(models.AlexNet_Weights.IMAGENET1K_V1.meta["categories"])
