"""A Llama in one file, decoded with RetroAttention.

Start at `Llama`, the model, and read upwards: `Block` is one layer, `Attention` the part that hands its queries, keys and
values to `retro_attention.py`. `Decoder`, below, is one batch of texts on its way through prefill and decode steps; `generate`
and `score` are loops over it. The second part, reading checkpoints and tokenizers, is not needed to understand the method.

Shapes stand at the end of the line that makes the tensor, in these letters: B batch, T tokens, W rows of the retrospective
window (newest last), n_head and n_kv_head heads, hs head size.

RoPE rotates neighbours, (x0, x1), (x2, x3) ..., as in Meta's checkpoints. Projections of the same input share one
parameter: `wqkv` is Meta's wq, wk and wv one below the other, `w13` its w1 and w3; `Llama.weights` names the parts.
"""

import base64
import copy
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import retro_attention
from retro_attention import RetroAttention, RetroConfig, accumulator, apply_rope, need, row_positions


@dataclass
class LlamaConfig:
    """Shape of a Llama. ValueError names a value that is out of range."""

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    vocab_size: int
    ffn_dim: int  # inner size of SwiGLU
    max_seq_len: int  # the context, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: float | None = None  # Llama 3.1's factor (8; in 3.2, 32), None before it
    tie_embeddings: bool = False  # the output head is the embedding table
    head_size: int | None = None  # dim / n_head if None
    qkv_bias: bool = False  # Qwen 2 and 2.5
    qk_norm: bool = False  # Qwen 3: each head's q and k are normalised before RoPE

    def __post_init__(self):
        for name in ("dim", "n_layer", "n_head", "n_kv_head", "vocab_size", "ffn_dim", "max_seq_len"):
            x = getattr(self, name)
            need(isinstance(x, int) and 1 <= x < 2**31, f"{name} must be an integer >= 1 and < 2**31, not {x!r}")
        for name in ("norm_eps", "rope_theta", "rope_scaling"):
            x = getattr(self, name)
            if name != "rope_scaling" or x is not None:
                need(isinstance(x, (int, float)) and 0 < x < 1e30, f"{name} must be a number > 0 and < 1e30, not {x!r}")
        if self.head_size is None and self.dim % self.n_head == 0:
            self.head_size = self.dim // self.n_head
        even = isinstance(self.head_size, int) and 2 <= self.head_size < 2**31 and self.head_size % 2 == 0
        need(even, f"dim {self.dim} must be an even multiple of n_head {self.n_head}, or head_size given, and even")
        need(self.n_head % self.n_kv_head == 0, f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")

    def shard(self) -> "LlamaConfig":
        """What one of several processes holds: its share of the heads, and of the feed-forward's inner values."""
        n = processes()[1]
        whole = self.n_kv_head % n == self.ffn_dim % n == 0
        need(whole, f"the number of processes must divide the {self.n_kv_head} KV heads and ffn_dim {self.ffn_dim}, not {n}")
        return replace(self, n_head=self.n_head // n, n_kv_head=self.n_kv_head // n, ffn_dim=self.ffn_dim // n)


def rope_table(config: LlamaConfig, length: int, device: torch.device | str, dtype: torch.dtype):
    """cos and sin of positions 0 .. length-1 and all pairs, (length, hs / 2) each; with Llama 3.1's scaling if config has it.

    In float32, as the published models were trained, unless the model (`dtype`) is in float64.
    """
    like = {"device": device, "dtype": accumulator(dtype)}
    freqs = 1.0 / float(config.rope_theta) ** (torch.arange(0, config.head_size, 2, **like) / config.head_size)  # (hs / 2,)
    if config.rope_scaling is not None:
        # Wavelengths that fit four times into the 8,192 tokens of pre-training stay; those that don't fit once are
        # stretched by the factor; in between, a blend.
        turns = 8192 * freqs / (2 * math.pi)
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / float(config.rope_scaling)
    angles = torch.outer(torch.arange(length, **like), freqs)  # (length, hs / 2) radians
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Grouped-query attention; in prefill and decode RetroAttention keeps the cache."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads, self.hs = [config.n_head, config.n_kv_head, config.n_kv_head], config.head_size
        self.wqkv = nn.Linear(config.dim, sum(self.heads) * self.hs, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_head * self.hs, config.dim, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.hs, eps=config.norm_eps) for _ in range(2))
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, cos, sin, retro: RetroAttention | None = None, t: torch.Tensor | None = None):
        """x (B, T, dim) -> (B, T, dim): see `Block.forward`."""
        T = x.shape[1]
        q, k, v = self.wqkv(x).unflatten(-1, (-1, self.hs)).split(self.heads, dim=2)  # (B, T, n_head or n_kv_head, hs)
        q, k = self.q_norm(q), self.k_norm(k)
        if t is not None:
            o = retro.decode(q, k, v, cos, sin, t)  # (B, W, n_head, hs)
        else:
            q, k = apply_rope(q, cos[:T], sin[:T]), apply_rope(k, cos[:T], sin[:T])
            # Each KV head repeated for its group: told of groups, torch has only a form that keeps all scores for some dtypes.
            repeated = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))  # (B, T, n_head, hs)
            rows = (x.transpose(1, 2) for x in (q, *repeated))
            o = F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)  # (B, T, n_head, hs)
            if retro is not None:
                retro.prefill(q, k, v)
        return sum_of_shards(self.wo(o.flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)  # gate and value
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x, ops):
        # A long prompt goes through in pieces, or these inner values would take most of the memory.
        parts = [self.w2(ops.swiglu(self.w13(part))) for part in x.split(8192, dim=1)]
        return sum_of_shards(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))


