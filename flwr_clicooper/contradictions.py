"""Run options that do not go together, each with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr_clicooper.options import Options

CONTRADICTIONS: list[tuple[Callable[[Options], bool], str]] = [
    (
        lambda o: o.release in ("local-dp", "central-dp") and not o.private,
        "option 'epsilon' is missing: release = 'local-dp' and 'central-dp' need a number > 0",
    ),
    (
        lambda o: o.release == "clean" and o.private,
        "option 'epsilon' is set and 'release' is 'clean', which adds no noise; use "
        "release = 'local-dp' or 'central-dp'",
    ),
    (
        lambda o: o.private and not o.head,
        "option 'head' is missing: a guarantee holds only for a head that does not depend on "
        "the private data. Declare head = 'public' (trained on public data only) or 'random' "
        "(drawn from the run's seed)",
    ),
    (
        lambda o: o.private and o.head == "private",
        "option 'head' is 'private': activations of a head that was trained on the private "
        "data carry other records than their own, which noise per record does not hide. Use "
        "a head from public data (head = 'public') or one drawn at random (head = 'random')",
    ),
    (
        lambda o: o.release == "central-dp" and o.privacy_unit != "record",
        "option 'privacy-unit' is 'element' and 'release' is 'central-dp': synthetic rows "
        "are private per record; use privacy-unit = 'record'",
    ),
    (
        lambda o: o.class_scores > 0 and (o.release, o.privacy_unit) != ("local-dp", "record"),
        "option 'class-scores' is set; it is for release = 'local-dp' with privacy-unit = "
        "'record'",
    ),
    (
        lambda o: o.release == "central-dp" and o.label_side == "owner",
        "option 'label-side' is 'owner' and 'release' is 'central-dp': the labels of "
        "synthetic rows are released with them; use label-side = 'trainer'",
    ),
    (
        lambda o: o.release == "central-dp" and o.label_epsilon > 0,
        "option 'label-epsilon' is set and 'release' is 'central-dp', whose epsilon covers "
        "the labels already; use label-epsilon = 0",
    ),
    (
        lambda o: o.label_expansion > 0 and o.label_side == "owner",
        "option 'label-expansion' is set and 'label-side' is 'owner': labels do not leave "
        "the owner; use label-expansion = 0",
    ),
    (
        lambda o: o.schedule == "local" and o.release == "interactive",
        "option 'schedule' is 'local' and 'release' is 'interactive': without gradients "
        "between the parties the head cannot train; use release = 'clean'",
    ),
    (
        lambda o: o.schedule == "local" and o.label_side == "owner",
        "option 'schedule' is 'local' and 'label-side' is 'owner': each trainer needs the "
        "labels to train by itself; use label-side = 'trainer'",
    ),
    (
        lambda o: o.watermark and not o.attest,
        "option 'attest' is false and 'watermark' is true: the key of a watermark is "
        "committed to in attestations; use attest = true, or watermark = false",
    ),
    (
        lambda o: o.audit_every > 0 and not o.attest,
        "option 'audit-every' is set and 'attest' is false: an audit opens what attestations "
        "commit to; use attest = true",
    ),
    (
        lambda o: o.audit_every > 0 and o.schedule == "local",
        "option 'audit-every' is set and 'schedule' is 'local': an audit repeats steps of "
        "lockstep training; use schedule = 'lockstep', or audit-every = 0",
    ),
    (
        lambda o: o.schedule == "local" and o.microbatches != 1,
        "option 'microbatches' is above 1 and 'schedule' is 'local': there is no pipeline "
        "to fill; use microbatches = 1",
    ),
]
