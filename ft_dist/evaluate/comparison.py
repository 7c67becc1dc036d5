"""Scores before and after a run side by side, with a few answers."""

from typing import Any

SHOWN = 4
WIDTH = 60


def comparison(before: dict[str, Any] | None, after: dict[str, Any]) -> list[str]:
    """Lines of a table of both scores (from `Scores.to_dict`), and a few answers to the same prompts."""
    lines = [f"{'':12}{'before':>12}{'after':>12}"]
    for name, form in (("loss", "{:.4f}"), ("perplexity", "{:.2f}"), ("accuracy", "{:.1%}")):
        values = [_cell(scores, name, form) for scores in (before, after)]
        if any(value != "-" for value in values):
            lines.append(f"{name:12}" + "".join(f"{value:>12}" for value in values))
    return lines + _answers(before, after)


def _cell(scores: dict[str, Any] | None, name: str, form: str) -> str:
    value = scores.get(name) if scores else None
    return "-" if value is None else form.format(value)


def _answers(before: dict[str, Any] | None, after: dict[str, Any]) -> list[str]:
    lines = []
    earlier = before["examples"] if before else []
    for number, example in enumerate(after["examples"][:SHOWN]):
        lines += ["", f"  {one_line(example['prompt'], WIDTH + 20)}", f"    reference  {example['reference']}"]
        if number < len(earlier):
            lines.append(f"    before     {one_line(earlier[number]['answer'], WIDTH)}")
        lines.append(f"    after      {one_line(example['answer'], WIDTH)}")
    return lines


def one_line(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 3]}..."


def summary_line(scores: dict[str, Any]) -> str:
    """Scores in one line."""
    parts = [f"{key} {scores[key]:.4f}" for key in ("loss", "perplexity") if scores[key] is not None]
    parts = parts or ["loss not finite"]
    if scores.get("accuracy") is not None:
        parts.append(f"accuracy {scores['accuracy']:.1%}")
    return ", ".join(parts)
