"""Training-free methods of activation sparsity: what each looks at, and what it keeps.

Each is given a model and a text once, and then makes rules for any level.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.activation.neurons import Chooser, FeedForward, NeuronRule, Part, PromptRule
from entangle.activation.rules import FORMS, Rule, Scores, Turn
from entangle.activation.sparsity import ActivationSparsity, LowRank
from entangle.activation.subject import Routed, Subject
from entangle.checks import choice, share
from entangle.doors import Door
from entangle.errors import EntangleError, InvalidInput
from entangle.models.layers import Layer
from entangle.recording.hooks import SeenTensor
from entangle.recording.recorder import Recorded

Levels = float | Mapping[str, float]
"""Share that goes: one, or one for every layer in scope, by name."""


class ActivationMethod(ABC):
    """A method, fitted to a model and a text.

    Parameters
    ----------
    subject
        What it is fitted to.
    form
        One of `entangle.activation.rules.FORMS`; by default as published.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Paper or repository."""
    form: ClassVar[str] = "threshold"
    """How it chooses as published."""
    scope: ClassVar[str | None] = None
    """The only scope that it has, if it has one."""
    routes: ClassVar[bool] = False
    """Whether layers may have several experts: it looks at no weight."""

    def __init__(self, subject: Subject, form: str | None = None) -> None:
        self.subject = subject
        self.chosen = choice("form", form or type(self).form, FORMS)
        if subject.routed and not self.routes:
            raise InvalidInput(
                f"{self.name} looks at one weight a layer; of several experts only methods that "
                "look at none mask the inputs, such as teal."
            )
        self.fit()

    def fit(self) -> None:  # noqa: B027  (not all need it)
        """Look at the text, where the method needs it."""

    @abstractmethod
    def at(self, level: Levels) -> ActivationSparsity:
        """Return the rules at a level."""

    def expected(self, level: float) -> float:
        """Return the density in scope that a level amounts to on the calibration text."""
        made = self.at(level)
        share = {rule: rule.expected for rule in made.rules}
        for rule, kept in share.items():
            size = len(rule.scale) if rule.scale is not None else self._width(made, rule)
            rule.kept = torch.full((size,), kept, dtype=torch.float64)
            rule.tokens = 1
            if rule.routing is not None:
                rule.joint = kept * self._routed(made, rule).share[:, None].expand(-1, size)
        found = made.density()["density"]
        for rule in share:
            rule.kept, rule.tokens, rule.joint = None, 0, None
        return found

    @staticmethod
    def _routed(made: ActivationSparsity, rule: Rule) -> Routed:
        routed = made.subject.routed
        return next(
            routed[name] for name, one in made.inputs.items() if one is rule and name in routed
        )

    @staticmethod
    def _width(made: ActivationSparsity, rule: Rule) -> int:
        if isinstance(rule, NeuronRule):
            assert rule.part is not None  # noqa: S101
            return rule.part.down.in_features
        name = next(name for name, one in made.inputs.items() if one is rule)
        return next(layer.in_features for layer in made.subject.layers if layer.name == name)

    def at_density(self, density: float) -> ActivationSparsity:
        """Return the rules whose expected density in scope, everything charged, is as asked.

        Raises
        ------
        InvalidInput
            If it is no share, or the method cannot be that sparse.
        """
        low, high, density = 0.0, 1.0, share("density", density)
        least = self.expected(high)
        if density < least - 1e-6:
            raise InvalidInput(
                f"{self.name} cannot reach a density of {density:g} in scope "
                f"{self.subject.scope!r}; its least is {least:.3f}."
            )
        if density >= 1:
            return self.at(0.0)
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if self.expected(middle) > density else (low, middle)
        return self.at(high)


def level_of(levels: Levels, layer: Layer) -> float:
    """Return a layer's level; refuse what is no share, or lacks the layer."""
    if isinstance(levels, Mapping):
        if layer.name not in levels:
            raise InvalidInput(f"levels must have one for {layer.name!r}; give it.")
        return share("level", levels[layer.name])
    return share("level", levels)


