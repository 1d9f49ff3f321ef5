"""Small modules that run their layers in ways that a recorder must cope with."""

import torch
from torch import Tensor, nn


class Spy(nn.Module):
    """Passes its input on and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.n_runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_runs += 1
        return x


class Toy(nn.Module):
    """An embedding, then the layers ``a``, ``b``, a spy and ``c``, run in a given order."""

    def __init__(self, order: str = "absc") -> None:
        super().__init__()
        self.order = order
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(112, 8)
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.s = Spy()

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.table(ids)
        for name in self.order:
            x = getattr(self, name)(x)
        return x


class Pieces(Toy):
    """Runs ``a`` and ``b`` on three tokens at a time."""

    def forward(self, ids: Tensor) -> Tensor:
        parts = self.table(ids).split(3, dim=1)
        return torch.cat([self.b(self.a(part)) for part in parts], dim=1)


class RowPieces(Toy):
    """Runs ``a`` on one sequence at a time."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self.a(part) for part in self.table(ids).split(1)])


class FlatPieces(Toy):
    """Runs ``a`` on five tokens of the joined sequences at a time."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return torch.cat([self.a(part) for part in x.flatten(0, 1).split(5)]).view_as(x)


class ByPlace(Toy):
    """Runs ``a`` place by place, as (tokens, sequences, features)."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.a(self.table(ids).transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


class FlatByPlace(Toy):
    """Runs ``a`` on one line of all sequences' first tokens, then their second ones."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).transpose(0, 1)
        return self.a(x.flatten(0, 1)).view_as(x).transpose(0, 1)  # type: ignore[no-any-return]


class Tables(Toy):
    """Runs ``a`` on the tokens and on a table, ``b`` on a table alone, as long as the text."""

    def __init__(self, rows: int | None = 6) -> None:
        super().__init__()
        self.rows = rows
        self.positions = nn.Embedding(256, 8)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.shape[1] if self.rows is None else self.rows
        table = self.positions(torch.arange(rows))[None]
        x: Tensor = self.a(self.table(ids))
        return x + self.a(table).sum() + self.b(table).sum()  # type: ignore[no-any-return]


class Padded(Toy):
    """Pads its input to a multiple of eight tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        padded = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 8))
        return self.b(self.a(padded))[:, : x.shape[1]]  # type: ignore[no-any-return]


class Experts(Toy):
    """Sends even ids through ``a`` and odd ones through ``b``, without places."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        even = ids % 2 == 0
        y = torch.empty_like(x)
        y[even], y[~even] = self.a(x[even]), self.b(x[~even])
        return y


class Adding(Toy):
    """Writes into what its layer gave and received, after it ran."""

    def forward(self, ids: Tensor) -> Tensor:
        done = []
        for part in self.table(ids).split(4, dim=1):
            y = self.a(part)
            y += 1
            part += 1
            done.append(y)
        return torch.cat(done, dim=1)


class ScaledLinear(nn.Linear):
    """A linear that does more than to multiply."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the tangent hyperbolic of the product."""
        return super().forward(x).tanh()


class ClampedLinear(nn.Linear):
    """A linear that bounds its first output where the token's input is the one given."""

    rare: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, of the rare token with a first output nearer to zero."""
        y = super().forward(x).clone()
        assert self.rare is not None
        y[..., 0] *= torch.where((x == self.rare.to(x)).all(-1), 0.1, 1.0).to(y)
        return y


class LongScaledLinear(nn.Linear):
    """A linear that does more than to multiply where there are many tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, of many tokens its tangent hyperbolic."""
        y = super().forward(x)
        return y.tanh() if x.shape[1] > 10 else y
