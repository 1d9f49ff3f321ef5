"""Running a causal language model for its logits, with plain errors."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import transformers as hf
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entangle.errors import InvalidInput, MemoryLimit
from entangle.memory import give_back, memory_for, ran_out
from entangle.models.blocks import MOST_LOGITS, BlockRunner
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.models.streaming import comes_by_blocks, kept_outside
from entangle.recording.states import last_by_blocks
from entangle.texts.evaluation import EvaluationText, as_evaluation


def as_causal_model(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguageModel:
    """Return ``model`` as a `LanguageModel`; raise `InvalidInput` for an encoder."""
    language_model = as_language_model(model, tokenizer)
    config = getattr(language_model.module, "config", None)
    masked = type(config) in hf.MODEL_FOR_MASKED_LM_MAPPING
    if masked and not getattr(config, "is_decoder", False):
        raise InvalidInput(
            "evaluation needs a model that predicts the next token; "
            f"{language_model.name!r} ({type(language_model.module).__name__}) is an encoder: "
            "give a causal language model."
        )
    return language_model


def check_fits(model: LanguageModel, text: EvaluationText) -> None:
    """Raise `InvalidInput` if windows are longer than the context or ids no tokens of the model."""
    if not isinstance(text, EvaluationText):
        raise InvalidInput(
            "the text to evaluate on must be an EvaluationText, from entangle.load_evaluation; got "
            f"{type(text).__name__}."
        )
    as_evaluation(text, model)


def next_token_logits(
    model: LanguageModel, ids: Int64[Tensor, "windows tokens"]
) -> Float[Tensor, "windows tokens vocabulary"]:
    """Run a model on token ids and return its logits, on the model's device.

    Raises
    ------
    InvalidInput
        If the model returns no logits for each token.
    """
    accepted = inspect.signature(model.module.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    with torch.no_grad():
        output = model.module(ids.to(model.device), **options)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise InvalidInput(
            f"evaluation needs logits of shape (windows, tokens, vocabulary); {model.name!r} "
            f"({type(model.module).__name__}) returns none: give a model with a "
            "language-modelling head."
        )
    return logits


def next_tokens(
    model: LanguageModel,
    batches: Sequence[Int64[Tensor, "_ _"]],
    *,
    memory: int | None = None,
    report: Callable[[int], None] = lambda _windows: None,
) -> Iterator[tuple[Int64[Tensor, "_ _"], Float[Tensor, "_ _ _"]]]:
    """Yield the ids and the logits (windows, tokens, vocabulary) of every batch, in order.

    Where the weights come block by block, all batches pass one block after the other, so that each
    is read once; elsewhere, and where a model cannot be run so, batch by batch.

    Parameters
    ----------
    model
        The model.
    batches
        Token ids of each, (windows, tokens).
    memory
        Bytes of hidden states between two blocks; by default half of what is free.
    report
        Called with the number of windows that are done with.
    """
    for ids, parts in next_tokens_in_parts(model, batches, memory=memory, report=report):
        together = [logits for _, logits in parts]
        yield ids, together[0] if len(together) == 1 else torch.cat(together, 1)


Parts = Iterator[tuple[int, Float[Tensor, "windows part vocabulary"]]]
"""Logits of one part of the tokens after the other, each with the place of its first token."""


def next_tokens_in_parts(
    model: LanguageModel,
    batches: Sequence[Int64[Tensor, "_ _"]],
    *,
    memory: int | None = None,
    report: Callable[[int], None] = lambda _windows: None,
) -> Iterator[tuple[Int64[Tensor, "_ _"], Parts]]:
    """As `next_tokens`, with the logits in parts where a batch has more than `MOST_LOGITS`.

    Take all parts of a batch before the next one. A model that cannot be run block by block gives
    them whole.
    """
    if not comes_by_blocks(model.module):
        for ids in batches:
            yield ids, logits_in_parts(model, ids)
            give_back()
            report(len(ids))
        return
    budget = memory_for(memory, model.module)
    runner = BlockRunner(model.module)
    with kept_outside(model.module):
        for ids, hidden in last_by_blocks(runner, batches, memory=budget):
            yield ids, runner.leave_in_parts(hidden, ids)
            report(len(ids))


def logits_in_parts(model: LanguageModel, ids: Int64[Tensor, "windows tokens"]) -> Parts:
    """Yield the logits of one batch in parts, as `next_tokens_in_parts`."""
    runner = None
    if ids.numel() * model.vocab_size > MOST_LOGITS:
        with suppress(InvalidInput):  # a model of another kind, whose logits come whole
            runner = BlockRunner(model.module)
    if runner is None:
        yield 0, next_token_logits(model, ids)
        return
    yield from runner.leave_in_parts(runner.last(ids), ids)


@contextmanager
def memory_limit(load: str, *, lower: str) -> Iterator[None]:
    """Turn the end of memory into a `MemoryLimit` that tells the load and what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise MemoryLimit(
            f"memory ran out with {load} in one forward pass; lower {lower}."
        ) from error