class Block(nn.Module):
    """One layer: attention and feed-forward, each preceded by a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x, cos, sin, retro: RetroAttention | None = None, t: torch.Tensor | None = None):
        """(B, T, dim) -> (B, T, dim). Without `retro` plain dense attention; with `retro` the prefill of a prompt; with
        `retro` and `t` a decode step, whose W rows (T = W) end at position t."""
        ops = retro_attention if retro is None else retro.ops  # the kernels have no gradients
        a, f = self.attention_norm, self.ffn_norm
        x = x + self.attention(ops.rms_norm(x, a.weight, a.eps), cos, sin, retro, t)
        return x + self.feed_forward(ops.rms_norm(x, f.weight, f.eps), ops)


class Llama(nn.Module):
    """Decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def hidden(self, idx, cos, sin, layers: Sequence[RetroAttention] | None = None, t: torch.Tensor | None = None):
        """(B, T) ids -> (B, T, dim) before the final norm; a RetroAttention for each layer, and t: see `Block.forward`."""
        x = self.tok_embeddings(idx)  # (B, T, dim)
        for block, retro in zip(self.layers, layers or [None] * len(self.layers), strict=True):
            x = block(x, cos, sin, retro, t)
        return x

    def logits(self, x):
        """(..., dim) -> (..., vocab)."""
        head = self.tok_embeddings if self.config.tie_embeddings else self.output
        return F.linear(self.norm(x), head.weight)  # (..., vocab)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) ids -> (B, T, vocab) logits: dense, no cache, differentiable. ValueError if T is 0 or exceeds the context."""
        (_, T), weight = check_ids(idx), self.norm.weight
        need(1 <= T <= self.config.max_seq_len, f"{T} tokens: must be between 1 and the context of {self.config.max_seq_len}")
        return self.logits(self.hidden(idx, *rope_table(self.config, T, weight.device, weight.dtype)))

    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, retro: RetroConfig | None = RetroConfig(), temperature: float = 0.8,
        top_k: int | None = None, top_p: float | None = 0.95, seed: int | None = None, stop_tokens: Sequence[int] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Continues (B, T) ids by up to `max_new_tokens` -> (B, T + n); `retro=None` attends densely, temperature 0 is greedy.

        n is less where the context ends or every sequence has met a stop token; one that ended before the others is filled
        with the first of `stop_tokens`. Same seed, same text. ValueError names a value that is out of range.
        """
        (B, T), context = check_ids(idx), self.config.max_seq_len
        check_prompt(T, context)
        decoder = Decoder(self, B, retro, max_seq_len=min(T + max(1, max_new_tokens), context))
        new = list(decoder.stream(idx, max_new_tokens, temperature, top_k, top_p, seed, stop_tokens))
        return torch.cat([idx, torch.stack(new, dim=1)], dim=1)

    def score(self, idx: torch.Tensor, prompt_len: int, retro: RetroConfig | None = RetroConfig()) -> torch.Tensor:
        """Log-probabilities of tokens prompt_len .. T-1 of (B, T) ids, fed one by one through the decode path.

        -> (B, T - prompt_len) float32. ValueError unless 1 <= prompt_len < T.
        """
        B, T = check_ids(idx)
        need(1 <= prompt_len < T, f"prompt_len must be between 1 and {T - 1}, not {prompt_len}")
        decoder = Decoder(self, B, retro, max_seq_len=T)
        logits, logps = decoder.prefill(idx[:, :prompt_len]), []
        for i in range(prompt_len, T):
            check_finite(logits)
            logps.append(logits.float().log_softmax(dim=-1).gather(1, idx[:, i, None]))  # (B, 1)
            if i < T - 1:
                logits = decoder.step(idx[:, i])
        return torch.cat(logps, dim=1)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights under Meta's names, as views: of `wqkv` and `w13` each part by itself. To load into, and to save."""
        c = self.config
        rows = {"wq": c.n_head * c.head_size, "wk": c.n_kv_head * c.head_size, "wv": c.n_kv_head * c.head_size}
        parts = {"wqkv": rows, "w13": {"w1": c.ffn_dim, "w3": c.ffn_dim}}
        weights = {}
        for name, p in self.named_parameters():
            joint = name.split(".")[-2]
            own = parts.get(joint, {joint: len(p)})
            for part, view in zip(own, p.detach().split(list(own.values())), strict=True):
                weights[name.replace(joint, part)] = view
        return weights

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
        max_seq_len: int | None = None,
    ) -> "Llama":  # fmt: skip
        """Loads Meta's format (`params.json`, `consolidated.00.pth`) or Hugging Face's (`config.json`, `*.safetensors`).

        `max_seq_len` replaces the checkpoint's context. Strict: ValueError names what is missing, foreign or misshapen. (In
        Meta's format a missing `output.weight` means that the head is the embedding table.) With several processes each loads
        its shard.
        """
        need(isinstance(dtype, torch.dtype), f"dtype must be a torch.dtype as torch.float32, not {dtype!r}")
        config, weights = read_checkpoint(folder)
        if max_seq_len is not None:
            config = replace(config, max_seq_len=max_seq_len)
        with torch.device("meta"):  # no memory and no random numbers for weights that are overwritten
            whole, model = cls(config), cls(config.shard())
        expected = {name: tuple(w.shape) for name, w in whole.weights().items()}
        found = {name: tuple(w.shape) for name, w in weights.items()}
        for name in sorted(expected.keys() | found.keys()):
            a, b = expected.get(name, "none: unknown name"), found.get(name, "no such tensor")
            need(a == b, f"checkpoint {folder}: {name} should have shape {a}, the file has {b}")
            kind = weights[name].dtype
            need(kind.is_floating_point, f"checkpoint {folder}: {name} must hold floating-point numbers, not {kind}")
        model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        theirs, (rank, n) = is_hugging_face(folder), processes()
        for name, w in model.weights().items():
            source = weights.pop(name)  # dropped after it is copied: a file's memory map goes with its last tensor
            if w.shape != source.shape:  # rows of wq, wk, wv, w1 and w3, columns of wo and w2
                source = source.chunk(n, dim=int(name.split(".")[-2] in ("wo", "w2")))[rank]
            if theirs and name.split(".")[-2] in ("wq", "wk", "q_norm", "k_norm"):
                source = pair_neighbours(source, config.head_size)
            w.copy_(source)
        return model


