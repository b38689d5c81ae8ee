"""Print facts of sources, scratch and verifications as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.errors import BadInput
from pipeline.printed import escaped, many
from pipeline.watching.consoles import PlainConsole
from pipeline.watching.units import human_bytes

if TYPE_CHECKING:
    from pipeline.sinks.scratch_listing import ScratchCut


def scratch_table(cuts: Sequence[ScratchCut]) -> RenderableType:
    """Make the table of the cuts in a scratch directory, a row each."""
    table = Table()
    for column in ("cut", "stage", "source", "size", "state"):
        table.add_column(column, overflow="fold")
    for cut in cuts:
        state = "whole" if cut.complete else "unfinished"
        table.add_row(cut.directory.name, cut.stage, cut.source, human_bytes(cut.size_bytes), state)
    return table


def source_table(facts: Mapping[str, Any]) -> RenderableType:
    """Make the table of `headrace inspect` from its facts."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("path", facts["path"])
    amounts = f"{many(len(facts['files']), 'file')}, {many(facts['tensors'], 'tensor')}, {human_bytes(facts['bytes'])}"
    table.add_row("source", f"{facts['kind']}, {amounts}")
    table.add_row("family", f"{facts['family'] or 'unknown'} ({facts['architecture'] or 'no architecture'})")
    shares = ", ".join(f"{dtype} {human_bytes(nbytes)}" for dtype, nbytes in facts["bytes_by_dtype"].items())
    table.add_row("weights", f"{facts['parameters']:,} parameters; {shares}; --dtype auto: from {facts['dtype'] or 'none named'}")
    table.add_row("quantization", facts["quantization"] or "none")
    if "model" in facts:
        table.add_row("model", ", ".join(f"{name} {value}" for name, value in facts["model"].items()))
        table.add_row("embeddings", "tied" if facts["tied_embeddings"] else "not tied")
        low, high = facts["pp_sizes"]
        table.add_row("tp_size", ", ".join(map(str, facts["tp_sizes"])) or "none")
        table.add_row("pp_size", f"{low} to {high}")
    for size, pairs in facts.get("moe_sizes", {}).items():
        table.add_row("", f"tp_size {size}: moe_tp_size x moe_ep_size " + ", ".join(f"{tp} x {ep}" for tp, ep in pairs))
    told = dict[str, str]()  # a reason that several options have is said of the first
    for way in facts["conversions"]:
        told.setdefault(way["says"] if way["becomes"] is None else way["options"], _way(way))
    for line in told.values() or ["no: nothing is known of it but the problem below"]:
        table.add_row("converts", line)
    for problem in facts["problems"][: BadInput.shown]:
        table.add_row(Text("problem", style="red"), problem)
    if len(facts["problems"]) > BadInput.shown:
        table.add_row("", f"... and {len(facts['problems']) - BadInput.shown} more")
    return table


def _way(way: Mapping[str, Any]) -> str:
    options = way["options"] or "as it is"
    return f"{options}, to {way['becomes']}: {way['says']}" if way["becomes"] else f"{options}: {way['says']}"


def families_table(rows: Sequence[Mapping[str, Any]], texts: Iterable[str]) -> RenderableType:
    """Make the table of `headrace families`, a row for each family, and beneath it the wrappers whose text is converted."""
    table = Table()
    for column in ("family", "source", "architectures", "class", "targets", "pp", "compared with"):
        table.add_column(column, overflow="fold")
    for row in rows:
        stages = "yes" if row["pipeline_stages"] else "no"
        named, targets, proof = ", ".join(row["architectures"]), ", ".join(row["targets"]), "; ".join(row["proof"])
        table.add_row(row["family"], row["source"], named, row["class"], targets, stages, proof)
    said = "Targets are values of --quantization. The text of these is converted too, as the family that they name:"
    return Group(table, said, ", ".join(texts))


