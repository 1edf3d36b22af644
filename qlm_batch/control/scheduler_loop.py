"""The scheduler: one pass plans the queue on a snapshot and hands out what is due next.

Everything that lasts is in the store. What is kept between passes only spares work: a new leader
starts without it, but for what was promised of batches still under way, which it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog

from qlm_batch.control.collecting import collector_held
from qlm_batch.control.leadership import Leadership
from qlm_batch.control.recording import RecordedPolicy, Recorder, recorded
from qlm_batch.control.story import Story
from qlm_batch.control.unserved import Unserved, UnservedConfig
from qlm_batch.domain.errors import NotLeader, Unavailable
from qlm_batch.domain.messages import Assigned
from qlm_batch.domain.ports import Dispatcher
from qlm_batch.domain.snapshot import Plan, RequestGroup, Snapshot
from qlm_batch.domain.store import Planning
from qlm_batch.scheduling.dispatching import DispatchConfig, recalls, rescues, top_up
from qlm_batch.scheduling.estimator import Estimator, EstimatorConfig
from qlm_batch.scheduling.forecasts import Forecasts
from qlm_batch.scheduling.grouping import form_groups
from qlm_batch.scheduling.loops import COMPILED, loops
from qlm_batch.scheduling.outlook import Outlook
from qlm_batch.scheduling.pacing import Pace
from qlm_batch.scheduling.policies import Policy
from qlm_batch.scheduling.profile import Knowledge
from qlm_batch.scheduling.promises import ends_of, with_estimates
from qlm_batch.scheduling.replanning import Incumbent, ReplanConfig, carried_on, fleet_signature

log = structlog.get_logger(__name__)

_HASTE = 4.0
"""How many times as often a pass is made while an instance runs dry between passes."""

_WRITTEN_SLOWER = 100
"""How many times fewer moves fit the same time while loops are not compiled."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Leadership lasts `term_s`; a pass is made every `tick_s`. Estimates `refresh_s` old are saved
    anew where a pass has news to look at, twice as old in any case.

    A plan may take about `plan_ms`, which at `moves_per_ms` bounds its search: a fixed rate, so
    that equal snapshots give equal plans on any machine. `observations` is the most taken a pass.
    """

    holder: str
    term_s: float = 10.0
    tick_s: float = 0.5
    refresh_s: float = 2.0
    plan_ms: float = 20.0
    moves_per_ms: float = 100.0
    seed: int = 0
    observations: int = 1000
    replan: ReplanConfig = field(default_factory=ReplanConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    unserved: UnservedConfig = field(default_factory=UnservedConfig)

    @property
    def moves(self) -> int:
        """The search budget of one plan."""
        return int(self.plan_ms * self.moves_per_ms)


@dataclass(frozen=True, slots=True)
class Tick:
    """What a pass did; true when there is more to do at once.

    `epoch` is None for a standby. `replanned` says why a new plan was made, empty when the old one
    stood. `assigned` counts slices per instance, `failed` slices of models nobody serves.
    """

    epoch: int | None = None
    replanned: str = ""
    groups: int = 0
    assigned: Mapping[str, int] = field(default_factory=dict)
    recalled: tuple[str, ...] = ()
    failed: int = 0
    more: bool = False

    def __bool__(self) -> bool:
        return self.more


class SchedulerLoop:
    """A service that plans and dispatches while it leads, and waits while another does."""

    def __init__(
        self,
        store: Planning,
        dispatcher: Dispatcher,
        policy: Policy,
        config: SchedulerConfig,
        leadership: Leadership | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """What is seen and planned is written to `recorder`, which is closed with the loop."""
        self._store = store if recorder is None else recorded(store, recorder)
        self._dispatcher = dispatcher
        self._policy = policy if recorder is None else RecordedPolicy(policy, recorder)
        self._config = config
        self._leadership = leadership or Leadership()
        self._recorder = recorder
        self._forget()

    @property
    def name(self) -> str:
        """As in the log."""
        return "scheduler"

    @property
    def idle_s(self) -> float:
        """Time between passes: shorter while an instance may work its share off between two."""
        return self._config.tick_s / (_HASTE if self._pace.hasty else 1.0)

    def run_once(self) -> Tick:
        """One pass: see `tick`."""
        return self.tick()

    def tick(self) -> Tick:
        """Lead if possible; then learn, plan where needed, save and dispatch."""
        epoch = self._store.lead(self._config.holder, self._config.term_s)
        if epoch is None:
            self._step_down()
            return Tick()
        if self._leadership.epoch != epoch:
            self._forget()
            self._forecasts = Forecasts.resumed(self._store.forecasts())
            self._leadership.lead(epoch)
            log.info("leading", epoch=epoch, holder=self._config.holder)
        try:
            return self._lead(epoch)
        except NotLeader:
            self._step_down()
            return Tick()

    def close(self) -> None:
        """Give leadership up, so that a standby takes over at once, and end the log."""
        try:
            if self._leadership.epoch is not None:
                self._step_down()
                self._store.resign(self._config.holder)
        finally:
            if self._recorder is not None:
                self._recorder.close()

    def _forget(self) -> None:
        self._incumbent: Incumbent | None = None
        self._saved_at = float("-inf")
        self._story: Story | None = None
        self._unserved = Unserved(self._config.unserved)
        self._forecasts = Forecasts()
        self._known = Knowledge()
        self._outlook: Outlook | None = None
        self._pace = Pace()
        self._rescued: set[str] = set()
        self._pressed: dict[str, float] = {}
        self._stale = "the first plan"

    def _step_down(self) -> None:
        if self._leadership.epoch is not None:
            log.info("not_leading", holder=self._config.holder)
        self._leadership.step_down()
        self._forget()

    def _lead(self, epoch: int) -> Tick:
        snapshot, known, full = self._learn(epoch)
        failed, more = self._fail_unserved(epoch, snapshot)
        if failed:
            # What was closed must not be planned; the next pass sees the queue without it.
            return Tick(epoch, failed=failed, more=True)
        before = self._outlook
        if before is not None and self._goes_on(before, snapshot, known):
            assigned = self._dispatch(epoch, snapshot, before, ())
            return Tick(epoch, "", before.groups, assigned, more=full)
        with collector_held():
            worked_out = None if before is None else before.estimator
            estimator = Estimator(snapshot, self._config.estimator, known, worked_out)
            groups = form_groups(snapshot, estimator.capacities(snapshot))
            plan, why = self._plan(snapshot, groups, estimator)
            if why or snapshot.unpromised or self._refresh_due(snapshot):
                ends = ends_of(plan, snapshot, estimator)
                plan = with_estimates(plan, ends)
                self._forecasts = self._forecasts.planned(ends, snapshot)
        recalled = self._recalled(snapshot, plan, estimator)
        self._save(epoch, plan, snapshot, recalled, changed=bool(why or recalled))
        if recalled:
            self._stale = "work was taken back"
        for instance in recalled:
            self._store.unassign(epoch, instance)
        outlook = Outlook.of(plan, estimator, len(groups), snapshot)
        assigned = self._dispatch(epoch, snapshot, outlook, recalled)
        return Tick(
            epoch, why, len(groups), assigned, recalled, more=full or bool(recalled) or more
        )

    def _goes_on(self, outlook: Outlook, snapshot: Snapshot, known: Knowledge) -> bool:
        """Whether the last look at the queue will do: it is young, and there is no news since."""
        if self._stale or self._incumbent is None:
            return False
        old = self._config.replan.is_old(self._incumbent, snapshot)
        overdue = snapshot.now - self._saved_at >= 2.0 * self._config.refresh_s
        return not (old or overdue) and outlook.stands(snapshot, known)

    def _learn(self, epoch: int) -> tuple[Snapshot, Knowledge, bool]:
        """The snapshot with what was newly observed; whether more observations wait."""
        seen = self._store.take_observations(epoch, self._config.observations)
        snapshot = self._store.snapshot()
        known = Knowledge.of(snapshot.profiles, self._known)
        self._forecasts = self._forecasts.seen(snapshot)
        outcomes = self._forecasts.outcomes
        if seen or outcomes:
            overdue = self._forecasts.overdue(snapshot.now)
            learned = known.observed(seen).ended(outcomes, overdue).written()
            self._forecasts = self._forecasts.learned()
            changed = [
                profile for key, profile in learned.read.items() if known.read.get(key) != profile
            ]
            self._store.save_profiles(epoch, changed)
            known, snapshot = learned, replace(snapshot, profiles=tuple(learned.read.values()))
        self._known = known
        return snapshot, known, len(seen) >= self._config.observations

    def _fail_unserved(self, epoch: int, snapshot: Snapshot) -> tuple[int, bool]:
        """Slices failed because nobody serves their model, and whether some are left."""
        failed, more = 0, False
        for model, message in self._unserved.due(snapshot):
            limit = self._config.unserved.slices_per_pass
            closed = self._store.fail_unservable(epoch, model, message, limit=limit)
            failed += closed
            more = more or closed >= limit
            log.warning("model_not_served", model=model, slices=closed)
        return failed, more

    def _plan(
        self, snapshot: Snapshot, groups: Sequence[RequestGroup], estimator: Estimator
    ) -> tuple[Plan, str]:
        """The plan in force and why it is a new one, or an empty word."""
        why = self._stale
        if not why and self._incumbent is not None:
            kept, why = carried_on(
                snapshot, groups, estimator, self._incumbent, self._config.replan
            )
            if kept is not None:
                if why:
                    self._incumbent = replace(self._incumbent, plan=kept)
                return kept, why
        moves = self._config.moves
        if loops() is not COMPILED:
            moves //= _WRITTEN_SLOWER
        plan = self._policy.plan(snapshot, groups, estimator, moves, self._config.seed)
        self._stale = ""
        self._incumbent = Incumbent(plan, snapshot.now, fleet_signature(snapshot))
        if groups:
            log.info(
                "planned",
                why=why,
                policy=self._policy.name,
                groups=len(groups),
                instances=len(snapshot.instances),
                plan_ms=self._config.plan_ms,
                moves=moves,
                shed=sum(placed.shed for queue in plan.queues for placed in queue.groups),
                unplaced=len(plan.unplaced),
            )
        return plan, why

    def _save(
        self,
        epoch: int,
        plan: Plan,
        snapshot: Snapshot,
        recalled: Sequence[str],
        *,
        changed: bool,
    ) -> None:
        if self._story is None:
            self._story = Story.resumed(snapshot)
        new = any(
            batch_id in plan.estimates and plan.estimates[batch_id].p50 is not None
            for batch_id in snapshot.unpromised
        )
        if not (changed or new or self._refresh_due(snapshot)):
            return
        decisions, story = self._story.told(plan, snapshot, recalled)
        self._store.save_plan(epoch, plan, decisions)
        # Only now: had the write failed, the decisions would have to be told again.
        self._story, self._saved_at = story, snapshot.now
        if self._forecasts.fresh:
            self._store.keep_forecasts(epoch, self._forecasts.fresh)
            self._forecasts = self._forecasts.kept()

    def _refresh_due(self, snapshot: Snapshot) -> bool:
        """Whether estimates were saved so long ago that they are saved again."""
        return snapshot.now - self._saved_at >= self._config.refresh_s

    def _recalled(self, snapshot: Snapshot, plan: Plan, estimator: Estimator) -> tuple[str, ...]:
        """Instances whose unclaimed work is to be taken back now."""
        config, now = self._config.dispatch, snapshot.now
        planned = {placed.group.key for queue in plan.queues for placed in queue.groups}
        # Once for each group, and now and then for a queue's head: a plan that lets the group go
        # all the same, or puts it first only while others hold unclaimed work, would recall for
        # ever.
        self._rescued &= planned
        self._pressed = {
            key: at for key, at in self._pressed.items() if now - at < config.recall_pause_s
        }
        saved = {
            name: key
            for name, key in rescues(snapshot, plan, estimator, config).items()
            if key not in self._rescued
        }
        pressed = {
            name: key
            for name, key in recalls(snapshot, plan, config).items()
            if key not in self._pressed
        }
        self._rescued |= set(saved.values())
        self._pressed |= dict.fromkeys(filter(None, pressed.values()), now)
        return tuple(sorted({*pressed, *saved}))

    def _dispatch(
        self,
        epoch: int,
        snapshot: Snapshot,
        outlook: Outlook,
        recalled: Sequence[str],
    ) -> Mapping[str, int]:
        """Assign what is due and hint at it; slices per instance."""
        self._pace = self._pace.seen(snapshot)
        due = top_up(
            snapshot,
            outlook.plan,
            outlook.estimator,
            self._config.dispatch,
            self._pace.factors,
            outlook.taken,
        )
        assignments = [made for made in due if made.instance not in recalled]
        self._pace = self._pace.handed(snapshot, assignments)
        self._outlook = outlook.handed(assignments)
        if not assignments:
            return {}
        assigned = self._store.assign(epoch, assignments)
        boots = {view.name: view.boot_id for view in snapshot.instances}
        for instance, slices in assigned.items():
            if slices:
                try:
                    self._dispatcher.assigned(Assigned(instance, boots[instance]))
                except Unavailable as error:
                    log.warning("hint_lost", instance=instance, error=error.message)
        return assigned
