"""Changes of a checkpoint that a stranger could make: of every field, one at a time."""

import copy
import math

import torch
from torch import nn

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = ["", "12", "\0", "a\nb", "\ud800", "x" * 10**6, "[" * 10**5, BOMB, "model: 3", "- 1"]
SCALARS = [
    None,
    True,
    -1,
    0,
    10**30,
    -(2**63),
    2**63,
    0.5,
    math.nan,
    math.inf,
    b"1",
    (),
    [],
    {},
    [[1]],
    {1: {}},
]


def tensors(value):
    """What may come in a tensor's place."""
    flat = value.detach().reshape(-1)
    real = value.is_floating_point()
    yield from (
        flat[:0],
        flat[:1].clone(),
        flat[:1].expand(value.numel()).reshape(value.shape) if 0 else flat,
    )
    yield flat[:1].clone().expand(value.shape) if value.dim() else value[None]  # of one element in memory
    yield from (value[None], value.new_zeros(*value.shape, 2), value.new_zeros(2 * value.numel()))
    if value.numel() > 1:
        yield value.new_zeros(value.numel()).as_strided(value.shape, [0] * value.dim())
        yield torch.cat([flat, flat]).as_strided(value.shape, [2 * s for s in value.stride()])
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float64, torch.bfloat16):
        yield value.to(dtype)
    yield from (value.to_sparse(), value.to("meta"), nn.Parameter(value) if real else value.neg())
    if value.dim() == 2:
        yield value.to_sparse_csr()
    if real:
        yield torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)
        yield torch.nested.nested_tensor([flat, flat])
        yield from (value.fill_(x) for x in (math.nan, math.inf, -math.inf, -1.0, 1e38, 0.5, 10.0**9))


def replacements(value):
    """What may come in a value's place."""
    if isinstance(value, torch.Tensor):
        yield from tensors(value.clone())
    if isinstance(value, str):
        yield from TEXTS
        yield from (value[: len(value) // 2], value + "\nmore: 1", value.replace(": ", ": -"))
        yield from (value.replace("latent_dim: 3", f"latent_dim: {n}") for n in ("4", "4000000", "1.e9", "x"))
        yield value.replace("hidden_dims:", "hidden_dims: " + str([1] * 100_000) + "\n  others:")
        yield value.replace("- 4", "- " + "9" * 30)
        yield value.replace("arch: pytorch-vae", "arch: [1]")
        yield value.replace("name: faces", "name: memory")
        yield value.replace("lr: ", "lr: 2001-99-99 #")
        yield value.replace("seed: ", "seed: " + "9" * 5000)
    yield from SCALARS
    yield from (torch.zeros(()), torch.ones(3), "text")
    if isinstance(value, dict):
        yield {**value, "more": torch.zeros(3)}
        yield {**value, (1, 2): 3}
        yield {str(key): item for key, item in value.items()}
        yield from ({k: v for k, v in value.items() if k != key} for key in value)
        yield dict.fromkeys(value)
    if isinstance(value, list):
        yield from (value[1:], value + value, value[::-1], [value], [str(item) for item in value])
    if type(value) in (int, float):
        yield from (value + 1, value - 1, float(value), str(value), torch.tensor(value), -value)


def places(state, path=()):
    """The paths of all fields, containers too."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(state, path):
    for key in path:
        state = state[key]
    return state


def mutations(state, number, seed):
    """Yield a description and a changed copy of the state, `number` of them: each field in turn."""
    generator = torch.Generator().manual_seed(seed)
    paths = list(places(state))
    order = torch.randperm(len(paths), generator=generator).tolist()
    for n in range(number):
        path = paths[order[n % len(paths)]]
        options = list(replacements(at(state, path)))
        chosen = int(torch.randint(len(options), (), generator=generator))
        changed = copy.deepcopy(state)
        at(changed, path[:-1])[path[-1]] = options[chosen]
        yield f"{'/'.join(map(str, path))} option {chosen} of {len(options)}", changed
