import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models import blocks
from entangle.models.blocks import BlockRunner
from entangle.models.layers import find_blocks
from entangle.seeding import torch_rng
from tests.tiny_models import GROUPED, TINY, build_other

DECODERS = [name for name in TINY if name != "bert"]
SHAPES = [(1, 1), (1, 7), (3, 20), (2, 64)]  # below and above the tiny models' sliding windows


def _ids(*shape: int) -> Tensor:
    return torch.randint(4, 112, shape, generator=torch_rng(0, "block tests", *shape))


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def _model(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> nn.Module:
    """Build a tiny model that computes attention in the given way, where it has a choice."""
    tiny: Any = TINY[name]()
    attention = attention if tiny._supports_sdpa else "eager"
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = tiny._from_config(tiny.config, attn_implementation=attention)
    model.load_state_dict(tiny.state_dict())
    return model.to(dtype).eval()


def _new(name: str, config: str, **settings: object) -> nn.Module:
    """Build a small model of a kind that is not among the tiny ones."""
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = getattr(hf, name)(getattr(hf, config)(**settings))
    return model.eval()


def _run_all(runner: BlockRunner, ids: Tensor) -> Tensor:
    """Return the logits of all blocks run one at a time, entering again for every block."""
    hidden, _ = runner.enter(ids)
    for index in range(runner.n_blocks):
        hidden = runner.run(index, hidden, runner.enter(ids)[1])
    return runner.leave(hidden, ids)


def _watch_blocks(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the output of every block in the model's own forward, and the logits."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, _args: object, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).clone())

    handles = [block.register_forward_hook(note) for block in find_blocks(model)[1]]
    logits = _logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen, logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECODERS)
def test_blocks_one_at_a_time_are_the_model(name: str, dtype: torch.dtype, attention: str) -> None:
    model = _model(name, dtype, attention)
    runner = BlockRunner(model)
    assert runner.n_blocks == 3
    for shape in SHAPES:
        ids = _ids(*shape)
        assert torch.equal(_run_all(runner, ids), _logits(model, ids))


@pytest.mark.parametrize("name", DECODERS)
def test_each_block_gives_its_own_output(name: str) -> None:
    model, ids = TINY[name](), _ids(2, 24)
    runner = BlockRunner(model)
    outputs, logits = _watch_blocks(model, ids)
    hidden, inputs = runner.enter(ids)
    assert inputs.shape == hidden.shape == (2, 24, 32)
    for index, expected in enumerate(outputs):
        before = hidden.clone()
        after = runner.run(index, hidden, inputs)
        assert torch.equal(after, expected)
        assert torch.equal(hidden, before)  # a batch can go through the same block again
        hidden = after
    assert torch.equal(runner.leave(hidden, ids), logits)


@pytest.mark.parametrize("name", DECODERS)
def test_changed_weights_count(name: str) -> None:
    model, ids = TINY[name](), _ids(2, 9)
    runner = BlockRunner(model)
    dense = _run_all(runner, ids)
    for parameter in find_blocks(model)[1][1].parameters():
        parameter.mul_(0.5)
    changed = _run_all(runner, ids)
    assert torch.equal(changed, _logits(model, ids))
    assert not torch.equal(changed, dense)


def test_a_replaced_block_counts() -> None:
    model, ids = TINY["llama"](), _ids(2, 9)
    runner = BlockRunner(model)
    dense = _run_all(runner, ids)
    find_blocks(model)[1][1] = TINY["mistral"]().get_submodule("model.layers.1")
    replaced = _run_all(runner, ids)
    assert torch.equal(replaced, _logits(model, ids))
    assert not torch.equal(replaced, dense)


def test_blocks_receive_different_arguments() -> None:
    model, ids = TINY["gemma3"](), _ids(2, 24)  # block 1 alone has global attention and rotation
    runner = BlockRunner(model)
    hidden, inputs = runner.enter(ids)
    block = find_blocks(model)[1][1]
    with torch.no_grad():
        local, own = inputs.calls[0](block, hidden), inputs.calls[1](block, hidden)
    assert torch.equal(own, runner.run(1, hidden, inputs))
    assert not torch.allclose(local, own, atol=1e-3)


def test_the_tail_caps_logits_as_the_model_does() -> None:
    settings = {**GROUPED, "head_dim": 8, "final_logit_softcapping": 0.01}
    model, ids = _new("Gemma2ForCausalLM", "Gemma2Config", **settings), _ids(2, 9)
    logits = _run_all(BlockRunner(model), ids)
    assert torch.equal(logits, _logits(model, ids))
    assert 0.009 < float(logits.abs().max()) <= 0.01


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_enter_and_leave_run_no_block(name: str) -> None:
    model, ids = TINY[name](), _ids(2, 9)
    runner = BlockRunner(model)
    ran: list[str] = []
    for path, part in model.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda *_, path=path: ran.append(path))
    hidden, _ = runner.enter(ids)
    assert ran == []
    runner.leave(hidden, ids)
    assert ran == ["lm_head"]


