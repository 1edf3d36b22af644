"""The engine model, plainly: continuous batching, one iteration after another.

A step has a budget of tokens. Running requests come before waiting ones; a prompt may take several
steps. A request is admitted when its whole sequence so far fits in key-value blocks and a slot is
free. When a running one cannot grow, the request of highest (priority, arrival) is preempted: it
keeps its tokens, and computes them anew when it resumes. Nothing is admitted in a step that
preempted. `fast_engine` does the same, compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qlm_batch.scheduling import agent, eviction
from qlm_batch.scheduling.speed import StepTime

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine can hold and do at once."""

    slots: int
    kv_tokens: int
    batched_tokens: int = 2048
    block_tokens: int = BLOCK_TOKENS

    @property
    def blocks(self) -> int:
        """Whole blocks of key-value memory."""
        return self.kv_tokens // self.block_tokens


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that ended: when its first token came, and its last (engine time)."""

    key: int
    first_token: float
    end: float


@dataclass(slots=True)
class Sequence:
    """A request inside the engine; `computed` of its tokens have their key-values in memory."""

    key: int
    prompt: int
    output: int
    priority: int
    arrival: float
    number: int
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    first_token: float = -1.0

    @property
    def known(self) -> int:
        """Tokens there are: the prompt and what was generated."""
        return self.prompt + self.generated

    @property
    def rank(self) -> tuple[int, float, int]:
        """Order among the waiting, lowest first."""
        return (self.priority, self.arrival, self.number)


@dataclass(slots=True)
class ReferenceEngine:
    """The readable engine; times are seconds on the caller's clock."""

    limits: EngineLimits
    speed: StepTime
    clock: float = 0.0
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    steps: int = 0
    generated: int = 0
    preemptions: int = 0
    recomputed: int = 0
    busy_s: float = 0.0
    submitted: int = 0

    def submit(self, key: int, prompt: int, output: int, priority: int, arrival: float) -> None:
        """Hand in a request; it joins the next step that begins at or after its arrival.

        ValueError when it is empty or could never fit.
        """
        check_size(self.limits, prompt, output)
        self.waiting.append(Sequence(key, prompt, output, priority, arrival, self.submitted))
        self.submitted += 1

    def abort(self, key: int) -> bool:
        """Drop a request; False when it is not here."""
        for group in (self.running, self.waiting):
            for sequence in group:
                if sequence.key == key:
                    group.remove(sequence)
                    return True
        return False

    def advance(self, until: float) -> list[Finished]:
        """Run every step that begins before `until`; what ended, in order."""
        done: list[Finished] = []
        while self.clock < until:
            if not self.running and not self.waiting:
                self.clock = until
                break
            self._step(done)
        return done

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return self.limits.blocks - sum(sequence.blocks for sequence in self.running)

    def _step(self, done: list[Finished]) -> None:
        self._evict()
        budget, before, scheduled = self.limits.batched_tokens, self.preemptions, dict[int, int]()
        position = 0
        while position < len(self.running) and budget > 0:
            sequence = self.running[position]
            tokens = min(sequence.known - sequence.computed, budget)
            lost = self._grow(sequence, self._blocks(sequence.computed + tokens))
            budget += sum(scheduled.pop(other.number, 0) for other in lost)
            if sequence in lost:
                break
            scheduled[sequence.number] = tokens
            budget -= tokens
            position = self.running.index(sequence) + 1
        room = self.preemptions == before
        while room and self.waiting and len(self.running) < self.limits.slots and budget > 0:
            head = min(self.waiting, key=lambda s: s.rank)
            head.blocks = self._blocks(head.known)
            if head.blocks > self.free:
                head.blocks = 0
                break
            self.waiting.remove(head)
            self.running.append(head)
            scheduled[head.number] = min(head.known, budget)
            budget -= scheduled[head.number]
        self._finish(scheduled, done)

    def _grow(self, sequence: Sequence, need: int) -> list[Sequence]:
        """Give a running request its blocks; those preempted for it, maybe itself."""
        lost = []
        while need - sequence.blocks > self.free:
            last = agent.victim([(s.priority, s.arrival) for s in self.running])
            lost.append(self._preempt(last))
            if lost[-1] is sequence:
                return lost
        sequence.blocks = max(sequence.blocks, need)
        return lost

    def _evict(self) -> None:
        """Make room for a waiting interactive request before the step."""
        while self.waiting and self.running:
            head = min(self.waiting, key=lambda s: s.rank)
            fits = self._blocks(head.known) <= self.free
            if len(self.running) < self.limits.slots and fits:
                return
            last = agent.victim([(s.priority, s.arrival) for s in self.running])
            if not eviction.may_evict(head.priority, self.running[last].priority):
                return
            self._preempt(last)

    def _preempt(self, position: int) -> Sequence:
        sequence = self.running.pop(position)
        self.preemptions += 1
        self.recomputed += sequence.computed
        sequence.computed = sequence.blocks = 0
        self.waiting.append(sequence)
        return sequence

    def _finish(self, scheduled: dict[int, int], done: list[Finished]) -> None:
        context = prefill = count = 0
        for sequence in self.running:
            tokens = scheduled.get(sequence.number, 0)
            if tokens:
                count += 1
                context += sequence.computed
                decoding = sequence.generated > 0 and sequence.known - sequence.computed == 1
                prefill += 0 if decoding else tokens
        seconds = self.speed.seconds(count, context, prefill)
        self.clock += seconds
        self.busy_s += seconds
        self.steps += 1
        still = []
        for sequence in self.running:
            sequence.computed += scheduled.get(sequence.number, 0)
            if sequence.computed == sequence.known:
                sequence.generated += 1
                self.generated += 1
                if sequence.first_token < 0.0:
                    sequence.first_token = self.clock
                if sequence.generated == sequence.output:
                    done.append(Finished(sequence.key, sequence.first_token, self.clock))
                    continue
            still.append(sequence)
        self.running = still

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_tokens)


def check_size(limits: EngineLimits, prompt: int, output: int) -> None:
    """ValueError unless a request of this size can run to its end, alone if need be."""
    if prompt < 1 or output < 1:
        raise ValueError(
            f"a request has {prompt} prompt and {output} output tokens; 1 is the least"
        )
    if -(-(prompt + output) // limits.block_tokens) > limits.blocks:
        raise ValueError(
            f"{prompt} prompt and {output} output tokens do not fit in {limits.kv_tokens} tokens of"
            " key-value memory"
        )
