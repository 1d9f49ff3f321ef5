"""EleutherAI's lm-evaluation-harness on a model in memory (the optional extra ``harness``)."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pandas as pd
from tokenizers import Tokenizer, processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.checks import whole
from entangle.errors import InvalidInput, Unavailable
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.models.pretrained import broken_as
from entangle.texts.special_tokens import DEFAULT_POLICY, affixes, check_policy

if TYPE_CHECKING:
    HarnessModel = Any
    """``lm_eval.models.huggingface.HFLM``, which may not be installed."""


def harness_model(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    special_tokens: str = DEFAULT_POLICY,
    batch_size: int = 1,
) -> "HarnessModel":
    """Wrap a model for ``lm_eval.simple_evaluate(model=harness_model(model), tasks=[...])``.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a causal transformers model, or a
        `LanguageModel`.
        Weights or layers may have been changed. It is not copied, and stays in eval mode, as the
        harness keeps it.
    tokenizer
        Replaces the model's own.
    special_tokens
        ``"model"``: those that the model's tokenizer puts before a text stand before every context
        and every text, once; ``"none"``: no context gets any; ``"published"``: as the harness does
        without being told, which puts some tokenizers' BOS twice before a text whose perplexity is
        measured. In front of an empty context, and of a text of a model with no such habit, the
        harness always puts one token, BOS or EOS.
    batch_size
        Sequences in one forward pass.

    Returns
    -------
    HarnessModel
        An ``lm_eval.models.huggingface.HFLM`` around the module and a copy of the tokenizer (the
        harness gives it a padding token if it has none).

    Raises
    ------
    Unavailable
        If the harness is not installed.
    InvalidInput
        If the module is no transformers model or there is no tokenizer.
    """
    language_model = as_language_model(model, tokenizer)
    module, own = language_model.module, language_model.tokenizer
    if not isinstance(module, PreTrainedModel) or not module.can_generate():
        raise InvalidInput(
            "the harness needs a causal language model of the transformers library; got "
            f"{type(module).__name__}."
        )
    if own is None:
        raise InvalidInput("the harness needs a tokenizer; pass the model's as `tokenizer`.")
    policy = check_policy(special_tokens)
    copied, settings = copy.deepcopy(own), _settings(own, policy)
    if policy == "model":
        _add_in_front(copied, affixes(own, policy).before)
    wrapper = _wrapper_class(once=policy == "model")
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings tell that the model is in memory, as is meant
    try:
        return wrapper(
            pretrained=module,
            backend="causal",
            tokenizer=copied,
            max_length=language_model.context_length,
            batch_size=whole("batch_size", batch_size, least=1),
            **settings,
        )
    finally:
        logger.setLevel(level)


def task_results(
    models: Mapping[str, LanguageModel],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    special_tokens: str = DEFAULT_POLICY,
    seed: int = 0,
) -> pd.DataFrame:
    """Run tasks of the harness on models.

    Parameters
    ----------
    models
        By label.
    tasks
        Names that the harness knows.
    limit
        Take only the first examples of every task.
    batch_size, special_tokens
        As for `harness_model`.
    seed
        Of the examples that are shown before a question.

    Returns
    -------
    DataFrame
        One row a model, task and metric: ``model``, ``task``, ``metric``, ``value``,
        ``standard error`` (NaN where the harness gives none).

    Raises
    ------
    Unavailable, InvalidInput
        As `harness_model`; and if the harness lacks a task, or its data cannot be had.
    """
    rows = []
    for label, model in models.items():
        wrapped = harness_model(model, special_tokens=special_tokens, batch_size=batch_size)
        evaluate: Any = import_module("lm_eval").simple_evaluate
        with broken_as(f"tasks {', '.join(tasks)!r}", verb="run"):
            found = evaluate(
                model=wrapped, tasks=list(tasks), limit=limit, random_seed=seed,
                numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        for task, scores in found["results"].items():
            for name, value in scores.items():
                metric, _, kind = name.partition(",")
                if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                    error = scores.get(f"{metric}_stderr,{kind}")
                    known = error if isinstance(error, int | float) else math.nan
                    rows.append((label, task, metric, float(value), float(known)))
    columns = ["model", "task", "metric", "value", "standard error"]
    return pd.DataFrame(rows, columns=columns)


def _settings(tokenizer: PreTrainedTokenizerBase, policy: str) -> dict[str, Any]:
    """Return the harness's own options that a policy amounts to."""
    if policy == "published":
        return {}
    before = affixes(tokenizer, policy).before
    if not before:
        return {"add_bos_token": False}
    return {"add_bos_token": True, "prefix_token_id": before[-1]}


def _add_in_front(tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> None:
    """Make a fast tokenizer put exactly these tokens in front of a text, and none behind it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return
    names = [str(tokenizer.convert_ids_to_tokens(token)) for token in before]
    pairs = list(zip(names, before, strict=True))
    template: Any = processors.TemplateProcessing
    backend.post_processor = template([*names, "$A"], None, pairs)


def _wrapper_class(*, once: bool) -> Any:
    """Return the harness's class; one that puts the tokens before a whole text ``once``.

    The harness puts its prefix token before the tokens of a text whose log-likelihood it sums
    (``loglikelihood_rolling``), those that the tokenizer adds among them.
    """
    try:
        known = import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise Unavailable(
            f"the evaluation harness cannot be imported ({error}); install it with "
            "`pip install 'neuron-entanglement[harness]'`."
        ) from error

    if not once:
        return known

    def loglikelihood_rolling(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept, self.add_bos_token = self.add_bos_token, False
        try:
            return known.loglikelihood_rolling(self, *args, **kwargs)
        finally:
            self.add_bos_token = kept

    return type(known.__name__, (known,), {"loglikelihood_rolling": loglikelihood_rolling})
