"""One linear's LoRA: A, B and DoRA's magnitude, and what they make of the base's weight. It knows no files."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LoraPair"]


@dataclass(frozen=True, slots=True)
class LoraPair:
    """`x → (W x + scaling B A x) m / |W + scaling B A|`, the last factor with DoRA only (Liu et al. 2024, eq. 5)."""

    a: Tensor  # (rank, in_features)
    b: Tensor  # (out_features, rank)
    scaling: float
    magnitude: Tensor | None = None  # (out_features,): DoRA's m

    @property
    def rank(self) -> int:
        """Rows of `A`."""
        return self.a.shape[0]

    @property
    def change(self) -> Tensor:  # (out_features, in_features) float32
        """`scaling B A`."""
        return (self.scaling * self.b.float()) @ self.a.float()

    def factors(
        self,
        weight: Tensor,  # (out_features, in_features): the base's
    ) -> Tensor:  # (out_features,) float32
        """DoRA's factor of every output, the norm taken over its inputs as PEFT's `DoraLinearLayer` does."""
        assert self.magnitude is not None
        norms: Tensor = torch.linalg.vector_norm(weight.float() + self.change, dim=1)
        return self.magnitude.float() / norms

    def merged(
        self,
        weight: Tensor,  # (out_features, in_features): the base's
    ) -> Tensor:  # (out_features, in_features) float32
        """The weight that does what base and adapter do together."""
        merged = weight.float() + self.change
        return merged if self.magnitude is None else merged * self.factors(weight)[:, None]
