"""What holds after every call of the engine, whatever happened before."""

from collections import Counter

import numpy as np
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id

from support.simulation.scenario import P


class Invariants:
    """Compares vLLM's books of blocks and pictures with what the device really holds.

    Attributes:
        promised: hashes in the prefix cache, by block, when the engine schedules next.
        expected: chat and number of the block that a hash means, by hash.
        verified: hashes of blocks whose content was looked at.
    """

    def __init__(self, simulation):
        self.simulation = simulation
        self.scheduler, self.pool = simulation.scheduler, simulation.pool
        self.manager, self.managers = simulation.manager, simulation.managers
        self.chats, self.steps, self.worker = simulation.chats, simulation.steps, simulation.worker
        self.expected = {}
        self.verified = Verified(self.worker)
        self.remember()

    def remember(self):
        """Hashes in the prefix cache when the engine schedules next."""
        self.promised = [block.block_hash for block in self.pool.blocks]

    def check(self, executing=None):
        """What holds after every call."""
        owners = Counter(
            block.block_id
            for manager in self.managers
            for row in manager.req_to_blocks.values()
            for block in row
            if not block.is_null
        )
        held = self.simulation.withheld + len(owners)
        assert self.pool.get_num_free_blocks() + held + 1 == self.simulation.blocks
        assert all(self.pool.blocks[block].ref_cnt == count for block, count in owners.items())
        for step in self.steps:
            for name, blocks in step.reads.items():
                request = self.scheduler.requests.get(name)
                if request is not None and request.num_preemptions == step.preemptions[name]:
                    assert all(block.ref_cnt for block in blocks), "freed while a step reads it"
        for name, prompt in self.manager.prompts.items():
            if prompt.compact_blocks:
                own = self.manager.req_to_blocks.get(name, [])[-(-prompt.tokens // P) :]
                assert all(b.ref_cnt == 1 and b.block_hash is None for b in own), "not private"
                request = self.scheduler.requests[name]
                processed = request.num_computed_tokens - request.num_in_flight_tokens
                if processed >= prompt.tokens and own:
                    older = self.manager.req_to_blocks[name][: prompt.freed_blocks]
                    assert all(block.is_null for block in older), "pruned and not freed"
        self._check_prefix_cache(executing)
        self._check_encoder_cache(executing)

    def _check_prefix_cache(self, executing):
        """Every block holds what its hash promises, or a step that will write it was sent."""
        sent = [*self.simulation.device.queue, *([executing] if executing else [])]
        writes = set().union(*(step.writes for step in sent))
        for block in self.pool.blocks:
            if block.block_hash is None or block.block_id in writes:
                continue
            if self.verified.get(block.block_id) is block.block_hash:
                continue
            chat, i = self._promise(get_block_hash(block.block_hash))
            group = get_group_id(block.block_hash)
            expected = chat.dense_values[P * i : P * (i + 1)] ^ group
            wrong = np.flatnonzero(self.worker.memory[block.block_id] != expected)
            assert not wrong.size, (
                f"block {block.block_id} of group {group} is in the prefix cache as [{P * i}, "
                f"{P * (i + 1)}) of {chat.name} or another; it has not the right content from "
                f"{P * i + wrong[0]} on, and no step that would compute it was sent"
            )
            self.verified[block.block_id] = block.block_hash

    def _promise(self, block_hash):
        """A chat whose tokens the hash means, and which block of them."""
        if block_hash not in self.expected:
            for chat in self.chats.values():
                for i, known in enumerate(chat.request.block_hashes):
                    self.expected[known] = chat, i
        return self.expected[block_hash]

    def _check_encoder_cache(self, executing):
        """The device has every picture that the scheduler believes it has."""
        has = set(self.worker.encoder)
        for step in [*self.simulation.device.queue, *([executing] if executing else [])]:
            has -= set(step.output.free_encoder_mm_hashes)
            for name, numbers in step.output.scheduled_encoder_inputs.items():
                has |= {f"picture-{self.chats[name].pictures[i][1]}" for i in numbers}
        cache_manager = self.scheduler.encoder_cache_manager
        missing = set(cache_manager.cached) - has
        assert not missing, f"{missing}: in the encoder cache, and no step computes it"
        assert has <= set(cache_manager.cached) | set(cache_manager.freed), "never freed"


class Verified(dict):
    """Hashes of blocks whose content was looked at; forgotten when the device writes there."""

    def __init__(self, worker):
        super().__init__()
        self.worker = worker

    def get(self, block):
        if block in self.worker.written:
            self.worker.written.discard(block)
            self.pop(block, None)
        return super().get(block)