def check_ids(idx: torch.Tensor) -> torch.Size:
    """The shape (B, T) of ids. ValueError if they are something else."""
    fine = isinstance(idx, torch.Tensor) and idx.ndim == 2 and idx.dtype in (torch.int32, torch.int64)
    what = f"{idx.dtype} {tuple(idx.shape)}" if isinstance(idx, torch.Tensor) else type(idx).__name__
    need(fine, f"token ids must be an integer tensor of shape (B, T), not {what}")
    return idx.shape


def check_prompt(T: int, context: int) -> None:
    """ValueError unless a prompt of T tokens leaves room for one more."""
    need(1 <= T < context, f"the prompt has {T} tokens: must be between 1 and {context - 1}, one less than the context")


def check_dense(n: int, config: LlamaConfig) -> None:
    most = config.n_layer
    need(n <= most, f"dense_layers must be between 0 and the model's {most} layers, not {n}")


def processes() -> tuple[int, int]:
    """The number of this process and how many there are: several with torch.distributed, which shares the model out."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def sum_of_shards(x: torch.Tensor) -> torch.Tensor:
    """Each process has the part of x that its own heads, or its share of the feed-forward, add. The sum, in place."""
    if processes()[1] > 1:
        dist.all_reduce(x)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


class Decoder:
    """One batch of sequences on its way: token ids, the position of the newest, and each layer's RetroAttention.

    `prefill` a prompt, then `step` with each next token; both return the logits of the token that follows. Without a prompt the
    first step is the text's first token. The model's weights must stay where they are while a decoder lives; their GPU becomes
    the current one and must stay so.
    """

    def __init__(
        self, model: Llama, batch_size: int, retro: RetroConfig | None = RetroConfig(), max_seq_len: int | None = None
    ):  # fmt: skip
        config, weight = model.config, model.norm.weight
        like = {"device": weight.device, "dtype": weight.dtype}
        n = config.max_seq_len if max_seq_len is None else max_seq_len
        need(1 <= n <= config.max_seq_len, f"max_seq_len must be between 1 and the context of {config.max_seq_len}, not {n}")
        if retro is None:
            retro = RetroConfig(window=1, dense_layers=config.n_layer)
        check_dense(retro.dense_layers, config)
        if weight.is_cuda:
            torch.cuda.set_device(weight.device)  # Triton launches on the current device
        self.model, self.retro, self.max_seq_len = model, retro, n
        self.rope = rope_table(config, n, **like)
        shape = {"n_head": config.n_head, "n_kv_head": config.n_kv_head, "head_size": config.head_size, "max_seq_len": n}
        self.layers = [
            RetroAttention(retro, dense=i < retro.dense_layers, batch_size=batch_size, **shape, **like)
            for i in range(config.n_layer)
        ]
        self.tokens = torch.zeros(batch_size, n, dtype=torch.long, device=weight.device)  # (B, max_seq_len)
        self.t = torch.full((), -1, dtype=torch.long, device=weight.device)  # position of the newest token ...
        self.position = -1  # ... and the same number on the host
        # On a GPU a step is hundreds of small kernels. As a CUDA graph they are launched at once; its input is `token`, its
        # output `newest_logits`. One graph serves every length of the text: t rises inside it, the kernels read t on the
        # device, and their grids are made for a full cache. The reference reads t on the host while it runs, so it cannot be
        # captured.
        self.captures = weight.is_cuda and all(layer.ops is not retro_attention for layer in self.layers)
        self.graph = None
        self.token = torch.zeros(batch_size, dtype=torch.long, device=weight.device)  # (B,) the newest token
        self.newest_logits = None  # (B, vocab)

    @torch.inference_mode()
    def prefill(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) prompt -> (B, vocab). ValueError if it is empty, longer than the context, or another number of texts."""
        (_, T), B = check_ids(idx), len(self.tokens)
        need(len(idx) == B, f"the prompt has {len(idx)} texts: must be {B}, as the decoder was made for")
        need(1 <= T <= self.max_seq_len, f"the prompt has {T} tokens: must be between 1 and the context of {self.max_seq_len}")
        self.tokens[:, :T] = idx
        self.t.fill_(T - 1)
        self.position = T - 1
        return self.model.logits(self.model.hidden(idx, *self.rope, self.layers)[:, -1])

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """(B,) the token that follows the newest -> (B, vocab). IndexError past the end of the cache."""
        if self.position + 1 >= self.max_seq_len:
            raise IndexError(f"position {self.position + 1} is past the end of the cache of {self.max_seq_len} tokens")
        assert token.shape == self.token.shape, f"one token per text: {tuple(self.token.shape)}, not {tuple(token.shape)}"
        self.token.copy_(token)
        watched = any(layer.hook is not None for layer in self.layers)  # a hook runs on the host
        if not self.captures or watched:
            logits = self._step()
        elif self.graph is None:
            logits = self._step()  # compiles the kernels, which a capture cannot do
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records the steps to come; nothing runs
                self.newest_logits = self._step()
            self.graph = graph
        else:
            self.graph.replay()
            logits = self.newest_logits.clone()  # the next replay overwrites them
        self.position += 1
        return logits

    def _step(self) -> torch.Tensor:
        """Through Triton nothing in here waits for the device, and no shape depends on the position."""
        self.t += 1
        self.tokens.index_copy_(1, self.t.view(1), self.token[:, None])
        return self.model.logits(self._window(self.layers)[:, -1])

    def _window(self, layers: Sequence[RetroAttention]) -> torch.Tensor:
        """The rows that end at t through the layers, from their token ids again -> (B, W, dim)."""
        rows = row_positions(self.t, self.retro.window).clamp(min=0)  # (W,) before the text starts, any id will do
        return self.model.hidden(self.tokens[:, rows], *self.rope, layers, self.t)

    def stream(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 0.8,
        top_k: int | None = None, top_p: float | None = 0.95, seed: int | None = None, stop_tokens: Sequence[int] = (),
    ) -> Iterator[torch.Tensor]:  # fmt: skip
        """Yields the (B,) next tokens; arguments and errors as in `Llama.generate`."""
        B, T = check_ids(idx)
        check_prompt(T, self.max_seq_len)
        check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
        generator = torch.Generator(device=idx.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        stops = torch.tensor(stop_tokens, dtype=torch.long, device=idx.device)
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)  # (B,)
        token = None
        for _ in range(min(max_new_tokens, self.max_seq_len - T)):
            logits = self.prefill(idx) if token is None else self.step(token)
            check_finite(logits)
            token = sample_token(logits, temperature, top_k, top_p, generator)  # (B,)
            if processes()[1] > 1:
                dist.broadcast(token, 0)  # the same text everywhere, whatever the rounding and the seed
            if len(stops):
                token = torch.where(ended, stops[0], token)
                ended |= torch.isin(token, stops)
            yield token
            if len(stops) and ended.all():
                return

    @torch.inference_mode()
    def rewind(self, t: int) -> None:
        """Forgets all tokens after position t, for a retry or for speculative decoding; the next step is that of t+1.

        For W=1 the logits are as if no later token had been there. For W>1 that cannot be restored: later steps have
        overwritten the keys and values of the past rows, and the output cache has lost the outputs of some. So the window that
        ends at t attends once more, densely, as at the end of a prompt of t+1 tokens. (`totals` keep the forgotten steps.)
        ValueError unless t is the position of a token.
        """
        need(0 <= t <= self.position, f"t must be between 0 and {self.position}, the newest position, not {t}")
        self.position = t
        self.t.fill_(t)
        for layer in self.layers:
            layer.forget(t)
        if self.retro.window > 1:
            twins = [copy.copy(layer) for layer in self.layers]  # the memory is shared
            for twin in twins:
                twin.dense = True
            self._window(twins)


