"""EleutherAI's lm-evaluation-harness on a model in memory (the optional extra ``harness``)."""

import copy
import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.checks import whole
from entangle.errors import InvalidInput, Unavailable
from entangle.models.loading import AnyModel, as_language_model

if TYPE_CHECKING:
    HarnessModel = Any
    """``lm_eval.models.huggingface.HFLM``, which may not be installed."""


def harness_model(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
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
    wrapper = _wrapper_class()
    logger = logging.getLogger(wrapper.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warnings tell that the model is in memory, as is meant
    try:
        return wrapper(
            pretrained=module,
            backend="causal",
            tokenizer=copy.deepcopy(own),
            max_length=language_model.context_length,
            batch_size=whole("batch_size", batch_size, least=1),
        )
    finally:
        logger.setLevel(level)


def _wrapper_class() -> Any:
    try:
        return import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise Unavailable(
            f"the evaluation harness cannot be imported ({error}); install it with "
            "`pip install 'entangle[harness]'`."
        ) from error