@pytest.mark.parametrize("name", DECODERS)
def test_blocks_are_told_to_use_no_cache(name: str) -> None:
    model, ids = TINY[name](), _ids(2, 9)
    runner = BlockRunner(model)
    received: list[dict[str, object]] = []

    def note(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        received.append({**{str(place): value for place, value in enumerate(args)}, **kwargs})

    for block in find_blocks(model)[1]:
        block.register_forward_pre_hook(note, with_kwargs=True)
    hidden, inputs = runner.enter(ids)
    received.clear()
    for index in range(runner.n_blocks):
        hidden = runner.run(index, hidden, inputs)
    assert len(received) == 3
    for arguments in received:
        assert not arguments.get("use_cache")
        assert not any(isinstance(value, hf.Cache) for value in arguments.values())


def test_inputs_hold_no_hidden_states() -> None:
    runner = BlockRunner(TINY["llama"]())
    hidden, inputs = runner.enter(_ids(2, 9))
    ghost = weakref.ref(hidden)
    del hidden
    assert ghost() is None
    assert len(inputs.calls) == 3


def test_nothing_is_differentiated_or_bound_to_inference_mode() -> None:
    model, ids = TINY["llama"]().requires_grad_(True), _ids(2, 9)
    runner = BlockRunner(model)
    with torch.inference_mode():
        hidden, inputs = runner.enter(ids)
        after = runner.run(0, hidden, inputs)
        logits = runner.leave(after, ids)
    for tensor in (hidden, after, logits):
        assert not tensor.requires_grad
        assert not tensor.is_inference()


Step = Callable[["Toy", Tensor], Tensor]


class Block(nn.Module):
    """A residual linear; what it is given beside the hidden states shows in its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.caches: list[object] = []

    def forward(self, hidden: Tensor, shift: float = 0.0, **others: Any) -> Tensor:
        self.caches.append(others.get("cache"))
        left = others.get("left")
        states = left.pop("states") if left else hidden
        change: Tensor = self.linear(states)
        if left is not None:
            left["states"] = change
        return hidden + change + shift


class Toy(nn.Module):
    """Embedding, blocks called by ``step``, final norm and head."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        generator = torch_rng(0, "toy")
        self.embed = nn.Embedding(112, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 112)
        self.step = step
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        hidden = self.step(self, self.embed(ids))
        return SimpleNamespace(logits=self.head(self.norm(hidden)))


def _by_keyword(toy: Toy, hidden: Tensor) -> Tensor:
    for index, block in enumerate(toy.blocks):
        hidden = block(hidden=hidden, shift=float(index), cache=hf.DynamicCache())
    return hidden


def _by_position(toy: Toy, hidden: Tensor) -> Tensor:
    for index, block in enumerate(toy.blocks):
        hidden = block(hidden, float(index), cache=hf.DynamicCache())
    return hidden


def _adding_between(toy: Toy, hidden: Tensor) -> Tensor:
    for block in toy.blocks:
        hidden = block(hidden) + 1.0
    return hidden


def _leaving_states(toy: Toy, hidden: Tensor) -> Tensor:
    left: dict[str, Tensor] = {}
    for block in toy.blocks:
        hidden = block(hidden, left=left)
    return hidden


def _reading_the_output(toy: Toy, hidden: Tensor) -> Tensor:
    for block in toy.blocks:
        hidden = block(hidden, shift=float(hidden.mean()))
    return hidden


def _twice(toy: Toy, hidden: Tensor) -> Tensor:
    for block in (*toy.blocks, *toy.blocks):
        hidden = block(hidden)
    return hidden


def _not_the_last(toy: Toy, hidden: Tensor) -> Tensor:
    for block in list(toy.blocks)[:-1]:
        hidden = block(hidden)
    return hidden


@pytest.mark.parametrize("step", [_by_keyword, _by_position])
def test_arguments_are_given_as_the_model_gives_them_but_no_cache(step: Step) -> None:
    toy, ids = Toy(step).eval(), _ids(2, 5)
    runner = BlockRunner(toy)
    assert torch.equal(_run_all(runner, ids), _logits(toy, ids))
    for block in toy.blocks:
        assert isinstance(block, Block)
        *_, replayed, own = block.caches
        assert replayed is None
        assert isinstance(own, hf.DynamicCache)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (_adding_between, "logits come out differently"),
        (_leaving_states, "logits come out differently"),
        (_reading_the_output, "logits come out differently"),
        (_twice, r"3 blocks run in the order \[0, 1, 2, 0, 1, 2\]"),
        (_not_the_last, r"3 blocks run in the order \[0, 1\]"),
    ],
)
def test_blocks_that_depend_on_more_than_their_input_are_refused(step: Step, message: str) -> None:
    toy = Toy(step).eval()
    with pytest.raises(InvalidInput, match=f"Toy cannot be run block by block: .*{message}"):
        BlockRunner(toy)
    assert _untouched(toy)


