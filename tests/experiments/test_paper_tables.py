"""The command line of the paper's tables."""

from experiments.paper_tables import main


def test_tables_are_written_and_printed(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0  # an empty folder: everything is "not run"
    printed = capsys.readouterr().out
    for number in range(2, 7):
        path = tmp_path / "tables" / f"table{number}.md"
        assert path.read_text() in printed
        assert f"wrote {path} and {path.with_suffix('.tex')}" in printed
        assert "\\begin{tabular}" in path.with_suffix(".tex").read_text()
    assert main([str(tmp_path), "--output", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "table3.md").is_file()


def test_no_results_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_damaged_file_is_named(tmp_path, capsys):
    (tmp_path / "table6.json").write_text('{"ablation": ')
    assert main([str(tmp_path)]) == 2
    assert "table6.json: not valid JSON" in capsys.readouterr().err
