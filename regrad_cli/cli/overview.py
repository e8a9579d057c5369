"""What `bank stats` looks like: a picture on a terminal, lines elsewhere, JSON. Knows figures and the terminal only."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from regrad_cli.render import Terminal
from regrad_cli.shown import count, size

COLOURS = {"gradients": "cyan", "embeddings": "green", "text": "yellow", "index": "magenta", "prior": "blue"}
COLOURS |= {"moved": "red"}
Part = tuple[str, int, str, str]  # name, amount, figure, colour
IDENTITY = ("model", "prior", "codec", "embedder")


def stats(terminal: Terminal, values: Mapping[str, Any], beside: Mapping[str, int]) -> None:
    """A bank in figures.

    values, beside  as `Snapshot.stats` and `bank.beside` tell them
    """
    if terminal.json:
        terminal.document({**values, "beside": beside})
    elif terminal.out_is_terminal:
        _picture(terminal, values, beside)
    else:
        _lines(terminal, values)


def _picture(terminal: Terminal, values: Mapping[str, Any], beside: Mapping[str, int]) -> None:
    """Where the bytes are and which passages live, at a glance."""
    path, state = str(values["path"]), f"{values['form']}, snapshot {values['snapshot']}"
    if len(path) + len(state) + 2 > terminal.width:
        terminal.parts((path, "bold"))
        terminal.parts((state, "dim"))
    else:
        terminal.parts((path, "bold"), (f"  {state}", "dim"))
    for line in _filled(_counted(values), terminal.width):
        terminal.text(line)
    passages, tokens = values["passages"], values.get("tokens", 0)
    if passages and tokens:
        mean = passages / values["documents"]
        _wrapped(terminal, f"{mean:,.1f} passages a document, {tokens / passages:,.0f} tokens a passage", "dim")
    terminal.text("")
    terminal.stack(_bytes_by_kind(values))
    states = _passages_by_state(values)
    if len(states) > 1:
        terminal.text("")
        terminal.stack(states)
    dead = values.get("dead", 0)
    drops = f"{count(dead, 'removed passage')} still on disk; `regrad compact` drops them" if dead else ""
    notes = [note for note in (drops, _moving(values), _beside(beside)) if note]
    if notes:
        terminal.text("")
    for note in notes:
        _wrapped(terminal, note, "dim")
    terminal.text("")
    for name in IDENTITY:
        terminal.parts((f"  {name:<9} ", "dim"), (str(values[name]),))


def _bytes_by_kind(values: Mapping[str, Any]) -> list[Part]:
    """What the snapshot's files hold, largest first; what removed passages take of it last, and counted once."""
    removed = values.get("removed_bytes", {"total": 0})
    kinds = [(name, held - removed.get(name, 0)) for name, held in values["bytes"].items() if name != "total"]
    kinds.sort(key=lambda kind: -kind[1])
    parts = [(name, held, size(held), COLOURS[name]) for name, held in kinds]
    return [*parts, ("removed", removed["total"], size(removed["total"]), "dim")]


def _passages_by_state(values: Mapping[str, Any]) -> list[Part]:
    """Live and removed ones; while the bank moves to another prior, of the live ones those that have got there."""
    passages, move = values["passages"], values.get("move")
    states = [("live", passages, "cyan")]
    if move:
        done = min(move["passages"], passages)
        states = [("recomputed", done, "green"), ("stale", passages - done, "yellow")]
    states.append(("removed", values.get("dead", 0), "dim"))
    return [(name, number, f"{number:,}", colour) for name, number, colour in states if number]


def _lines(terminal: Terminal, values: Mapping[str, Any]) -> None:
    """The same for a pipe."""
    terminal.parts((f"{values['path']}  {values['form']}, snapshot {values['snapshot']}",))
    terminal.text(", ".join(_counted(values)))
    dead = values.get("dead") or 0
    if dead:
        terminal.text(f"{count(dead, 'removed passage')} still on disk")
    if values.get("move"):
        terminal.parts((_moving(values),))
    terminal.bars([(name, amount, size(amount)) for name, amount in values["bytes"].items() if name != "total"])
    for name in IDENTITY:
        terminal.parts((f"  {name:<9} {values[name]}",))


def _counted(values: Mapping[str, Any]) -> list[str]:
    parts = [count(values["documents"], "document"), count(values["passages"], "passage")]
    parts.append(size(values["bytes"]["total"]))
    if values.get("bytes_per_passage"):
        parts.append(f"{size(values['bytes_per_passage'])} a passage")
    return parts


def _filled(parts: Sequence[str], width: int) -> list[str]:
    """Parts with commas between them, broken into lines between two of them only."""
    lines = [parts[0]]
    for part in parts[1:]:
        lines[-1] += ","
        if len(lines[-1]) + len(part) + 2 <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return lines


def _moving(values: Mapping[str, Any]) -> str:
    move = values.get("move")
    if not move:
        return ""
    done = f"{move['passages']:,} of {count(values['passages'], 'passage')} computed"
    return f"on the way to prior {move['prior']}: {done}; `regrad ingest --stale` goes on"


def _beside(beside: Mapping[str, int]) -> str:
    """What else lies on the disk."""
    snapshots, own, quarantine = beside["snapshots"], beside["bytes"], beside["quarantine"]
    parts = [f"{count(snapshots, 'other snapshot')} with {size(own)} of their own"] if snapshots else []
    parts += [f"{size(own)} that no snapshot names"] if own and not snapshots else []
    parts += [f"{size(quarantine)} in quarantine"] if quarantine else []
    return f"beside it on disk: {', '.join(parts)}" if parts else ""


def _wrapped(terminal: Terminal, text: str, *styles: str) -> None:
    for line in wrap(text, terminal.width, break_on_hyphens=False):
        terminal.parts((line, *styles))
