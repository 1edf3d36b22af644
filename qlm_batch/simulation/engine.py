"""The engine model, plainly: continuous batching, one iteration after another.

A step has a budget of tokens. Running requests come before waiting ones; a prompt may take several
steps. A request is admitted when its whole sequence so far fits in key-value blocks and a slot is
free. When a running one cannot grow, the one that gives way first is preempted: it keeps its
tokens, and computes anew, when it resumes, what has left the prefix cache. That holds whole blocks,
and gives the longest free away first, of one request's those behind first. Nothing is admitted in a
step that preempted. Before the step, batch work is evicted for interactive requests by the rules of
`scheduling.eviction`, which the real engine follows too: it rests, with its blocks, until there is
a place again, or is preempted where blocks are short. `fast_engine` does the same, compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qlm_batch.scheduling import eviction
from qlm_batch.scheduling.speed import StepTime

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine can hold and do at once.

    `slots` are places of batch work; `headroom`, `alone` and `together` are those of
    `eviction.Pace`. Without `prefix_caching` who gave way computes all its tokens anew.
    """

    slots: int
    kv_tokens: int
    batched_tokens: int = 2048
    block_tokens: int = BLOCK_TOKENS
    headroom: int = 0
    alone: bool = False
    together: int | None = None
    prefix_caching: bool = True

    @property
    def size(self) -> int:
        """The largest running batch."""
        return self.slots + self.headroom

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
    """A request inside the engine; `computed` of its tokens have their key-values in memory.

    One that gave way had `cached` tokens there; once the engine has handed out `safe_until` blocks
    in its life, it begins to reuse theirs.
    """

    key: int
    prompt: int
    output: int
    priority: int
    arrival: float
    number: int
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    evictions: int = 0
    cached: int = 0
    safe_until: int = 0
    first_token: float = -1.0

    @property
    def urgent(self) -> bool:
        """Whether it is interactive."""
        return eviction.is_urgent(self.priority)

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
    resting: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    steps: int = 0
    generated: int = 0
    preemptions: int = 0
    recomputed: int = 0
    busy_s: float = 0.0
    submitted: int = 0
    alone_steps: int = 0
    handed_out: int = 0

    def submit(self, key: int, prompt: int, output: int, priority: int, arrival: float) -> None:
        """Hand in a request; it joins the next step that begins at or after its arrival.

        ValueError when it is empty or could never fit.
        """
        check_size(self.limits, prompt, output)
        self.waiting.append(Sequence(key, prompt, output, priority, arrival, self.submitted))
        self.submitted += 1

    def abort(self, key: int) -> bool:
        """Drop a request; False when it is not here."""
        for group in (self.running, self.resting, self.waiting):
            for sequence in group:
                if sequence.key == key:
                    group.remove(sequence)
                    return True
        return False

    def advance(self, until: float) -> list[Finished]:
        """Run every step that begins before `until`; what ended, in order."""
        done: list[Finished] = []
        while self.clock < until:
            if not (self.running or self.resting or self.waiting):
                self.clock = until
                break
            self._step(done)
        return done

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return self.limits.blocks - sum(s.blocks for s in (*self.running, *self.resting))

    def _step(self, done: list[Finished]) -> None:
        waiting = sorted((s for s in self.waiting if s.urgent), key=lambda s: s.rank)
        urgent = self._entering(waiting)
        self._evict(urgent)
        self._run_again(len(waiting))
        self._let_grow()
        alone = self._alone(urgent)
        limit = self._most_running(len(urgent), alone=alone)
        if len(urgent) < len(waiting):
            limit = min(limit, len(self.running) + len(urgent))
        budget, before, scheduled = self.limits.batched_tokens, self.preemptions, dict[int, int]()
        position = 0
        while position < len(self.running) and budget > 0:
            sequence = self.running[position]
            if alone and not sequence.urgent:
                position += 1
                continue
            tokens = min(sequence.known - sequence.computed, budget)
            lost = self._grow(sequence, self._blocks(sequence.computed + tokens))
            budget += sum(scheduled.pop(other.number, 0) for other in lost)
            if sequence in lost:
                break
            scheduled[sequence.number] = tokens
            budget -= tokens
            position = self.running.index(sequence) + 1
        room = self.preemptions == before
        while room and self.waiting and len(self.running) < limit and budget > 0:
            head = min(self.waiting, key=lambda s: s.rank)
            head.blocks = self._blocks(head.known)
            if head.blocks > self.free:
                head.blocks = 0
                break
            self.waiting.remove(head)
            self.running.append(head)
            self._find_cached(head)
            scheduled[head.number] = min(head.known - head.computed, budget)
            budget -= scheduled[head.number]
        self._finish(scheduled, done)

    def _grow(self, sequence: Sequence, need: int) -> list[Sequence]:
        """Give a running request its blocks; those preempted for it, maybe itself."""
        lost = []
        while need - sequence.blocks > self.free:
            ranks = [(s.priority, s.arrival) for s in self.running]
            lost.append(self._preempt(eviction.gives_way_first(ranks)[0]))
            if lost[-1] is sequence:
                return lost
        self.handed_out += max(0, need - sequence.blocks)
        sequence.blocks = max(sequence.blocks, need)
        return lost

    def _entering(self, waiting: list[Sequence]) -> list[Sequence]:
        """Those of the interactive requests that wait that this step takes in."""
        together = self.limits.together
        if together is None:
            return waiting
        return waiting[: eviction.entering((s.known for s in waiting), together)]

    def _evict(self, urgent: list[Sequence]) -> None:
        """Make room for waiting interactive requests before the step."""
        if not urgent:
            return
        inside = [*self.running, *self.resting]
        chosen = eviction.victims(
            [eviction.Waiting(str(s.number), self._blocks(s.known)) for s in urgent],
            [
                eviction.Running(
                    str(s.number),
                    s.priority,
                    s.arrival,
                    s.blocks,
                    0 if s in self.resting else self._growth(s),
                    rests=s in self.resting,
                )
                for s in inside
            ],
            free_slots=self.limits.size - len(self.running),
            free_kv=self.free,
            evictions={str(s.number): s.evictions for s in self.running},
        )
        for victim in [inside[index] for index in chosen.rest]:
            self.running.remove(victim)
            self.resting.append(victim)
            victim.evictions += 1
            self.preemptions += 1
        for victim in [inside[index] for index in chosen.leave]:
            self._leave(self.resting, victim)

    def _run_again(self, urgent: int) -> None:
        """Let the first of those that rest run again, where places are left for the urgent."""
        while self.resting and len(self.running) + urgent < self._most_running(urgent):
            first = self._resting_by_rank()[-1]
            self.resting.remove(first)
            self.running.append(first)

    def _let_grow(self) -> None:
        """Take from those that rest the blocks that running requests need in this step."""
        while self.resting and sum(map(self._growth, self.running)) > self.free:
            self._leave(self.resting, self._resting_by_rank()[0])

    def _resting_by_rank(self) -> list[Sequence]:
        """Those that rest, in the order in which they give way."""
        order = eviction.gives_way_first([(s.priority, s.arrival) for s in self.resting])
        return [self.resting[index] for index in order]

    def _alone(self, urgent: list[Sequence]) -> bool:
        """Whether interactive requests have this step without batch work; MOST_ALONE in a row."""
        stay = [s for s in self.running if s.urgent]
        alone = (
            bool(urgent)
            and self.limits.alone
            and self.alone_steps < eviction.MOST_ALONE
            and len(self.running) < self.limits.size
            and sum(map(self._growth, stay)) + self._blocks(urgent[0].known) <= self.free
        )
        self.alone_steps = self.alone_steps + 1 if alone else 0
        return alone

    def _most_running(self, urgent: int, *, alone: bool = False) -> int:
        """How many may run after this step's admissions."""
        inside = sum(s.urgent for s in self.running)
        held = len(self.running) - inside if alone else 0
        slots = 0 if alone else self.limits.slots
        limit = eviction.admission_limit(self.limits.size - held, slots, inside + urgent)
        return max(limit + held, len(self.running))

    def _growth(self, sequence: Sequence) -> int:
        tokens = min(sequence.known - sequence.computed, self.limits.batched_tokens)
        return max(0, self._blocks(sequence.computed + tokens) - sequence.blocks)

    def _preempt(self, position: int) -> Sequence:
        sequence = self.running[position]
        self.preemptions += 1
        self._leave(self.running, sequence)
        return sequence

    def _leave(self, group: list[Sequence], sequence: Sequence) -> None:
        """Move a request of this group to the waiting, its blocks to the prefix cache."""
        sequence.cached, sequence.safe_until = sequence.computed, self.handed_out + self.free
        group.remove(sequence)
        sequence.computed = sequence.blocks = 0
        self.waiting.append(sequence)

    def _find_cached(self, sequence: Sequence) -> None:
        """Take what the prefix cache still has of an admitted request; its blocks are its own."""
        if sequence.cached and self.limits.prefix_caching:
            reused = max(0, self.handed_out - sequence.safe_until)
            whole = sequence.cached // self.limits.block_tokens
            left = min(whole, max(0, self._blocks(sequence.cached) - reused))
            sequence.computed = left * self.limits.block_tokens
        self.recomputed += sequence.cached - sequence.computed
        sequence.cached = 0
        self.handed_out += sequence.blocks

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