def test_one_module_in_two_places_is_refused() -> None:
    toy = Toy(_by_position).eval()
    toy.blocks[2] = toy.blocks[0]
    with pytest.raises(InvalidInput, match=r"\b3 blocks.*order"):
        BlockRunner(toy)
    assert _untouched(toy)


@pytest.mark.parametrize("shared", [0, 2])
def test_only_shared_keys_and_values_are_refused(shared: int) -> None:
    settings: dict[str, object] = {
        **GROUPED,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": shared,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 112,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    }
    model, ids = _new("Gemma3nForCausalLM", "Gemma3nTextConfig", **settings), _ids(2, 9)
    if shared:
        with pytest.raises(InvalidInput, match=r"Gemma3nForCausalLM.*Error"):
            BlockRunner(model)
    else:  # an input of its own for every block, and four copies of the hidden states
        assert torch.equal(_run_all(BlockRunner(model), ids), _logits(model, ids))


def test_models_of_another_kind_are_refused() -> None:
    classifier = _new("LlamaForSequenceClassification", "LlamaConfig", **GROUPED)
    for model in (TINY["bert"](), classifier):
        with pytest.raises(InvalidInput, match=type(model).__name__):
            BlockRunner(model)
    small = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    with pytest.raises(InvalidInput, match="encoder-decoder"):
        BlockRunner(_new("T5ForConditionalGeneration", "T5Config", **small))
    with pytest.raises(InvalidInput, match="ModuleList"):
        BlockRunner(nn.Sequential(nn.Embedding(112, 8), nn.Linear(8, 112)).eval())
    with pytest.raises(InvalidInput, match="eval mode"):
        BlockRunner(TINY["llama"]().train())


def test_an_index_or_shape_of_another_model_or_batch_is_refused() -> None:
    runner = BlockRunner(TINY["llama"]())
    ids = _ids(2, 9)
    hidden, inputs = runner.enter(ids)
    for index in (-1, 3):
        with pytest.raises(InvalidInput, match=rf"0\.\.2; got {index}"):
            runner.run(index, hidden, inputs)
    short = runner.enter(_ids(2, 1))[0]
    with pytest.raises(InvalidInput, match=r"\(2, 9, 32\).*\(2, 1, 32\)"):
        runner.run(0, short, inputs)
    with pytest.raises(InvalidInput, match=r"\(2, 9, 32\).*\(2, 1, 32\)"):
        runner.leave(short, ids)


def _untouched(model: nn.Module) -> bool:
    return all("forward" not in vars(part) for part in model.modules())


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.norm"])
def test_an_interrupt_leaves_the_model_as_it_was(part: str) -> None:
    model, ids = TINY["llama"](), _ids(2, 9)
    runner, expected = BlockRunner(model), _logits(model, ids)
    hidden, _ = runner.enter(ids)
    handle = model.get_submodule(part).register_forward_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.leave(hidden, ids)
    if part == "model.embed_tokens":
        with pytest.raises(KeyboardInterrupt):
            runner.enter(ids)
    handle.remove()
    assert _untouched(model)
    assert torch.equal(_logits(model, ids), expected)


def test_a_forward_of_a_blocks_own_is_put_back(count_hooks: Callable[[nn.Module], int]) -> None:
    model, ids = TINY["llama"](), _ids(2, 9)
    block = find_blocks(model)[1][1]

    def doubled(forward: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
        return 2 * forward(*args, **kwargs)

    own = partial(doubled, block.forward)
    vars(block)["forward"] = own
    assert torch.equal(_run_all(BlockRunner(model), ids), _logits(model, ids))
    assert vars(block).pop("forward") is own
    assert _untouched(model)
    assert count_hooks(model) == 0


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have logits of five tokens at most computed at once."""
    for name in ("MOST_LOGITS", "LOGITS_OF_A_PART"):
        monkeypatch.setattr(blocks, name, 5 * 112)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("name", DECODERS)
def test_logits_in_parts_are_the_whole_ones(name: str) -> None:
    model, ids = TINY[name](), _ids(1, 13)
    runner, (outputs, logits) = BlockRunner(model), _watch_blocks(model, ids)
    hidden = runner.last(ids)
    assert torch.equal(hidden, outputs[-1])
    starts, parts = zip(*runner.leave_in_parts(hidden, ids), strict=True)
    assert starts == (0, 5, 10)
    torch.testing.assert_close(torch.cat(parts, 1), logits)
    assert torch.equal(_logits(model, ids), logits)  # all is as it was
    few = list(runner.leave_in_parts(hidden[:, :5], ids[:, :5]))
    assert [(start, part.shape[1]) for start, part in few] == [(0, 5)]
    both = runner.last(_ids(2, 13))
    assert [part.shape[1] for _, part in runner.leave_in_parts(both, _ids(2, 13))] == [2] * 6 + [1]


class _Sums(nn.Module):
    """A head before which every token gets the sum of those before it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight, self.own = head.weight, head

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.own(hidden.cumsum(1))
        return found


@pytest.mark.usefixtures("in_parts")
def test_what_joins_tokens_after_the_blocks_is_never_parted() -> None:
    model, ids = TINY["llama"](), _ids(1, 13)
    model.lm_head = _Sums(model.get_submodule("lm_head"))
    runner = BlockRunner(model)
    (start, logits), *others = runner.leave_in_parts(runner.last(ids), ids)
    assert (start, others) == (0, [])
    assert torch.equal(logits, _logits(model, ids))


@pytest.mark.usefixtures("in_parts")
def test_hidden_states_of_another_form_are_never_parted() -> None:
    """Gemma 3n's are (versions, sequences, tokens, features)."""
    model, ids = build_other("gemma3n"), _ids(1, 13)
    runner = BlockRunner(model)
    (start, logits), *others = runner.leave_in_parts(runner.last(ids), ids)
    assert (start, others) == (0, [])
    torch.testing.assert_close(logits, _logits(model, ids))


@pytest.mark.usefixtures("in_parts")
def test_logits_of_two_tokens_are_not_parted() -> None:
    model, ids = TINY["llama"](), _ids(7, 2)
    runner = BlockRunner(model)
    ((_, logits),) = runner.leave_in_parts(runner.last(ids), ids)
    torch.testing.assert_close(logits, _logits(model, ids))
