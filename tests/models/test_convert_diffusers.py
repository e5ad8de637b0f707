"""Official DC-AE and diffusers' AutoencoderDC: keys in both directions; equal outputs where diffusers is installed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from efficientvit_kernels.models.checkpoint import CheckpointError, load_weights
from efficientvit_kernels.models.convert import diffusers_to_official, official_to_diffusers
from efficientvit_kernels.models.dc_ae import CONFIGS, DCAE, create_dc_ae
from tests.golden_data import GOLDEN
from tests.models import golden_models as golden
from tests.models.diffusers_models import autoencoder_dc_arguments
from tests.models.test_dc_ae import SMALL, official, on_meta, small, std_error

pytestmark = pytest.mark.usefixtures("one_thread")

# Of the standard deviation. diffusers' float32 is up to 1.6e-5 from the goldens' float64, ours 0.5e-5, and the most
# that was measured between them is 2.1e-5.
TOLERANCE = 6e-5

# The state dicts of AutoencoderDC(**autoencoder_dc_arguments(SMALL[name])) in diffusers 0.42.1, key -> shape.
DIFFUSERS_KEYS: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "diffusers_keys.json").read_text())


def randomised(model: nn.Module) -> None:
    """Norm weights, biases and statistics away from 1 and 0, so that exchanged ones are seen."""
    for key, value in model.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            value.copy_(torch.rand_like(value) * 0.5 + (0.75 if key.endswith(("weight", "running_var")) else -0.25))


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("name", SMALL)
def test_diffusers_keys(name: str) -> None:
    assert shapes(official_to_diffusers(small(name).state_dict())) == DIFFUSERS_KEYS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name: str) -> None:
    state = on_meta(name).state_dict()
    back = diffusers_to_official(official_to_diffusers(state))
    assert shapes(back) == shapes(state)


@pytest.mark.parametrize("name", SMALL)
def test_values_there_and_back(name: str) -> None:
    state = small(name).state_dict()
    back = diffusers_to_official(official_to_diffusers(state))
    assert set(back) == set(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_other_keys_are_refused() -> None:
    state = small("sana").state_dict()
    with pytest.raises(
        ValueError, match="official_to_diffusers: state must have the keys of an official DC-AE, got 'x'"
    ):
        official_to_diffusers({**state, "x": torch.zeros(1)})
    other = official_to_diffusers(state)
    with pytest.raises(ValueError, match=r"must have the keys of diffusers' AutoencoderDC, got 'encoder\.x'"):
        diffusers_to_official({**other, "encoder.x": torch.zeros(1)})
    for letter in "qkv":
        key = f"decoder.up_blocks.2.0.attn.to_{letter}.weight"
        rest = {name: value for name, value in other.items() if name != key}
        with pytest.raises(ValueError, match=f"must have to_q, to_k and to_v, got no '{key}'"):
            diffusers_to_official(rest)


def test_load_weights_converts(tmp_path: object) -> None:
    source = small("sana")
    randomised(source)
    torch.save(official_to_diffusers(source.state_dict()), f"{tmp_path}/diffusers.pt")
    model = small("sana")
    load_weights(model, f"{tmp_path}/diffusers.pt", convert=diffusers_to_official)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in source.state_dict().items())
    with pytest.raises(CheckpointError, match="cannot be converted: official_to_diffusers: state must have"):
        load_weights(model, f"{tmp_path}/diffusers.pt", convert=official_to_diffusers)


def equal_outputs(ours: DCAE, x: Tensor) -> None:
    """Of ours and of an AutoencoderDC with the converted weights, which must load strictly."""
    diffusers = pytest.importorskip("diffusers", reason="optional peer: pip install diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderDC(**autoencoder_dc_arguments(ours.config)).eval()
    theirs.load_state_dict(official_to_diffusers(ours.state_dict()), strict=True, assign=True)
    with torch.no_grad():
        latent = theirs.encode(x).latent
        assert std_error(ours.encode(x), latent) < TOLERANCE
        assert std_error(ours.decode(latent), theirs.decode(latent).sample) < TOLERANCE


@pytest.mark.parametrize("name", SMALL)
def test_equal_outputs(name: str) -> None:
    model = small(name)
    randomised(model)
    equal_outputs(model, golden.golden_image(32, 48))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0", "dc-ae-f64c128-in-1.0"])
def test_equal_outputs_of_official_models(name: str) -> None:
    with torch.device("meta"):
        model = create_dc_ae(name)
    golden.load_golden(model, official(name))
    equal_outputs(model, golden.golden_image(64, 128))
