"""Which blocks each decode step of one sequence could attend; another pass over its tokens checks it."""

from dataclasses import dataclass, field

from forepage.rpc import worker_pb2 as pb


@dataclass
class ResidentHistory:
    """Owner of the sets, from the step on from which each held; kept only for who asks."""

    steps: list[int] = field(default_factory=list)
    """Decode steps, from 1, at which the set changed."""
    sets: list[frozenset[int]] = field(default_factory=list)

    seen_paged: set[int] = field(default_factory=set)
    """Every block that was there at a step that could not attend them all."""

    def add_step(self, step: int, blocks: frozenset[int], *, is_paged: bool) -> None:
        """What the step could attend."""
        if not self.sets or self.sets[-1] != blocks:
            self.steps.append(step)
            self.sets.append(blocks)
        if is_paged:
            self.seen_paged |= blocks

    def write(self, report: pb.ResidencyReport) -> None:
        """Set after set."""
        report.resident_block_idx.extend(sorted(self.seen_paged))
        report.resident_set_step.extend(self.steps)
        report.resident_set_size.extend(len(blocks) for blocks in self.sets)
        for blocks in self.sets:
            report.resident_set_block_idx.extend(sorted(blocks))