def check_finite(logits: torch.Tensor) -> None:
    """ValueError unless they are: what is drawn from others means nothing, and a GPU would end the draw with no word."""
    need(logits.isfinite().all(), f"the model's logits are not finite: its weights are broken, or too large for {logits.dtype}")


def check_sampling(max_new_tokens, temperature, top_k, top_p, seed) -> None:
    """ValueError names the first value that is out of range."""
    need(max_new_tokens >= 1, f"max_new_tokens must be >= 1, not {max_new_tokens}")
    sharp = temperature == 0 or 1e-6 <= temperature < math.inf  # below, logits / temperature overflow
    need(sharp, f"temperature must be 0 or a finite number >= 1e-6, not {temperature}")
    need(top_k is None or top_k >= 1, f"top_k must be >= 1, not {top_k}")
    need(top_p is None or 0 < top_p <= 1, f"top_p must be in (0, 1], not {top_p}")
    need(seed is None or 0 <= seed < 2**63, f"seed must be between 0 and 2**63 - 1, not {seed}")


def sample_token(logits, temperature, top_k, top_p, generator) -> torch.Tensor:
    """(B, vocab) logits -> (B,) ids; temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, ids = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)  # (B, vocab), likeliest first
    if top_k is not None:
        probs[:, top_k:] = 0
    if top_p is not None:
        # The smallest set of likeliest tokens that holds top_p: a token stays if those before it hold less.
        probs[:, 1:][(probs.cumsum(dim=-1) - probs >= top_p)[:, 1:]] = 0
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)


# ======================================================================================================================
# Files: what follows is not needed to understand the method
# ======================================================================================================================


def is_hugging_face(folder: str | Path) -> bool:
    """Hugging Face's format; also where files of Meta's lie beside it. ValueError if there is no such folder."""
    need(Path(folder).is_dir(), f"checkpoint {folder}: no such folder")
    return (Path(folder) / "config.json").is_file()


def read_checkpoint(folder: str | Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """A folder's configuration, and its weights as memory maps under Meta's names; q and k as the files have them.

    ValueError names the file that is missing or broken, or what the model asks for that is not supported.
    """
    if is_hugging_face(folder):
        config, weights = config_from_hugging_face(folder), read_safetensors(folder)
        if "output.weight" in weights:  # a head in the files counts, whatever config.json says: transformers' rule
            config.tie_embeddings = False
        return config, weights
    need((Path(folder) / "params.json").is_file(), f"checkpoint {folder}: has neither params.json nor config.json")
    params, weights = read_json(folder, "params.json"), read_pth(folder)
    return config_from_params(params, tie_embeddings="output.weight" not in weights), weights


def checkpoint_file(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    need(path.is_file(), f"checkpoint {folder}: {name} is missing")
    return path


@contextmanager
def one_line(what: str):
    """What goes wrong inside, as a ValueError that begins with `what`. Broken files raise all kinds, Rust's panics, too."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {reason[:300]}") from None


