"""`hf-freeze audit TARGET`: what is wrong with what trains, in a model, a recipe or a script."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class SymptomName(StrEnum):
    """The symptoms, as the command line takes them."""

    loss = "loss"
    memory = "memory"
    accuracy = "accuracy"


def audit(
    target: Annotated[
        str,
        typer.Argument(
            help="A model folder, a hub name, 'embedded', a recipe's name or YAML file, or a Python script."
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments, behind --.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Texts to audit on, as for 'train'; the recipe's or the embedded ones unless told."),
    ] = None,
    symptom: Annotated[
        SymptomName | None,
        typer.Option(help="What is wrong: the loss does not fall, memory did not drop, or accuracy fell."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; all else goes to stderr.")] = False,
) -> None:
    """Audits what trains: each finding with its code, names, cause and mend. Exit code 1 where there is an error.

    A model takes one backward on real texts, a recipe one in each of its stages. A script is run as it is, to its end,
    with an AuditCallback in each Trainer that it makes.

    Example: hf-freeze audit gradual

    Example: hf-freeze audit embedded --symptom memory

    Example: hf-freeze audit train.py -- --epochs 1
    """
    from rich.console import Console

    from ..targets import audit_target
    from .tables import only_json, print_json, quiet

    with only_json(as_json):
        quiet()
        found = audit_target(target, arguments or (), dataset, symptom.value if symptom else None)
        if not as_json:
            for each in found:
                Console().print(f"\n{each.subject}", style="bold", highlight=False, markup=False)
                Console().print(each.report)
    if as_json:
        print_json({"target": target, "reports": [{"subject": own.subject, **own.report.to_dict()} for own in found]})
    if not all(each.report.ok for each in found):
        raise typer.Exit(1)
