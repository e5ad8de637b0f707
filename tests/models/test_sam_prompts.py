"""Prompt encoder and mask decoder beyond the goldens: dtypes, batches, training, errors."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from efficientvit_kernels.models.sam.mask_decoder import MaskDecoder
from efficientvit_kernels.models.sam.prompt_encoder import PromptEncoder
from tests.models.sam_common import BOXES, POINTS, embedding_l0, golden_prompts, mask_prompt, sam_l0

pytestmark = pytest.mark.usefixtures("one_thread")

COORDS, LABELS = POINTS


def test_padding_and_box_labels() -> None:
    """A point labelled -1 is worth the same wherever it lies, and labels 2 and 3 are the corners of a box."""
    encoder = sam_l0().prompt_encoder
    alone = encoder((COORDS, LABELS))[0]
    padded = encoder((torch.cat([COORDS, COORDS[:, :1] + 50], 1), torch.cat([LABELS, -torch.ones(2, 1)], 1)))[0]
    assert torch.equal(padded[:, :3], alone)
    assert torch.equal(padded[:, 2], padded[:, 3])
    corners = encoder((BOXES.reshape(2, 2, 2), torch.tensor([[2, 3], [2, 3]])))[0]
    assert torch.equal(corners[:, :2], encoder(boxes=BOXES)[0])


def test_no_prompt() -> None:
    sparse, dense = sam_l0().prompt_encoder()
    assert list(sparse.shape) == [1, 0, 256]
    assert list(dense.shape) == [1, 256, 64, 64]
    masks, ious = sam_l0().decode(embedding_l0(), None, None, None, True)
    assert list(masks.shape) == [1, 3, 256, 256]
    assert bool(masks.isfinite().all() & ious.isfinite().all())


def test_no_objects() -> None:
    masks, ious = sam_l0().decode(embedding_l0(), None, torch.empty(0, 4), None, True)
    assert list(masks.shape) == [0, 3, 256, 256]
    assert list(ious.shape) == [0, 3]


@torch.no_grad()
def test_one_image_for_all_prompts_is_that_image_for_each() -> None:
    """The shortcuts for one image and one dense embedding change nothing but the order of sums."""
    model = sam_l0()
    sparse, dense = model.prompt_encoder(POINTS)
    image_pe = model.prompt_encoder.get_dense_pe()
    assert dense.stride(0) == 0
    shared = model.mask_decoder(embedding_l0(), image_pe, sparse, dense, True)
    images = embedding_l0().expand(2, -1, -1, -1)
    for image, own_dense in ((images, dense), (images.contiguous(), dense.contiguous()), (embedding_l0(), dense + 0)):
        each = model.mask_decoder(image, image_pe, sparse, own_dense, True)
        torch.testing.assert_close(each, shared, rtol=0, atol=1e-4 * float(shared[0].std()))


@torch.no_grad()
def test_the_encoding_stays_in_float32() -> None:
    encoder = sam_l0().prompt_encoder
    dense_pe, sparse = encoder.get_dense_pe(), encoder(POINTS)[0]
    for dtype in (torch.float16, torch.bfloat16):
        narrow = deepcopy(encoder).to(dtype)
        assert narrow.pe_layer.positional_encoding_gaussian_matrix.dtype == torch.float32
        pe = narrow.get_dense_pe()
        assert pe.dtype == dtype
        assert torch.equal(pe, dense_pe.to(dtype))
        assert narrow(POINTS)[0].dtype == dtype
        with torch.autocast("cpu", dtype):
            assert torch.equal(encoder.get_dense_pe(), dense_pe)
            assert torch.equal(encoder(POINTS)[0], sparse)
    assert deepcopy(encoder).double().get_dense_pe().dtype == torch.float64


@torch.no_grad()
def test_float64() -> None:
    model = deepcopy(sam_l0())
    model.prompt_encoder.double()
    model.mask_decoder.double()
    masks, _ = model.decode(embedding_l0().double(), *golden_prompts()["points_box_mask"], False)
    assert masks.dtype == torch.float64
    narrow, _ = sam_l0().decode(embedding_l0(), *golden_prompts()["points_box_mask"], False)
    assert float((masks - narrow).abs().max() / masks.std()) < 2e-5  # float32's own error, see the goldens


def test_every_parameter_has_a_gradient() -> None:
    """Of one mask and of three: the other hypernetworks get zeros, which distributed training wants."""
    prompts, decoder = PromptEncoder(), MaskDecoder()
    for multimask in (True, False):
        prompts.zero_grad()
        decoder.zero_grad()
        sparse, dense = prompts(POINTS, BOXES, mask_prompt())
        masks, ious = decoder(embedding_l0().detach(), prompts.get_dense_pe(), sparse, dense, multimask)
        (masks.square().mean() + ious.square().mean()).backward()
        unused = {"no_mask_embed.weight"}  # a mask is given
        for name, parameter in [*prompts.named_parameters(), *decoder.named_parameters()]:
            assert (parameter.grad is None) == (name in unused), name
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


ERRORS: list[tuple[Callable[[PromptEncoder], object], str]] = [
    (lambda e: e((COORDS[0], LABELS)), r"PromptEncoder: points must be \[B, N > 0, 2\], got \[2, 2\]"),
    (lambda e: e((COORDS[:, :0], LABELS[:, :0])), r"PromptEncoder: points must be \[B, N > 0, 2\], got \[2, 0, 2\]"),
    (lambda e: e((COORDS, LABELS[:, :1])), r"PromptEncoder: labels must be \[2, 2\], one for each point, got \[2, 1\]"),
    (lambda e: e(boxes=BOXES[0]), r"PromptEncoder: boxes must be \[B, 4\], got \[4\]"),
    (
        lambda e: e(masks=torch.zeros(1, 256, 256)),
        r"PromptEncoder: masks must be \[B, 1, 256, 256\], got \[1, 256, 256\]",
    ),
    (lambda e: e(POINTS, BOXES[:1]), r"PromptEncoder: points, boxes and masks must be of one batch size, got .*1"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_of_the_prompt_encoder(call: Callable[[PromptEncoder], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(sam_l0().prompt_encoder)


@pytest.mark.parametrize(
    ("changed", "shape", "message"),
    [
        (0, (1, 255, 64, 64), r"image_embeddings must be \[B, 256, H, W\], got \[1, 255, 64, 64\]"),
        (0, (3, 256, 64, 64), "image_embeddings must be of batch 1 or 2, got 3"),
        (1, (1, 256, 32, 64), r"image_pe must be \[1, 256, 64, 64\], got \[1, 256, 32, 64\]"),
        (2, (2, 3, 255), r"sparse_prompt_embeddings must be \[B, T, 256\], got \[2, 3, 255\]"),
        (3, (1, 256, 64, 64), r"dense_prompt_embeddings must be \[2, 256, 64, 64\], got \[1, 256, 64, 64\]"),
    ],
)
def test_errors_of_the_mask_decoder(changed: int, shape: tuple[int, ...], message: str) -> None:
    inputs: list[Tensor] = [torch.zeros(1, 256, 64, 64), torch.zeros(1, 256, 64, 64), torch.zeros(2, 3, 256)]
    inputs.append(torch.zeros(2, 256, 64, 64))
    inputs[changed] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"MaskDecoder: {message}"):
        sam_l0().mask_decoder(*inputs, True)
