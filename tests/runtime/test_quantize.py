"""8-bit linear maps: within the format's error, the plain model for gradients and files, and undone bit for bit."""

import dataclasses
from typing import Any

import pytest
import torch

from videogen.errors import InvalidRequest
from videogen.models.dit import DiT
from videogen.runtime.quantize import FORMATS, MAPS, in_8_bits, quantize, restore
from videogen.testing import TINY_DIT, tiny_batch, tiny_pipeline

FORMS = list(FORMATS)
# Half a step of rounding: e4m3 has 3 bits behind the leading one; int8 steps by 1 of 127.
ERROR = {"fp8": 2**-4, "int8": 0.5 / 127}


def network(layers: int = 4, dtype: torch.dtype = torch.float32) -> DiT:
    return tiny_pipeline(dit=dataclasses.replace(TINY_DIT, num_layers=layers), dtype=dtype).dit


def widest(dit: DiT, block: int) -> Any:
    return dit.blocks[block].get_submodule("mlp.down")


@pytest.mark.parametrize("form", FORMS)
def test_rows_keep_their_largest_number_and_round_within_the_format(form):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1], [1e3], [0], [7]])
    numbers, scale = in_8_bits(x, FORMATS[form])
    back = numbers.float() * scale
    assert numbers.dtype == FORMATS[form].dtype
    torch.testing.assert_close(back.abs().amax(1), x.abs().amax(1))
    least = x.abs() if form == "fp8" else x.abs().amax(1, keepdim=True)
    smallest = scale * 2**-9  # of e4m3, below which numbers are evenly spaced
    assert ((back - x).abs() <= ERROR[form] * least + smallest).all()
    assert (back[3] == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_multiplies_exactly_what_its_8_bits_say(form, dtype):
    dit = quantize(network(1, dtype), form, whole_ends=0)
    linear = widest(dit, 0)
    x = torch.randn(2, 9, linear.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    (a, a_scale), (w, w_scale) = (in_8_bits(m.flatten(0, -2).detach(), FORMATS[form]) for m in (x, linear.weight))
    product = (a.double() * a_scale) @ (w.double() * w_scale).t()
    with torch.no_grad():
        out = linear(x)
    expected = (product + linear.bias.double()).to(dtype).view_as(out)
    torch.testing.assert_close(out, expected)
    assert out.dtype == dtype


@pytest.mark.parametrize(("form", "most"), [("fp8", 0.06), ("int8", 0.03)])
def test_the_error_is_small_and_the_ends_are_whole(form, most):
    dit, batch = network(), tiny_batch(TINY_DIT)
    with torch.no_grad():
        plain = dit(*batch)
        out = quantize(dit, form)(*batch)
    error = (out - plain).norm() / plain.norm()
    assert 1e-4 < error < most
    changed = [[hasattr(block.get_submodule(name), "rows") for name in MAPS] for block in dit.blocks]
    assert changed == [[False] * 6, [True] * 6, [True] * 6, [False] * 6]


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_gradients_and_undo_are_those_of_the_plain_model(form):
    dit, batch = network(), tiny_batch(TINY_DIT)
    weights = {name: x.clone() for name, x in dit.state_dict().items()}
    with torch.no_grad():
        plain = dit(*batch)
    dit(*batch).sum().backward()
    gradients = {name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None}

    quantize(quantize(dit, "int8"), form)  # another format replaces the first
    assert dit.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in dit.state_dict().items())
    dit.zero_grad()
    out = dit(*batch)
    assert torch.equal(out, plain), "with gradients on, the plain maps compute"
    out.sum().backward()
    found = {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], g) for name, g in gradients.items())

    restore(restore(dit))
    with torch.no_grad():
        assert torch.equal(dit(*batch), plain)
    assert dit.state_dict().keys() == weights.keys()
    assert not [name for name, _ in dit.named_modules() if name.endswith("rows")]
    assert not [m for m in dit.modules() if "forward" in m.__dict__ or "parked" in m.__dict__]


def test_the_8_bit_weights_are_the_only_ones_that_travel():
    dit = quantize(network(), "fp8")
    linear = widest(dit, 1)
    assert linear.parked
    assert not any(parameter.is_cuda for parameter in linear.parameters(recurse=False))
    assert {name: x.dtype for name, x in linear.rows.named_buffers()} == {
        "weight": torch.float8_e4m3fn,
        "scale": torch.float32,
        "bias": torch.float32,
    }


def test_an_unknown_format_is_refused():
    with pytest.raises(InvalidRequest, match="no 8-bit format 'fp4'"):
        quantize(network(1), "fp4")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_gives_the_numbers_of_the_cpu(form):
    dit = network(1, torch.bfloat16)
    linear = widest(dit, 0)
    x = torch.randn(2, 64, linear.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        quantize(dit, form, whole_ends=0)
        expected = linear(x)
        plain = {name: p.clone() for name, p in restore(dit).state_dict().items()}
        quantize(dit.cuda(), form, whole_ends=0)
        assert linear.weight.device.type == "cpu"
        torch.testing.assert_close(linear(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)
        restore(dit)
        assert linear.weight.device.type == "cuda"
        assert all(torch.equal(p.cpu(), plain[name]) for name, p in dit.state_dict().items())
