"""What the network learns to predict: noise, target, weight and timesteps, apart from any model.

An objective is four functions of tensors. It owns no randomness: timesteps are a function of uniform numbers, noise is
handed in.
"""

from typing import Any

import torch

from lora_nb.errors import ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Diffusion:
    """Denoising diffusion in discrete time (Ho et al. 2020) with prediction types epsilon, v and sample.

    alphas_cumprod: (T,) decreasing in [0, 1]; the last one may be 0 (zero terminal SNR, Lin et al. 2023).
    snr_gamma: the gamma of Min-SNR weighting (Hang et al. 2023), or None for the plain loss.
    """

    def __init__(
        self, alphas_cumprod: torch.Tensor, prediction_type: str, snr_gamma: float | None = None
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
        self.snr_gamma = snr_gamma

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, prediction_type: str | None = None, snr_gamma: float | None = None
    ) -> "Diffusion":
        """The objective that a diffusers noise scheduler was made for.

        Raises ConfigError if the scheduler has no alphas_cumprod (a flow-matching scheduler, say).
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ConfigError(
                f"{type(scheduler).__name__} is no diffusion scheduler: it has no alphas_cumprod."
            )
        return cls(
            scheduler.alphas_cumprod, prediction_type or scheduler.config.prediction_type, snr_gamma
        )

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

        With gamma: min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v, min(SNR, gamma) for sample.
        """
        if self.snr_gamma is None:
            return torch.ones(len(t), device=t.device)
        snr = self.snr(t)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.prediction_type == "epsilon":
            return clipped / snr
        if self.prediction_type == "v_prediction":
            return clipped / (snr + 1)
        return clipped
