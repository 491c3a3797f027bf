"""What the network learns to predict: noise, target, weight and timesteps, apart from any model.

An objective is four functions of tensors. It owns no randomness: timesteps are a function of uniform numbers, noise is
handed in.
"""

import math
from typing import Any

import torch

from lora_nb.config import WEIGHTING_SCHEMES
from lora_nb.errors import ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
MODE_SCALE_LIMIT = 2 / (
    math.pi - 2
)  # beyond, timesteps run backwards (Esser et al. 2024, equation 20)


class Diffusion:
    """Denoising diffusion in discrete time (Ho et al. 2020) with prediction types epsilon, v and sample.

    alphas_cumprod: (T,) decreasing in [0, 1]; the last one may be 0 (zero terminal SNR, Lin et al. 2023).
    snr_gamma: the gamma of Min-SNR weighting (Hang et al. 2023), or None for the plain loss. snr_floor: its other form
    for v, never below 1, as the SDXL DreamBooth script has it.
    """

    def __init__(
        self,
        alphas_cumprod: torch.Tensor,
        prediction_type: str,
        snr_gamma: float | None = None,
        snr_floor: bool = False,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}."
            )
        if prediction_type == "epsilon" and alphas_cumprod[-1] == 0:
            raise ConfigError(
                "prediction_type is 'epsilon', but the noise schedule ends without any signal (zero terminal SNR), "
                "where noise says nothing about the picture; use v_prediction."
            )
        self.alphas_cumprod = alphas_cumprod.float()
        self.prediction_type = prediction_type
        self.snr_gamma, self.snr_floor = snr_gamma, snr_floor

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        snr_floor: bool = False,
    ) -> "Diffusion":
        """The objective that a diffusers noise scheduler was made for.

        Raises ConfigError if the scheduler has no alphas_cumprod (a flow-matching scheduler, say).
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ConfigError(
                f"{type(scheduler).__name__} is no diffusion scheduler: it has no alphas_cumprod."
            )
        kind = prediction_type or scheduler.config.prediction_type
        return cls(scheduler.alphas_cumprod, kind, snr_gamma, snr_floor)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def sample_t(self, u: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) in 0..T-1, each equally likely, from uniform numbers u (B,) in [0, 1)."""
        return (u * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def _signal_and_noise(
        self, t: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped (B, 1, ...) and in the dtype of `like`."""
        alpha_bar = self.alphas_cumprod.to(like.device)[t.to(like.device)].to(like.dtype)
        alpha_bar = alpha_bar.view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, equation 4)."""
        a, b = self._signal_and_noise(t, x0)
        return a * x0 + b * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should output: noise, v = a noise - b x0 (Salimans & Ho 2022, section 4), or x0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        a, b = self._signal_and_noise(t, x0)
        return a * noise - b * x0

    def x0_from(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The x0 that a prediction at x_t implies; for epsilon it needs some signal left at t."""
        a, b = self._signal_and_noise(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - b * prediction) / a
        if self.prediction_type == "sample":
            return prediction
        return a * x_t - b * prediction

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), (B,)."""
        alpha_bar = self.alphas_cumprod.to(t.device)[t]
        return alpha_bar / (1 - alpha_bar)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Loss weight of each picture, (B,): 1, or Min-SNR (Hang et al. 2023, section 3.4).

        With gamma: min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v, min(SNR, gamma) for sample;
        with snr_floor min(SNR, gamma) / SNR + 1 for v.
        """
        if self.snr_gamma is None:
            return torch.ones(len(t), device=t.device)
        snr = self.snr(t)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.prediction_type == "epsilon":
            return clipped / snr
        if self.prediction_type == "v_prediction":
            # 1 at SNR 0, where clipped / snr would be 0 / 0.
            return (
                (self.snr_gamma / snr).clamp(max=1) + 1 if self.snr_floor else clipped / (snr + 1)
            )
        return clipped


class FlowMatching:
    """Rectified flow (Liu et al. 2022; Esser et al. 2024): x_t on the straight line from picture to noise.

    sigmas: (T,) decreasing in (0, 1], the share of noise at each step; a timestep is t = sigma T, a float in (0, T].
    weighting_scheme: logit_normal and mode draw some timesteps more often, sigma_sqrt and cosmap weigh the loss
    instead, none does neither. precondition_outputs: measure the error of x0 rather than of the velocity.
    """

    def __init__(
        self,
        sigmas: torch.Tensor,
        weighting_scheme: str = "none",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        precondition_outputs: bool = False,
    ):
        if weighting_scheme not in WEIGHTING_SCHEMES:
            raise ConfigError(
                f"weighting_scheme is {weighting_scheme!r}; choose one of {', '.join(WEIGHTING_SCHEMES)}."
            )
        if logit_std <= 0:
            raise ConfigError(f"logit_std is {logit_std}; give a number above 0.")
        if not -1 <= mode_scale <= MODE_SCALE_LIMIT:
            raise ConfigError(
                f"mode_scale is {mode_scale}; between -1 and {MODE_SCALE_LIMIT:.4g} each timestep has one density."
            )
        self.sigmas = sigmas.float()
        self.weighting_scheme = weighting_scheme
        self.logit_mean, self.logit_std, self.mode_scale = logit_mean, logit_std, mode_scale
        self.precondition_outputs = precondition_outputs

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        **options: Any,
    ) -> "FlowMatching":
        """The objective of a diffusers flow-matching scheduler, with the shift it has.

        Where the scheduler shifts by picture size (use_dynamic_shifting), training goes without, as the reference
        scripts do. Raises ConfigError for a diffusion scheduler, and for settings that only diffusion has.
        """
        if hasattr(scheduler, "alphas_cumprod"):
            raise ConfigError(
                f"{type(scheduler).__name__} is no flow-matching scheduler: it has alphas_cumprod."
            )
        if prediction_type is not None:
            raise ConfigError(
                f"prediction_type is {prediction_type!r}, but this base model learns by flow matching, "
                "which always predicts the velocity; leave it out."
            )
        if snr_gamma is not None:
            raise ConfigError(
                f"snr_gamma is {snr_gamma}, but this base model learns by flow matching, for which Min-SNR "
                "weighting is not defined; leave it out, or choose a weighting_scheme."
            )
        return cls(scheduler.sigmas, **options)

    @property
    def num_timesteps(self) -> int:
        return len(self.sigmas)

    def sample_t(self, u: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) in (0, T] from uniform numbers u (B,) in [0, 1), distributed as the weighting scheme says."""
        index = (self._warped(u.double()) * self.num_timesteps).long()
        return self.sigmas[index.clamp(0, self.num_timesteps - 1)] * self.num_timesteps

    def _warped(self, u: torch.Tensor) -> torch.Tensor:
        """Where in the list of sigmas, 0 for pure noise and 1 for none (Esser et al. 2024, section 3.1).

        As in the reference scripts, so a larger logit_mean means less noise; in the paper it means more.
        """
        if self.weighting_scheme == "logit_normal":
            normal = self.logit_mean + self.logit_std * torch.special.ndtri(u)
            return normal.sigmoid()
        if self.weighting_scheme == "mode":
            return 1 - u - self.mode_scale * ((torch.pi / 2 * u).cos() ** 2 - 1 + u)
        return u

    def _sigma(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The share of noise, shaped (B, 1, ...) and in the dtype of `like`."""
        sigma = (t / self.num_timesteps).to(like.device, like.dtype)
        return sigma.view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = (1 - sigma) x0 + sigma noise."""
        sigma = self._sigma(t, x0)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The velocity noise - x0, the same at all timesteps."""
        return noise - x0

    def x0_from(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The x0 that a predicted velocity at x_t implies."""
        return x_t - self._sigma(t, x_t) * prediction

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio ((1 - sigma) / sigma)^2, (B,)."""
        sigma = t / self.num_timesteps
        return ((1 - sigma) / sigma) ** 2

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Loss weight of each picture, (B,).

        1 / sigma^2 for sigma_sqrt, 2 / (pi (1 - 2 sigma + 2 sigma^2)) for cosmap, else 1. The error of x0 is sigma
        times that of the velocity, so precondition_outputs multiplies by sigma^2.
        """
        sigma = t / self.num_timesteps
        weight = torch.ones_like(sigma)
        if self.weighting_scheme == "sigma_sqrt":
            weight = sigma**-2
        if self.weighting_scheme == "cosmap":
            weight = 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))
        return weight * sigma**2 if self.precondition_outputs else weight


class CosineDiffusion:
    """Denoising diffusion in continuous time: t in [0, 1), the cosine schedule of Nichol & Dhariwal 2021, epsilon.

    alpha_bar(t) = cos²((t + s) / (1 + s) · π/2) over its value at t = 0, kept within 0.0001..0.9999 as the
    sampler does (Pernias et al. 2023). s: how much noise there is at once. snr_gamma: as in Diffusion.
    """

    prediction_type = "epsilon"

    def __init__(self, s: float = 0.008, snr_gamma: float | None = None):
        self.s, self.snr_gamma = s, snr_gamma

    def alpha_bar(self, t: torch.Tensor) -> torch.Tensor:
        """The share of signal at t, in t's dtype and shape."""
        angle = (t + self.s) / (1 + self.s) * math.pi / 2
        start = math.cos(self.s / (1 + self.s) * math.pi / 2) ** 2
        return (angle.cos() ** 2 / start).clamp(0.0001, 0.9999)

    def sample_t(self, u: torch.Tensor) -> torch.Tensor:
        """Times (B,) in [0, 1): the uniform numbers u (B,) themselves."""
        return u

    def _signal_and_noise(
        self, t: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_bar = self.alpha_bar(t.to(like)).view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""
        a, b = self._signal_and_noise(t, x0)
        return a * x0 + b * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should output: the noise."""
        return noise

    def x0_from(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The x0 that a prediction at x_t implies; the clamp leaves some signal at every t."""
        a, b = self._signal_and_noise(t, x_t)
        return (x_t - b * prediction) / a

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), (B,)."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Loss weight of each picture, (B,): 1, or with gamma min(SNR, gamma) / SNR."""
        if self.snr_gamma is None:
            return torch.ones(len(t), device=t.device)
        snr = self.snr(t)
        return snr.clamp(max=self.snr_gamma) / snr
