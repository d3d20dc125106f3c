"""Tables of results from CSV files: what a cell says, what adds up, and what is refused."""

import doctest
import textwrap

import pytest
from typer.testing import CliRunner

from abdlab.cli import app
from abdlab.studies import book

HEAD = "study,preset,trigger,method,setting,seed,acc,acc_std,asr,asr_std,note\n"


@pytest.fixture
def results(tmp_path):
    """Rows of a file, or of several, as one table."""

    def read(*files, head=HEAD):
        for number, rows in enumerate(files):
            text = head + textwrap.dedent(rows).lstrip("\n")
            (tmp_path / f"{number}.csv").write_text(text)
        return book.read_results(tmp_path)

    return read


SEEDS = """
    s,p,sq,zskt,,1,90.0,,10.0,,
    s,p,sq,zskt,,2,94.0,,40.0,,
    s,p,sq,clean,,1 2,99.0,0.5,1.0,,
    """


class TestCells:
    def test_seeds_are_their_mean_and_sample_standard_deviation(self, results):
        # by hand: (90 + 94) / 2 and 2 x sqrt(2); (10 + 40) / 2 and 15 x sqrt(2)
        spec = {"rows": {"method": "name"}, "cells": {"ACC": "{acc}", "ASR": "{asr}", "n": "{n}"}}
        assert book.table(results(SEEDS), spec).splitlines() == [
            "| method | ACC | ASR | n |",
            "| --- | --- | --- | --- |",
            "| ZSKT | 92.0 ± 2.8 | 25.0 ± 21.2 | 2 |",
            "| clean KD | 99.0 ± 0.5 | 1.0 | 2 |",
        ]

    def test_each_seed_in_the_order_of_the_file(self, results):
        spec = {"where": {"method": "zskt"}, "rows": ["study"], "cells": {"each": "{each}"}}
        assert book.table(results(SEEDS), spec).endswith("| s | 90.0/10.0, 94.0/40.0 |")

    def test_a_pivot_has_a_column_per_value_and_leaves_out_what_was_not_run(self, results):
        found = results("""
            s,,sq,teacher,,0,99.6,,100,,
            s,,sq,cmi,,0,98.0,,97.0,,
            s,,sq,cmi+sv+tu,,0,96.0,,,,
            s,,grid,bounded/cmi,,0,90.0,,0,,
            """)
        spec = {"rows": ["trigger", "defense"], "pivot": "source", "cells": "{acc}/{asr}"}
        assert book.table(found, spec).splitlines()[2:] == [
            "| sq | none | 99.6/100.0 | 98.0/97.0 |",
            "| sq | sv+tu |  | 96.0/- |",
            "| grid | bounded/ |  | 90.0/0.0 |",
        ]

    def test_later_measures_need_no_new_code(self, results):
        head = "study,method,seed,robust,excess,excess_std,purifiers_seconds\n"
        found = results("s,bounded+unlearn/cmi,0 1,88.5,-0.4,0.2,12\n", head=head)
        cells = {"robust": "{robust}", "excess ASR": "{excess}", "seconds": "{purifiers_seconds}"}
        made = book.table(found, {"rows": {"purifier": "purifier"}, "cells": cells})
        assert made.splitlines()[-1] == "| bounded+unlearn | 88.5 | -0.4 ± 0.2 | 12 |"

    def test_other_settings_are_never_averaged(self, results):
        found = results("""
            s,,sq,zskt,short,0,90.0,,10.0,,
            s,,sq,zskt,long,1,94.0,,40.0,,
            """)
        with pytest.raises(ValueError, match=r"differ in setting fall into one cell \(0.csv, line"):
            book.table(found, {"rows": ["method"], "cells": {"ACC": "{acc}"}})

    def test_a_mean_is_no_seed(self, results):
        found = results("""
            s,,sq,zskt,,0,90.0,,10.0,,
            s,,sq,zskt,,1 2,94.0,,40.0,,
            """)
        with pytest.raises(ValueError, match="one of them a mean"):
            book.table(found, {"rows": ["method"], "cells": {"ACC": "{acc}"}})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"row": ["method"]}, "part of a table"),
            ({"rows": ["methd"]}, "did you mean 'method'"),
            ({"rows": []}, "rows lists the columns"),
            ({"cells": "{acc}"}, "cells is a text with pivot"),
            ({"cells": {"ACC": "{ac}"}}, "column of the results"),
            ({"where": {"study": "t"}}, "no row has study t"),
        ],
    )
    def test_a_mistake_in_a_table_is_named(self, results, change, message):
        spec = {"rows": ["method"], "cells": {"ACC": "{acc}"}, **change}
        with pytest.raises(ValueError, match=message):
            book.table(results(SEEDS), spec)


