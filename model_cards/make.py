"""Writes the model cards in this folder from what runs and exports left in data/. No figure and no sentence of them is typed.

    python model_cards/make.py            # writes model_cards/*/README.md and the pictures
    python model_cards/make.py --check    # exit code 1 where one is not what the files say

data/NAME/ holds the config.json of the packed model and either the results.json of a run (`hf-bitnet train`, a recipe) or the
export.json of an export. The generator itself is `hf_bitnet.hub.model_card`: it goes with the package, so that cards are
written where there is no checkout; these are what it makes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_bitnet import BitNetQuantizationConfig
from hf_bitnet.export import EXPORT_FORMATS, ExportReport, Source
from hf_bitnet.hub import CARD
from hf_bitnet.publish.exporting import export_card
from hf_bitnet.surgery import attach, prepare_model
from hf_bitnet.training.curve import CURVE, training_curve
from hf_bitnet.training.run_results import METRICS, run_card

HERE = Path(__file__).resolve().parent


def cards(folder: Path = HERE) -> dict[str, str]:
    """Path below the folder -> content of every generated file."""
    made: dict[str, str] = {}
    for data in sorted((folder / "data").iterdir()):
        results, export = data / "results.json", data / "export.json"
        if results.exists():
            values = json.loads(results.read_text(encoding="utf-8"))
            curve = training_curve(values["history"])
            if curve is not None:
                made[f"{data.name}/{CURVE}"] = curve
            made[f"{data.name}/{CARD}"] = _of_run(data, values, curve is not None)
        else:
            made[f"{data.name}/{CARD}"] = _of_export(data, json.loads(export.read_text(encoding="utf-8")))
    return made


def _of_run(data: Path, results: dict[str, Any], drawn: bool) -> str:
    metric, base = next(name for name in METRICS if name in results), results["base_model"]
    # a name without an owner is that of a folder on the machine that trained, and no Hub id
    base = base if base is None or "/" in base else f"./{base}"
    return str(run_card(_model(data), results, metric, data.name, base, CURVE if drawn else None))


def _of_export(data: Path, values: dict[str, Any]) -> str:
    report = ExportReport.from_dict(values)
    chosen = EXPORT_FORMATS.get(report.format)(**report.options)
    with tempfile.TemporaryDirectory() as folder:
        for name in report.files:  # some formats name their files in the card
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return str(export_card(chosen, Source(_model(data), None, data.name), Path(folder), report, None, None))


def _model(data: Path) -> Any:
    """The packed model that config.json describes, without tensors."""
    config = transformers.AutoConfig.from_pretrained(data)
    settings = BitNetQuantizationConfig.from_dict(config.quantization_config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    prepare_model(model, settings, saved=True)
    attach(model, settings)
    return model


def main(argv: list[str] | None = None, folder: Path = HERE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, different = parser.parse_args(argv).check, []
    for name, text in cards(folder).items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        different.append(name)
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if check and different:
        print(f"not what data/ says: {', '.join(different)}; run: python model_cards/make.py", file=sys.stderr)
    return 1 if check and different else 0


if __name__ == "__main__":
    sys.exit(main())