class InputMethod(ActivationMethod):
    """Methods that score the inputs of every layer."""

    def fit(self) -> None:
        """Count the scores of all inputs, for thresholds."""
        self._scores: dict[str, Scores] = {}
        self._made = {layer.name: layer for layer in self.subject.layers}
        self.prepare()
        if self.chosen != "threshold":
            return
        rules = self._rules(dict.fromkeys(self._made, 0.5))
        first = {rule: name for name, rule in reversed(rules.items())}

        def take(seen: Recorded) -> None:
            rule = rules[seen.layer.name]
            if first[rule] == seen.layer.name:
                rule.scores.update(rule.score(seen.inputs))

        self.subject.watch([self._made[name] for name in first.values()], take)
        self._scores = {name: rule.scores for name, rule in rules.items()}

    def prepare(self) -> None:
        """Make what `rule` needs."""

    def rule(self, layer: Layer, level: float) -> Rule:  # noqa: ARG002  (others look at it)
        """Return a new rule for a layer."""
        return Rule(level, self.subject.window, self.chosen)

    def alike(self, layer: Layer) -> str:  # noqa: ARG002  (others look at it)
        """Return what layers that read one input have in common if they have one rule."""
        return ""

    def _rules(self, levels: Mapping[str, float]) -> dict[str, Rule]:
        found: dict[str, Rule] = {}
        for group in self.subject.groups:
            shared: dict[tuple[float, str], Rule] = {}
            for layer in group:
                if layer.name not in levels:
                    continue
                level = levels[layer.name]
                alike = level, self.alike(layer)
                if alike not in shared:
                    shared[alike] = self.rule(layer, level)
                found[layer.name] = shared[alike]
                if layer.name in self.subject.routed:
                    shared[alike].routing = self.subject.routed[layer.name].routing
        return found

    def _levels(self, level: Levels) -> dict[str, float]:
        if isinstance(level, Mapping):
            if unknown := [name for name in level if name not in self._made]:
                raise InvalidInput(f"levels must be of layers in scope; {unknown[0]!r} is none.")
            if not level:
                raise InvalidInput("levels must be of one layer at least; got none.")
            return {n: share("level", level[n]) for n in self._made if n in level}
        return dict.fromkeys(self._made, share("level", level))

    def at(self, level: Levels) -> ActivationSparsity:
        """Return the rules at a level, or at one of every layer's own."""
        return self.plain_at(level)

    def plain_at(self, level: Levels) -> ActivationSparsity:
        """Return the rules at a level, the same for all layers, or at one of each layer's own.

        Layers without one have no rule.
        """
        levels = self._levels(level)
        rules = self._rules(levels)
        for name, rule in rules.items():
            if name in self._scores:
                rule.scores = self._scores[name]
                rule.settle()
        named = level if not isinstance(level, Mapping) else sum(levels.values()) / len(levels)
        return ActivationSparsity(self.name, float(named), self.subject, rules)


class Teal(InputMethod):
    """Inputs of small magnitude go."""

    name, source = "teal", "arXiv 2408.14690; github.com/FasterDecoding/TEAL"
    routes = True


class ColumnNorm(InputMethod):
    """Inputs of small magnitude times the norm of their column go: WINA's and R-Sparse's core."""

    name, source = "column-norm", "arXiv 2505.19427, arXiv 2504.19449: |x_j| · ‖W[:, j]‖"

    def prepare(self) -> None:
        """Measure the columns."""
        self._norms = {
            layer.name: layer.weight.float().norm(dim=0) for layer in self.subject.layers
        }

    def rule(self, layer: Layer, level: float) -> Rule:
        """Return a new rule for a layer."""
        return Rule(level, self.subject.window, self.chosen, scale=self._norms[layer.name])

    def alike(self, layer: Layer) -> str:
        """Return the layer's name: its columns are its own."""
        return layer.name


class RSparse(ColumnNorm):
    """Inputs by their columns' norms; the others go through a low-rank weight.

    The share ``rho`` of what is kept goes to columns.
    """

    name, source = "rsparse", "arXiv 2504.19449; github.com/VITA-Group/R-Sparse"
    rho: ClassVar[float] = 0.95

    def prepare(self) -> None:
        """Measure the columns and decompose the weights."""
        super().prepare()
        self._factors = {
            layer.name: torch.linalg.svd(layer.weight.float(), full_matrices=False)
            for layer in self.subject.layers
        }

    def plain_at(self, level: Levels) -> ActivationSparsity:
        """Return the rules at a level: columns and rank share what is kept of each layer."""
        wanted = self._levels(level)
        made = super().plain_at(
            {name: 1 - (1 - s) * self.rho if 0 < s < 1 else s for name, s in wanted.items()}
        )
        made.level = sum(wanted.values()) / len(wanted)
        rest = {name: self._rest(self._made[name], s) for name, s in wanted.items()}
        made.rest = {name: pair for name, pair in rest.items() if pair is not None}
        return made

    def _rest(self, layer: Layer, level: float) -> LowRank | None:
        rows, cols = layer.shape
        columns = int(cols * (1 - level) * self.rho)
        rank = int((cols * rows * (1 - level) - columns * rows) / (cols + rows))
        if level <= 0 or rank < 1:
            return None
        u, s, v = self._factors[layer.name]
        return u[:, :rank] * s[:rank], v[:rank].contiguous()


