"""The methods by `method.kind`."""

from collections.abc import Callable
from typing import Any, get_args

from ft_dist.method.full import Full
from ft_dist.method.lora import Lora
from ft_dist.method.protocol import Method

MethodConfig = (
    Full
    | Lora
)  # fmt: skip
"""The config section `method`: one line per method"""

METHODS: dict[str, type[Method]] = {method.model_fields["kind"].default: method for method in get_args(MethodConfig)}
DEFAULT = Lora


def own_options(section: dict[str, Any]) -> dict[str, Any]:
    """`section` with its `kind`, and without options of other methods.

    A recipe still contains them if the command line switches it to another method, and so does a full run's config
    from before each method had separate options.
    """
    section = {"kind": DEFAULT.model_fields["kind"].default, **section}
    method = METHODS.get(section["kind"]) if isinstance(section["kind"], str) else None
    if method is None:
        return section
    foreign = {name for other in METHODS.values() for name in other.model_fields} - set(method.model_fields)
    return {name: value for name, value in section.items() if name not in foreign}


def read_section(section: dict[str, Any], parse: Callable[[dict[str, Any]], Method]) -> Method:
    """Build the method of a config section with `parse`; check the options of other methods and list them in `unused`.

    Raises pydantic.ValidationError for a value that no method would accept.
    """
    own = own_options(section)
    method = parse(own)
    unused = {name: value for name, value in section.items() if name not in own}
    for kind, other in METHODS.items():
        theirs = {name: value for name, value in unused.items() if name in other.model_fields}
        if theirs:
            other.model_validate({"kind": kind, **theirs})
    method._unused = tuple(unused)
    return method
