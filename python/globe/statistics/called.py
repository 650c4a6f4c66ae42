"""What the module of a layer's experts is called with: tokens and a router's choices, or a copy of them an expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from globe.errors import GlobeError


@dataclass(frozen=True)
class Called:
    """Tokens of one call of a layer's experts, and where they go.

    Parameters
    ----------
    inputs : torch.Tensor, shape (n, d)
        As the experts are given them.
    chosen, weights : torch.Tensor, shape (n, k)
        Each token's experts, and what their outputs are weighed by.
    copies : int
        0, or the number of experts, where each is given all tokens (Llama 4): those of others as zeros, its own
        weighed before it instead of behind it.
    """

    inputs: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    copies: int = 0

    def first(self, count: int) -> Called:
        """The call with its first tokens alone."""
        return Called(self.inputs[:count], self.chosen[:count], self.weights[:count], self.copies)

    def by(self, module: Any) -> torch.Tensor:
        """What a module of transformers makes of the tokens, (n, d)."""
        if not self.copies:
            made: torch.Tensor = type(module).forward(module, self.inputs, self.chosen, self.weights)
            return made
        return self.own(type(module).forward(module, self.spread(self.inputs)))

    def own(self, answers: torch.Tensor) -> torch.Tensor:
        """Of what the call gives, or of its gradient, the tokens' own (n, d)."""
        if not self.copies:
            return answers
        return answers.view(self.copies, len(self.inputs), -1)[self.chosen[:, 0], self._tokens]

    def spread(self, outputs: torch.Tensor) -> torch.Tensor:
        """The tokens' own (n, d), as the call gives them."""
        if not self.copies:
            return outputs
        found = outputs.new_zeros(self.copies, *outputs.shape)
        found[self.chosen[:, 0], self._tokens] = outputs
        return found.flatten(0, 1)

    @property
    def _tokens(self) -> torch.Tensor:
        return torch.arange(len(self.inputs), device=self.inputs.device)


def called(module: Any, experts: int, hidden: torch.Tensor, *routing: torch.Tensor) -> Called:
    """The call of a module of so many experts; of one that is given copies, with one of them for each token.

    Raises
    ------
    GlobeError
        If a token is copied to several experts, with a weight of its own for each.
    """
    if len(routing) == 2:
        return Called(hidden, *routing)
    copies = hidden.view(experts, -1, hidden.shape[-1])
    there = (copies != 0).any(-1)
    if len(there) and int(there.sum(0).max()) > 1:
        raise GlobeError(
            f"{type(module).__name__} is given tokens weighed for several experts each; calibration knows one expert "
            "a token there: use --calibrate none"
        )
    chosen = there.int().argmax(0)
    inputs = copies[chosen, torch.arange(len(chosen), device=chosen.device)]
    return Called(inputs, chosen[:, None], inputs.new_ones(len(chosen), 1), experts)
