"""From logits to tokens in NumPy: processors, warpers, generators and the per-sequence selector."""

from __future__ import annotations

from qwen_runtime.sampling.bias import (
    LogitBiasLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
)
from qwen_runtime.sampling.build import build_logits_processors, build_warpers
from qwen_runtime.sampling.candidates import CandidateFilter, CandidateProcessor, Candidates
from qwen_runtime.sampling.constraints import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from qwen_runtime.sampling.entropy_warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)
from qwen_runtime.sampling.guidance import UnbatchedClassifierFreeGuidanceLogitsProcessor
from qwen_runtime.sampling.ngrams import (
    EncoderNoRepeatNGramLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)
from qwen_runtime.sampling.numerics import log_softmax, softmax
from qwen_runtime.sampling.penalties import (
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    FrequencyPenaltyLogitsProcessor,
    PresencePenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from qwen_runtime.sampling.processor import LogitsProcessor, LogitsProcessorList, ProcessorCallable
from qwen_runtime.sampling.rng import (
    DefaultGenerator,
    TokenGenerator,
    TorchGenerator,
    make_generator,
)
from qwen_runtime.sampling.selector import TokenSelector, checked_probabilities, sample
from qwen_runtime.sampling.warpers import (
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

__all__ = [
    "CandidateFilter",
    "CandidateProcessor",
    "Candidates",
    "DefaultGenerator",
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "FrequencyPenaltyLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitBiasLogitsProcessor",
    "LogitNormalization",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "PresencePenaltyLogitsProcessor",
    "ProcessorCallable",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TokenGenerator",
    "TokenSelector",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TorchGenerator",
    "TypicalLogitsWarper",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "build_logits_processors",
    "build_warpers",
    "checked_probabilities",
    "log_softmax",
    "make_generator",
    "sample",
    "softmax",
]
