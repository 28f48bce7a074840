"""Sampling: a request's settings, the target's processed distribution, its own token at every node.

Knows nothing of trees beyond their depths and ancestor words, and nothing of models.
Dimension legend: B requests, N nodes, V vocabulary.

Randomness: the token at output position t of a request is the inverse CDF of its distribution at one uniform
number u_t that depends on the request's seed and t alone. All nodes of one depth would fill the same position
and at most one of them is ever visited, so they share their u_t: draws stay independent along every path, and
a seeded request gives the very same tokens with and without speculation, whatever the tree and the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.fused import available
from specdec.native.largest import MOST, can_find, places, top
from specdec.tree import DraftTree

MAX_BIAS = 1e6  # decides against any logit and stays finite in float32 at any temperature
COLDEST = 1e-5  # smaller temperatures act as this one: below it quotients of logits leave float32
LEAST_MASS = 1e-30  # smaller top_p act as this one: 0 in float32 would keep no token at all
WORD = 2**64 - 1  # a 64-bit word, all bits set
BLOCK = 256  # neighbouring tokens whose mass is summed before a draw
NUCLEUS_HEAD = 1024  # most nuclei fit in so many tokens; the full sort is only made where one does not


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request samples and stops. Validated on creation.

    Attributes:
        temperature: 0 is greedy, else logits are divided by it.
        top_k: keep the k likeliest tokens, 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose mass reaches it.
        min_p: keep tokens at least this fraction of the likeliest one's probability.
        repetition_penalty: divides positive, multiplies negative logits of tokens seen in prompt and output.
        presence_penalty, frequency_penalty: subtracted once, and per occurrence, for tokens of the output.
        logit_bias: added to the logits of the given token ids.
        seed: of the request's own random numbers; None draws one.
        max_tokens: at most so many new tokens.
        stop: strings that end the answer; they are cut from the text.
        stop_token_ids: token ids that end the answer beside the target's own.
        ignore_eos: go on after the target's end-of-sequence tokens (not after `stop_token_ids`).
        logprobs: report the log-probability of emitted tokens and this many alternatives; None: nothing.

    Raises:
        RequestError: naming the field that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _whole("top_k", self.top_k, 0, None)
        _whole("max_tokens", self.max_tokens, 1, None)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, 100)
        _check_stops(self.stop, self.stop_token_ids)
        _check_bias(self.logit_bias)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    allowed = f"a number {'>' if open_low else '>='} {low:g} and <= {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
        raise RequestError("is not a number", field=name, value=value, allowed=allowed)
    if value > high or value < low or (open_low and value == low):
        raise RequestError("is out of range", field=name, value=value, allowed=allowed)


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    allowed = f"a whole number >= {low}" + (f" and <= {high}" if high is not None else "")
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError("is not a whole number", field=name, value=value, allowed=allowed)
    if value < low or (high is not None and value > high):
        raise RequestError("is out of range", field=name, value=value, allowed=allowed)


def _check_stops(stop: object, ids: object) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(text, str) and text for text in stop):
        raise RequestError("wants strings", field="stop", value=stop, allowed="a tuple of non-empty strings")
    if not isinstance(ids, tuple) or not all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids
    ):
        raise RequestError(
            "wants token ids", field="stop_token_ids", value=ids, allowed="a tuple of ids >= 0"
        )


def _check_bias(bias: object) -> None:
    good = isinstance(bias, Mapping) and all(
        isinstance(k, int) and not isinstance(k, bool) and k >= 0
        and isinstance(v, int | float) and not isinstance(v, bool) and -MAX_BIAS <= v <= MAX_BIAS
        for k, v in bias.items()
    )  # fmt: skip
    if not good:
        raise RequestError("wants finite numbers by token id", field="logit_bias", value=bias,
                           allowed=f"ids >= 0 with numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}")  # fmt: skip


@dataclass(frozen=True, slots=True)
class BatchSampling:
    """The settings of B requests as tensors, made anew only when the batch changes.

    Attributes:
        temperature, top_p, min_p: float32 [B]; top_k: int64 [B] (0 keeps all).
        bias: float32 [B, V] or None where nobody asks.
        penalties: float32 [B, 3] repetition, presence, frequency, or None where nobody asks.
        greedy: nobody in the batch samples.
        plain: nobody in the batch truncates (top_k, top_p, min_p).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    bias: Tensor | None
    penalties: Tensor | None
    greedy: bool
    plain: bool

    @staticmethod
    def of(settings: Sequence[Sampling], vocab: int, device: torch.device) -> BatchSampling:
        """Gather the settings of a batch. Raises RequestError for a bias outside the vocabulary."""

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        penalties = [[s.repetition_penalty, s.presence_penalty, s.frequency_penalty] for s in settings]
        return BatchSampling(
            temperature=column([max(s.temperature, COLDEST) if s.temperature else 0.0 for s in settings]),
            top_k=torch.tensor([min(s.top_k, vocab) for s in settings], dtype=torch.int64, device=device),
            top_p=column([max(s.top_p, LEAST_MASS) for s in settings]),
            min_p=column([s.min_p for s in settings]),
            bias=_bias(settings, vocab, device),
            penalties=torch.tensor(penalties, device=device) if any(s.penalised for s in settings) else None,
            greedy=all(s.greedy for s in settings),
            plain=all((s.top_k, s.top_p, s.min_p) == (0, 1.0, 0.0) for s in settings),
        )