def read_json(folder: str | Path, name: str) -> dict:
    path = checkpoint_file(folder, name)
    data = path.read_bytes()
    with one_line(f"{path}: not JSON"):
        contents = json.loads(data.decode("utf-8-sig"))
    need(isinstance(contents, dict), f"{path}: a JSON object was expected, not {type(contents).__name__}")
    return contents


# ----------------------------------------------------------------------------------------------------------------------
# Meta's format


def config_from_params(params: dict, tie_embeddings: bool = False) -> LlamaConfig:
    """From the keys of Meta's params.json. ValueError names a key that is missing or out of range."""
    for key in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of"):
        x = params.get(key, "missing")
        need(isinstance(x, int) and x >= 1, f"params.json: {key} must be an integer >= 1, not {x!r}")
    multiplier = params.get("ffn_dim_multiplier", 1)
    positive = isinstance(multiplier, (int, float)) and 0 < multiplier < math.inf
    need(positive, f"params.json: ffn_dim_multiplier must be a number > 0, not {multiplier!r}")
    # Meta's rule for SwiGLU: two thirds of 4*dim, times a multiplier, rounded up to a multiple.
    ffn_dim = int(multiplier * int(8 * params["dim"] / 3))
    ffn_dim = math.ceil(ffn_dim / params["multiple_of"]) * params["multiple_of"]
    scaled = params.get("use_scaled_rope", False)
    factor = params.get("rope_scaling_factor")
    if factor is None:  # 3.1's, or that of 3.2, whose models are smaller: their files don't say it
        factor = 8.0 if params["dim"] >= 4096 else 32.0
    return LlamaConfig(
        dim=params["dim"], n_layer=params["n_layers"], n_head=params["n_heads"], vocab_size=params["vocab_size"],
        n_kv_head=params.get("n_kv_heads") or params["n_heads"], ffn_dim=ffn_dim, norm_eps=params.get("norm_eps", 1e-5),
        max_seq_len=params.get("max_seq_len", 131_072 if scaled else 8_192), rope_theta=params.get("rope_theta", 500_000.0),
        rope_scaling=factor if scaled else None, tie_embeddings=tie_embeddings,
    )  # fmt: skip


