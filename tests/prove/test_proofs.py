"""Does every proof hold at the size of seconds?"""

from __future__ import annotations

from tests.prove.proofs import PROOFS


def test_every_proof_holds_at_test_size() -> None:
    """One test for all, as an empty list of parameters would read as a skipped test."""
    for proof in PROOFS:
        for seed in proof.seeds("test"):
            assert proof.run(seed, "test"), f"{proof.name} gave no figures for seed {seed}"
