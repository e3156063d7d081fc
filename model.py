"""A Llama in one file, decoded with RetroAttention.

Start at `Llama`, the model, and read upwards. `Block` is one layer, and `Attention` the part that
hands its queries, keys and values to `retro_attention.py`. Below `Llama`, `Decoder` takes one batch
of texts through prefill and decode steps; `generate` and `score` are loops over it. The second
part, which reads checkpoints and tokenizers, is not needed to understand the method.

Shapes stand at the end of the line that makes the tensor: B batch, T tokens, W rows of the
retrospective window (newest last), n_head and n_kv_head heads, hs head size.

RoPE rotates neighbouring pairs, (x0, x1), (x2, x3) ..., as in Meta's checkpoints. `wqkv` stacks
Meta's wq, wk and wv, `w13` stacks w1 and w3; `Llama.weights` splits them again.
"""

import base64
import importlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

import retro_attention
from retro_attention import (
    RetroAttention,
    RetroConfig,
    accumulator,
    apply_rope,
    need,
    row_positions,
)


@dataclass
class LlamaConfig:
    """Shape of a Llama. Raises ValueError if a value is out of range."""

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    vocab_size: int
    ffn_dim: int  # inner size of SwiGLU
    max_seq_len: int  # the context, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: float | None = None  # 8 in Llama 3.1, 32 in 3.2, None in 3
    tie_embeddings: bool = False  # the output head is the embedding table
    head_size: int | None = None  # dim / n_head if None
    qkv_bias: bool = False  # Qwen 2 and 2.5
    qk_norm: bool = False  # Qwen 3: each head's q and k are normalised before RoPE

    def __post_init__(self):
        sizes = "dim", "n_layer", "n_head", "n_kv_head", "vocab_size", "ffn_dim", "max_seq_len"
        for name in sizes:
            x = getattr(self, name)
            fits = isinstance(x, int) and 1 <= x < 2**31
            need(fits, f"{name} must be an integer >= 1 and < 2**31, not {x!r}")
        numbers = {"norm_eps": self.norm_eps, "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            numbers["rope_scaling"] = self.rope_scaling
        for name, x in numbers.items():
            fits = isinstance(x, (int, float)) and 0 < x < 1e30
            need(fits, f"{name} must be a number > 0 and < 1e30, not {x!r}")
        if self.head_size is None and self.dim % self.n_head == 0:
            self.head_size = self.dim // self.n_head
        hs = self.head_size
        even = isinstance(hs, int) and 2 <= hs < 2**31 and hs % 2 == 0
        default = f"dim / n_head = {self.dim} / {self.n_head}"
        need(even, f"head_size (by default {default}) must be even and >= 2, not {hs!r}")
        whole = self.n_head % self.n_kv_head == 0
        need(whole, f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")


def rope_table(
    config: LlamaConfig, length: int, device: torch.device | str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for positions 0 .. length-1, (length, hs / 2) each; with Llama 3.1's scaling if
    config has it. Their dtype is float32, as in the published models' training, or float64 if
    `dtype` is."""
    like = {"device": device, "dtype": accumulator(dtype)}
    exponents = torch.arange(0, config.head_size, 2, **like) / config.head_size  # (hs / 2,)
    freqs = 1.0 / float(config.rope_theta) ** exponents
    if config.rope_scaling is not None:
        # Wavelengths that fit at least four times into the 8,192 tokens of pre-training are kept.
        # Those that don't fit once are stretched by the factor, and those in between are blended.
        turns = 8192 * freqs / (2 * math.pi)
        keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * freqs / float(config.rope_scaling)
    angles = torch.outer(torch.arange(length, **like), freqs)  # (length, hs / 2) radians
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]
        self.hs = config.head_size
        self.wqkv = nn.Linear(config.dim, sum(self.heads) * self.hs, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_head * self.hs, config.dim, bias=False)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.hs, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.hs, eps=config.norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        state: RetroAttention | None = None,
        t: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, T, dim) -> (B, T, dim), in one of three modes:

        no state       plain dense attention, no cache, differentiable
        state          the same for a prompt, and its keys and values go into the cache
        state and t    a decode step: x holds the W rows (T = W) that end at position t
        """
        T = x.shape[1]
        qkv = self.wqkv(x).unflatten(-1, (-1, self.hs))  # (B, T, n_head + 2 n_kv_head, hs)
        q, k, v = qkv.split(self.heads, dim=2)  # (B, T, n_head or n_kv_head, hs)
        q = self.q_norm(q)
        k = self.k_norm(k)
        if t is not None:
            o = state.decode(q, k, v, cos, sin, t)  # (B, W, n_head, hs)
            return self.wo(o.flatten(2))
        q = apply_rope(q, cos[:T], sin[:T])
        k = apply_rope(k, cos[:T], sin[:T])
        if state is not None:
            state.prefill(q, k, v)
        # Repeat each KV head for its group. With enable_gqa, torch materialises all scores for
        # some dtypes.
        G = q.shape[2] // k.shape[2]
        keys = k.repeat_interleave(G, dim=2)  # (B, T, n_head, hs)
        values = v.repeat_interleave(G, dim=2)  # (B, T, n_head, hs)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True
        )  # (B, n_head, T, hs)
        return self.wo(o.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)  # gate and value
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor, ops) -> torch.Tensor:
        """(B, T, dim) -> (B, T, dim); `ops` has `swiglu`."""
        # Long prompts go through in pieces; else these activations would dominate memory.
        piece = max(1, 8192 // len(x))  # tokens of each text
        if x.shape[1] > piece:
            return torch.cat([self.forward(part, ops) for part in x.split(piece, dim=1)], dim=1)
        return self.w2(ops.swiglu(self.w13(x)))


class Block(nn.Module):
    """One layer: attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        state: RetroAttention | None = None,
        t: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T, dim) -> (B, T, dim); `state` and `t` as in `Attention.forward`."""
        # Without `state` the model may train, and only the PyTorch ops have gradients.
        ops = retro_attention if state is None else state.ops
        a = self.attention_norm
        f = self.ffn_norm
        x = x + self.attention(ops.rms_norm(x, a.weight, a.eps), cos, sin, state, t)
        return x + self.feed_forward(ops.rms_norm(x, f.weight, f.eps), ops)


class Llama(nn.Module):
    """Decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # On the meta device, nn.Embedding's own initialisation would import torch._dynamo, which
        # takes seconds.
        table = torch.randn(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def hidden(
        self,
        idx: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        states: Sequence[RetroAttention | None],
        t: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T) ids -> (B, T, dim) before the final norm. `states` has one `state` per layer; it
        and t are as in `Attention.forward`."""
        x = self.tok_embeddings(idx)  # (B, T, dim)
        for block, state in zip(self.layers, states, strict=True):
            x = block(x, cos, sin, state, t)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., vocab)."""
        head = self.tok_embeddings if self.config.tie_embeddings else self.output
        return F.linear(self.norm(x), head.weight)  # (..., vocab)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) ids -> (B, T, vocab) logits: dense, no cache, differentiable.

        Raises ValueError if T is 0 or exceeds the context.
        """
        T = check_ids(idx)[1]
        context = self.config.max_seq_len
        need(1 <= T <= context, f"{T} tokens: must be between 1 and the context of {context}")
        weight = self.norm.weight
        cos, sin = rope_table(self.config, T, weight.device, weight.dtype)
        return self.logits(self.hidden(idx, cos, sin, [None] * len(self.layers)))

    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        retro: RetroConfig | None = RetroConfig(),
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = 0.95,
        seed: int | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> torch.Tensor:
        """Continues (B, T) ids by up to `max_new_tokens` -> (B, T + n). `retro=None` attends
        densely, temperature 0 is greedy. Same seed, same text.

        n is `max_new_tokens`, or less if the context ends or every sequence has reached a stop
        token; one that ends early is padded with `stop_tokens[0]`. Raises ValueError if a value is
        out of range.
        """
        B, T = check_ids(idx)
        context = self.config.max_seq_len
        check_prompt(T, context)
        length = min(T + max(1, max_new_tokens), context)
        decoder = Decoder(self, B, retro, max_seq_len=length)
        new = decoder.stream(idx, max_new_tokens, temperature, top_k, top_p, seed, stop_tokens)
        return torch.cat([idx, torch.stack(list(new), dim=1).to(idx.device)], dim=1)

    def score(
        self, idx: torch.Tensor, prompt_len: int, retro: RetroConfig | None = RetroConfig()
    ) -> torch.Tensor:
        """Log-probabilities of tokens prompt_len .. T-1 of (B, T) ids, fed one by one through the
        decode path -> (B, T - prompt_len) float32.

        Raises ValueError unless 1 <= prompt_len < T, or if T exceeds the context.
        """
        B, T = check_ids(idx)
        need(1 <= prompt_len < T, f"prompt_len must be between 1 and {T - 1}, not {prompt_len}")
        decoder = Decoder(self, B, retro, max_seq_len=T)
        logits = decoder.prefill(idx[:, :prompt_len])
        logps = []
        for i in range(prompt_len, T):
            check_finite(logits)
            logp = logits.float().log_softmax(dim=-1)  # (B, vocab)
            logps.append(logp.gather(1, idx[:, i, None]))  # (B, 1)
            if i < T - 1:
                logits = decoder.step(idx[:, i])
        return torch.cat(logps, dim=1)

    def weights(self) -> dict[str, torch.Tensor]:
        """Views of the weights under Meta's names (`wqkv` and `w13` split), for loading and
        saving."""
        c = self.config
        q_rows = c.n_head * c.head_size
        kv_rows = c.n_kv_head * c.head_size
        weights = {}
        for name, p in self.named_parameters():
            parts = {name: len(p)}
            if ".wqkv." in name:
                parts = {"wq": q_rows, "wk": kv_rows, "wv": kv_rows}
                parts = {name.replace("wqkv", part): rows for part, rows in parts.items()}
            elif ".w13." in name:
                parts = {name.replace("w13", part): c.ffn_dim for part in ("w1", "w3")}
            views = p.detach().split(list(parts.values()))
            weights |= dict(zip(parts, views, strict=True))
        return weights

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_seq_len: int | None = None,
    ) -> "Llama":
        """Loads Meta's format (`params.json`, `consolidated.00.pth`) or, with extras/, Hugging
        Face's (`config.json`, `*.safetensors`). `max_seq_len` replaces the checkpoint's context.

        Raises ValueError if a file is missing or broken, or the model needs an unsupported feature.
        """
        is_dtype = isinstance(dtype, torch.dtype)
        need(is_dtype, f"dtype must be a torch.dtype such as torch.float32, not {dtype!r}")
        config, weights = read_checkpoint(folder)
        if max_seq_len is not None:
            config = replace(config, max_seq_len=max_seq_len)
        return cls.from_weights(config, weights, device, dtype)

    @classmethod
    def from_weights(
        cls,
        config: LlamaConfig,
        weights: dict[str, torch.Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Llama":
        """A model with these weights, under Meta's names. Empties `weights`, because a memory map
        is freed only with its last tensor.

        Raises ValueError if a tensor is missing, unknown, misshapen or not floating-point.
        """
        with torch.device("meta"):  # no memory or random numbers for weights that are overwritten
            model = cls(config)
        expected = model.weights()
        for name in sorted(expected.keys() | weights.keys()):
            need(name in weights, f"weights: {name} is missing")
            need(name in expected, f"weights: {name} is unknown: the model has no such tensor")
            shape = tuple(expected[name].shape)
            found = weights[name]
            fits = tuple(found.shape) == shape
            need(fits, f"weights: {name} must have shape {shape}, not {tuple(found.shape)}")
            is_float = found.dtype.is_floating_point
            need(is_float, f"weights: {name} must be floating-point, not {found.dtype}")
        model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for name, w in model.weights().items():
            w.copy_(weights.pop(name))
        if model.norm.weight.device.type == "cpu":
            choose_threads(sum(p.numel() for p in model.parameters()))
        return model


def choose_threads(parameters: int) -> None:
    """Uses one thread for a small model on a CPU, because threads that share its small products
    wait for each other, above all on a busy machine. Keeps a number that was set by OMP_NUM_THREADS
    or torch.set_num_threads."""
    cpus = os.cpu_count()
    is_set = "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() not in (cpus, cpus // 2)
    if parameters < 200_000_000 and not is_set:
        torch.set_num_threads(1)


def check_ids(idx: torch.Tensor) -> torch.Size:
    """The shape (B, T) of ids. Raises ValueError unless idx is an integer tensor with 2 axes."""
    what = type(idx).__name__
    fits = False
    if isinstance(idx, torch.Tensor):
        what = f"{idx.dtype} {tuple(idx.shape)}"
        fits = idx.ndim == 2 and idx.dtype in (torch.int32, torch.int64)
    need(fits, f"token ids must be an integer tensor of shape (B, T), not {what}")
    return idx.shape


def check_vocabulary(ids: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError if an id is out of range."""
    for token in (ids.min().item(), ids.max().item()):
        need(0 <= token < vocab_size, f"token id {token} must be between 0 and {vocab_size - 1}")


def check_prompt(T: int, context: int) -> None:
    """Raises ValueError unless a prompt of T tokens leaves room for one more."""
    fits = 1 <= T < context
    need(fits, f"the prompt must have 1 to {context - 1} tokens, not {T}: the context is {context}")


def check_dense(n: int, config: LlamaConfig) -> None:
    """Raises ValueError if the model has fewer than n layers."""
    most = config.n_layer
    need(n <= most, f"dense_layers must be between 0 and the model's {most} layers, not {n}")


# --------------------------------------------------------------------------------------------------
# Decoding


class Decoder:
    """Decoding state of one batch: token ids, the newest position, and each layer's RetroAttention.

    `prefill` a prompt, then `step` with each next token; both return the logits of the token that
    follows. Without a prompt the first step takes the text's first token. The model's weights must
    not move while a decoder lives. Their GPU becomes torch's current device; keep it so.
    """

    def __init__(
        self,
        model: Llama,
        batch_size: int,
        retro: RetroConfig | None = RetroConfig(),
        max_seq_len: int | None = None,
    ):
        """Raises ValueError if a value is out of range. `retro=None` attends densely."""
        is_config = retro is None or isinstance(retro, RetroConfig)
        need(is_config, f"retro must be a RetroConfig, or None for full attention, not {retro!r}")
        config = model.config
        weight = model.norm.weight
        like = {"device": weight.device, "dtype": weight.dtype}
        n = config.max_seq_len if max_seq_len is None else max_seq_len
        fits = 1 <= n <= config.max_seq_len
        need(fits, f"max_seq_len must be between 1 and the context, {config.max_seq_len}, not {n}")
        if retro is None:
            retro = RetroConfig(window=1, dense_layers=config.n_layer)
        check_dense(retro.dense_layers, config)
        if weight.is_cuda:
            torch.cuda.set_device(weight.device)  # Triton launches on the current device
        self.model = model
        self.retro = retro
        self.max_seq_len = n
        self.rope = rope_table(config, n, **like)
        layer = partial(
            RetroAttention,
            retro,
            batch_size=batch_size,
            n_head=config.n_head,
            n_kv_head=config.n_kv_head,
            head_size=config.head_size,
            max_seq_len=n,
            **like,
        )
        self.layers = [layer(dense=i < retro.dense_layers) for i in range(config.n_layer)]
        device = weight.device
        # (B, max_seq_len)
        self.tokens = torch.zeros(batch_size, n, dtype=torch.long, device=device)
        self.t = torch.full((), -1, dtype=torch.long, device=device)  # the newest token's position
        self.position = -1  # the same number on the host; None after a call that failed
        # On a GPU a step is hundreds of short kernels. A CUDA graph launches them at once. Its
        # input is `token`, its output `newest_logits`. One graph serves all lengths of the text:
        # it increments t itself, kernels read t on the device, and each grid is that of a full
        # cache.
        self.graph = None
        self.token = torch.zeros(batch_size, dtype=torch.long, device=device)  # (B,) the newest
        self.newest_logits = None  # (B, vocab)

    @torch.inference_mode()
    def prefill(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) prompt -> (B, vocab) logits of the next token.

        Raises ValueError if the prompt is empty, too long, or its batch size is not the decoder's.
        """
        T = check_ids(idx)[1]
        B = len(self.tokens)
        most = self.max_seq_len
        need(len(idx) == B, f"the prompt has {len(idx)} texts, but the decoder was made for {B}")
        need(1 <= T <= most, f"the prompt must have 1 to {most} tokens, not {T}")
        check_vocabulary(idx, self.model.config.vocab_size)
        self.position = None
        self.tokens[:, :T] = idx
        self.t.fill_(T - 1)
        x = self.model.hidden(idx, *self.rope, self.layers)  # (B, T, dim)
        self.position = T - 1
        return self.model.logits(x[:, -1])

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Appends one token per text, (B,), and returns the next token's logits (B, vocab).

        Raises IndexError past the end of the cache, and ValueError after a call that failed.
        """
        need(self.position is not None, "the last call failed: start afresh with prefill")
        t = self.position + 1
        if t >= self.max_seq_len:
            raise IndexError(f"position {t} is past the end of the cache, {self.max_seq_len}")
        shape = tuple(self.token.shape)
        assert token.shape == shape, f"one token per text: {shape}, not {tuple(token.shape)}"
        if not token.is_cuda:  # on a GPU the check would wait for the device
            check_vocabulary(token, self.model.config.vocab_size)
        self.position = None  # a step that fails may have written into some of the layers
        self.token.copy_(token)
        if not (self.t.is_cuda and all(layer.ops.capturable for layer in self.layers)):
            logits = self._step()
        elif self.graph is None:
            logits = self._step()  # compiles the kernels, which a capture cannot do
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records one step without running it; t stays
                self.newest_logits = self._step()
            self.graph = graph
        else:
            self.graph.replay()
            logits = self.newest_logits.clone()  # the next replay overwrites them
        self.position = t
        return logits

    def _step(self) -> torch.Tensor:
        """Runs one step on `self.token`. With the kernels, nothing in here waits for the device,
        and no shape depends on t."""
        self.t += 1
        self.tokens.index_copy_(1, self.t.view(1), self.token[:, None])
        # Rows before the text, clamped to 0, reach nothing.
        rows = row_positions(self.t, self.retro.window).clamp(min=0)  # (W,)
        x = self.model.hidden(self.tokens[:, rows], *self.rope, self.layers, self.t)  # (B, W, dim)
        return self.model.logits(x[:, -1])

    def stream(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = 0.95,
        seed: int | None = None,
        stop_tokens: Sequence[int] = (),
        append: bool = False,
    ) -> Iterator[torch.Tensor]:
        """Yields the (B,) next tokens, on the CPU; arguments and errors as in `Llama.generate`.
        With `append`, idx does not start a text. It is decoded token by token, after the text so
        far.

        With a CUDA graph, the next step is launched before the host reads a token, which keeps
        the GPU busy. So the caches then also hold a text's stop token.
        """
        B, T = check_ids(idx)
        start = 0
        if append:
            need(self.position is not None, "the last call failed: start afresh, without append")
            start = self.position + 1
        check_prompt(start + T, self.max_seq_len)
        check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
        generator = seeded_generator(seed, idx.device)
        stops = torch.tensor(stop_tokens, dtype=torch.long, device=idx.device)
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)  # (B,)
        if append:
            for token in idx.T:
                logits = self.step(token)
        else:
            logits = self.prefill(idx)
        n = min(max_new_tokens, self.max_seq_len - start - T)
        for i in range(n):
            token = sample_token(logits, temperature, top_k, top_p, generator)  # (B,)
            if len(stops):
                token = torch.where(ended, stops[0], token)
                ended |= (token[:, None] == stops).any(dim=1)
            # One copy brings the host all that it needs, so it waits only once. -1 marks logits
            # that are not finite.
            sent = torch.where(all_finite(logits), token, -1)
            wait = copy_to_host(torch.stack((sent, ended)))  # (2, B)
            ahead = self.graph is not None and i + 1 < n
            if ahead:
                logits = self.step(token)
            token_read, ended_read = wait()
            need(token_read.min() >= 0, not_finite(logits.dtype))
            yield token_read
            if ended_read.all():
                return
            if not ahead and i + 1 < n:
                logits = self.step(token)


def copy_to_host(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Starts a copy, and returns the function that waits for it."""
    if not x.is_cuda:
        return lambda: x
    copy = x.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return copy

    return wait


def seeded_generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def all_finite(logits: torch.Tensor) -> torch.Tensor:
    """(B, vocab) -> (B,): whether all logits of a row are finite. Otherwise sampling would be
    meaningless."""
    return logits.abs().amax(dim=-1).isfinite()  # the maximum is NaN if any element is


def not_finite(dtype: torch.dtype) -> str:
    reason = f"its weights are broken, or too large for {dtype}"
    return f"the model's logits are not finite: {reason}"


def check_finite(logits: torch.Tensor) -> None:
    """Raises ValueError unless all logits are finite. Waits for the device."""
    need(all_finite(logits).all(), not_finite(logits.dtype))


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    """Raises ValueError if a value is out of range."""
    need(max_new_tokens >= 1, f"max_new_tokens must be >= 1, not {max_new_tokens}")
    fits = temperature == 0 or 1e-6 <= temperature < math.inf  # smaller values overflow
    need(fits, f"temperature must be 0 or a finite number >= 1e-6, not {temperature}")
    need(top_k is None or top_k >= 1, f"top_k must be >= 1, not {top_k}")
    need(top_p is None or 0 < top_p <= 1, f"top_p must be in (0, 1], not {top_p}")
    need(seed is None or 0 <= seed < 2**63, f"seed must be between 0 and 2**63 - 1, not {seed}")


def sample_token(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """(B, vocab) logits -> (B,) ids; temperature 0 takes the likeliest. Nothing in here waits for
    the device."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is None:
        logits, ids = logits.sort(dim=-1, descending=True)  # (B, vocab) each
    else:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]))  # (B, top_k) each, also sorted
    logits = logits.float()
    weights = ((logits - logits[:, :1]) / temperature).exp()  # probabilities, up to a factor
    if top_p is not None:
        # Keep the smallest set of likeliest tokens that holds top_p. So a token stays if those
        # before it hold less.
        beyond = sum_before(weights) >= top_p * weights.sum(dim=-1, keepdim=True)
        beyond[:, 0] = False  # also if top_p underflows to 0
        weights = weights.masked_fill(beyond, 0)
    # A race: each token arrives after a random time, exponentially distributed, with its weight as
    # the rate. The chance that it arrives first is its probability.
    times = torch.empty_like(weights).exponential_(generator=generator)  # for rates of 1
    first = (weights / times).argmax(dim=-1, keepdim=True)  # (B, 1) smallest times / weights
    return ids.gather(1, first).squeeze(1)


def sum_before(x: torch.Tensor) -> torch.Tensor:
    """For each element of x (B, n), the sum of those before it in its row. Sums blocks first,
    because a running sum over a whole vocabulary uses little of a GPU, and rounds more."""
    n = x.shape[1]
    blocks = F.pad(x, (0, -n % 512)).unflatten(1, (-1, 512))  # (B, n / 512, 512)
    inside = blocks.cumsum(dim=-1)  # (B, n / 512, 512)
    totals = inside[:, :, -1:]  # (B, n / 512, 1)
    before = inside - blocks + (totals.cumsum(dim=1) - totals)  # (B, n / 512, 512)
    return before.flatten(1)[:, :n]


# ==================================================================================================
# Files: what follows is not needed to understand the method
# ==================================================================================================


def read_checkpoint(folder: str | Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """A folder's configuration and its weights, as memory maps, under Meta's names.

    Raises ValueError if a file is missing or broken, or the model needs an unsupported feature.
    """
    theirs = hugging_face(folder)
    if theirs:
        config, weights = theirs.read_checkpoint(folder)
        return LlamaConfig(**config), weights
    path = checkpoint_file(folder, "params.json")
    try:
        params = json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    need(isinstance(params, dict), f"{path}: must be a JSON object, not {type(params).__name__}")
    weights = read_pth(folder)
    return config_from_params(params, tie_embeddings="output.weight" not in weights), weights


def hugging_face(folder: str | Path):
    """The module that reads Hugging Face's format, or None if the folder has only Meta's. Raises
    ValueError if there is no such folder, it has neither format, or the module is missing."""
    folder = Path(folder)
    reason = "must be a folder" if folder.exists() else "no such folder"
    hint = "download a model's folder first, see the README"
    need(folder.is_dir(), f"checkpoint {folder}: {reason}; {hint}")
    if not (folder / "config.json").is_file():
        found = (folder / "params.json").is_file()
        need(found, f"checkpoint {folder}: has neither params.json nor config.json")
        return None
    return extra("hugging_face", f"checkpoint {folder}: Hugging Face's format")


def extra(name: str, what: str):
    """The module of extras/ that `what` needs. Raises ValueError if it is missing."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ImportError:
        raise ValueError(f"{what} needs extras/{name}.py, which is missing") from None


def checkpoint_file(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    need(path.is_file(), f"checkpoint {folder}: {name} is missing")
    return path


def config_from_params(params: dict, tie_embeddings: bool = False) -> LlamaConfig:
    """The config from Meta's params.json. Raises ValueError if a key is missing or out of range."""
    for key in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of"):
        x = params.get(key, "missing")
        fits = isinstance(x, int) and x >= 1
        need(fits, f"params.json: {key} must be an integer >= 1, not {x!r}")
    multiplier = params.get("ffn_dim_multiplier", 1)
    fits = isinstance(multiplier, (int, float)) and 0 < multiplier < math.inf
    need(fits, f"params.json: ffn_dim_multiplier must be a number > 0, not {multiplier!r}")
    # Meta's rule for SwiGLU: two thirds of 4 * dim, times a multiplier, rounded up to a multiple.
    ffn_dim = int(multiplier * int(8 * params["dim"] / 3))
    ffn_dim = math.ceil(ffn_dim / params["multiple_of"]) * params["multiple_of"]
    scaled = params.get("use_scaled_rope", False)
    factor = params.get("rope_scaling_factor")
    if factor is None:  # Llama 3.1's, or 3.2's for smaller models; the files omit it
        factor = 8.0 if params["dim"] >= 4096 else 32.0
    return LlamaConfig(
        dim=params["dim"],
        n_layer=params["n_layers"],
        n_head=params["n_heads"],
        n_kv_head=params.get("n_kv_heads") or params["n_heads"],
        vocab_size=params["vocab_size"],
        ffn_dim=ffn_dim,
        max_seq_len=params.get("max_seq_len", 131_072 if scaled else 8_192),
        norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=params.get("rope_theta", 500_000.0),
        rope_scaling=factor if scaled else None,
        tie_embeddings=tie_embeddings,
    )


def read_pth(folder: str | Path) -> dict[str, torch.Tensor]:
    """Reads consolidated.00.pth."""
    path = checkpoint_file(folder, "consolidated.00.pth")
    several = (path.parent / "consolidated.01.pth").exists()
    need(not several, f"checkpoint {folder}: several consolidated.*.pth files are not supported")
    try:
        # weights_only, because a pickle could run code. mmap reads a tensor when it is copied, so
        # that there is no second model in memory.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # broken files raise anything, with advice that is not for the user
        reason = f"not a readable PyTorch file of weights ({type(error).__name__})"
        if re.search("memory|allocate", str(error)):
            reason = "not enough memory to map it"
        raise ValueError(f"{path}: {reason}") from None
    tensors = isinstance(weights, dict)
    tensors = tensors and all(isinstance(w, torch.Tensor) for w in weights.values())
    need(tensors, f"{path}: must be a dictionary of tensors")
    weights.pop("rope.freqs", None)  # in Meta's older files; we compute it
    return weights


def check_message(role: str, text: str) -> None:
    known = role in ("system", "user", "assistant")
    need(known, f"a role must be system, user or assistant, not {role!r}")
    need(isinstance(text, str), f"a message must have a text, not {text!r}")


class Tokenizer:
    """Llama 3's byte-pair encoding on tiktoken. The file has lines "<token in base64> <rank>"; 256
    special tokens take the next ids."""

    # Splits a text into pieces; byte pairs are merged only inside a piece.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    # Llama 3.1's names for the first eleven; the rest continue the numbering.
    special_names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
    ]

    def __init__(self, ranks: dict[bytes, int]):
        """`ranks` maps byte-pair tokens to ranks, which are their ids."""
        self.special = {name: len(ranks) + i for i, name in enumerate(self.special_names)}
        self.bos = self.special["<|begin_of_text|>"]
        # A generation ends with the text, with a message, or with a turn.
        ends = "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
        self.stop_tokens = [self.special[name] for name in ends]
        self.bpe = tiktoken.Encoding(
            "bpe", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.vocab_size = self.bpe.n_vocab

    @staticmethod
    def from_checkpoint(folder: str | Path) -> "Tokenizer":
        """The tokenizer of a folder, from Meta's `tokenizer.model` or, with extras/, from Hugging
        Face's files (the class there has the same methods). Raises ValueError if there is none."""
        theirs = hugging_face(folder)
        if theirs:
            return theirs.Tokenizer(folder)
        path = checkpoint_file(folder, "tokenizer.model")
        # Not by tiktoken's own loader, which caches by path and would miss changes of the file.
        ranks = {}
        try:
            for line in path.read_bytes().splitlines():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}: must be lines of '<base64 token> <rank>'") from None
        complete = sorted(ranks.values()) == list(range(len(ranks)))
        complete = complete and all(bytes([b]) in ranks for b in range(256))
        need(complete, f"{path}: must have ranks 0 .. n-1, and the 256 single bytes as tokens")
        return Tokenizer(ranks)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`; with `bos`, begin_of_text first. Names of special tokens in the text are
        plain text."""
        # Cut long runs of spaces, because a million of them overflow the regex engine's stack.
        pieces = re.split(r"(\s{25000})", text)
        ids = [i for piece in pieces for i in self.bpe.encode_ordinary(piece)]
        return [self.bos, *ids] if bos else ids

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Ids of a conversation in Llama 3's format, up to where the assistant's turn begins. A
        message is (role, text); roles are system (first, if at all), user and assistant.

        Raises ValueError for another role or no text.
        """
        start = self.special["<|start_header_id|>"]
        end = self.special["<|end_header_id|>"]
        end_of_turn = self.special["<|eot_id|>"]
        ids = [self.bos]
        for role, text in messages:
            check_message(role, text)
            ids += [start, *self.encode(role), end]
            ids += [*self.encode("\n\n" + text.strip()), end_of_turn]
        return [*ids, start, *self.encode("assistant"), end, *self.encode("\n\n")]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.bpe.decode([i for i in ids if i < self.vocab_size], errors="replace")
