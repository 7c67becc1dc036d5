"""What a run does with the parts of a multimodal model that are not its text model."""

from pathlib import Path

from ft_dist.engine.step import Engine
from ft_dist.model.facts import model_facts


def other_parts(engine: Engine, folder: str) -> list[str]:
    """A line for the user, or none for a model of text; `ft_dist.check` lists the parts. `folder` holds the base model.

    transformers loads some multimodal models whole, others as their text model alone.
    """
    parts = model_facts(folder).other_parts if Path(folder).is_dir() else {}
    causal_lm = engine.objective.causal_lm
    loaded = {part for name, _ in causal_lm.named_modules() for part in name.split(".")} & parts.keys()
    kept, gone = sorted(loaded), sorted(parts.keys() - loaded)
    lines = []
    if kept:
        what = "has no update for" if engine.config.method.frozen_base else "keeps unchanged:"
        lines.append(f"final/ {what} {', '.join(kept)}")
    if gone:
        lines.append(f"final/ leaves out: {', '.join(gone)} ({type(causal_lm).__name__} is the text model alone)")
    return lines