def _bias(settings: Sequence[Sampling], vocab: int, device: torch.device) -> Tensor | None:
    if not any(s.logit_bias for s in settings):
        return None
    bias = torch.zeros(len(settings), vocab, device=device)
    for row, one in enumerate(settings):
        for token, value in one.logit_bias.items():
            if token >= vocab:
                raise RequestError("names a token outside the vocabulary", field="logit_bias", value=token,
                                   allowed=f"ids below {vocab}")  # fmt: skip
            bias[row, token] = value
    return bias


@dataclass(frozen=True, slots=True)
class Seen:
    """Occurrences that penalties count: int32 [B, V] in the prompt and in the output before the root.

    The root is the newest emitted token and counts as output through the tree: every node adds its own path.
    """

    prompt: Tensor
    output: Tensor


def process(logits: Tensor, tree: DraftTree, batch: BatchSampling, seen: Seen | None = None,
            allowed: Tensor | None = None) -> Tensor:  # fmt: skip
    """Logits after bias, penalties and temperature in float32; ruled-out tokens are -inf. The very `logits`, in their
    own dtype, where nobody samples and nothing else is asked.

    Args:
        logits: [B, N, V] the target's logits after each node.
        tree: whose paths count as output for the penalties.
        batch: settings of the B requests.
        seen: counts before the root; required when `batch.penalties` is set.
        allowed: bool [B, N, V], tokens a grammar permits after each node, or None.

    Order: grammar, bias, penalties, temperature, then top-k, top-p, min-p. Greedy rows keep temperature 1.
    """
    if batch.greedy and allowed is None and batch.bias is None and batch.penalties is None:
        return logits  # the argmax needs neither a copy nor float32
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if batch.bias is not None:
        logits = logits + batch.bias[:, None]
    if batch.penalties is not None:
        assert seen is not None, "penalties need counts"
        logits = _penalise(logits, tree, batch.penalties, seen)
    if batch.greedy:
        return logits
    warm = torch.where(batch.temperature > 0, batch.temperature, 1.0)
    logits = logits / warm[:, None, None]
    return logits if batch.plain else _truncate(logits, batch)


def _penalise(logits: Tensor, tree: DraftTree, penalties: Tensor, seen: Seen) -> Tensor:
    """Repetition as in the CTRL paper, presence and frequency as OpenAI's; each node sees its own path."""
    b, n, v = logits.shape
    path = ((tree.ancestors[..., None] >> torch.arange(n, device=logits.device)) & 1).to(torch.int32)
    on_path = torch.zeros(b, n, v, dtype=torch.int32, device=logits.device)
    on_path.scatter_add_(2, tree.tokens[:, None, :].expand(b, n, n), path)
    output = seen.output[:, None] + on_path
    repetition, presence, frequency = (penalties[:, i, None, None] for i in range(3))
    known = (output > 0) | (seen.prompt[:, None] > 0)
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(known, scaled, logits) - presence * (output > 0) - frequency * output


def _truncate(logits: Tensor, batch: BatchSampling) -> Tensor:
    """Apply top-k, then top-p, then min-p, each on what the one before left."""
    v = logits.shape[-1]
    if bool((batch.top_k > 0).any()):
        k = batch.top_k.clamp(max=v)
        largest = logits.topk(int(k.max()), dim=-1).values
        edge = largest.gather(2, (k - 1).clamp(min=0)[:, None, None].expand(-1, logits.shape[1], 1))
        edge = edge.masked_fill(k[:, None, None] == 0, -torch.inf)  # who asked for none keeps all
        logits = logits.masked_fill(logits < edge, -torch.inf)
    if bool((batch.top_p < 1).any()):
        logits = logits.masked_fill(logits < _nucleus_edge(logits, batch.top_p), -torch.inf)
    if bool((batch.min_p > 0).any()):
        floor = logits.amax(dim=-1, keepdim=True) + batch.min_p.log()[:, None, None]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits


def _nucleus_edge(logits: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit inside each nucleus. [B, N, 1]

    A token stays while the mass before it is below top_p, so the likeliest always stays. Ties stay too.
    """
    # not logsumexp, which threads share where there is one row alone: a tree's sums would differ from plain decoding's
    total = logits.amax(dim=-1, keepdim=True) - logits.log_softmax(dim=-1).amax(dim=-1, keepdim=True)
    head = min(NUCLEUS_HEAD, logits.shape[-1])
    while True:
        values = logits.topk(head, dim=-1).values
        before = (values - total).exp().cumsum(dim=-1)
        before = torch.cat([torch.zeros_like(before[..., :1]), before[..., :-1]], dim=-1)
        inside = before < top_p[:, None, None]
        if head == logits.shape[-1] or not bool((inside[..., -1] & (top_p < 1)[:, None]).any()):
            break
        head = logits.shape[-1]
    edge = values.gather(-1, inside.sum(dim=-1, keepdim=True) - 1)
    return torch.where((top_p < 1)[:, None, None], edge, -torch.inf)


def choose(
    processed: Tensor, tree: DraftTree, batch: BatchSampling, uniforms: Tensor, best: Tensor | None = None
) -> Tensor:
    """The target's own token after each node.

    Args:
        processed: [B, N, V] from `process`.
        tree: its depths say which output position each node fills.
        batch: settings; rows with temperature 0 take the argmax.
        uniforms: float64 [B, >= D + 1], the requests' u_t from the next output position on.
        best: int64 [B, N], the largest entries of `processed`, where they are known.

    Returns:
        int64 [B, N].
    """
    best = likeliest(processed) if best is None else best
    if batch.greedy:
        return best
    drawn = draw(torch.softmax(processed, dim=-1), uniforms.gather(1, tree.depths))
    return torch.where(batch.temperature[:, None] > 0, drawn, best)


def likeliest(scores: Tensor) -> Tensor:
    """The first largest entry of each row [..., V] -> int64 [...].

    `max` and not `argmax`: on CPUs the latter walks bfloat16 rows one element at a time.
    """
    return largest(scores)[1]


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of each row [..., V] and where it stands first, int64 [...]; NaN counts as largest."""
    if available.runs(scores.device):
        from specdec.fused.largest import largest as fused

        return fused(scores)
    if can_find(scores):
        where = places(scores)
        return scores.gather(-1, where[..., None])[..., 0], where
    found = scores.max(dim=-1)
    return found.values, found.indices


def top_log_probs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest entries of each row [..., V]: their log-probabilities float32 [..., count] and which they
    are int64 [..., count]; likeliest first."""
    if count <= MOST and can_find(logits) and not logits.requires_grad:
        return top(logits, count)
    found = logits.float().log_softmax(dim=-1).topk(count, dim=-1)
    return found.values, found.indices


def spread(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities at each row's temperature; a point on the argmax where it is 0.

    logits float32 [B, ..., V], temperature float32 [B] -> float32 [B, ..., V].
    """
    heat = temperature.view(-1, *[1] * (logits.dim() - 1))
    warm = torch.softmax(logits / torch.where(heat > 0, heat, 1.0), dim=-1)
    point = torch.zeros_like(warm).scatter_(-1, likeliest(logits)[..., None], 1.0)
    return torch.where(heat > 0, warm, point)


def draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw from rows of (unnormalised) mass [..., V] at uniform [...] -> int64 [...].

    Two levels: the cumulative sum runs over the masses of blocks, then inside the one block that the draw falls in. A
    sum over the whole vocabulary in float64 would cost more than verifying a tree. A token without mass is never drawn.
    """
    v = mass.shape[-1]
    whole = v - v % BLOCK
    blocks = mass[..., :whole].reshape(*mass.shape[:-1], whole // BLOCK, BLOCK).sum(dim=-1)
    if whole < v:
        blocks = torch.cat([blocks, mass[..., whole:].sum(dim=-1, keepdim=True)], dim=-1)
    heights = blocks.cumsum(dim=-1, dtype=torch.float64)
    level = uniform[..., None] * heights[..., -1:]
    block = _reaches(heights, level)
    below = torch.where(block > 0, heights.gather(-1, (block - 1).clamp(min=0)), 0.0)
    columns = block * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = torch.where(columns < v, mass.gather(-1, columns.clamp(max=v - 1)), 0.0)
    heights = below + inside.cumsum(dim=-1, dtype=torch.float64)
    return (block * BLOCK + _reaches(heights, level))[..., 0]


def _reaches(heights: Tensor, level: Tensor) -> Tensor:
    """The first column of each rising row that lies above its level [..., 1], at most the last that adds anything."""
    last = (heights < heights[..., -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum((heights <= level).sum(dim=-1, keepdim=True), last)


def generator(seed: int, stream: int = 0) -> torch.Generator:
    """A generator on the host for one of a request's streams of random numbers.

    The seed is mixed first (SplitMix64's finaliser, Steele et al. 2014): neighbouring seeds of a Mersenne twister give
    related numbers, and people count their seeds up from 0.
    """
    z = (seed + (stream + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return torch.Generator().manual_seed(z ^ (z >> 31))


def uniforms(seed: int, count: int) -> Tensor:
    """The request's own random numbers u_0 ... u_{count-1}. float64 [count], on the host."""
    return torch.rand(count, generator=generator(seed), dtype=torch.float64)
