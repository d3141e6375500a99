"""Requests whose answers are known beforehand."""

import numpy as np
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from support.simulation.scenario import DRAFTS, MAX_LEN, P, W

STOP, PICTURE = 99, 98
ASKED = [None] * 4 + [{"sparsemm": 0}, {"sparsemm_budget": W + 2}, {"sparsemm_budget": 48}]
ASKED += [{"sparsemm_budget": W}]  # which cannot be
# At and beside what ends a window, a budget or a block.
EDGES = [1, 2, 9, 10, 11, 15, 16, 17, 23, 24, 25, 31, 32, 33, 39, 40, 41, 47, 48, 49, 64, 72]
PICTURES = [3, 5, 7, 8, 12, 16, 20, 31, 40]  # tokens of each; a picture's number is its index
AHEAD = 4  # steps in flight at most


class Chat:
    """A request whose answer is known beforehand, and what the cache must hold for each token.

    The value of a token is a hash of all tokens and pictures up to it, as its keys and values
    depend on them; answers to a pruned prompt are private to the chat.
    """

    def __init__(
        self, index, prompt, answer_tokens, pictures=(), asked=None, stops=False, priority=0
    ):
        self.index, self.name, self.n = index, f"chat-{index}", len(prompt)
        self.answer_tokens, self.asked, self.priority = answer_tokens, asked, priority
        self.arrival = float(index)
        self.pictures = pictures  # (first token, number)
        further = answer_tokens + (AHEAD + 2) * (DRAFTS + 1)  # steps in flight may sample more
        self.tokens = [*prompt, *((31 * index + i) % 97 for i in range(further))]
        self.max_tokens = answer_tokens
        if stops:  # at a token that the scheduler does not foresee
            self.max_tokens = min(answer_tokens + 15, MAX_LEN - self.n)
            self.tokens[self.n + answer_tokens - 1] = STOP
        self.compact_value = -1000 - index
        self.layout = None
        self.answer, self.finished, self.aborted = [], None, False
        seen = list(self.tokens)
        for first, number in pictures:
            for i in range(PICTURES[number]):
                seen[first + i] = 1_000_000 + 1_000 * number + i
        values, value = [], 0
        for token in seen:
            value = hash((value, token))
            values.append(value)
        self.dense_values = np.array(values)
        self.request = None

    def use(self, layout):
        """Its layout, known from its admission on, stays what it is."""
        assert self.layout in (None, layout), "a resumed request is pruned in another way"
        self.layout, self.pruned = layout, layout.is_pruned(self.n)
        self.N, self.C = -(-self.n // P), layout.compact_blocks(self.n, P)
        self.values = self.dense_values
        if self.pruned:
            self.values = self.dense_values.copy()
            self.values[self.n :] = [
                hash((self.index, position)) for position in range(self.n, len(self.tokens))
            ]

    def engine_request(self):
        features = [
            MultiModalFeatureSpec(
                data={"picture": number},
                modality="image",
                identifier=f"picture-{number}",
                mm_position=PlaceholderRange(offset=first, length=PICTURES[number]),
            )
            for first, number in self.pictures
        ]
        params = SamplingParams(
            max_tokens=self.max_tokens, stop_token_ids=[STOP], extra_args=self.asked
        )
        return EngineCoreRequest(
            request_id=self.name,
            prompt_token_ids=self.tokens[: self.n],
            mm_features=features or None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=self.arrival,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            priority=self.priority,
        )


def any_chat(simulation):
    """A new chat, one that shares a prefix, or the next turn of an earlier one."""
    rng, chats = simulation.rng, simulation.chats
    index, kind = len(chats), rng.random()
    prompt, pictures = [rng.randrange(90) for _ in range(rng.choice(EDGES))], []
    if kind < 0.4:
        family = rng.randrange(3)
        shared = rng.choice([15, 16, 17, 64, 100, 200])
        prompt = [100 + family] * shared + prompt
    elif kind < 0.7 and chats:
        earlier = rng.choice(list(chats.values()))
        kept = min(earlier.n + earlier.answer_tokens, 300)
        pictures = [p for p in earlier.pictures if p[0] + PICTURES[p[1]] <= kept]
        prompt = earlier.tokens[:kept] + prompt
    elif kind < 0.73:
        prompt = [rng.randrange(90) for _ in range(MAX_LEN - rng.choice([1, 2, 9]))]
    while rng.random() < 0.35 and len(prompt) < 330:
        number = rng.randrange(len(PICTURES))
        pictures.append((len(prompt), number))
        prompt += [PICTURE] * PICTURES[number] + [rng.randrange(90)] * rng.choice([0, 1, 5])
    most = min(60, MAX_LEN - len(prompt))
    answer_tokens = 1 if rng.random() < 0.1 else rng.randint(1, most)
    asked, stops = rng.choice(ASKED), rng.random() < 0.4
    return Chat(index, prompt, answer_tokens, pictures, asked, stops, rng.randrange(3))
