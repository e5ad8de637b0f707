"""Masks of one image from points, boxes and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .model import EfficientViTSam
from .transforms import ResizeLongestSide, resized_size

Array = npt.NDArray[Any]
CHANNEL_ORDERS = ("RGB", "BGR")


def check_image_array(caller: str, image: object) -> None:
    """A NumPy array [H > 0, W > 0, 3] of uint8."""
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{caller}: image must be a NumPy array, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"{caller}: image must be of dtype uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{caller}: image must be [H > 0, W > 0, 3], got {list(image.shape)}")


class SamPredictor:
    """Embeds an image once (`set_image`), then finds the masks of any prompts on it (`predict`).

    The model is put into eval mode.

    Attributes:
        model: the model.
        transform: `ResizeLongestSide` from the image's pixels to the prompts' frame, for `predict_torch`.
        is_image_set, original_size, input_size, features: of the current image: whether there is one, its (H, W), its
            size in the prompts' frame, its embedding [1, 256, 64, 64].
    """

    def __init__(self, model: EfficientViTSam) -> None:
        self.model = model.eval()
        self.transform = ResizeLongestSide(model.image_size[0])
        self._to_encoder = ResizeLongestSide(model.image_size[1])
        self.reset_image()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def reset_image(self) -> None:
        """Forgets the image."""
        self.is_image_set = False
        self.features: Tensor | None = None
        self.original_size: tuple[int, int] | None = None
        self.input_size: tuple[int, int] | None = None

    @torch.no_grad()
    def set_image(self, image: npt.NDArray[np.uint8], image_format: str = "RGB") -> None:
        """Embeds `image`, uint8 [H, W, 3] with channels in the order `image_format` ("RGB" or "BGR").

        Raises:
            TypeError, ValueError: not such an array, or another order; the model is in training mode.
        """
        check_image_array("SamPredictor.set_image", image)
        if image_format not in CHANNEL_ORDERS:
            orders = ", ".join(CHANNEL_ORDERS)
            raise ValueError(f"SamPredictor.set_image: image_format must be one of {orders}, got {image_format!r}")
        if self.model.training:
            raise ValueError("SamPredictor.set_image: model must be in eval mode, got training mode")
        if image_format != self.model.image_format:
            image = image[..., ::-1]
        self.reset_image()
        height, width = image.shape[:2]
        # A copy: torch warns of memory that may not be written to, and takes no negative strides.
        resized = torch.from_numpy(np.array(self._to_encoder.apply_image(image), order="C"))
        self.features = self.model.image_encoder(self.model.preprocess(resized.permute(2, 0, 1).unsqueeze(0)))
        self.original_size = (height, width)
        self.input_size = resized_size(height, width, self.model.image_size[0])
        self.is_image_set = True

    def get_image_embedding(self) -> Tensor:
        """[1, 256, 64, 64]."""
        return self._image("get_image_embedding")[0]

    def predict(
        self,
        point_coords: Array | None = None,
        point_labels: Array | None = None,
        box: Array | None = None,
        mask_input: Array | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Array, Array, Array]:
        """Masks of one object.

        Args:
            point_coords: (x, y) [N, 2] in pixels of the image. point_labels: [N], 1 on the object, 0 off it.
            box: (x0, y0, x1, y1) [4] in pixels of the image.
            mask_input: low-resolution logits [1, 256, 256] of an earlier prediction.
            multimask_output: three masks, for an ambiguous prompt, or one.
            return_logits: logits in place of binary masks.

        Returns:
            masks [M, H, W] bool (or logits, float32), predicted IoU [M], low-resolution logits [M, 256, 256].

        Raises:
            RuntimeError: no image is set.
            ValueError: a shape or label other than these, points without labels or labels without points.
        """
        original_size = self._image("predict")[1]
        coords, labels = _points(point_coords, point_labels)
        if coords is not None:
            coords = self.transform.apply_coords(coords, original_size)[None]
        if box is not None:
            box = _array("box", box, ((4,), (1, 4)), "[4]").reshape(1, 4)
            box = self.transform.apply_boxes(box, original_size)
        if mask_input is not None:
            rows, columns = self.model.prompt_encoder.mask_size
            mask_input = _array("mask_input", mask_input, ((1, rows, columns),), f"[1, {rows}, {columns}]")[None]
        masks, ious, low_res = self.predict_torch(
            self._tensor(coords),
            None if labels is None else self._tensor(labels[None]),
            self._tensor(box),
            self._tensor(mask_input),
            multimask_output,
            return_logits,
        )
        # NumPy has no bfloat16, and callers do not expect 16 bits.
        return masks[0].cpu().numpy(), ious[0].float().cpu().numpy(), low_res[0].float().cpu().numpy()

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks of B objects; coordinates in the prompts' frame (`transform.apply_coords_torch`, `apply_boxes_torch`).

        Args:
            point_coords: [B, N, 2]. point_labels: [B, N]. boxes: [B, 4]. mask_input: [B, 1, 256, 256].
            multimask_output, return_logits: as `predict`.

        Returns:
            masks [B, M, H, W] bool (or logits), predicted IoU [B, M], low-resolution logits [B, M, 256, 256].

        Raises: as `predict`.
        """
        original_size = self._image("predict_torch")[1]
        low_res, ious = self.predict_low_res(point_coords, point_labels, boxes, mask_input, multimask_output)
        masks = self.restore(low_res, original_size)
        return masks if return_logits else masks > self.model.mask_threshold, ious, low_res

    @torch.no_grad()
    def predict_low_res(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The low-resolution logits and predicted IoU of `predict_torch`, without the masks of the image's size."""
        features = self._image("predict_torch")[0]
        if (point_coords is None) != (point_labels is None):
            missing = "point_labels" if point_labels is None else "point_coords"
            raise ValueError(f"SamPredictor: {missing} must be given with its counterpart, got None")
        points = None if point_coords is None or point_labels is None else (point_coords, point_labels)
        return self.model.decode(features, points, boxes, mask_input, multimask_output)

    def restore(self, low_res: Tensor, original_size: tuple[int, int]) -> Tensor:
        """Logits of the image's size."""
        input_size = resized_size(*original_size, self.model.image_size[0])
        return self.model.postprocess_masks(low_res, input_size, original_size)

    def _image(self, method: str) -> tuple[Tensor, tuple[int, int]]:
        if self.features is None or self.original_size is None:
            raise RuntimeError(f"SamPredictor.{method}: an image must be set with set_image first, got none")
        return self.features, self.original_size

    def _tensor(self, array: Array | None) -> Tensor | None:
        if array is None:
            return None
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


def _array(arg: str, value: Array, shapes: tuple[tuple[int, ...], ...], expected: str) -> Array:
    array = np.asarray(value)
    if array.shape not in shapes:
        raise ValueError(f"SamPredictor.predict: {arg} must be {expected}, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"SamPredictor.predict: {arg} must be finite, got NaN or infinity")
    return array


def _points(coords: Array | None, labels: Array | None) -> tuple[Array | None, Array | None]:
    """Both or neither, of matching shapes, with known labels."""
    if coords is None and labels is None:
        return None, None
    if coords is None or labels is None:
        missing = "point_labels" if labels is None else "point_coords"
        raise ValueError(f"SamPredictor.predict: {missing} must be given with its counterpart, got None")
    labels, count = np.asarray(labels), max(1, len(coords))
    coords = _array("point_coords", coords, ((count, 2),), "[N > 0, 2]")
    if labels.shape != coords.shape[:1]:
        raise ValueError(f"SamPredictor.predict: point_labels must be [{len(coords)}], got {list(labels.shape)}")
    if not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError(f"SamPredictor.predict: point_labels must be 1, 0 or -1 (padding), got {labels.tolist()}")
    return coords, labels
