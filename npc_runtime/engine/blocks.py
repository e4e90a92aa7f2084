"""Who owns which KV block, and which blocks hold a prefix that can be used again. No torch.

Blocks are shared by reference counts. A full block whose keys and values are computed is known by a key that
covers the adapter's content and every token up to its end; a block that nobody uses any more keeps its key until
it is needed, the least recently used first. Two personas with the same text and different adapters never share.

A worked example with blocks of 4 tokens. Line 1 computes a prompt of 10 tokens in blocks 0, 1, 2; blocks 0 and 1
are full and get keys, block 2 is not. Line 2 of the same persona has the same first 9 tokens: it takes blocks 0
and 1 (8 tokens cached, two users each) and a new block 3 for the rest. When both are over, blocks 0 and 1 are
free but still known; blocks 2 and 3 are just free and are given out before them.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable

from npc_runtime.engine.core import Sequence

__all__ = ["BlockPool"]


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_users = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # first out first

    @property
    def num_free(self) -> int:
        """Blocks without a user; some may hold a known prefix."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free

    @property
    def num_known(self) -> int:
        """Blocks that hold a known prefix, in use or not."""
        return len(self._known)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill."""
        return -(-num_tokens // self.block_size)

    def take_prefix(self, sequence: Sequence) -> int:
        """Give the sequence the known blocks its tokens begin with; return how many tokens that is.

        At least one token is always left to compute, since its logits are wanted.
        """
        assert not sequence.blocks
        for key in self._block_keys(sequence, (sequence.num_tokens - 1) // self.block_size):
            block = self._known.get(key)
            if block is None:
                break
            self._use(block)
            sequence.blocks.append(block)
        return len(sequence.blocks) * self.block_size

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `extend` would have to take."""
        return max(self.num_needed(num_tokens) - len(sequence.blocks), 0)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Make room for the sequence's first `num_tokens` tokens; the caller asked `num_missing` first."""
        for _ in range(self.num_missing(sequence, num_tokens)):
            block = next(iter(self._free))
            self._forget(block)
            self._use(block)
            sequence.blocks.append(block)

    def remember(self, sequence: Sequence) -> None:
        """Make the sequence's full and computed blocks known, as far as their prefix is not known yet."""
        num_full = sequence.num_computed // self.block_size
        for number, key in enumerate(self._block_keys(sequence, num_full)):
            block = sequence.blocks[number]
            if key not in self._known and self._keys[block] is None:
                self._known[key], self._keys[block] = block, key

    def release(self, sequence: Sequence) -> None:
        """Take the sequence's blocks back; its last ones are given out again before its first ones."""
        for block in reversed(sequence.blocks):
            self._num_users[block] -= 1
            assert self._num_users[block] >= 0
            if self._num_users[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=self._keys[block] is not None)
        sequence.blocks = []

    def forget_all(self) -> None:
        """Drop every known prefix; after a failed step nothing computed can be trusted."""
        for block in range(self.num_blocks):
            self._forget(block)

    def check_integrity(self, owners: Iterable[Sequence]) -> None:
        """Assert that users and free list agree with who holds what, and that every key leads to its block."""
        num_users = [0] * self.num_blocks
        for sequence in owners:
            for block in sequence.blocks:
                num_users[block] += 1
        assert num_users == self._num_users, "a KV block is lost or counted wrongly"
        assert set(self._free) == {block for block, count in enumerate(num_users) if count == 0}
        assert {key: block for block, key in enumerate(self._keys) if key is not None} == self._known

    def _block_keys(self, sequence: Sequence, num_blocks: int) -> Iterable[bytes]:
        """Keys of the sequence's first blocks, each covering all tokens before it; computed once and kept."""
        keys = sequence.block_keys
        while len(keys) < num_blocks:
            start = len(keys) * self.block_size
            digest = hashlib.blake2b(keys[-1] if keys else sequence.request.cache_key.encode(), digest_size=16)
            digest.update(array("q", sequence.tokens(start, start + self.block_size)).tobytes())
            keys.append(digest.digest())
        return keys[:num_blocks]

    def _use(self, block: int) -> None:
        self._num_users[block] += 1
        self._free.pop(block, None)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._known[key]
            self._keys[block] = None
