"""`demo` finds what it plants, where it was planted, and nothing where nothing was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import aprjax
from aprjax.assets import embedded_model
from aprjax.bisect.layers.command import run_layers
from aprjax.cli import main
from aprjax.demo import PLANS, PROBES, DemoFault, missed, prepare
from aprjax.qwen2.model import bucket
from aprjax.text import Tokenizer

FAULTS = [fault for fault in DemoFault if fault is not DemoFault.NONE]
# The tensor or key that the cause must name.
ACCUSED = {
    DemoFault.GATE_UP_SWAPPED: "model.layers.2.mlp.gate_proj.weight",
    DemoFault.CHATML_ROW: "model.embed_tokens.weight",
    DemoFault.ROPE_THETA: "rope_theta",
}


def test_both_probes_share_their_compiled_programs() -> None:
    tokenizer = Tokenizer.from_checkpoint(aprjax.open(embedded_model()))
    lengths = [len(tokenizer.encode(probe.prompt(), parse_special=True)) for probe in PROBES]
    assert lengths == [17, 27]
    assert len({bucket(length) for length in lengths}) == 1


@pytest.mark.parametrize("fault", DemoFault)
def test_each_fault_is_found_where_it_was_planted(fault: DemoFault, tmp_path: Path) -> None:
    model, ref = prepare(fault, tmp_path)
    code = run_layers(model=str(model), ref=str(ref), json_out=str(tmp_path / "layers.json"), probes=PROBES)
    document = json.loads((tmp_path / "layers.json").read_text(encoding="utf-8"))
    assert missed(fault, document) == ()
    assert code == (0 if fault is DemoFault.NONE else 1)
    # What would be said of another fault is not what was planted.
    for other in DemoFault:
        assert (missed(other, document) == ()) == (other is fault)
    if fault in ACCUSED:
        assert ACCUSED[fault] in document["first_divergence"]["cause"]
        assert PLANS[fault].site == (document["first_divergence"]["layer"], document["first_divergence"]["stage"])


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "demo")]) == 4
    assert "choose another --out" in capsys.readouterr().err
