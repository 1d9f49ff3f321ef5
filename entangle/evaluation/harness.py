"""EleutherAI's lm-evaluation-harness on a model in memory (the optional extra ``harness``)."""

import copy
import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.errors import InvalidInput, Unavailable
from entangle.models.loading import LanguageModel, as_language_model
