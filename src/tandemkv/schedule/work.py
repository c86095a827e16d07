"""What a layer's step has to do, and a plan of who does it. Numbers only."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tandemkv.errors import InputError


@dataclass(frozen=True)
class Work:
    """One decode step of one layer.

    near_tokens, far_tokens: of each sequence. k_bytes, v_bytes: of a far token of one sequence, all KV heads.
    near_bytes: K and V of a near token. item_bytes: of a number of the model. num_inputs: first tokens whose layer
    inputs are kept, `hidden` numbers each, near or far. free_near_bytes: that staging and what comes up may take.
    """

    num_seqs: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    near_tokens: int
    far_tokens: int
    k_bytes: float
    v_bytes: float
    near_bytes: float
    hidden: int = 0
    item_bytes: int = 2
    page_size: int = 64
    num_inputs: int = 0
    inputs_are_near: bool = True
    free_near_bytes: float = math.inf

    @property
    def kv_bytes(self) -> float:
        """K and V of a far token."""
        return self.k_bytes + self.v_bytes

    @property
    def input_bytes(self) -> int:
        """A token's layer input."""
        return self.hidden * self.item_bytes

    @property
    def rebuild_flops(self) -> float:
        """Of K and V of a token from its layer input: 4 h^2 where every head has its own (KVPR, 2411.17089)."""
        return 2.0 * self.hidden * self.num_kv_heads * (self.head_dim + self.v_head_dim)

    @property
    def query_bytes(self) -> int:
        """A query of every sequence."""
        return self.num_seqs * self.num_q_heads * self.head_dim * self.item_bytes

    @property
    def part_bytes(self) -> int:
        """out and lse of a lane, in float32."""
        return self.num_seqs * self.num_q_heads * (self.v_head_dim + 1) * 4


_MAX_PLAN_TOKENS = 1 << 40


@dataclass(frozen=True)
class Plan:
    """How many far tokens of each sequence go to each lane, and in what pieces.

    stage_tokens: that a link carries at once. piece_tokens: that are rebuilt at once.
    """

    tokens: Mapping[str, int] = field(default_factory=dict)
    stage_tokens: int = 1024
    piece_tokens: int = 256

    @property
    def num_tokens(self) -> int:
        """Of all lanes together."""
        return sum(self.tokens.values())

    @property
    def summary(self) -> str:
        """`"attend 3,264, stream 832"`; "none" where there was nothing to share out."""
        return ", ".join(f"{name} {num:,}" for name, num in self.tokens.items()) or "none"

    def scaled(self, far_tokens: int, page_size: int, most: Mapping[str, int]) -> "Plan":
        """The same shares of another number of far tokens, in whole pages; of some lanes at most so many."""
        left, shares = far_tokens, {}
        whole = max(1, self.num_tokens)
        for name, num in self.tokens.items():
            share = round(num / whole * far_tokens / page_size) * page_size
            shares[name] = min(share, left, most.get(name, left))
            left -= shares[name]
        for name in reversed(shares):
            room = min(left, most.get(name, left + shares[name]) - shares[name])
            shares[name] += room
            left -= room
        return Plan({name: num for name, num in shares.items() if num}, self.stage_tokens, self.piece_tokens)

    def to_dict(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return {"tokens": dict(self.tokens), "stage_tokens": self.stage_tokens, "piece_tokens": self.piece_tokens}

    @staticmethod
    def from_json(text: str) -> "Plan":
        """`{"tokens": {"attend": 4096, "stream": 1024}, "stage_tokens": 512}`: shares count, whatever their sum.

        InputError, with what was expected, for what is no plan.
        """
        expected = 'expected a plan such as {"tokens": {"attend": 4096, "stream": 1024}, "stage_tokens": 512}'
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{expected}, got no JSON: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("tokens"), dict) or not found["tokens"]:
            raise InputError(f"{expected}, got {text.strip()[:100]!r}")
        found.pop("shares", None)  # `explain` tells them beside the tokens
        unknown = found.keys() - {"tokens", "stage_tokens", "piece_tokens"}
        numbers = [*found["tokens"].values(), *(num for name, num in found.items() if name != "tokens")]
        if unknown or not all(type(num) is int and 0 < num < _MAX_PLAN_TOKENS for num in numbers):
            raise InputError(f"{expected}, with whole numbers above 0 and below 2**40, got {text.strip()[:100]!r}")
        return Plan(**found)
