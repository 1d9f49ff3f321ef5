"""A linear layer whose weight depends on the cluster that its input belongs to."""

import weakref

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.routing import Router


class SharedRouting:
    """Routes tokens for all the layers that read one input, such as gate and up, once.

    Parameters
    ----------
    router
        Fitted router; it follows the tokens to their device.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def __call__(self, x: Float[Tensor, "*batch features"]) -> Int64[Tensor, " tokens"]:
        """Return the cluster of every token, in reading order, shape (tokens,)."""
        if x.is_inference():  # it does not count its writes, so it could have been changed
            return self._route(x)
        if self._last is None or self._last[0]() is not x or self._last[1] != x._version:
            self._last = weakref.ref(x), x._version, self._route(x)
        return self._last[2]

    def __getstate__(self) -> dict[str, object]:
        """Leave the last input out of copies."""
        return {"router": self.router, "_last": None}

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None

    def _route(self, x: Tensor) -> Tensor:
        if self.router.centroids.device != x.device:
            self.router = self.router.to(x.device)
        return self.router.route(x).flatten()


class ExpandedLinear(nn.Module):
    """Sends every token through the expert of its cluster; the dense output is never computed.

    Parameters
    ----------
    weight
        Experts, shape (experts, out_features, in_features); sparse, stored with their zeros.
    bias
        Shape (out_features,), common to all experts, or None.
    routing
        Shared by the layers that read the same input.
    """

    def __init__(
        self,
        weight: Float[Tensor, "experts out_features in_features"],
        bias: Float[Tensor, " out_features"] | None,
        routing: SharedRouting,
    ) -> None:
        super().__init__()
        if weight.shape[0] != routing.router.k or weight.shape[2] != routing.router.features:
            raise InvalidInput(
                f"`weight` must hold one expert a cluster, ({routing.router.k}, out_features, "
                f"{routing.router.features}); got {tuple(weight.shape)}."
            )
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.routing = routing

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the output of every token's own expert, in the order of the tokens."""
        tokens = x.reshape(-1, x.shape[-1])
        clusters = self.routing(x)
        order = clusters.argsort(stable=True)
        counts = torch.bincount(clusters, minlength=self.weight.shape[0]).tolist()
        outputs = nn.functional.linear(tokens[:0], self.weight[0], self.bias)  # autocast's dtype
        outputs = outputs.new_empty(tokens.shape[0], self.weight.shape[1])
        for expert, index in enumerate(order.split(counts)):
            if index.numel():
                chosen = nn.functional.linear(tokens[index], self.weight[expert], self.bias)
                outputs[index] = chosen
        return outputs.reshape(*x.shape[:-1], self.weight.shape[1])

    def extra_repr(self) -> str:
        """Describe the shape for ``print(model)``."""
        experts, out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, experts={experts}"
