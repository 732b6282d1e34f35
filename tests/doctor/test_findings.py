from nemo_apo.doctor.findings import failure, has_failure, ok, table, warning


def test_nodes_that_say_the_same_share_a_line_and_the_worst_is_last() -> None:
    findings = [
        failure("n2", "gpus", "7 of 8", "ask for them"),
        ok("n1", "clock", "fine"),
        warning("n1", "disk", "9 GiB free", "free some"),
        ok("n2", "clock", "fine"),
    ]
    assert table(findings).splitlines() == [
        "ok       clock  n1,n2  fine",
        "warning  disk   n1     9 GiB free",
        "                       -> free some",
        "FAILURE  gpus   n2     7 of 8",
        "                       -> ask for them",
    ]
    assert has_failure(findings)
    assert not has_failure(findings[1:])


def test_many_nodes_are_counted() -> None:
    told = table([ok(f"n{number}", "clock", "fine") for number in range(64)])
    assert told == "ok  clock  n0,n1,n2,n3 and 60 more  fine"
