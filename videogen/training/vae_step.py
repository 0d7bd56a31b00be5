"""What a VAE learns: to give back the clip it saw, through a latent that stays near a unit Gaussian."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from videogen.config import VAETraining
from videogen.models.vae import VAE
from videogen.training.discriminator import hinge, verdict, wide
from videogen.training.perceptual import Distance, frame_distances

Video5D = Float[Tensor, "b _c _f _h _w"]


@runtime_checkable
class Time(Protocol):
    """Which frames of each clip this process computes (`distributed.vae_training.TimePieces`, or `WholeClips`).

    The losses of `degree` processes add up to the loss; what all of them compute alike counts 1/degree in each.
    """

    @property
    def degree(self) -> int: ...

    def own_pixels(self, pixels: Tensor) -> Tensor: ...

    def own_latents(self, latents: Tensor) -> Tensor: ...

    def moments(self, vae: VAE, own: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(self, vae: VAE, own: Tensor) -> Tensor: ...

    def gather(self, own: Tensor) -> Tensor: ...

    def total(self, part: Tensor) -> Tensor:
        """The sum over the processes, of which each has the gradient of its own part."""
        ...


class WholeClips:
    """One process has all frames."""

    degree = 1

    def own_pixels(self, pixels: Tensor) -> Tensor:
        return pixels

    def own_latents(self, latents: Tensor) -> Tensor:
        return latents

    def moments(self, vae: VAE, own: Tensor) -> tuple[Tensor, Tensor]:
        return vae.moments(own)

    def decode(self, vae: VAE, own: Tensor) -> Tensor:
        return vae.decode(own)

    def gather(self, own: Tensor) -> Tensor:
        return own

    def total(self, part: Tensor) -> Tensor:
        return part


def vae_losses(
    vae: VAE,
    pixels: Float[Tensor, "b 3 F H W"],
    noise: Float[Tensor, "b c f h w"],
    config: VAETraining,
    *,
    distance: Distance | None = None,
    discriminator: nn.Module | None = None,
    is_judged: bool = True,
    time: Time = WholeClips(),  # noqa: B008  (it has no state)
) -> tuple[Float[Tensor, " b"], dict[str, float]]:
    """The loss of each clip, and facts: means over the clips.

    Reconstruction (absolute and squared errors, heavier on edges and motion), the `distance` of the frames, and the KL
    divergence per latent value (arXiv:1312.6114). L1 alone starts slowly (it likes the median colour), squares alone
    end blurred. With a discriminator its own hinge loss, and if the clips are judged the VAE's share of the game, by
    the weight of `adaptive_weight`.

    noise  that the posterior is sampled with, N(0, 1)
    """
    own = time.own_pixels(pixels)
    with torch.set_grad_enabled(config.train_encoder and torch.is_grad_enabled()):
        mean, logvar = (wide(part) for part in time.moments(vae, own))
    latents = mean + torch.exp(0.5 * logvar) * time.own_latents(noise)
    made = wide(time.decode(vae, latents * vae.config.scaling_factor))

    error = (made - own).abs()
    weight = 1 + config.detail_weight * detail(pixels)
    weighted = time.own_pixels(weight) * (error + config.square_weight * error.square())
    reconstruction = _sums(weighted) / (pixels.shape[1] * _sums(weight))
    kl = 0.5 * _sums(mean.square() + logvar.exp() - 1 - logvar) / noise[0].numel()
    looks = torch.zeros_like(kl)
    if distance is not None:
        looks = reduce(frame_distances(distance, made, own), "b f -> b", "sum") / pixels.shape[2]
    told = {
        "l1": _sums(error.detach()) / pixels[0].numel(),
        "mse": _sums(error.detach().square()) / pixels[0].numel(),
        "kl": kl.detach(),
    } | ({"perceptual": looks.detach()} if distance is not None else {})
    reconstruction = reconstruction + config.perceptual_weight * looks
    loss = reconstruction + config.kl_weight * kl

    if discriminator is not None:
        assert config.gan is not None
        whole = time.gather(made)
        critic = hinge(discriminator, pixels, whole) / time.degree
        told["discriminator"] = critic.detach()
        if is_judged:
            wish = -verdict(discriminator, whole) / time.degree
            balance = adaptive_weight(reconstruction, wish, made, vae.decoder.conv_out.weight, time)
            loss = loss + config.gan.weight * balance * wish
            told |= {"generator": wish.detach(), "balance": balance / time.degree}
        loss = loss + critic

    total = time.total(torch.stack([*told.values()]))
    facts = {name: float(value.mean()) for name, value in zip(told, total, strict=True)}
    facts["psnr"] = float((10 * torch.log10(4 / total[[*told].index("mse")])).mean())
    facts.pop("mse")
    return time.total(loss), facts


def adaptive_weight(
    reconstruction: Float[Tensor, " b"],
    wish: Float[Tensor, " b"],
    made: Float[Tensor, "b 3 F H W"],
    last: nn.Parameter | Tensor,
    time: Time,
    most: float = 1e4,
) -> Float[Tensor, " b"]:
    """What makes the gradient of `wish` at the decoder's last layer as long as that of the reconstruction (Eq. 7,
    arXiv:2012.09841), for each clip by itself: so it is the same in any batch, on any number of processes.
    """
    lengths = []
    for loss in (reconstruction, wish):
        (at_pixels,) = torch.autograd.grad(loss.sum(), made, retain_graph=True)
        parts = [wide(torch.autograd.grad(made[i], last, at_pixels[i], retain_graph=True)[0]) for i in range(len(made))]
        lengths.append(time.total(torch.stack(parts)).flatten(1).norm(dim=1))
    return (lengths[0] / (lengths[1] + 1e-6)).clamp(max=most).detach()


@torch.no_grad()
def detail(pixels: Float[Tensor, "b 3 F H W"], threshold: float = 0.08) -> Float[Tensor, "b 1 F H W"]:
    """1 within a pixel of an edge or of something that moves, else 0: flat still ground is easy, and most of it all."""
    change = torch.zeros_like(pixels[:, :1])
    for dim in (2, 3, 4):
        difference = pixels.diff(dim=dim).abs().amax(dim=1, keepdim=True)
        size = difference.shape[dim]
        change.narrow(dim, 0, size).copy_(torch.maximum(change.narrow(dim, 0, size), difference))
        change.narrow(dim, 1, size).copy_(torch.maximum(change.narrow(dim, 1, size), difference))
    return F.max_pool3d((change > threshold).float(), (1, 3, 3), stride=1, padding=(0, 1, 1))


def _sums(x: Tensor) -> Float[Tensor, " b"]:
    return reduce(x, "b ... -> b", "sum")


# The latents --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_vae(vae: VAE) -> None:
    """From scratch: the latents' modulation starts as "no change", the posterior narrow (log variance -5)."""
    for name, module in vae.decoder.named_modules():
        if isinstance(module, nn.Conv3d) and name.endswith((".scale", ".shift")):
            module.weight.mul_(0.1)
            nn.init.constant_(_bias(module), 1.0 if name.endswith(".scale") else 0.0)
    logvar = vae.config.latent_channels
    vae.encoder.conv_out.weight[logvar:].mul_(0.1)
    _bias(vae.encoder.conv_out)[logvar:] = -5.0