def read_pth(folder: str | Path) -> dict[str, torch.Tensor]:
    """consolidated.00.pth."""
    path = checkpoint_file(folder, "consolidated.00.pth")
    split = (path.parent / "consolidated.01.pth").exists()
    need(not split, f"checkpoint {folder}: several consolidated.*.pth: models split over GPUs are not supported")
    try:
        # weights_only: a pickle could run code. mmap: a tensor is read when it is copied: no second model in memory.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # broken files raise all kinds, with advice that is not for the user
        raise ValueError(f"{path}: not a readable PyTorch file of weights ({type(error).__name__})") from None
    tensors = isinstance(weights, dict) and all(isinstance(w, torch.Tensor) for w in weights.values())
    need(tensors, f"{path}: a dictionary of tensors was expected")
    weights.pop("rope.freqs", None)  # in Meta's older files; we compute it
    return weights


class Tokenizer:
    """Llama 3's byte-pair encoding on tiktoken: a file of lines "<token in base64> <rank>", then 256 special tokens."""

    # How a text is split into pieces, inside which byte pairs are merged.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    # Llama 3.1's names for the first eleven; the rest are numbered on.
    special_names = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
        "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
    ]  # fmt: skip

    def __init__(self, ranks: dict[bytes, int]):
        """`ranks` of the byte-pair tokens, which are their ids."""
        self.special = {name: len(ranks) + i for i, name in enumerate(self.special_names)}
        self.bos = self.special["<|begin_of_text|>"]
        # A generation ends with the text, with a message, or with a turn.
        self.stop_tokens = [self.special[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
        self.bpe = tiktoken.Encoding("bpe", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special)
        self.vocab_size = self.bpe.n_vocab

    @staticmethod
    def from_checkpoint(folder: str | Path) -> "Tokenizer | HuggingFaceTokenizer":
        """That of a folder in Meta's format (`tokenizer.model`) or in Hugging Face's. ValueError if there is none."""
        if is_hugging_face(folder):
            return HuggingFaceTokenizer(folder)
        path = checkpoint_file(folder, "tokenizer.model")
        # Not tiktoken's own loader: it caches by path, and would miss that a file has changed.
        lines = path.read_bytes().splitlines()
        with one_line(f"{path}: must be lines of '<base64 token> <rank>'"):
            pairs = [line.split() for line in lines]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        whole = sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([b]) in ranks for b in range(256))
        need(whole, f"{path}: the ranks must be 0 .. n-1 and the 256 single bytes among the tokens")
        return Tokenizer(ranks)

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`; with `bos`, begin_of_text first. Special tokens' names in the text are plain text unless `special`."""
        encode = partial(self.bpe.encode, allowed_special="all") if special else self.bpe.encode_ordinary
        # The split's regular expression overflows its stack in a run of a million spaces: cut such runs.
        ids = [i for piece in re.split(r"(\s{25000})", text) for i in encode(piece)]
        return [self.bos, *ids] if bos else ids

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation of (role, text) in Llama 3's format, up to where the assistant's turn begins.

        Roles are system (first, if at all), user and assistant. ValueError for another.
        """
        start, end, turn = (self.special[name] for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
        ids = [self.bos]
        for role, text in messages:
            need(role in ("system", "user", "assistant"), f"a role must be system, user or assistant, not {role!r}")
            ids += [start, *self.encode(role), end, *self.encode("\n\n" + text.strip()), turn]
        return [*ids, start, *self.encode("assistant"), end, *self.encode("\n\n")]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.bpe.decode([i for i in ids if i < self.vocab_size], errors="replace")


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face's format


def from_pretrained(kind: str, folder: str | Path):
    """transformers' AutoConfig, AutoTokenizer or GenerationConfig of a folder. ValueError in one line if it has none."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f"checkpoint {folder}: Hugging Face's format needs more packages: pip install -e '.[hf]'") from None
    need(int(transformers.__version__.split(".")[0]) >= 5, f"transformers must be 5 or newer, not {transformers.__version__}")
    transformers.logging.set_verbosity_error()
    with one_line(f"checkpoint {folder}: {kind} cannot be read"):
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)


def config_from_hugging_face(folder: str | Path) -> LlamaConfig:
    """From config.json, of Llama, Qwen 2, 2.5 and 3. ValueError names what is not supported."""
    config = from_pretrained("AutoConfig", folder)
    kind = config.model_type
    need(kind in ("llama", "qwen2", "qwen3"), f"checkpoint {folder}: model_type must be llama, qwen2 or qwen3, not {kind!r}")
    # What we don't do, and the value of each key that doesn't ask for it.
    for key, wanted in (
        ("hidden_act", "silu"), ("use_sliding_window", False), ("mlp_bias", False), ("attention_bias", False),
        ("quantization_config", None), ("dual_chunk_attention_config", None),
    ):  # fmt: skip
        x = getattr(config, key, wanted)
        need(x == wanted, f"checkpoint {folder}: {key} {x!r} is not supported: must be {wanted!r}")
    rope = dict(config.rope_parameters)
    theta, scaling = rope.pop("rope_theta", None), None
    if rope.pop("rope_type", "default") == "llama3":
        scaling = rope.pop("factor", None) or 0  # 0 is refused: it must be there
        llama3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        rope = {} if rope == llama3 else rope
    need(not rope, f"checkpoint {folder}: rope_parameters {config.rope_parameters} are not supported")
    return LlamaConfig(
        dim=config.hidden_size, n_layer=config.num_hidden_layers, n_head=config.num_attention_heads,
        n_kv_head=config.num_key_value_heads, head_size=getattr(config, "head_dim", None), vocab_size=config.vocab_size,
        ffn_dim=config.intermediate_size, max_seq_len=config.max_position_embeddings, norm_eps=config.rms_norm_eps,
        rope_theta=theta, rope_scaling=scaling, tie_embeddings=config.tie_word_embeddings, qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )  # fmt: skip


META_NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def meta_name(name: str) -> str:
    for theirs, ours in META_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def read_safetensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json names, as memory maps."""
    from safetensors.torch import load_file

    files = ["model.safetensors"]
    if (Path(folder) / "model.safetensors.index.json").is_file():
        index = read_json(folder, "model.safetensors.index.json").get("weight_map")
        named = isinstance(index, dict) and index and all(isinstance(file, str) for file in index.values())
        need(named, f"checkpoint {folder}: model.safetensors.index.json has no weight_map")
        files = sorted(set(index.values()))
    weights = {}
    for path in [checkpoint_file(folder, name) for name in files]:  # all are there before one is read
        with one_line(f"{path}: not readable as safetensors"):
            found = load_file(path)
        twice = sorted(found.keys() & weights.keys())
        need(not twice, f"checkpoint {folder}: {twice[:1]} is in {path.name} and in another file that the index names")
        weights |= found
    return {meta_name(name): w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def pair_neighbours(w: torch.Tensor, head_size: int) -> torch.Tensor:
    """Rows of Hugging Face's q or k projection, or what else has an element for each, in Meta's order.

    Theirs pairs element i of a head with i + hs / 2, ours with its neighbour. Attention is the same: q and k move together.
    """
    return w.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


# For a checkpoint that has ChatML's tokens and no template. (Jinja drops a newline at the end of a template.)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}"
)


class HuggingFaceTokenizer:
    """transformers' tokenizer of a folder, and its chat template, with the methods of `Tokenizer`."""

    def __init__(self, folder: str | Path):
        self.folder, self.tokenizer = folder, from_pretrained("AutoTokenizer", folder)
        if self.tokenizer.chat_template is None and "<|im_end|>" in self.tokenizer.get_vocab():
            self.tokenizer.chat_template = CHATML
        self.bos = next(iter(self.encode("", bos=True)), None)
        ends = [self.tokenizer.eos_token_id, *self.end_of_turn()]
        for kind, file in (("AutoConfig", "config.json"), ("GenerationConfig", "generation_config.json")):
            if (Path(folder) / file).is_file():
                end = from_pretrained(kind, folder).eos_token_id
                ends += end if isinstance(end, list) else [end]
        ends = [end for end in ends if end is not None]
        for end in ends:
            need(type(end) is int and 0 <= end < 2**63, f"checkpoint {folder}: eos_token_id must be an id or ids, not {end!r}")
        self.stop_tokens = sorted(set(ends))  # any of those that the files name

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`; with `bos`, what the tokenizer puts around a text. Special tokens' names are text unless `special`."""
        with one_line(f"checkpoint {self.folder}: its tokenizer fails"):
            return self.tokenizer.encode(text, add_special_tokens=bos, split_special_tokens=not special)

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation of (role, text) by the checkpoint's template, up to where the assistant's turn begins."""
        return self.render(messages, add_generation_prompt=True)

    def render(self, messages: Sequence[tuple[str, str]], **options):
        said = [{"role": role, "content": text} for role, text in messages]
        with one_line(f"checkpoint {self.folder}: chat template"):  # which may refuse, in words of its own
            return self.tokenizer.apply_chat_template(said, return_dict=False, **options)

    def end_of_turn(self) -> list[int]:
        """The special token, if there is one, that the chat template puts after an assistant's turn."""
        try:
            text = self.render([("user", "u"), ("assistant", "END")], tokenize=False)
        except ValueError:
            return []  # `chat` will say why
        first = self.encode(text.rpartition("END")[2], special=True)[:1]
        return [i for i in first if i in self.tokenizer.added_tokens_decoder]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