class Wina(InputMethod):
    """As published: turned into the singular basis of `k` and `gate`, whose columns' norms count.

    Of the other layers magnitudes alone count. The turns are charged.
    """

    name, source = "wina", "arXiv 2505.19427; github.com/microsoft/wina"
    form = "topk"

    def prepare(self) -> None:
        """Find the basis of every input that comes from a norm."""
        self._turns: dict[str, Turn] = {}
        self._scales: dict[str, Tensor] = {}
        gates = {p.gate.layer.name: p.gate for p in self.subject.parts if p.gate is not None}
        for group in self.subject.groups:
            lead = _lead(group, gates)
            if lead is None:
                continue
            gain = self.subject.gain(lead)
            weight = gates.get(lead.name, Part(lead, 0, lead.out_features)).of(lead.weight.T).T
            weight = weight.float() * gain
            wide = weight.shape[0] < weight.shape[1]  # only then are more vectors needed
            basis = torch.linalg.svd(weight.double(), full_matrices=wide).Vh.T.float()
            turn = Turn(basis, gain)
            self._turns |= dict.fromkeys([layer.name for layer in group], turn)
            self._scales[lead.name] = (weight @ basis).norm(dim=0)
        if not self._turns:
            raise InvalidInput(
                "wina turns the inputs of q, k, v or of gate and up, each a layer of its own; this "
                f"model has none in scope {self.subject.scope!r}."
            )

    def rule(self, layer: Layer, level: float) -> Rule:
        """Return a new rule for a layer."""
        return Rule(
            level, self.subject.window, self.chosen, scale=self._scales.get(layer.name),
            turn=self._turns.get(layer.name),
        )  # fmt: skip

    def alike(self, layer: Layer) -> str:
        """Return the name of a layer whose columns count, and nothing of the others."""
        return layer.name if layer.name in self._scales else ""


def _lead(group: list[Layer], gates: Mapping[str, Part]) -> Layer | None:
    """Return the layer whose singular vectors turn a group's input: `gate`, or `k` of q, k, v."""
    for layer in group:
        if layer.name in gates or layer.projection == "k_proj":
            return layer
    return group[1] if len(group) == 3 else None


class Larosa(InputMethod):
    """Inputs that come from a norm are turned into their principal components; top-k of these.

    0.8 of the level for them, 1.2 for the others. The turns are charged.
    """

    name, source = "larosa", "arXiv 2507.01299; github.com/alibaba/EfficientAI"
    form = "topk"
    turned, plain = 0.8, 1.2

    def prepare(self) -> None:
        """Find the principal components of every input that comes from a norm."""
        self._turns: dict[str, Turn] = {}
        lead = {g[0].name: g for g in self.subject.groups if g[0].name in self.subject.norms}
        grams: dict[str, Tensor] = {}

        def take(seen: Recorded) -> None:
            x = seen.inputs.double()
            gram = x.T @ x
            name = seen.layer.name
            grams[name] = gram if name not in grams else grams[name] + gram

        if not lead:
            raise InvalidInput("larosa turns inputs that come from a norm; this model has none.")
        self.subject.watch([group[0] for group in lead.values()], take)
        for name, gram in grams.items():
            turn = Turn(torch.linalg.eigh(gram).eigenvectors.flip(-1).float())
            self._turns |= dict.fromkeys([layer.name for layer in lead[name]], turn)

    def rule(self, layer: Layer, level: float) -> Rule:
        """Return a new rule for a layer."""
        turn = self._turns.get(layer.name)
        share = min(1.0, level * (self.plain if turn is None else self.turned))
        return Rule(share, self.subject.window, self.chosen, turn=turn)


