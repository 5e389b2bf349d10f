"""What is said of faulty tokens."""

from __future__ import annotations

from megatron_drpo.metrics.faulty_tokens import FaultReport, FaultyToken, alarm_of_faults, report_faults
from megatron_drpo.types import Origin


def test_faults_by_prompt_and_server() -> None:
    origin = Origin(where="prompt 3 (line 4), sample 0", servers=(("http://a", 2), ("http://b", 1)))
    faults = [
        FaultyToken(replica=1, sequence_id=id_, position=position, logprob=-1.25, rollout_logprob=-30.0)
        for id_, position in ((7, 1), (7, 2), (8, 0), (9, 5))
    ]
    values = "(log pi -1.25, log mu -30)"
    assert report_faults(faults, {7: origin, 8: None}) == [
        FaultReport("http://a", f"prompt 3 (line 4), sample 0, response token 1 {values}"),
        FaultReport("http://b", f"prompt 3 (line 4), sample 0, response token 2 {values}"),
        FaultReport("an unknown server", f"sequence 8, response token 0 {values}"),
        FaultReport("an unknown server", f"sequence 9, response token 5 {values}"),
    ]


def test_the_alarm_counts_by_server_and_names_a_few() -> None:
    reports = [FaultReport(f"http://{'ab'[i % 2]}", f"place {i}") for i in range(7)]
    text = alarm_of_faults(reports, 20.0)
    assert text.startswith("7 faulty tokens were kept out of the loss (http://a: 4, http://b: 3): ")
    assert "e^20 times" in text
    assert "place 0 of http://a; place 1 of http://b; place 2 of http://a; and 4 more. " in text
    assert "\n" not in text, "an alarm is one line"
    one = alarm_of_faults(reports[:1], 12.5)
    assert one.startswith("1 faulty token was kept out of the loss (http://a: 1): ")
    assert "more." not in one
