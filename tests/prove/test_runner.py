"""Does the runner run what is due, keep what held, and say what did not?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from tests.prove.__main__ import main
from tests.prove.journal import Journal, Result, digest
from tests.prove.proof import Figures, Proof, Size
from tests.prove.report import BEGIN, EMPTY_FIGURES, EMPTY_PAGE, END, figures_page, page, spread


class Toy:
    """A proof that notes how it was called, holds unless its seed is among `wrong`, and can be interrupted."""

    def __init__(self, name: str, full_seeds: int = 3) -> None:
        self.calls: list[tuple[int, Size]] = []
        self.wrong: set[int] = set()
        self.interrupted_at: int | None = None
        self.proof = Proof(name=name, sentence=f"{name} never loses a bill", run=self.run, full_seeds=full_seeds)

    def run(self, seed: int, size: Size) -> Figures:
        if seed == self.interrupted_at:
            raise KeyboardInterrupt
        self.calls.append((seed, size))
        assert seed not in self.wrong, f"seed {seed} lost one"
        return {"kills": 100 * seed, "lost": 0, "engine": "toy"}

    def seeds(self) -> list[int]:
        calls, self.calls = self.calls, []
        return [seed for seed, _ in calls]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "a.py").write_text("A = 1\n")
    return tmp_path


def table(root: Path) -> str:
    return (root / "docs" / "proofs.md").read_text().partition(BEGIN)[2].partition(END)[0].strip()


def test_each_seed_is_run_once_and_its_row_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Toy("kills")
    assert main([], [toy.proof], root) == 0
    assert toy.calls == [(1, "full"), (2, "full"), (3, "full")]
    assert "seed 2: held" in capsys.readouterr().out
    cells = [cell.strip() for cell in table(root).splitlines()[2].strip("|").split("|")]
    assert cells == [
        "`kills`",
        "kills never loses a bill",
        "3",
        "kills 100 to 300; lost 0; engine toy",
        f"`{digest(root)}`",
        "`python -m tests.prove kills`",
    ]
    written = (root / "docs" / "proofs.md").read_text()
    toy.seeds()
    assert main([], [toy.proof], root) == 0
    assert toy.seeds() == []
    assert (root / "docs" / "proofs.md").read_text() == written
    assert "3 of 3 seeds held before" in capsys.readouterr().out


def test_fresh_runs_everything_again(root: Path) -> None:
    toy = Toy("kills")
    main([], [toy.proof], root)
    main(["--fresh"], [toy.proof], root)
    assert toy.seeds() == [1, 2, 3, 1, 2, 3]


def test_an_interrupted_run_goes_on_where_it_was(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Toy("kills")
    toy.interrupted_at = 2
    assert main([], [toy.proof], root) == 130
    assert "goes on from here" in capsys.readouterr().out
    assert table(root) == "No proof has been run to its end yet."
    toy.interrupted_at = None
    assert main([], [toy.proof], root) == 0
    assert toy.seeds() == [1, 2, 3]
    assert table(root).count("`kills`") == 1


def test_changed_source_has_to_be_proved_again(root: Path) -> None:
    toy = Toy("kills")
    main([], [toy.proof], root)
    first = digest(root)
    (root / "gateway" / "a.py").write_text("A = 2\n")
    assert digest(root) != first
    toy.wrong = {3}
    assert main([], [toy.proof], root) == 1
    assert toy.seeds() == [1, 2, 3, 1, 2, 3]
    # The row is of the last source for which every seed held, and says which that was.
    assert f"`{first}`" in table(root)


def test_the_digest_sees_names_and_bytes_but_no_caches(root: Path) -> None:
    seen = {digest(root)}
    (root / "gateway" / "__pycache__").mkdir()
    (root / "gateway" / "__pycache__" / "a.pyc").write_bytes(b"x")
    assert digest(root) in seen
    (root / "gateway" / "a.py").rename(root / "gateway" / "b.py")
    seen.add(digest(root))
    (root / "locks").mkdir()
    (root / "locks" / "test.txt").write_text("a==1\n")
    seen.add(digest(root))
    assert len(seen) == 3


def test_a_broken_proof_fails_says_its_seed_and_stops_no_other(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = Toy("bad"), Toy("good")
    bad.wrong = {2}
    assert main([], [bad.proof, good.proof], root) == 1
    told = capsys.readouterr().out
    assert "seed 2: BROKEN: seed 2 lost one" in told
    assert "python -m tests.prove bad --seed 2 --size full" in told
    assert "BROKEN: bad, seed 2" in told
    assert bad.seeds() == good.seeds() == [1, 2, 3]
    assert "`good`" in table(root)
    assert "`bad`" not in table(root)
    assert main([], [bad.proof, good.proof], root) == 1
    assert (bad.seeds(), good.seeds()) == ([2], [])


def test_an_error_in_a_proof_is_no_result(root: Path) -> None:
    def run(seed: int, size: Size) -> Figures:
        raise OSError("no server")

    toy = Toy("kills")
    crashing = Proof(name="crashing", sentence="-", run=run, full_seeds=1)
    with pytest.raises(OSError, match="no server"):
        main([], [toy.proof, crashing], root)
    assert "`kills`" in table(root)
    assert "crashing" not in table(root)


def test_one_name_one_seed_and_the_small_size(root: Path) -> None:
    one, other = Toy("one"), Toy("other")
    assert main(["one", "--seed", "7", "--size", "test"], [one.proof, other.proof], root) == 0
    assert one.calls == [(7, "test")]
    assert other.calls == []
    assert table(root) == "No proof has been run to its end yet."
    assert main(["one", "--size", "test"], [one.proof, other.proof], root) == 0
    assert one.calls == [(7, "test"), (1, "test")]


def test_small_sizes_and_foreign_seeds_make_no_row(root: Path) -> None:
    toy = Toy("kills", full_seeds=1)
    main(["--size", "test"], [toy.proof], root)
    main(["--seed", "9"], [toy.proof], root)
    assert table(root) == "No proof has been run to its end yet."
    main([], [toy.proof], root)
    assert "kills 100;" in table(root)


def test_list_runs_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Toy("kills")
    main(["--seed", "1"], [toy.proof], root)
    toy.seeds()
    capsys.readouterr()
    assert main(["--list"], [toy.proof], root) == 0
    assert capsys.readouterr().out == "kills: kills never loses a bill (1 of 3 seeds held)\n"
    assert toy.seeds() == []


def test_an_unknown_name_says_which_there_are(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["kils"], [Toy("kills").proof], root)
    assert exit_.value.code == 2
    assert "no proof is called kils; there are: kills" in capsys.readouterr().err


def test_two_proofs_cannot_share_a_name(root: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        main([], [Toy("kills").proof, Toy("kills").proof], root)


def test_a_line_cut_short_is_no_result_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    journal = Journal(path)
    assert journal.results() == []
    first = Result(proof="a", seed=1, size="full", source="00", took_s=0.5, figures={"n": 1})
    journal.append(first)
    with path.open("ab") as file:
        file.write(b'{"proof":"a","seed":2,"si')
    second = msgspec.structs.replace(first, seed=3)
    journal.append(second)
    assert journal.results() == [first, second]


def test_rows_of_another_machine_stay_and_rows_of_no_proof_go() -> None:
    old = EMPTY_PAGE.replace(END, f"| `kills` | elsewhere |\n| `gone` | x |\n{END}") + "the end\n"
    new = page(old, [Toy("kills").proof], [])
    assert "| `kills` | elsewhere |" in new
    assert "gone" not in new
    assert new.endswith("the end\n")
    assert page(new, [Toy("kills").proof], []) == new
    with pytest.raises(ValueError, match="has no"):
        page("# Proofs\n", [], [])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([7, 7], "7"),
        ([1234567, 1000], "1,000 to 1,234,567"),
        ([0.123456, 2.0], "0.1235 to 2"),
        (["b", "a", "b"], "b, a"),
        ([3, None], "3"),
    ],
)
def test_figures_over_seeds_are_told_for_people(values: list[float | str | None], text: str) -> None:
    assert spread(values) == text


def test_a_bar_in_a_sentence_does_not_break_the_table(root: Path) -> None:
    toy = Toy("kills")
    main([], [dataclasses.replace(toy.proof, sentence="a | b")], root)
    assert r"| a \| b |" in table(root)


def test_many_figures_have_a_page_of_their_own(root: Path) -> None:
    toy, plain = Toy("kills"), Toy("plain")
    proofs = [dataclasses.replace(toy.proof, figures_in="much.md"), plain.proof]
    assert main([], proofs, root) == 0
    rows = table(root).splitlines()[2:]
    assert "| [in much.md](much.md#figures) |" in rows[0]
    assert "kills 100 to 300" in rows[1]
    written = (root / "docs" / "much.md").read_text()
    assert "### `kills`\n\nkills never loses a bill (3 seeds, source `" in written
    assert "| kills | 100 to 300 |\n| lost | 0 |\n| engine | toy |" in written
    assert "plain" not in written
    # A page that is there keeps its text, and the figures of another machine.
    assert figures_page("a\n" + written + "z\n", proofs[:1], []) == "a\n" + written + "z\n"
    assert figures_page(written, [], []) == EMPTY_FIGURES.replace("-->\n<!--", "-->\n\n<!--")
    with pytest.raises(ValueError, match="has no"):
        figures_page("# Figures\n", proofs[:1], [])