class Cats(ActivationMethod):
    """Neurons whose activated gate is small go: `up` and `down` need not compute them."""

    name, source = "cats", "arXiv 2404.08763; github.com/ScalingIntelligence/CATS"
    weighted: ClassVar[bool] = False
    """Whether the mean size of `up` counts too."""
    attention: ClassVar[bool] = False
    """Whether inputs of `q` and `o` are sparse too."""

    def fit(self) -> None:
        """Count the scores of all neurons."""
        if not self.subject.parts:
            raise InvalidInput(f"{self.name} needs feed-forward parts of linears; there are none.")
        self._sizes = self._up_sizes() if self.weighted else {}
        self._scores: dict[str, Scores] = {}
        rules = {part.down.name: self._rule(part, 0.5) for part in self.subject.parts}
        outside = self._queries()
        plain = {name: Rule(0.5, self.subject.window) for name in outside}
        heard = {p.gate.layer.name: p for p in self.subject.parts if p.gate is not None}

        def take(seen: Recorded) -> None:
            name = seen.layer.name
            if name in heard:
                rules[heard[name].down.name].gates[name] = seen.outputs
            if name in rules:
                rules[name].scores.update(rules[name].score(seen.inputs))
            if name in plain:
                plain[name].scores.update(plain[name].score(seen.inputs))

        layers = [layer for layer in self.subject.layers if layer.name in {*heard, *rules, *plain}]
        self.subject.watch(layers, take)
        self._scores = {n: r.scores for n, r in (rules | plain).items()}

    def _queries(self) -> list[str]:
        """Return the layers of attention whose inputs are sparse: o, and q where it is one."""
        if not self.attention or self.subject.scope != "all":
            return []
        inside = {layer.name for p in self.subject.parts for layer in _layers(p)}
        outside = [g for g in self.subject.groups if not {x.name for x in g} & inside]
        return [g[0].name for g in outside if len(g) > 1 or g[0].name not in self.subject.norms]

    def _up_sizes(self) -> dict[str, Float[Tensor, " neurons"]]:
        ups: dict[str, list[FeedForward]] = defaultdict(list)
        for part in self.subject.parts:
            if part.gate is not None and part.up is not None:
                ups[part.up.layer.name].append(part)
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = defaultdict(int)

        def take(seen: Recorded) -> None:
            for part in ups[seen.layer.name]:
                assert part.up is not None  # noqa: S101
                size = part.up.of(seen.outputs).abs().double().sum(0)
                sums[part.down.name] = sums.get(part.down.name, torch.zeros_like(size)) + size
                counts[part.down.name] += len(seen.outputs)

        if ups:
            wanted = [layer for layer in self.subject.layers if layer.name in ups]
            self.subject.watch(wanted, take)
        return {name: (total / counts[name]).float() for name, total in sums.items()}

    def _rule(self, part: FeedForward, level: float) -> NeuronRule:
        scale = self._sizes.get(part.down.name)
        return NeuronRule(level, self.subject.window, self.chosen, scale=scale, part=part)

    def at(self, level: Levels) -> ActivationSparsity:
        """Return the rules at a level of every feed-forward part (by the name of its `down`)."""
        neurons = [self._rule(part, level_of(level, part.down)) for part in self.subject.parts]
        for rule in neurons:
            assert rule.part is not None  # noqa: S101
            rule.scores = self._scores[rule.part.down.name]
            rule.settle()
        layers = {layer.name: layer for layer in self.subject.layers}
        inputs = {
            name: Rule(level_of(level, layers[name]), self.subject.window, self.chosen,
                       scores=self._scores[name])
            for name in self._queries()
        }  # fmt: skip
        for one in inputs.values():
            one.settle()
        mean = sum(rule.level for rule in neurons) / len(neurons)
        return ActivationSparsity(self.name, mean, self.subject, inputs, neurons)


class Chess(Cats):
    """As CATS, by the activated gate times the mean size of `up`."""

    name, source = "chess", "arXiv 2409.01366; github.com/junhuihe-hjh/CHESS (attention dense)"
    weighted = True


class ChessAttention(Chess):
    """As CHESS, with sparse inputs of `q` and `o` too."""

    name, source = "chess+", "arXiv 2409.01366; github.com/junhuihe-hjh/CHESS"
    attention = True


