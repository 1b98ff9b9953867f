import json

from whalejax.bench import exchange


def test_prints_a_row_of_every_method_and_wire(capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    exchange.main(["--rounds", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ways = [(row["op"], row["implementation"], row["wire"]) for row in rows]
    assert len(set(ways)) == len(ways) == 2 * (1 + len(exchange.METHODS)) + len(exchange.METHODS)
    assert all(row["us"] > 0 and row["gbs_per_gpu"] >= 0 and row["ranks"] == 8 for row in rows)
    table = capsys.readouterr().out.splitlines()[-len(rows) :]
    assert [line.split()[0] for line in table[:2]] == ["least", "dispatch"]