class TestFiles:
    def test_sittings_add_up(self, results):
        found = results("s,,sq,zskt,,1,90.0,,10.0,,\n", "s,,sq,zskt,,2,94.0,,40.0,,\n")
        made = book.table(found, {"rows": ["method"], "cells": {"ACC": "{acc}"}})
        assert made.endswith("| zskt | 92.0 ± 2.8 |")

    def test_a_file_without_a_column_leaves_it_empty(self, tmp_path, results):
        (tmp_path / "a.csv").write_text("study,method,length\ns,cmi,10 rounds\n")
        found = results(SEEDS)
        assert list(found["length"]) == ["", "", "", "10 rounds"]
        assert list(found["n"]) == [1, 1, 2, 1]

    def test_one_run_twice_is_an_error_that_names_both(self, results):
        row = "s,,sq,zskt,,1,90.0,,10.0,,\n"
        with pytest.raises(ValueError, match=r"1.csv, line 2 is the same figure as 0.csv, line 2"):
            results(row, row)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("s,,sq,zskt,,1,90 %,,,,\n", "line 2: acc is a number, in percent, not '90 %'"),
            ("s,,sq,zskt++sv,,1,90,,,,\n", "line 2: a method is"),
        ],
    )
    def test_a_mistake_in_a_row_is_named(self, results, row, message):
        with pytest.raises(ValueError, match=message):
            results(row)

    def test_n_is_the_number_of_seeds(self, results):
        with pytest.raises(ValueError, match="n is 3, but seed names 2"):
            results("s,zskt,1 2,3\n", head="study,method,seed,n\n")

    def test_a_file_says_its_study_and_method_and_not_what_follows(self, results):
        with pytest.raises(ValueError, match=r"0.csv has no column study"):
            results("zskt\n", head="method\n")
        with pytest.raises(ValueError, match=r"column source: that follows"):
            results("s,zskt,zskt\n", head="study,method,source\n")

    def test_no_files_are_no_results(self, tmp_path):
        with pytest.raises(ValueError, match="there is no CSV file"):
            book.read_results(tmp_path)


class TestPage:
    TEMPLATE = "# Results\n\n```table\nrows: [method]\ncells: {ACC: '{acc}'}\n```\n\nThat is all.\n"

    def test_blocks_become_tables_and_prose_stays(self, results):
        made = book.page(self.TEMPLATE, results("s,,,zskt,,1,90.0,,,,\n"))
        assert made.startswith("<!-- Written by `abdlab book`")
        assert made.endswith(
            "# Results\n\n| method | ACC |\n| --- | --- |\n| zskt | 90.0 |\n\nThat is all.\n"
        )

    @pytest.mark.parametrize("broken", ["rows: [methd]", "rows: [", "nothing"])
    def test_a_mistake_names_its_line(self, results, broken):
        found = results(SEEDS)
        with pytest.raises(ValueError, match="the table in line 3: "):
            book.page(self.TEMPLATE.replace("rows: [method]", broken), found)

    def test_write_then_check_then_change(self, tmp_path):
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / "a.csv").write_text("study,method,acc\ns,zskt,90\n")
        (tmp_path / "book.md").write_text(self.TEMPLATE)
        with pytest.raises(ValueError, match="run make book"):
            book.write_book(tmp_path, check=True)
        assert book.write_book(tmp_path) == tmp_path / "README.md"
        book.write_book(tmp_path, check=True)
        (tmp_path / "results" / "a.csv").write_text("study,method,acc\ns,zskt,91\n")
        with pytest.raises(ValueError, match="is not what abdlab book would write"):
            book.write_book(tmp_path, check=True)

    def test_a_folder_without_a_book_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"there is no .*book.md"):
            book.write_book(tmp_path)


def test_the_docstrings_examples_run():
    assert doctest.testmod(book) == (0, 2)


def test_the_command_writes_checks_and_says_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.csv").write_text("study,method,acc\ns,zskt,90\n")
    (tmp_path / "book.md").write_text(TestPage.TEMPLATE)
    run = CliRunner()
    missing = run.invoke(app, ["book", str(tmp_path), "--check"])
    assert missing.exit_code == 2
    assert missing.stderr.strip().endswith("is not what abdlab book would write: run make book")
    assert run.invoke(app, ["book", str(tmp_path)]).exit_code == 0
    assert run.invoke(app, ["book", str(tmp_path), "--check"]).exit_code == 0