class Griffin(ActivationMethod):
    """The neurons that the first tokens of a sequence use most, for all tokens after them."""

    name, source = "griffin", "arXiv 2404.01365; as in github.com/Infini-AI-Lab/Sirius"
    form = "topk"

    def at(self, level: Levels) -> ActivationSparsity:
        """Return the rules at a level; the first tokens are those of the window."""
        if self.subject.window.dense < 1:
            raise InvalidInput(
                f"{self.name} chooses neurons from the first tokens; give `prefix`, their number."
            )
        if not self.subject.parts:
            raise InvalidInput(f"{self.name} needs feed-forward parts of linears; there are none.")
        neurons = [
            PromptRule(level_of(level, part.down), self.subject.window, part=part,
                       chooser=Chooser(self.name, 1 - level_of(level, part.down)))
            for part in self.subject.parts
        ]  # fmt: skip
        mean = sum(rule.level for rule in neurons) / len(neurons)
        return ActivationSparsity(self.name, mean, self.subject, {}, neurons)


class CoreInfer(Griffin):
    """The neurons that most of the first tokens have among their largest, for all after them."""

    name, source = "coreinfer", "arXiv 2410.18311; github.com/wangqinsi1/CoreInfer (stability)"


Score = Callable[[Float[Tensor, "tokens features"], Float[Tensor, "rows features"]], Tensor]
"""Maps a layer's inputs and weight to scores of the inputs' shape, finite and not negative."""


class _Given(Rule):
    """A rule by somebody's own scores."""

    function: Score
    weight: Tensor

    def weigh(self, z: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Return the scores; refuse what are none."""
        flat, weight = z.flatten(0, -2), self.weight
        given = SeenTensor.of(flat), SeenTensor.of(weight)
        try:
            found: Any = self.function(flat, weight)
        except EntangleError:
            raise
        except Exception as error:
            raise InvalidInput(
                f"the function of scores failed: {type(error).__name__}: {error}"
            ) from error
        if not given[0].same_as(flat) or not given[1].same_as(weight):
            raise InvalidInput("the function of scores must not change what it is given; it did.")
        if not isinstance(found, Tensor) or found.shape != flat.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InvalidInput(
                f"scores must have the inputs' shape {tuple(flat.shape)}; the function gave "
                f"{shape}."
            )
        if not bool(((found >= 0) & found.isfinite()).all()):
            raise InvalidInput("scores must be finite and not negative; the function's are not.")
        return found.reshape(z.shape).float().abs()  # without negative zeros


def input_method(name: str, function: Score, source: str = "") -> type[InputMethod]:
    """Return a method of one's own: the inputs with the smallest scores go.

    Parameters
    ----------
    name
        How it is called.
    function
        Maps inputs (tokens, features) and a weight (rows, features) to scores (tokens, features).
    source
        What `entangle list` shows of it.

    Examples
    --------
    >>> input_method("mine", lambda x, w: x.abs() * w.abs().amax(0)).name
    'mine'
    """

    def rule(self: InputMethod, layer: Layer, level: float) -> Rule:
        made = _Given(level, self.subject.window, self.chosen)
        made.function, made.weight = function, layer.weight
        return made

    settings = {
        "name": name, "source": source, "rule": rule, "alike": lambda _self, layer: layer.name
    }  # fmt: skip
    return type(f"Given_{name}", (InputMethod,), settings)


def as_method(name: str, thing: object) -> type[ActivationMethod]:
    """Return a class of methods: `thing` itself, or one made of a function as by `input_method`."""
    if isinstance(thing, type) and issubclass(thing, ActivationMethod):
        return thing
    if not callable(thing):
        raise InvalidInput(
            f"an activation method must be a function of inputs and weight, or a class of "
            f"ActivationMethod; {name!r} is {type(thing).__name__}."
        )
    return input_method(name, thing)


ACTIVATION_METHODS: Door[type[ActivationMethod]] = Door("methods", as_method)
"""The methods by name."""
for _one in (Teal, ColumnNorm, Wina, Cats, Chess, ChessAttention, RSparse, Larosa, Griffin,
             CoreInfer):  # fmt: skip
    ACTIVATION_METHODS.own(_one.name, _one, source=_one.source)


def _layers(part: FeedForward) -> Iterable[Layer]:
    yield part.down
    for piece in (part.gate, part.up):
        if piece is not None:
            yield piece.layer