@torch.no_grad()
def latent_statistics(vae: VAE, clips: Float[Tensor, "n 3 F H W"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Mean and standard deviation of each channel of unscaled latents, sampled from the posterior, over all clips."""
    device = vae.encoder.conv_out.weight.device
    moments = [vae.moments(clip.to(device)) for clip in clips.split(1)]
    mean, logvar = (torch.cat(parts).double() for parts in zip(*moments, strict=True))
    variance = mean.var(dim=(0, 2, 3, 4)) + logvar.exp().mean(dim=(0, 2, 3, 4))
    return mean.mean(dim=(0, 2, 3, 4)), variance.sqrt()


def scaling_factor(mean: Float[Tensor, " c"], std: Float[Tensor, " c"]) -> float:
    """1 over the standard deviation of all latent values together (section 3.3 of arXiv:2112.10752, appendix G)."""
    return float((std.square().mean() + mean.var(correction=0)).rsqrt())


@torch.no_grad()
def unit_variance(vae: VAE, std: Float[Tensor, " c"]) -> None:
    """Divide each latent channel by its standard deviation, exactly: folded into the convolutions that write the
    latents and those that read them, so the function encode -> decode does not change."""
    channels = vae.config.latent_channels
    out = vae.encoder.conv_out
    std = std.to(out.weight)
    out.weight[:channels] /= std[:, None, None, None, None]
    _bias(out)[:channels] /= std
    _bias(out)[channels:] -= 2 * std.log()
    for name, module in vae.decoder.named_modules():
        if isinstance(module, nn.Conv3d) and (name == "conv_in" or name.endswith((".scale", ".shift"))):
            module.weight *= std[None, :, None, None, None]


def _bias(conv: nn.Conv3d) -> Tensor:
    assert conv.bias is not None
    return conv.bias