def formats_table(facts: Mapping[str, Sequence[Mapping[str, Any]]]) -> RenderableType:
    """Make the table of `headrace formats`, rows by kind of format."""
    table = Table()
    for column in ("kind", "name", "what it is", "codes kept as", "compared with"):
        table.add_column(column, overflow="fold")
    for kind, rows in facts.items():
        for row in rows:
            kept = Text("\n".join(row.get("keeps", ())) or ("" if "keeps" not in row else "none: 16 bits"))
            table.add_row(kind, row["name"], row["is"], kept, row.get("proof", ""))
    numbers = "Any quantized format also becomes float16, bfloat16, float32, W8A16, W4A16 or FP8_PER_CHANNEL_PER_TOKEN."
    return Group(table, numbers)


def console(stderr: bool = False) -> PlainConsole:
    """Make a console; where its output is no terminal, lines are 120 characters wide."""
    made = PlainConsole(stderr=stderr)
    return made if made.is_terminal else PlainConsole(stderr=stderr, width=120)


def verification_table(summary: Mapping[str, Any]) -> RenderableType:
    """Make the tables of `headrace verify`.

    Parameters
    ----------
    summary
        What `Verification.summary()` returns.

    Returns
    -------
    RenderableType
        For rich's `Console.print`.
    """
    integrity = summary["integrity"]
    parts: list[RenderableType] = [Text(escaped(summary["directory"]), style="bold")]
    sums = many(integrity["checksums"], "checksum") if integrity["checksums"] else "no checksums"
    amounts = f"{many(integrity['tensors'], 'tensor')}, {human_bytes(integrity['bytes'])}, {sums}"
    parts.append(f"integrity: {amounts}, {integrity['seconds']:.1f} s")
    if summary["round_trip"]:
        parts.append(f"round trip with {summary['source']}: {summary['round_trip']['seconds']:.1f} s")
        parts.append(_errors_table(summary["round_trip"]["tensors"]))
    if summary["logits"]:
        parts.append(f"logits of {many(summary['logits']['tokens'], 'token')}: {summary['logits']['seconds']:.1f} s")
        parts.append(_logits_table(summary["logits"]["comparisons"]))
    count = len(summary["findings"])
    parts.append(Text(many(count, "finding"), style="bold red") if count else Text("nothing wrong", style="bold green"))
    return Group(*parts)


def _errors_table(tensors: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table of errors: a row for each kind of module, with the worst of its layers."""
    table = Table()
    for column in ("module", "tensors", "stored as", "exact", "worst SNR", "worst cosine", "max error"):
        table.add_column(column, justify="left" if column in ("module", "stored as") else "right")
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in tensors:
        kinds.setdefault((row["kind"], row["storage"]), []).append(row)
    for (kind, storage), rows in kinds.items():
        exact = sum(row["exact"] for row in rows)
        noises = [row["snr_db"] for row in rows if row["snr_db"] is not None]
        worst = f"{min(noises):.1f} dB" if noises else "no error"
        cosine, greatest = min(row["cosine"] for row in rows), max(row["max_abs"] for row in rows)
        table.add_row(kind, str(len(rows)), storage, f"{exact} of {len(rows)}", worst, f"{cosine:.6f}", f"{greatest:.3g}")
    return table


def _logits_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table of logits: a row for each model that transformers ran."""
    table = Table()
    for column in ("transformers running", "same first token", "max difference", "KL mean", "KL max", "must be below"):
        table.add_column(column, justify="left" if column.startswith("transformers") else "right")
    for each in comparisons:
        bound = f"{each['bound']:.0e}" if each["bound"] is not None else "-"
        relative = f"{each['max_relative']:.1e} of the largest"
        model = {"source": "the source", "joined ranks": "the ranks' own weights, joined"}[each["against"]]
        table.add_row(model, f"{each['top1_agreement']:.1%}", relative, f"{each['kl_mean']:.2e}", f"{each['kl_max']:.2e}", bound)
    return table
